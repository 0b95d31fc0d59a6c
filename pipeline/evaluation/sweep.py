"""All thresholds of a score map at once: exact MaxBoxAcc, MaxBoxAccV2 and pixel AUC.

The definition (Choe et al., "Evaluating Weakly Supervised Object Localization Methods Right",
CVPR 2020, and their evaluator): a score map in [0, 1] becomes 256 integer levels; at each of 1000
thresholds the pixels above it are drawn as OpenCV contours, outer borders and borders of holes,
and the box of the largest one (MaxBoxAcc) or the boxes of all of them (V2) are compared with the
true boxes. Only 256 of the thresholds differ, and the contours of neighbouring levels differ
little, so here no contour is drawn at all:

- A hole at level t is a 4-connected component of pixels <= t that does not reach the outside.
  Filling holes commutes with thresholding: one filled map has, at every level, the map's outermost
  8-connected components without their holes.
- An outer contour's area is that of the polygon through its pixels' centres, holes included: over
  the 2 x 2 quads of a filled component, 1 for four pixels and 1/2 for three. The area of a hole's
  contour or of what lies within a hole never exceeds that of the component around it, which OpenCV
  lists before them. So the largest contour is an outermost component. Of equally large ones OpenCV
  lists that first whose first pixel in reading order comes last.
- Components merge as the level falls: one pass over the pixels in descending order gives all of
  them with their boxes and areas (`loops.find_components`). It runs on the filled map (outermost
  contours), on the holes' pixels upside down (holes), and on the part that holes enclose (contours
  in holes).
"""

from dataclasses import dataclass

import numpy as np

from pipeline.evaluation.protocols import IOU_GRID, thresholds


@dataclass(frozen=True, kw_only=True)
class LevelBoxes:
    """Boxes of all contours of a map at all levels. boxes: int32 [C, 4], inclusive pixels of the
    map, a row for each box that a contour has; first, last: int16 [C], its levels, inclusive;
    largest: int32 [256], the row of the largest contour at each level, or -1; maximum: the highest
    level."""

    boxes: np.ndarray
    first: np.ndarray
    last: np.ndarray
    largest: np.ndarray
    maximum: int


def threshold_levels(maximum: int) -> np.ndarray:
    """Return the level of each threshold for a map whose highest level is `maximum`: int64 [T].
    Pixels strictly above that level are drawn. Truncated from the float64 product."""
    return (thresholds() * float(maximum)).astype(np.int64)


def quantize(maps: np.ndarray) -> np.ndarray:
    """Turn scores in [0, 1] into levels: 255 times the score in float64, truncated to uint8. Raises
    ValueError for NaN and for scores outside [0, 1]."""
    scores = np.asarray(maps, np.float64)
    if scores.size and not (scores.min() >= 0 and scores.max() <= 1):
        raise ValueError(
            f"scores from {scores.min():g} to {scores.max():g} in a map that must lie in [0, 1] "
            "without NaN: levels would wrap around; stretch the maps first."
        )
    return (scores * 255).astype(np.uint8)


def stretch(maps: np.ndarray) -> np.ndarray:
    """Stretch each map from 0 to 1: float [B, H, W] -> float64 [B, H, W]. A flat map becomes zeros.
    Raises ValueError for NaN and infinite values."""
    scores = np.asarray(maps, np.float64)
    lowest = scores.min(axis=(1, 2), keepdims=True)
    spread = scores.max(axis=(1, 2), keepdims=True) - lowest
    if not np.isfinite(spread).all():
        bad = np.flatnonzero(~np.isfinite(spread.ravel())).tolist()
        raise ValueError(
            f"maps {bad} of the batch have NaN or infinite values, so they cannot be stretched; "
            "check the net that made them."
        )
    return (scores - lowest) / np.where(spread > 0, spread, 1.0)


def _framed(levels: np.ndarray) -> np.ndarray:
    """Put a map within a frame of zeros, its rows padded to a power of two."""
    height, width = levels.shape
    framed = np.zeros((height + 2, 1 << (width + 1).bit_length()), np.uint8)
    framed[1 : height + 1, 1 : width + 1] = levels
    return framed


def _basins(holes: np.ndarray, map_size: int) -> np.ndarray:
    """Return where contours in holes can be: boxes of the holes with room for one, or a box
    around them all if that has fewer pixels."""
    roomy = holes[(holes[:, 2:] - holes[:, :2] >= 2).all(axis=1)]
    if (roomy[:, 2:] - roomy[:, :2] + 1).prod(axis=1).sum() <= map_size:
        return roomy
    return np.concatenate([roomy[:, :2].min(axis=0), roomy[:, 2:].max(axis=0)])[None]


def level_boxes(levels: np.ndarray) -> LevelBoxes:
    """Find every contour's box at every level, exactly as OpenCV's contours at each level. levels:
    uint8 [H, W]. A hole's box includes the pixels around the hole, on which its contour lies.
    Raises ValueError for other arrays."""
    if levels.dtype != np.uint8 or levels.ndim != 2 or not levels.size:
        raise ValueError(
            f"levels are {levels.dtype} {list(levels.shape)}; they must be uint8 [H, W] with at "
            "least one pixel; use quantize on each map."
        )
    from pipeline.evaluation import loops  # here: numba takes a while, and boxes alone need none

    framed = _framed(levels)
    filled = loops.fill_holes(framed)
    outer = loops.find_components(filled, loops.JOINS_8, loops.GAINS)
    parts = [(outer.boxes, outer.first, outer.last)]
    in_holes = filled > framed
    if in_holes.any():
        upside_down = np.where(in_holes, ~framed, np.uint8(0))
        holes = loops.find_components(upside_down, loops.JOINS_4, loops.GAINS)
        # Below the level of the filled map the hole is part of the outside.
        last = np.minimum(254 - holes.first, filled.ravel()[holes.pixel].astype(np.int16) - 1)
        around = holes.boxes + np.array([-1, -1, 1, 1], np.int32)
        parts.append((around, 254 - holes.last, last))
        basins = _basins(holes.boxes[holes.first == 0], levels.size)
        if len(basins):
            parts += loops.find_enclosed(levels, basins, loops.JOINS_8, loops.GAINS)
    boxes, first, last = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    maximum = int(levels.max())
    return LevelBoxes(boxes=boxes, first=first, last=last, largest=outer.largest, maximum=maximum)


def level_ious(
    contours: LevelBoxes, boxes: np.ndarray, truths: np.ndarray, plus: int, empty: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the IoU with the best of the truths [T, 4] at each level, of the largest contour's box
    and the best of all: float64 [256] each. boxes: [C, 4] in the truths' coordinates; empty: [4],
    the box for a level without contours."""
    from pipeline.evaluation import loops  # here: see `level_boxes`

    return loops.level_ious(
        np.ascontiguousarray(boxes, np.float64),
        contours.first,
        contours.last,
        contours.largest,
        np.ascontiguousarray(truths, np.float64),
        plus,
        np.ascontiguousarray(empty, np.float64),
    )


def add_counts(counts: np.ndarray, ious: np.ndarray, levels: np.ndarray) -> None:
    """Count one image in place: at each threshold, how many IoUs of IOU_GRID its own reaches.
    counts: int64 [T, 20]; ious: float64 [256], by level; levels: int [T], `threshold_levels`."""
    from pipeline.evaluation import loops  # here: see `level_boxes`

    loops.add_counts(counts, ious, levels, IOU_GRID)


def pixel_auc(levels: np.ndarray, inside: np.ndarray) -> float:
    """Return the probability that a pixel inside scores above one outside, ties counted half, from
    integer counts. levels: uint8 [H, W]; inside: bool [H, W]. NaN where either is empty."""
    from pipeline.evaluation import loops  # here: see `level_boxes`

    outside, within = loops.histograms(levels, inside)
    pairs = int(outside.sum()) * int(within.sum())
    if not pairs:
        return float("nan")
    below = np.cumsum(outside) - outside
    return int((within * (2 * below + outside)).sum()) / (2 * pairs)


def pixel_auc_boxes(levels: np.ndarray, boxes: np.ndarray) -> float:
    """Return `pixel_auc` of the union of boxes: int [T, 4], inclusive pixels within the map."""
    inside = np.zeros(levels.shape, bool)
    for x0, y0, x1, y1 in boxes.tolist():
        inside[y0 : y1 + 1, x0 : x1 + 1] = True
    return pixel_auc(levels, inside)
