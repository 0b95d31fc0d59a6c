"""Boxes and classes -> named figures, equal to the last digit for any division of the images. Every
share is an integer count over an integer number of images; sums of fractions (mean IoU, AUC) are
rounded once. docs/formats.md says in words what each figure means."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.evaluation.bootstrap import bootstrap_intervals, share_interval
from pipeline.evaluation.protocols import IOU_GRID, IOU_THRESHOLD, V2_IOUS, box_area, thresholds
from pipeline.evaluation.results import Figures

SMALL = 0.5  # of the image: a largest box below it makes the image one of "small_boxes"
OFF_CENTRE = 0.125  # of the side: boxes whose centres all lie farther from the image's, in x or y
SUBSETS = {
    "small_boxes": "the largest true box covers less than half of the image",
    "off_centre": "every true box's centre is more than an eighth of the side from the image's",
}
SHARES = ("gt_known", "top1_loc", "top5_loc", "top1_cls", "top5_cls")
CLASS_SHARES = ("top1_cls", "top5_cls")  # of all images; the other shares: of those with boxes
ERRORS = (
    "right",
    "class_wrong",
    "several_instances",
    "too_small",
    "too_large",
    "elsewhere",
    "nothing_found",
)
RIGHT, CLASS_WRONG = ERRORS.index("right"), ERRORS.index("class_wrong")
_SEVERAL, _INSIDE, _COVERED = 0.3, 0.5, 0.7


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Counts of one map over all thresholds (`sweep.add_counts`), int64 [T, 20]: by the largest
    contour alone and by the best of all."""

    largest: np.ndarray
    contours: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Outcomes:
    """How one row of the table fares on each image; None: not known of it. ious: float64 [N] with
    the best true box, NaN where none is known. errors: int [N], indices in ERRORS. top1, top5: bool
    [N], whether the label is among its first classes. top5_right: bool [N], whether a guess has the
    label and a right box. auc, auc_other: float64 [N], `sweep.pixel_auc` against the own and
    another image's boxes, NaN where undefined."""

    ious: np.ndarray
    errors: np.ndarray
    top1: np.ndarray | None = None
    top5: np.ndarray | None = None
    top5_right: np.ndarray | None = None
    auc: np.ndarray | None = None
    auc_other: np.ndarray | None = None
    sweep: Sweep | None = None


def subset_masks(boxes: np.ndarray, starts: np.ndarray, sizes: np.ndarray) -> dict[str, np.ndarray]:
    """Return the images of each of SUBSETS: bool [N] by name. boxes: [M, 4] inclusive original
    pixels, image by image; starts: int64 [N + 1]; sizes: integer [N, 2], (height, width)."""
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
    """Return the share of the image that its largest box covers: float64 [N], 0 for no box."""
    owners = np.repeat(np.arange(len(sizes)), np.diff(starts))
    shares = np.zeros(len(sizes))
    np.maximum.at(shares, owners, box_area(boxes) / sizes[owners].prod(axis=1))
    return shares


def error_kinds(
    boxes: np.ndarray,
    found: np.ndarray,
    right: np.ndarray,
    truths: np.ndarray,
    starts: np.ndarray,
) -> np.ndarray:
    """Return why each box is wrong, the class left aside: indices in ERRORS, int64 [N]. The first
    that holds: right; nothing_found: the map had no content; several_instances: the box covers over
    0.3 of two or more true boxes; too_small: over half of it lies in a true box; too_large: over
    0.7 of a true box lies in it; elsewhere. boxes: [N, 4] and truths: [M, 4], inclusive pixels;
    found, right: bool [N]."""
    counts = np.diff(starts)
    owners = np.repeat(np.arange(len(boxes)), counts)
    repeated = boxes[owners]
    low, high = (
        np.maximum(repeated[:, :2], truths[:, :2]),
        np.minimum(repeated[:, 2:], truths[:, 2:]),
    )
    shared = np.clip(high - low + 1, 0, None).prod(axis=1)
    covered, inside = shared / box_area(truths), shared / box_area(repeated)

    def holds(of_pairs: np.ndarray, at_least: int = 1) -> np.ndarray:
        return np.bincount(owners[of_pairs], minlength=len(boxes)) >= at_least

    conditions = {
        "right": right,
        "nothing_found": ~found,
        "several_instances": holds(covered > _SEVERAL, 2),
        "too_small": holds(inside > _INSIDE),
        "too_large": holds(covered > _COVERED),
    }
    kinds = [ERRORS.index(name) for name in conditions]
    return np.select(list(conditions.values()), kinds, ERRORS.index("elsewhere"))


def with_classes(errors: np.ndarray, class_right: np.ndarray) -> np.ndarray:
    """Return `error_kinds` where a right box with a wrong class is "class_wrong"."""
    return np.where((errors == RIGHT) & ~class_right, CLASS_WRONG, errors)


def figures(outcomes: Outcomes, among: np.ndarray | None = None) -> Figures:
    """Return the figures of one row on the images `among`, bool [N], all by default, as
    docs/formats.md defines them; None for a share of no images and for what is not known. n: images
    with known boxes; counts: the integers behind the shares; errors: how many of the n fall to each
    of ERRORS."""
    every = np.ones(len(outcomes.ious), bool) if among is None else among
    known = every & ~np.isnan(outcomes.ious)
    right = known & (np.nan_to_num(outcomes.ious) >= IOU_THRESHOLD)
    flags = {
        "images": (every, every),
        "with_boxes": (known, known),
        "gt_known": (right, known),
        "top1_loc": (outcomes.top1, right),
        "top5_loc": (outcomes.top5_right, known),
        "top1_cls": (outcomes.top1, every),
        "top5_cls": (outcomes.top5, every),
    }
    counts = {
        name: int((own & counted).sum())
        for name, (own, counted) in flags.items()
        if own is not None
    }
    shares: Figures = {}
    for name in SHARES:
        total = counts["images" if name in CLASS_SHARES else "with_boxes"]
        shares[name] = counts[name] / total if total and name in counts else None
    errors = np.bincount(outcomes.errors[known], minlength=len(ERRORS)).tolist()
    return {
        **shares,
        "mean_iou": _mean(outcomes.ious, every),
        "auc": _mean(outcomes.auc, every),
        "auc_other": _mean(outcomes.auc_other, every),
        "auc_gap": _mean(_gap(outcomes), every),
        "n": counts["with_boxes"],
        "counts": counts,
        "errors": dict(zip(ERRORS, errors, strict=True)),
    }


def _gap(outcomes: Outcomes) -> np.ndarray | None:
    if outcomes.auc is None or outcomes.auc_other is None:
        return None
    return outcomes.auc - outcomes.auc_other


def _mean(values: np.ndarray | None, among: np.ndarray) -> float | None:
    """Return the mean of the defined values of these images, rounded once; None without any."""
    if values is None:
        return None
    defined = values[~np.isnan(values) & among]
    return math.fsum(defined.tolist()) / len(defined) if len(defined) else None


def sweep_figures(outcomes: Outcomes) -> Figures:
    """Return MaxBoxAcc, its threshold and MaxBoxAccV2. The IoUs stand for a row without maps."""
    known = outcomes.ious[~np.isnan(outcomes.ious)]
    if not len(known):
        return dict.fromkeys(("max_box_acc", "max_box_acc_threshold", "max_box_acc_v2"))
    if outcomes.sweep is None:
        shares = [int((known >= level).sum()) / len(known) for level in V2_IOUS]
        return {
            "max_box_acc": shares[V2_IOUS.index(IOU_THRESHOLD)],
            "max_box_acc_threshold": None,
            "max_box_acc_v2": math.fsum(shares) / len(shares),
        }
    best, threshold = max_box_acc(outcomes.sweep.largest, len(known))
    return {
        "max_box_acc": best,
        "max_box_acc_threshold": threshold,
        "max_box_acc_v2": max_box_acc_v2(outcomes.sweep.contours, len(known)),
    }


def _right(counts: np.ndarray, iou: float) -> np.ndarray:
    """Count the images whose IoU is at least `iou` (of IOU_GRID), by threshold: int64 [T]."""
    return counts[:, int(np.flatnonzero(iou == IOU_GRID)[0]) + 1 :].sum(axis=1)


def max_box_acc(counts: np.ndarray, images: int) -> tuple[float, float]:
    """Return the best share of right images over the thresholds, and the smallest such threshold.
    counts: int64 [T, 20] of the largest contours."""
    right = _right(counts, IOU_THRESHOLD)
    best = int(right.argmax())
    return int(right[best]) / images, float(thresholds()[best])


def max_box_acc_v2(counts: np.ndarray, images: int) -> float:
    """Return the mean over IoU 0.3, 0.5, 0.7 of each one's best share over thresholds. counts:
    int64 [T, 20] of the best of all contours."""
    return sum(int(_right(counts, iou).max()) for iou in V2_IOUS) / (len(V2_IOUS) * images)


def curves(outcomes: Outcomes) -> dict[str, list[float]]:
    """Return CorLoc over the IoU: {"iou": grid, "gt_known": share with at least that IoU}."""
    known = outcomes.ious[~np.isnan(outcomes.ious)]
    shares = [int((known >= level).sum()) / max(1, len(known)) for level in IOU_GRID]
    return {"iou": IOU_GRID.tolist(), "gt_known": shares}


def intervals(
    outcomes: Sequence[Outcomes], rows: Sequence[Figures], seed: int
) -> list[dict[str, list[float] | None]]:
    """Return the 95 % interval of each figure of each row: [low, high], None without a figure.
    Shares by `share_interval`, means by resampling; none for max_box_acc_v2, whose shares are
    dependent."""
    result: list[dict[str, list[float] | None]] = []
    columns: dict[tuple[int, str], np.ndarray] = {}
    for i, (row, outcome) in enumerate(zip(rows, outcomes, strict=True)):
        result.append({figure: _interval(row, figure) for figure in (*SHARES, "max_box_acc")})
        columns[i, "mean_iou"] = outcome.ious
        gap = _gap(outcome)
        if gap is not None and outcome.auc is not None and outcome.auc_other is not None:
            columns[i, "auc"], columns[i, "auc_other"] = outcome.auc, outcome.auc_other
            columns[i, "auc_gap"] = gap
    # Columns that are defined on the same images are resampled together.
    together: dict[bytes, list[tuple[int, str]]] = {}
    for key, values in columns.items():
        together.setdefault(np.isnan(values).tobytes(), []).append(key)
    for keys in together.values():
        defined = ~np.isnan(columns[keys[0]])
        bounds = bootstrap_intervals(np.stack([columns[k][defined] for k in keys], axis=1), seed)
        for (i, figure), bound in zip(keys, bounds, strict=True):
            result[i][figure] = None if np.isnan(bound).any() else bound.tolist()
    return result


def _interval(row: Figures, figure: str) -> list[float] | None:
    if row[figure] is None:
        return None
    n = row["counts"]["images"] if figure in CLASS_SHARES else row["n"]
    return share_interval(round(row[figure] * n), n)


def renumbered_share(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Return the share of right classes if each class stood for the label that it mostly meets; 0
    where fewer than ten images a class or nine in ten classes with an own label prove nothing."""
    given = predicted >= 0
    classes, rows = np.unique(predicted[given], return_inverse=True)
    _, columns = np.unique(labels[given], return_inverse=True)
    if len(classes) < 2 or len(rows) < 10 * len(classes):
        return 0.0
    met = [np.bincount(columns[rows == i]) for i in range(len(classes))]
    if len({int(counts.argmax()) for counts in met}) < 0.9 * len(classes):
        return 0.0
    return sum(int(counts.max()) for counts in met) / len(labels)


def top_k(predicted: np.ndarray, labels: np.ndarray, k: int) -> np.ndarray:
    """Return whether each label is among the first `k` predicted classes, integer [N, K]: bool
    [N]."""
    return (predicted[:, :k] == labels[:, None]).any(axis=1)
