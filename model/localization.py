"""From a map of probabilities to a box (paper, section 3.2 and figure 3).

Boxes are [x0, y0, x1, y1] in inclusive integer pixels: a box of one pixel has x0 = x1.
"""

from collections.abc import Callable

import cv2
import numpy as np

MEAN_WEIGHT, MAX_WEIGHT = 0.7, 0.3
KEPT_SHARE = 0.35  # of the pixels lies above the "quantile" rule's threshold
# Sums of float32 values over superpixels leave about this much noise on a map without content.
FLAT = 1e-5


def adaptive_threshold(values: np.ndarray) -> float:
    """Return 0.7 mean + 0.3 max of a map, in float64 (paper, section 3.2)."""
    mean = mean_threshold(values)
    # Written so that a constant map's threshold is exactly its value.
    return mean + MAX_WEIGHT * (float(values.max()) - mean)


def mean_threshold(values: np.ndarray) -> float:
    """Return the mean of a map, in float64."""
    return float(values.mean(dtype=np.float64))


def quantile_threshold(values: np.ndarray) -> float:
    """Return the value that 0.35 of a map's pixels exceed, fewer where values are equal.

    Where more of them are at the maximum, it is the largest value below, so that those exceed it.
    """
    index = values.size - int(KEPT_SHARE * values.size) - 1
    threshold = np.partition(values, index, axis=None)[index]
    if threshold == values.max():
        threshold = values[values < threshold].max()
    return float(threshold)


# Scaling or shifting a map moves no rule's box, so a map need not lie in [0, 1].
RULES: dict[str, Callable[[np.ndarray], float]] = {
    "paper": adaptive_threshold,
    "mean": mean_threshold,
    "quantile": quantile_threshold,
}
RULE_TEXTS = {
    "paper": f"threshold {MEAN_WEIGHT} mean + {MAX_WEIGHT} max",
    "mean": "threshold at the mean",
    "quantile": f"threshold that {KEPT_SHARE} of the pixels exceed",
}


def map_box(values: np.ndarray, rule: str = "paper") -> np.ndarray | None:
    """Return the box of the largest 8-connected component strictly above the threshold of a rule.

    values: float [H, W]; rule: a name of RULES. Returns int64 [4], None for a flat map (the same
    value everywhere, up to rounding). Of components with equally many pixels the topmost wins,
    then the leftmost. Raises ValueError for NaN or infinite values.
    """
    if not np.isfinite(values).all():
        raise ValueError(
            f"a map of {values.shape[0]} x {values.shape[1]} pixels holds NaN or infinite values: "
            "the net that made it has diverged; train it again."
        )
    if float(values.max()) - adaptive_threshold(values) <= FLAT * float(np.abs(values).max()):
        return None
    above = (values > RULES[rule](values)).astype(np.uint8)
    stats = cv2.connectedComponentsWithStats(above, connectivity=8)[2][1:].tolist()
    x, y, width, height, _ = min(stats, key=lambda s: (-s[4], s[1], s[0], s[3], s[2]))
    return np.array([x, y, x + width - 1, y + height - 1], np.int64)


def localize(maps: np.ndarray, rule: str = "paper") -> tuple[np.ndarray, np.ndarray]:
    """Return `map_box` of each map: float [B, H, W] -> boxes int64 [B, 4], found bool [B].

    A flat map says nothing about where the object is: its box is the whole map, `found` False.
    """
    height, width = maps.shape[1:]
    boxes = np.tile(np.array([0, 0, width - 1, height - 1], np.int64), (len(maps), 1))
    found = np.zeros(len(maps), bool)
    for i, values in enumerate(maps):
        box = map_box(values, rule)
        if box is not None:
            boxes[i], found[i] = box, True
    return boxes, found
