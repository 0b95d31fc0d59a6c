"""Boxes and classes of any origin -> the rows of the table and the lines of predictions.parquet."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from pipeline.evaluation.formats import Guesses
from pipeline.evaluation.metrics import (
    ERRORS,
    Outcomes,
    Sweep,
    curves,
    error_kinds,
    figures,
    intervals,
    subset_masks,
    sweep_figures,
    top_k,
    with_classes,
)
from pipeline.evaluation.protocols import (
    IOU_THRESHOLD,
    PROTOCOLS,
    TOP,
    best_iou,
    own_boxes,
    scale_boxes,
    truth_boxes,
)
from pipeline.evaluation.results import Row, RowFigures
from pipeline.evaluation.truth import GroundTruth


@dataclass(frozen=True, kw_only=True)
class Localization:
    """One box per image by one map and rule. map, rule: see `results.Row`. title: the map's.
    classes: whose class counts, a row each. paper: metrics 1 and 2 of the paper's Table 1, for the
    first row. boxes: [N, 4], inclusive pixels of `grid`, (height, width) or int [N, 2]; without a
    grid in the truth's own coordinates. found: bool [N], False where a map had no content. guesses:
    up to five boxes with classes, `boxes` the first. auc, auc_other, sweep: see
    `metrics.Outcomes`."""

    map: str
    title: str
    boxes: np.ndarray
    grid: np.ndarray | None
    rule: str | None = None
    classes: tuple[str | None, ...] = (None,)
    paper: tuple[float | None, float | None] | None = None
    found: np.ndarray | None = None
    guesses: Guesses | None = None
    auc: np.ndarray | None = None
    auc_other: np.ndarray | None = None
    sweep: Sweep | None = None


def image_sizes(truth: GroundTruth) -> np.ndarray:
    """Return the (height, width) of each image: integer [N, 2]; ones where they are unknown, since
    then only given boxes are scored, by a protocol that needs no size."""
    return np.ones((len(truth.ids), 2), np.int64) if truth.sizes is None else truth.sizes


def original_boxes(localization: Localization, truth: GroundTruth) -> np.ndarray:
    """Return the boxes in inclusive original pixels, [N, 4]."""
    if localization.grid is None:
        return localization.boxes
    return scale_boxes(localization.boxes, localization.grid, image_sizes(truth))


def box_ious(
    boxes: np.ndarray, grid: np.ndarray | None, truth: GroundTruth, protocol: str
) -> np.ndarray:
    """Return the IoU of each box with the best true box: float64 [N], NaN where none is known.
    boxes, grid: see `Localization`."""
    sizes = image_sizes(truth)
    owners = np.repeat(np.arange(len(sizes)), np.diff(truth.starts))
    if grid is None:
        compared = truth_boxes(boxes, sizes, protocol)
    else:
        compared = own_boxes(boxes, grid, sizes, protocol)
    read = truth_boxes(truth.boxes, sizes[owners], protocol)
    return best_iou(compared, read, truth.starts, PROTOCOLS[protocol].plus)


def box_outcomes(localization: Localization, truth: GroundTruth, protocol: str) -> Outcomes:
    """Return how the boxes fare, the class left aside."""
    ious = box_ious(localization.boxes, localization.grid, truth, protocol)
    found = np.ones(len(ious), bool) if localization.found is None else localization.found
    right = np.nan_to_num(ious) >= IOU_THRESHOLD
    boxes = original_boxes(localization, truth)
    return Outcomes(
        ious=ious,
        errors=error_kinds(boxes, found, right, truth.boxes, truth.starts),
        auc=localization.auc,
        auc_other=localization.auc_other,
        sweep=localization.sweep,
    )


def class_outcomes(
    outcomes: Outcomes,
    classes: np.ndarray | None,
    guesses: Guesses | None,
    truth: GroundTruth,
    protocol: str,
) -> Outcomes:
    """Return `box_outcomes` with a classifier's classes, int [N, 5] or None. guesses: whose boxes
    count each with its own class (the official rule); None where the one box goes with all five."""
    if classes is None:
        return outcomes
    top1, top5 = (top_k(classes, truth.labels, k) for k in (1, TOP))
    right = np.nan_to_num(outcomes.ious) >= IOU_THRESHOLD
    if guesses is None:
        top5_right = right & top5
    else:
        named = guesses.labels == truth.labels[:, None]
        top5_right = right & named[:, 0]
        for i in np.flatnonzero(named[:, 1:].any(axis=0)) + 1:
            ious = box_ious(guesses.boxes[:, i], None, truth, protocol)
            top5_right |= named[:, i] & (np.nan_to_num(ious) >= IOU_THRESHOLD)
    errors = with_classes(outcomes.errors, top1)
    return replace(outcomes, errors=errors, top1=top1, top5=top5, top5_right=top5_right)


def score(
    localizations: Sequence[Localization],
    classes: Mapping[str, np.ndarray],
    truth: GroundTruth,
    *,
    protocol: str,
    seed: int,
) -> tuple[list[RowFigures], pa.Table]:
    """Return the rows of the table, and the lines of predictions.parquet. classes: by classifier,
    int [N, 5], best first, -1 for none. seed: of the bootstrap."""
    rows, outcomes, lines = [], [], []
    subsets = {}
    if truth.sizes is not None:
        subsets = subset_masks(truth.boxes, truth.starts, truth.sizes)
    for localization in localizations:
        boxes = box_outcomes(localization, truth, protocol)
        lines.append(prediction_lines(localization, truth, boxes))
        for source in localization.classes:
            named = None if source is None else classes[source]
            outcomes.append(class_outcomes(boxes, named, localization.guesses, truth, protocol))
            rows.append(_row_figures(localization, source, outcomes[-1], subsets))
    bounds = intervals(outcomes, [row.figures for row in rows], seed)
    rows = [replace(row, interval=bound) for row, bound in zip(rows, bounds, strict=True)]
    return rows, pa.concat_tables(lines)


def _row_figures(
    localization: Localization,
    source: str | None,
    outcomes: Outcomes,
    subsets: dict[str, np.ndarray],
) -> RowFigures:
    """Return one row, but for its intervals. subsets: see `subset_masks`; none where sizes are
    unknown."""
    whole = figures(outcomes) | sweep_figures(outcomes)
    if localization.found is not None:
        whole["counts"]["nothing_found"] = int((~localization.found).sum())
    paper = localization.paper if source == localization.classes[0] else None
    return RowFigures(
        row=Row(map=localization.map, rule=localization.rule, classes=source),
        title=localization.title,
        paper=None if paper is None else {"metric1": paper[0], "metric2": paper[1]},
        figures=whole,
        interval={},
        curves=curves(outcomes),
        subsets={name: figures(outcomes, among) for name, among in subsets.items()},
    )


def prediction_lines(
    localization: Localization, truth: GroundTruth, outcomes: Outcomes
) -> pa.Table:
    """Return the lines of predictions.parquet of one map and rule: box in inclusive original
    pixels; iou, auc null where unknown; error with the class left aside."""
    n = len(truth.ids)
    kinds = pa.array(outcomes.errors.astype(np.int8), mask=np.isnan(outcomes.ious))
    found = np.ones(n, bool) if localization.found is None else localization.found

    def repeated(text: str | None) -> pa.Array:
        return pa.repeat(pa.scalar(text, pa.string()), n)

    def numbers(values: np.ndarray | None) -> pa.Array:
        return pa.nulls(n, pa.float64()) if values is None else pa.array(values, from_pandas=True)

    return pa.table(
        {
            "image": np.arange(n),
            "map": repeated(localization.map),
            "rule": repeated(localization.rule),
            "box": fixed_lists(np.rint(original_boxes(localization, truth)).astype(np.int32)),
            "found": found,
            "iou": numbers(outcomes.ious),
            "error": pa.DictionaryArray.from_arrays(kinds, pa.array(ERRORS)).dictionary_decode(),
            "auc": numbers(outcomes.auc),
            "auc_other": numbers(outcomes.auc_other),
        }
    )


def fixed_lists(values: np.ndarray) -> pa.Array:
    """Return an array [N, k] as N lists of k."""
    return pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])


def truth_lists(truth: GroundTruth) -> pa.Array:
    """Return the true boxes as a list of [x0, y0, x1, y1] for each image."""
    return pa.ListArray.from_arrays(
        pa.array(truth.starts, pa.int32()), fixed_lists(truth.boxes.astype(np.int32))
    )


def class_lists(classes: np.ndarray, values: np.ndarray) -> pa.Array:
    """Return `values` [N, k] as a list for each image, without those where classes [N, k] is -1."""
    present = classes >= 0
    starts = np.concatenate([[0], np.cumsum(present.sum(axis=1))])
    return pa.ListArray.from_arrays(pa.array(starts, pa.int32()), pa.array(values[present]))


def classifier_figures(classes: np.ndarray, truth: GroundTruth) -> dict[str, float]:
    """Return the shares of images whose label is the first, or among the first five, classes."""
    return {f"top{k}": int(top_k(classes, truth.labels, k).sum()) / len(classes) for k in (1, TOP)}
