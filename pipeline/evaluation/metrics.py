"""Boxes and classes -> named figures, equal to the last digit for any sharding.

Every share is an integer count over an integer number of images; sums of fractions (mean IoU,
AUC) are rounded once. docs/formats.md says in words what each figure means.
"""

import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import binom

from pipeline.evaluation.protocols import IOU_GRID, IOU_THRESHOLD, V2_IOUS, box_area, thresholds

REPLICATES = 1000
CONFIDENCE = 0.95
SMALL = 0.5  # of the image: a largest box below it makes the image one of "small_boxes"
OFF_CENTRE = 0.125  # of the side: boxes whose centres all lie farther from the image's, in x or y
SUBSETS = {
    "small_boxes": "the largest true box covers less than half of the image",
    "off_centre": "every true box's centre is more than an eighth of the side from the image's",
}
SUBSET_GROUPS = {"small_boxes": [1, 3], "off_centre": [2, 3]}  # of Sweep's first axis
SHARES = ("gt_known", "top1_loc", "top5_loc", "max_box_acc", "top1_cls", "top5_cls")
SIZE_EDGES = (0.0, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 1.0)  # shares of the image
ERRORS = (
    "right",
    "class_wrong",
    "several_instances",
    "too_small",
    "too_large",
    "elsewhere",
    "nothing_found",
)
CURVE_STEP = 10  # every tenth threshold of the sweep is drawn
_SEVERAL, _INSIDE, _COVERED = 0.3, 0.5, 0.7
_CHUNK = 2**22  # resampled values in memory at once
_STEP = 2.0**-30  # resampled fractions are multiples of this: their sums are exact in any order


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Counts of one method's maps over all thresholds, see `model.sweep.add_counts`.

    largest, contours: int64 [4, T, 20], by the largest contour alone and by the best of all; the
    first axis is 1 for small boxes plus 2 for off-centre ones (see SUBSETS).
    """

    largest: np.ndarray
    contours: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Outcomes:
    """What one method says of each image.

    ious: float64 [N] with the best true box, NaN where none is known. errors: int [N], places in
    ERRORS, meaningless where no box is known. top1, top5: bool [N], whether the label is the
    first, or among the first five, of its classes. top5_right: bool [N], whether one of its (at
    most five) guesses has the label and a right box. auc, auc_other: float64 [N], see
    `model.sweep.pixel_auc`, against the own and another image's boxes; NaN where undefined.
    None: not known of this method.
    """

    ious: np.ndarray
    errors: np.ndarray
    top1: np.ndarray | None = None
    top5: np.ndarray | None = None
    top5_right: np.ndarray | None = None
    auc: np.ndarray | None = None
    auc_other: np.ndarray | None = None
    sweep: Sweep | None = None


def subset_masks(boxes: np.ndarray, starts: np.ndarray, sizes: np.ndarray) -> dict[str, np.ndarray]:
    """The images of each of SUBSETS: bool [N] by name. An image without boxes is in none.

    boxes: [M, 4] inclusive original pixels, image by image; starts: int64 [N + 1]; sizes: integer
    [N, 2], (height, width).
    """
    owners = np.repeat(np.arange(len(sizes)), np.diff(starts))
    sides = sizes[owners][:, ::-1]
    known = np.diff(starts) > 0
    offsets = np.abs((boxes[:, :2] + boxes[:, 2:] + 1) / (2 * sides) - 0.5)
    centred = np.zeros(len(sizes), bool)
    centred[owners[(offsets <= OFF_CENTRE).all(axis=1)]] = True
    return {
        "small_boxes": known & (largest_shares(boxes, starts, sizes) < SMALL),
        "off_centre": known & ~centred,
    }


def largest_shares(boxes: np.ndarray, starts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """The share of the image that its largest box covers: float64 [N], 0 where none is known."""
    owners = np.repeat(np.arange(len(sizes)), np.diff(starts))
    shares = np.zeros(len(sizes))
    np.maximum.at(shares, owners, box_area(boxes) / sizes[owners].prod(axis=1))
    return shares


def error_kinds(
    boxes: np.ndarray,
    found: np.ndarray,
    right: np.ndarray,
    class_right: np.ndarray | None,
    truths: np.ndarray,
    starts: np.ndarray,
) -> np.ndarray:
    """Why each image is wrong: places in ERRORS, int64 [N]. The first that holds of

    right: the box is right, and the class where one is given; class_wrong: only the box is;
    nothing_found: the map had no content; several_instances: the box covers over .3 of each of two
    or more true boxes; too_small: over half of the box lies in a true box; too_large: over .7 of
    a true box lies in it; elsewhere. (The split of the weakly supervised localization literature,
    but for the class, which is asked last: so the others are the errors of GT-known localization.)

    boxes: [N, 4] and truths: [M, 4], inclusive pixels; found, right (IoU), class_right: bool [N].
    """
    owners = np.repeat(np.arange(len(boxes)), np.diff(starts))
    mine = boxes[owners]
    low, high = np.maximum(mine[:, :2], truths[:, :2]), np.minimum(mine[:, 2:], truths[:, 2:])
    shared = np.clip(high - low + 1, 0, None).prod(axis=1)
    covered, inside = shared / box_area(truths), shared / box_area(mine)

    def holds(of_pairs: np.ndarray, at_least: int = 1) -> np.ndarray:
        return np.bincount(owners[of_pairs], minlength=len(boxes)) >= at_least

    wrong_class = np.zeros(len(boxes), bool) if class_right is None else ~class_right
    conditions = {
        "class_wrong": right & wrong_class,
        "right": right,
        "nothing_found": ~found,
        "several_instances": holds(covered > _SEVERAL, 2),
        "too_small": holds(inside > _INSIDE),
        "too_large": holds(covered > _COVERED),
    }
    places = [ERRORS.index(name) for name in conditions]
    return np.select(list(conditions.values()), places, ERRORS.index("elsewhere"))


def _mean(values: np.ndarray | None) -> float | None:
    """Mean of the defined values, None without any."""
    if values is None:
        return None
    defined = values[~np.isnan(values)]
    return math.fsum(defined) / len(defined) if len(defined) else None


def _share(count: int | None, n: int) -> float | None:
    return count / n if n and count is not None else None


def figures(outcomes: Outcomes, rows: np.ndarray | None = None) -> dict[str, Any]:
    """The figures of one method on the images number `rows` (int [n], default all); fractions.

    gt_known: share of images with known boxes whose box has IoU >= 0.5 with one of them;
    top1_loc: share with that and the label as top class (the paper's metrics 1 and 2, by whose
      class it is); top5_loc: the label and a right box in one of five guesses (the complement of
      the official ILSVRC error);
    top1_cls, top5_cls: share of all images with the label first, among the first five;
    mean_iou: over images with known boxes;
    auc, auc_other: mean pixel AUC against the own boxes and another image's; auc_gap: their
      difference, over images where both are defined;
    n: images with known boxes; counts: the integers behind the shares; errors: how many of the n
      fall to each of ERRORS.
    None stands for a share of no images and for what is not known of the method.
    """
    rows = np.arange(len(outcomes.ious)) if rows is None else rows
    ious = outcomes.ious[rows]
    known = ~np.isnan(ious)
    right = known & (np.nan_to_num(ious) >= IOU_THRESHOLD)

    def count(flags: np.ndarray | None, among: np.ndarray | None = None) -> int | None:
        if flags is None:
            return None
        return int((flags[rows] if among is None else flags[rows] & among).sum())

    n = int(known.sum())
    counts = {
        "images": len(rows),
        "with_boxes": n,
        "gt_known": int(right.sum()),
        "top1_loc": count(outcomes.top1, right),
        "top5_loc": count(outcomes.top5_right, known),
        "top1_cls": count(outcomes.top1),
        "top5_cls": count(outcomes.top5),
    }
    shares = {
        name: _share(counts[name], len(rows) if name.endswith("cls") else n)
        for name in ("gt_known", "top1_loc", "top5_loc", "top1_cls", "top5_cls")
    }
    kinds = np.bincount(outcomes.errors[rows][known], minlength=len(ERRORS))
    auc = None if outcomes.auc is None else outcomes.auc[rows]
    other = None if outcomes.auc_other is None else outcomes.auc_other[rows]
    return {
        **shares,
        "mean_iou": _mean(ious),
        "auc": _mean(auc),
        "auc_other": _mean(other),
        "auc_gap": None if auc is None or other is None else _mean(auc - other),
        "n": n,
        "counts": {name: value for name, value in counts.items() if value is not None},
        "errors": dict(zip(ERRORS, kinds.tolist(), strict=True)),
    }


def sweep_figures(sweep: Sweep | None, ious: np.ndarray, subset: str | None) -> dict[str, Any]:
    """max_box_acc (IoU 0.5, the best threshold for all images), its threshold, and
    max_box_acc_v2 (mean over IoU 0.3, 0.5, 0.7 of each one's own best, over all contours).

    ious: float64, the method's IoUs on the same images, which stand for a method without maps: of
    its one box every threshold is the best. subset: a name of SUBSETS, or None for all images.
    """
    known = ious[~np.isnan(ious)]
    if not len(known):
        return dict.fromkeys(("max_box_acc", "max_box_acc_threshold", "max_box_acc_v2"))
    if sweep is None:
        shares = [int((known >= level).sum()) / len(known) for level in (0.3, 0.5, 0.7)]
        return {
            "max_box_acc": shares[1],
            "max_box_acc_threshold": None,
            "max_box_acc_v2": math.fsum(shares) / 3,
        }
    groups = slice(None) if subset is None else SUBSET_GROUPS[subset]
    best, threshold = max_box_acc(sweep.largest[groups].sum(axis=0), len(known))
    return {
        "max_box_acc": best,
        "max_box_acc_threshold": threshold,
        "max_box_acc_v2": max_box_acc_v2(sweep.contours[groups].sum(axis=0), len(known)),
    }


def _right(counts: np.ndarray, iou: float) -> np.ndarray:
    """Count the images whose IoU is at least `iou` (of IOU_GRID), by threshold: int64 [T]."""
    return counts[:, int(np.flatnonzero(iou == IOU_GRID)[0]) + 1 :].sum(axis=1)


def max_box_acc(counts: np.ndarray, images: int) -> tuple[float, float]:
    """Return MaxBoxAcc, the best share of right images over the thresholds, and its threshold.

    counts: int64 [T, 20] of the largest contours (`sweep.add_counts`), T = len(thresholds()). Of
    equal thresholds the smallest.
    """
    right = _right(counts, IOU_THRESHOLD)
    best = int(right.argmax())
    return int(right[best]) / images, float(thresholds()[best])


def max_box_acc_v2(counts: np.ndarray, images: int) -> float:
    """Return MaxBoxAccV2, the mean over IoU 0.3, 0.5, 0.7 of each one's best share over thresholds.

    counts: int64 [T, 20] of the best of all contours (`sweep.add_counts`).
    """
    return sum(int(_right(counts, iou).max()) for iou in V2_IOUS) / (len(V2_IOUS) * images)


def curves(outcomes: Outcomes) -> dict[str, Any]:
    """CorLoc over the IoU for the method's own boxes, and over the threshold for its maps.

    {"iou": grid, "gt_known": share with at least that IoU, "thresholds": 0, .01 ... or None,
    "corloc": {"0.3", "0.5", "0.7": share right by the largest contour at each} or None}.
    """
    known = outcomes.ious[~np.isnan(outcomes.ious)]
    n = max(1, len(known))
    drawn: dict[str, Any] = {
        "iou": IOU_GRID.tolist(),
        "gt_known": [int((known >= level).sum()) / n for level in IOU_GRID],
        "thresholds": None,
        "corloc": None,
    }
    if outcomes.sweep is not None:
        counts = outcomes.sweep.largest.sum(axis=0)
        at_least = counts[:, ::-1].cumsum(axis=1)[:, ::-1]  # [T, bin]: images at this bin or above
        drawn["thresholds"] = [round(t, 6) for t in thresholds()[::CURVE_STEP].tolist()]
        drawn["corloc"] = {
            f"{level}": (at_least[::CURVE_STEP, IOU_GRID.tolist().index(level) + 1] / n).tolist()
            for level in (0.3, 0.5, 0.7)
        }
    return drawn


def class_figures(outcomes: Outcomes, labels: np.ndarray, classes: int) -> list[dict[str, Any]]:
    """`figures` of the images of each class, in index order; labels: integer [N]."""
    order = np.argsort(labels, kind="stable")
    edges = np.searchsorted(labels[order], np.arange(classes + 1))
    return [figures(outcomes, order[edges[i] : edges[i + 1]]) for i in range(classes)]


def size_figures(outcomes: Outcomes, shares: np.ndarray) -> list[dict[str, Any]]:
    """`figures` by the share of the image that the largest true box covers; shares: float [N]."""
    bins = []
    for low, high in itertools.pairwise(SIZE_EDGES):
        inside = (shares >= low) & ((shares < high) | (high == SIZE_EDGES[-1]))
        rows = np.flatnonzero(inside & ~np.isnan(outcomes.ious))
        bins.append({"low": low, "high": high, **figures(outcomes, rows)})
    return bins


def bootstrap_intervals(values: np.ndarray, seed: int) -> np.ndarray:
    """95 % percentile bootstrap intervals of the column means of `values`.

    values: float64 [N, F], one row an image, in [-1, 1]; all columns are resampled together, 1000
    times. Returns float64 [F, 2], low and high; NaN where N is 0. The same rows in the same
    order and the same seed give the same intervals, to the last digit.
    """
    n, columns = values.shape
    if n == 0:
        return np.full((columns, 2), np.nan)
    exact = np.round(values / _STEP)
    rng = np.random.default_rng(seed)
    chunk = max(1, _CHUNK // n)
    means = []
    for start in range(0, REPLICATES, chunk):
        size = min(chunk, REPLICATES - start)
        drawn = rng.integers(0, n, (size, n)) + np.arange(size)[:, None] * n
        weights = np.bincount(drawn.ravel(), minlength=size * n).reshape(size, n)
        means.append(weights.astype(np.float64) @ exact / n * _STEP)
    tail = (1 - CONFIDENCE) / 2
    return np.quantile(np.concatenate(means), [tail, 1 - tail], axis=0).T


def share_interval(share: float, n: int) -> list[float]:
    """The 95 % percentile bootstrap interval of a share of n images, [low, high].

    Resampled, the count of such images is binomial, so its percentiles need no resampling: this
    is the interval that infinitely many replicates give.
    """
    tail = (1 - CONFIDENCE) / 2
    return [float(q) / n for q in binom.ppf([tail, 1 - tail], n, min(1.0, share))]


def intervals(
    outcomes: dict[str, Outcomes], rows: dict[str, dict[str, Any]], seed: int
) -> dict[str, dict[str, list[float] | None]]:
    """The 95 % interval of each figure of each method: [low, high], None where there is no figure.

    rows: the methods' `figures`, with max_box_acc. Shares by `share_interval`, means by
    resampling; none for max_box_acc_v2, whose three shares depend on each other.
    """
    result: dict[str, dict[str, list[float] | None]] = {}
    columns: dict[tuple[str, str], np.ndarray] = {}
    for name, one in outcomes.items():
        result[name] = {}
        for figure in SHARES:
            share = rows[name][figure]
            n = rows[name]["counts"]["images"] if figure.endswith("cls") else rows[name]["n"]
            result[name][figure] = None if share is None else share_interval(share, n)
        columns[name, "mean_iou"] = one.ious
        if one.auc is not None and one.auc_other is not None:
            columns[name, "auc"] = one.auc
            columns[name, "auc_other"] = one.auc_other
            columns[name, "auc_gap"] = one.auc - one.auc_other
    # Columns that are defined on the same images are resampled together.
    together: dict[bytes, list[tuple[str, str]]] = {}
    for key, values in columns.items():
        together.setdefault(np.isnan(values).tobytes(), []).append(key)
    for keys in together.values():
        defined = ~np.isnan(columns[keys[0]])
        bounds = bootstrap_intervals(np.stack([columns[k][defined] for k in keys], axis=1), seed)
        for (name, figure), bound in zip(keys, bounds, strict=True):
            result[name][figure] = None if np.isnan(bound).any() else bound.tolist()
    return result


def top_k(predicted: np.ndarray, labels: np.ndarray, k: int) -> np.ndarray:
    """Whether each label is among the first `k` predicted classes: bool [N].

    predicted: integer [N, K], best first; labels: integer [N].
    """
    return (predicted[:, :k] == labels[:, None]).any(axis=1)
