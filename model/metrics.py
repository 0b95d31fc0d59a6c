"""Boxes and classes -> named figures, equal to the last digit for any sharding.

Every figure is an integer count over an integer number of images, but for the mean IoU, whose
sum is rounded once. Protocol "devkit": inclusive pixels (a box from x0 to x1 is x1 - x0 + 1
wide), the best IoU over all boxes of an image counts, right from 0.5 on.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

PROTOCOL = "devkit"
IOU_THRESHOLD = 0.5
REPLICATES = 1000
CONFIDENCE = 0.95
_CHUNK = 2**22  # resampled values in memory at once
_IOU_STEP = 2.0**-30  # resampled IoUs are multiples of this: their sums are exact in any order


def iou(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Intersection over union of inclusive integer boxes: [..., 4] and [..., 4] -> float64 [...].

    In [0, 1]. Areas are integers and the quotient is rounded once, so comparing it with 0.5 is
    exact.
    """
    a, b = np.asarray(boxes, np.int64), np.asarray(others, np.int64)
    low, high = np.maximum(a[..., :2], b[..., :2]), np.minimum(a[..., 2:], b[..., 2:])
    intersection = np.clip(high - low + 1, 0, None).prod(axis=-1)
    return intersection / (box_area(a) + box_area(b) - intersection)


def box_area(boxes: np.ndarray) -> np.ndarray:
    """Pixels in inclusive integer boxes: [..., 4] -> int64 [...]."""
    return (boxes[..., 2:] - boxes[..., :2] + 1).prod(axis=-1)


def best_iou(boxes: np.ndarray, truths: Sequence[Sequence[Sequence[int]]]) -> np.ndarray:
    """The largest IoU of each box with its image's ground-truth boxes.

    boxes: integer [N, 4]; truths: for each image its boxes, possibly none. Returns float64 [N]
    in [0, 1], NaN where an image has no known box.
    """
    owners = np.repeat(np.arange(len(truths)), [len(t) for t in truths])
    flat = np.array([box for t in truths for box in t], np.int64).reshape(-1, 4)
    best = np.full(len(truths), np.nan)
    np.fmax.at(best, owners, iou(boxes[owners], flat))
    return best


def figures(ious: np.ndarray, class_right: np.ndarray) -> dict[str, Any]:
    """The figures of one method on one set of images; fractions in [0, 1].

    ious: float64 [N], NaN where no box is known; class_right: bool [N], whether the top class is
    the label. Returns
      gt_known: share of images with IoU >= 0.5, the class given, of those with known boxes;
      top1_loc: share with that and the top class right (the paper's metrics 1 and 2, by whose
        class it is), of the same;
      top1_cls: share with the top class right, of all images;
      mean_iou: of those with known boxes;
      n: images with known boxes; counts: the integers behind the shares.
    A share of no images is None.
    """
    known = ~np.isnan(ious)
    right_box = known & (np.nan_to_num(ious) >= IOU_THRESHOLD)
    n = int(known.sum())
    counts = {
        "images": len(ious),
        "with_boxes": n,
        "gt_known": int(right_box.sum()),
        "top1_loc": int((right_box & class_right).sum()),
        "top1_cls": int(class_right.sum()),
    }
    return {
        "gt_known": counts["gt_known"] / n if n else None,
        "top1_loc": counts["top1_loc"] / n if n else None,
        "top1_cls": counts["top1_cls"] / len(ious) if len(ious) else None,
        "mean_iou": math.fsum(ious[known]) / n if n else None,
        "n": n,
        "counts": counts,
    }


def class_figures(
    ious: np.ndarray, class_right: np.ndarray, labels: np.ndarray, classes: int
) -> list[dict[str, Any]]:
    """`figures` of the images of each class, in index order; labels: integer [N]."""
    order = np.argsort(labels, kind="stable")
    edges = np.searchsorted(labels[order], np.arange(classes + 1))
    parts = [order[edges[i] : edges[i + 1]] for i in range(classes)]
    return [figures(ious[part], class_right[part]) for part in parts]


def bootstrap_intervals(values: np.ndarray, seed: int) -> np.ndarray:
    """95 % percentile bootstrap intervals of the column means of `values`.

    values: float64 [N, F], one row an image, in [0, 1]; all columns are resampled together, 1000
    times. Returns float64 [F, 2], low and high; NaN where N is 0. The same rows in the same
    order and the same seed give the same intervals, to the last digit.
    """
    n, columns = values.shape
    if n == 0:
        return np.full((columns, 2), np.nan)
    exact = np.round(values / _IOU_STEP)
    rng = np.random.default_rng(seed)
    chunk = max(1, _CHUNK // n)
    means = []
    for start in range(0, REPLICATES, chunk):
        size = min(chunk, REPLICATES - start)
        drawn = rng.integers(0, n, (size, n)) + np.arange(size)[:, None] * n
        weights = np.bincount(drawn.ravel(), minlength=size * n).reshape(size, n)
        means.append(weights.astype(np.float64) @ exact / n * _IOU_STEP)
    tail = (1 - CONFIDENCE) / 2
    return np.quantile(np.concatenate(means), [tail, 1 - tail], axis=0).T


def intervals(
    methods: dict[str, tuple[np.ndarray, np.ndarray]], seed: int
) -> dict[str, dict[str, list[float] | None]]:
    """The bootstrap interval of every figure of every method, [low, high] or None for no images.

    methods: name -> (ious, class_right) as in `figures`, over the same images with the same known
    boxes. Figures on images with known boxes and those on all images are resampled apart.
    """
    if not methods:
        return {}
    known = ~np.isnan(next(iter(methods.values()))[0])
    columns = []
    for ious, right in methods.values():
        hit = ious[known] >= IOU_THRESHOLD
        columns += [hit, hit & right[known], ious[known]]
    boxed = bootstrap_intervals(np.stack(columns, axis=1).astype(np.float64), seed)
    rights = np.stack([right for _, right in methods.values()], axis=1)
    classed = bootstrap_intervals(rights.astype(np.float64), seed)
    result = {}
    for i, name in enumerate(methods):
        rows = dict(
            zip(("gt_known", "top1_loc", "mean_iou"), boxed[3 * i : 3 * i + 3], strict=True)
        )
        rows["top1_cls"] = classed[i]
        result[name] = {
            figure: None if np.isnan(row).any() else [float(row[0]), float(row[1])]
            for figure, row in rows.items()
        }
    return result


def top_k(predicted: np.ndarray, labels: np.ndarray, k: int) -> float | None:
    """Share of images whose label is among the first `k` predicted classes.

    predicted: integer [N, K], best first; labels: integer [N]. None for no images.
    """
    if not len(labels):
        return None
    return int((predicted[:, :k] == labels[:, None]).any(axis=1).sum()) / len(labels)
