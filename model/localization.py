"""From a map of probabilities to a box (paper, section 3.2 and figure 3). Boxes are [x0, y0, x1,
y1] in inclusive integer pixels: a box of one pixel has x0 = x1."""

from collections.abc import Callable, Sequence
from typing import Literal

import cv2
import numpy as np

Rule = Literal["paper", "mean", "otsu", "medoid"]
MEAN_WEIGHT, MAX_WEIGHT = 0.7, 0.3
OTSU_LEVELS = 256
MEDOID_SHARES = np.arange(6, 17) / 20  # 0.3, 0.35 ... 0.8 of the way from minimum to maximum
# Sums of float32 values over superpixels leave about this much noise on a map without content;
# below the normal range of float32 thresholds between two values do not exist.
FLAT, TINY = 1e-5, float(np.finfo(np.float32).tiny)


def adaptive_threshold(values: np.ndarray) -> float:
    """Return 0.7 mean + 0.3 max of a map, in float64 (paper, section 3.2)."""
    mean = mean_threshold(values)
    # Written so that a constant map's threshold is exactly its value.
    return mean + MAX_WEIGHT * (float(values.max()) - mean)


def mean_threshold(values: np.ndarray) -> float:
    """Return the mean of a map, in float64."""
    return float(values.mean(dtype=np.float64))


def otsu_threshold(values: np.ndarray) -> float:
    """Return the largest value of the lower class where the between-class variance is largest (Otsu
    1979). The values, not all equal, are read as 256 levels from minimum to maximum; of equal
    variances the lowest cut wins."""
    low, high = float(values.min()), float(values.max())
    levels = np.minimum((values - low) / (high - low) * OTSU_LEVELS, OTSU_LEVELS - 1)
    levels = levels.astype(np.uint8)
    counts = np.bincount(levels.ravel(), minlength=OTSU_LEVELS)
    below = counts.cumsum()[:-1]
    sums = (counts * np.arange(OTSU_LEVELS)).cumsum()
    # Differences of the classes' means times their sizes, as integers: equal variances stay equal.
    differences = (sums[:-1] * values.size - sums[-1] * below).astype(np.float64)
    cut = np.argmax(differences**2 / (below * (values.size - below)))
    return float(values[levels <= cut].max())


def medoid_thresholds(values: np.ndarray) -> list[float]:
    """Return the thresholds at 0.3, 0.35 ... 0.8 of the way from a map's minimum to its maximum."""
    low, high = float(values.min()), float(values.max())
    return (low + MEDOID_SHARES * (high - low)).tolist()


# The thresholds of a map, in ascending order. Scaling or shifting a map moves no rule's box, so a
# map need not lie in [0, 1].
RULES: dict[Rule, Callable[[np.ndarray], list[float]]] = {
    "paper": lambda values: [adaptive_threshold(values)],
    "mean": lambda values: [mean_threshold(values)],
    "otsu": lambda values: [otsu_threshold(values)],
    "medoid": medoid_thresholds,
}
RULE_TEXTS: dict[Rule, str] = {
    "paper": f"threshold {MEAN_WEIGHT} mean + {MAX_WEIGHT} max",
    "mean": "threshold at the mean",
    "otsu": "Otsu's threshold of the map",
    "medoid": "of the boxes at 0.3, 0.35 ... 0.8 of the range, the closest to the others",
}


def map_boxes(values: np.ndarray, rules: Sequence[Rule]) -> list[np.ndarray] | None:
    """Return, by each rule, the box of the largest 8-connected component strictly above the rule's
    threshold, or of the boxes of several thresholds the medoid. values: float [H, W]. Boxes are
    int64 [4]; None for a flat map. Of equal components the topmost wins, then the leftmost. Raises
    ValueError for values that are not finite."""
    if not np.isfinite(values).all():
        raise ValueError(
            f"a map of {values.shape[0]} x {values.shape[1]} pixels holds NaN or infinite values: "
            "the net that made it has diverged; train it again."
        )
    scale = float(np.abs(values).max())
    if float(values.max()) - adaptive_threshold(values) <= FLAT * scale + TINY:
        return None
    boxes: dict[int, np.ndarray] = {}  # by the number of pixels above: equal numbers, equal pixels
    chosen = []
    for rule in rules:
        counts = []
        for threshold in RULES[rule](values):
            above = (values > threshold).view(np.uint8)
            counts.append(cv2.countNonZero(above))
            if counts[-1] not in boxes:
                boxes[counts[-1]] = _largest_component(above)
        several = len(set(counts)) > 1
        chosen.append(medoid(np.stack([boxes[n] for n in counts])) if several else boxes[counts[0]])
    return chosen


def map_box(values: np.ndarray, rule: Rule = "paper") -> np.ndarray | None:
    """Return the box, int64 [4], of `map_boxes` by one rule."""
    boxes = map_boxes(values, (rule,))
    return None if boxes is None else boxes[0]


def _largest_component(above: np.ndarray) -> np.ndarray:
    """Return the box of the largest component: uint8 [H, W] of 0 and 1, not all 0 -> int64 [4]."""
    left, top, width, height = cv2.boundingRect(above)
    part = above[top : top + height, left : left + width]
    stats = cv2.connectedComponentsWithStats(part, connectivity=8)[2][1:].tolist()
    x, y, width, height, _ = min(stats, key=lambda s: (-s[4], s[1], s[0], s[3], s[2]))
    x, y = x + left, y + top
    return np.array([x, y, x + width - 1, y + height - 1], np.int64)


def medoid(boxes: np.ndarray) -> np.ndarray:
    """Return the first box of the largest mean IoU with the others: int64 [N, 4] -> [4]."""
    ious = box_ious(boxes[:, None], boxes[None])
    return boxes[ious.mean(axis=1).round(12).argmax()]  # rounded: equal means stay equal


def box_ious(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the IoU of boxes with each other: int64 [..., 4] each -> float64 [...]."""
    low = np.maximum(first[..., :2], second[..., :2])
    high = np.minimum(first[..., 2:], second[..., 2:])
    shared = np.maximum(high - low + 1, 0).prod(axis=-1)
    areas = [(boxes[..., 2:] - boxes[..., :2] + 1).prod(axis=-1) for boxes in (first, second)]
    return shared / (areas[0] + areas[1] - shared)


def localize_by(maps: np.ndarray, rules: Sequence[Rule]) -> tuple[np.ndarray, np.ndarray]:
    """Return `map_boxes` of each map: float [B, H, W] -> boxes int64 [R, B, 4] by rule, found bool
    [B]. The box of a flat map is the whole map, `found` False."""
    height, width = maps.shape[1:]
    whole = np.array([0, 0, width - 1, height - 1], np.int64)
    boxes = np.tile(whole, (len(rules), len(maps), 1))
    found = np.zeros(len(maps), bool)
    for i, values in enumerate(maps):
        own = map_boxes(values, rules)
        if own is not None:
            boxes[:, i], found[i] = own, True
    return boxes, found


def localize(maps: np.ndarray, rule: Rule = "paper") -> tuple[np.ndarray, np.ndarray]:
    """Return the boxes, int64 [B, 4], and found, bool [B], of `localize_by` one rule."""
    (boxes,), found = localize_by(maps, (rule,))
    return boxes, found
