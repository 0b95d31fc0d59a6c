"""The protocols under which boxes [x0, y0, x1, y1] are compared: coordinates, IoU and
thresholds."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How boxes are compared. plus: added to x1 - x0 and y1 - y0, 1 where coordinates are
    inclusive pixels. text: the protocol in words."""

    plus: int
    text: str


SIDE = 224  # of the square to which "int224" carries every image
PROTOCOLS = {
    "devkit": Protocol(
        plus=1, text="original pixels, inclusive, widths + 1: the ILSVRC development kit's rule"
    ),
    "exclusive": Protocol(plus=0, text="original pixels, edges of boxes, no + 1"),
    "int224": Protocol(
        plus=1,
        text="images carried to 224 x 224, the truth truncated to whole pixels, widths + 1: "
        "as wsolevaluation does",
    ),
}
IOU_THRESHOLD = 0.5  # from which a box is right
IOU_GRID = np.arange(1, 20) / 20  # correctly rounded, so 6 / 20 is the float 0.3
V2_IOUS = (0.3, 0.5, 0.7)  # of MaxBoxAccV2
THRESHOLD_STEP = 0.001
TOP = 5  # classes or guesses of an image that count


def thresholds(step: float = THRESHOLD_STEP) -> np.ndarray:
    """Return the thresholds of score maps, as shares of the maximum: 0, step ... below 1."""
    return np.arange(0, 1, step)


def box_area(boxes: np.ndarray, plus: int = 1) -> np.ndarray:
    """Count the pixels in boxes: [..., 4] -> [...]."""
    return (boxes[..., 2] - boxes[..., 0] + plus) * (boxes[..., 3] - boxes[..., 1] + plus)


def iou(boxes: np.ndarray, others: np.ndarray, plus: int = 1) -> np.ndarray:
    """Return intersection over union: [..., 4] and [..., 4] -> float64 [...]. Rounded once for
    integer boxes, so comparing with 0.5 is exact. 0 where both are empty."""
    width, height = (
        np.minimum(boxes[..., axis + 2], others[..., axis + 2])
        - np.maximum(boxes[..., axis], others[..., axis])
        + plus
        for axis in (0, 1)
    )
    intersection = np.maximum(width, 0) * np.maximum(height, 0)
    union = box_area(boxes, plus) + box_area(others, plus) - intersection
    return np.divide(intersection, union, out=np.zeros(union.shape), where=union > 0)


def truth_boxes(boxes: np.ndarray, sizes: np.ndarray, protocol: str) -> np.ndarray:
    """Read boxes [M, 4] in original pixels as the protocol does. sizes: integer [M, 2]."""
    if protocol != "int224":
        return boxes
    sides = np.tile(sizes[:, ::-1], 2).astype(np.float64)
    return (boxes.astype(np.float64) * SIDE / sides).astype(np.int64)


def own_boxes(boxes: np.ndarray, grid: np.ndarray, sizes: np.ndarray, protocol: str) -> np.ndarray:
    """Carry our boxes, in inclusive pixels of a map or image, to the protocol's coordinates:
    integer [N, 4] -> int64 [N, 4]. grid, sizes: (height, width) or [N, 2], from and of the
    originals."""
    if protocol == "int224":
        edges = scale_boxes(boxes, grid, np.array([SIDE, SIDE])) + np.array([0, 0, 1, 1])
        return np.minimum(edges, SIDE - 1)
    inclusive = scale_boxes(boxes, grid, sizes)
    return inclusive + np.array([0, 0, 1, 1]) if protocol == "exclusive" else inclusive


def best_iou(
    boxes: np.ndarray, truths: np.ndarray, starts: np.ndarray, plus: int = 1
) -> np.ndarray:
    """Return the largest IoU of each box [N, 4] with its image's truths[starts[i]:starts[i + 1]]:
    float64 [N], NaN where there is none."""
    owners = np.repeat(np.arange(len(boxes)), np.diff(starts))
    best = np.full(len(boxes), np.nan)
    np.fmax.at(best, owners, iou(boxes[owners], truths, plus))
    return best


def scale_boxes(
    boxes: np.ndarray, stored: np.ndarray | tuple[int, int], sizes: np.ndarray
) -> np.ndarray:
    """Scale boxes, integer [N, 4], from pixels of (height, width) `stored` to pixels of `sizes`,
    either one pair or [N, 2]: int64 [N, 4]. Edges of pixels are rounded to the nearest edge in
    integers, so the whole image stays whole; a box keeps at least one pixel."""
    from_size = np.asarray(stored, np.int64)[..., ::-1]
    to_size = np.asarray(sizes, np.int64)[..., ::-1]

    def edge(position: np.ndarray) -> np.ndarray:
        return (2 * position * to_size + from_size) // (2 * from_size)

    first = np.minimum(edge(boxes[:, :2].astype(np.int64)), to_size - 1)
    last = np.maximum(edge(boxes[:, 2:].astype(np.int64) + 1) - 1, first)
    return np.concatenate([first, last], axis=1)
