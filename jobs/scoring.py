"""From predictions to figures: joining them to the ledger, checking that all are there, scoring.

Needs neither nets nor shards: what is scored here may come from any place.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from jobs.cli import UserError
from model.baselines import HALF_AREA, centred_boxes, fit_centred_box, whole_image_boxes
from model.localization import scale_boxes
from model.metrics import best_iou, class_figures, figures, intervals, top_k
from pipeline.ledger import read_ledger
from pipeline.shards import Card

TOP = 5  # classes kept per image and classifier
NAMED = 5  # rows that an error message lists


@dataclass(frozen=True, kw_only=True)
class Method:
    """A row of the table. box: prefix of its box's columns; classes: the net that names the
    class for top-1 figures; from_map: whether its box follows from a map by the paper's rule."""

    title: str
    box: str
    classes: str
    from_map: bool


METHODS = {
    "whole_image": Method(
        title="Whole image", box="whole_image", classes="clean_classifier", from_map=False
    ),
    "centred_box": Method(
        title="Centred box", box="centred_box", classes="clean_classifier", from_map=False
    ),
    "cam": Method(title="CAM", box="cam", classes="clean_classifier", from_map=True),
    "gradient": Method(
        title="Gradient saliency, blurred",
        box="gradient",
        classes="clean_classifier",
        from_map=True,
    ),
    "aln": Method(title="ALN", box="aln", classes="classifier", from_map=True),
    "aln_clean_class": Method(
        title="ALN, clean classifier's class", box="aln", classes="clean_classifier", from_map=True
    ),
}


def fixed_lists(values: np.ndarray) -> pa.Array:
    """Arrays [N] as they are, [N, k] as lists of k; classes and boxes as int32."""
    if values.dtype == np.int64:
        values = values.astype(np.int32)
    if values.ndim == 1:
        return pa.array(values)
    return pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])


def matrix(table: pa.Table, name: str) -> np.ndarray:
    """A column of fixed-size lists as [N, k]."""
    column = table[name].combine_chunks()
    return column.flatten().to_numpy().reshape(len(column), column.type.list_size)


def check_coverage(rows: np.ndarray, ledger: pa.Table) -> None:
    """Raise UserError, naming images, unless each ledger row was predicted exactly once."""
    expected = ledger["row"].to_numpy()
    unique, counts = np.unique(rows, return_counts=True)
    faults = {
        "missing": np.setdiff1d(expected, unique),
        "evaluated more than once": unique[counts > 1],
        "unknown to the ledger": np.setdiff1d(unique, expected),
    }
    named = dict(zip(expected.tolist(), ledger["id"].to_pylist(), strict=True))
    for fault, found in faults.items():
        if len(found):
            listed = [
                f"{row} ({named[row]})" if row in named else f"{row}" for row in found.tolist()
            ]
            more = f" and {len(found) - NAMED} more" if len(found) > NAMED else ""
            raise UserError(
                f"images {fault}: {len(found)}, ledger rows {', '.join(listed[:NAMED])}{more}: "
                "figures over them would be wrong, so none were written. Shards and ledger do not "
                "belong together; run jobs.preprocess again."
            )


def centred_shares(data: Path, card: Card) -> tuple[tuple[float, float], str]:
    """(height, width) shares of the centred box, and in words where they come from."""
    if "train" in card.splits:
        ledger = read_ledger(data, "train", ["height", "width", "boxes"])
        shares = fit_centred_box(_sizes(ledger), _truths(ledger))
        if shares is not None:
            return shares, "best GT-known localization on the train split's boxes"
    return HALF_AREA, "half of the image's area, since no train image has a known box"


def _sizes(ledger: pa.Table) -> np.ndarray:
    return np.stack([ledger["height"].to_numpy(), ledger["width"].to_numpy()], axis=1).astype(int)


def _truths(ledger: pa.Table) -> list[list[list[int]]]:
    return [boxes or [] for boxes in ledger["boxes"].to_pylist()]


def join_predictions(
    ledger: pa.Table, predicted: pa.Table, stored: tuple[int, int], shares: tuple[float, float]
) -> pa.Table:
    """The ledger's rows with everything predicted for them, in row order.

    Per box method (a METHODS' `box`): `X_box` int32 [4] in original inclusive pixels, `X_iou`
    with the best true box (null where none is known), and `X_found` for those from maps. Per
    classifier: `X_classes` and `X_scores`, up to five, best first.
    """
    predicted = predicted.sort_by("row")
    sizes, truths = _sizes(ledger), _truths(ledger)
    boxes = {"whole_image": whole_image_boxes(sizes), "centred_box": centred_boxes(sizes, shares)}
    table = ledger
    for name in predicted.column_names:
        if name.endswith("_box"):
            boxes[name.removesuffix("_box")] = scale_boxes(matrix(predicted, name), stored, sizes)
        elif name != "row":
            table = table.append_column(name, predicted[name])
    for name, box in boxes.items():
        ious = pa.array(best_iou(box, truths), from_pandas=True)  # NaN becomes null
        table = table.append_column(f"{name}_box", fixed_lists(box))
        table = table.append_column(f"{name}_iou", ious)
    return table


def score(predictions: pa.Table, card: Card, seed: int) -> dict[str, Any]:
    """Figures of every method and classifier, from the joined predictions."""
    labels = predictions["label"].to_numpy()
    outcomes = {}
    for name, method in METHODS.items():
        if f"{method.box}_iou" in predictions.column_names:
            ious = predictions[f"{method.box}_iou"].to_numpy()  # null becomes NaN
            right = matrix(predictions, f"{method.classes}_classes")[:, 0] == labels
            outcomes[name] = (ious, right)
    bounds = intervals(outcomes, seed)
    methods = {}
    for name, (ious, right) in outcomes.items():
        method = METHODS[name]
        parts = class_figures(ious, right, labels, len(card.classes))
        methods[name] = {
            **figures(ious, right),
            "interval": bounds[name],
            "title": method.title,
            "class_from": method.classes,
            "classes": dict(zip(card.classes, parts, strict=True)),
        }
        if method.from_map:
            found = predictions[f"{method.box}_found"].to_numpy()
            methods[name]["counts"]["nothing_found"] = int((~found).sum())
    classifiers = {
        name: {
            f"top{k}": top_k(matrix(predictions, f"{name}_classes"), labels, k) for k in (1, TOP)
        }
        for name in ("classifier", "clean_classifier")
    }
    return {"methods": methods, **classifiers}
