"""Boxes that ignore the image: the whole image and the best centred box."""

import math
from collections.abc import Sequence

import numpy as np

from pipeline.evaluation.protocols import IOU_THRESHOLD, box_area

GRID = np.arange(1, 41) / 40  # shares of a side that the search tries
MAX_FIT_IMAGES = 20_000
HALF_AREA = (math.sqrt(0.5), math.sqrt(0.5))  # a centred box of half the image's area


def whole_image_boxes(sizes: np.ndarray) -> np.ndarray:
    """Return the box that covers each image: integer [N, 2] -> int64 [N, 4]."""
    return centred_boxes(sizes, (1.0, 1.0))


def centred_boxes(sizes: np.ndarray, shares: tuple[float, float]) -> np.ndarray:
    """Return a centred box in each image: integer [N, 2] -> int64 [N, 4]. shares: its (height,
    width) as shares of the image's, in (0, 1]. An odd margin's extra pixel lies right and below."""
    extent = np.maximum(np.rint(sizes * np.array(shares)), 1).astype(np.int64)
    first = (sizes - extent) // 2
    return np.concatenate([first[:, ::-1], (first + extent - 1)[:, ::-1]], axis=1)


def _overlaps(
    sizes: np.ndarray, low: np.ndarray, high: np.ndarray, axis: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return along one axis (0: y, 1: x), for each share of GRID and each truth, the extent of the
    centred box and the pixels it shares with the truth; int64 [len(GRID), M] each."""
    extents, shared = [], []
    for share in GRID:
        boxes = centred_boxes(sizes, (share, share))
        start, stop = boxes[:, 1 - axis], boxes[:, 3 - axis]
        extents.append(stop - start + 1)
        shared.append(np.clip(np.minimum(stop, high) - np.maximum(start, low) + 1, 0, None))
    return np.stack(extents), np.stack(shared)


def fit_centred_box(
    sizes: np.ndarray, truths: Sequence[Sequence[Sequence[int]]]
) -> tuple[float, float] | None:
    """Find the (height, width) shares, of 1/40, 2/40 ... 1, whose centred box has the best GT-known
    localization on at most 20,000 images spread over the set; of equally good ones the smallest
    height, then width. None where no box is known. sizes: integer [N, 2]."""
    usable = [i for i, boxes in enumerate(truths) if boxes]
    if not usable:
        return None
    usable = usable[:: -(-len(usable) // MAX_FIT_IMAGES)]
    flat = np.array([box for i in usable for box in truths[i]], np.int64)
    amounts = np.array([len(truths[i]) for i in usable])
    starts = np.cumsum(amounts) - amounts
    sizes_m = np.repeat(sizes[usable], amounts, axis=0)
    heights, shared_y = _overlaps(sizes_m, flat[:, 1], flat[:, 3], axis=0)
    widths, shared_x = _overlaps(sizes_m, flat[:, 0], flat[:, 2], axis=1)
    truth_areas = box_area(flat)
    hits = np.zeros((len(GRID), len(GRID)), np.int64)
    for i in range(len(GRID)):
        intersection = shared_y[i] * shared_x  # [widths, M]
        union = heights[i] * widths + truth_areas - intersection
        right = intersection >= IOU_THRESHOLD * union
        hits[i] = np.logical_or.reduceat(right, starts, axis=1).sum(axis=1)
    best = np.unravel_index(int(hits.argmax()), hits.shape)
    return float(GRID[best[0]]), float(GRID[best[1]])
