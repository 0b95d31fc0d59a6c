"""From predictions to figures: checking that all are there, joining them, scoring every row.

Needs neither nets nor shards: what is scored here may come from any place.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from jobs.evaluate.maps import MapCounts, MapTruth, fixed_lists, image_aucs, no_counts, sweep_image
from jobs.evaluate.rows import Method
from model.localization import localize
from pipeline.errors import UserError
from pipeline.evaluation.constant_boxes import (
    HALF_AREA,
    centred_boxes,
    fit_centred_box,
    whole_image_boxes,
)
from pipeline.evaluation.formats import Guesses
from pipeline.evaluation.metrics import (
    ERRORS,
    Outcomes,
    class_figures,
    curves,
    error_kinds,
    figures,
    intervals,
    largest_shares,
    size_figures,
    subset_masks,
    sweep_figures,
    top_k,
)
from pipeline.evaluation.protocols import (
    IOU_THRESHOLD,
    PROTOCOLS,
    best_iou,
    own_boxes,
    scale_boxes,
    truth_boxes,
)
from pipeline.evaluation.sweep import level_boxes, quantize, stretch
from pipeline.evaluation.truth import GroundTruth
from pipeline.shards.format import Manifest
from pipeline.shards.ledger import read_ledger

TOP = 5  # classes kept per image and classifier
NAMED = 5  # rows that an error message lists
NO_GRID = np.zeros(2, np.int64)  # of boxes that are given in the truth's own coordinates


@dataclass(frozen=True, kw_only=True)
class Boxes:
    """One box per image. boxes: [N, 4]; inclusive pixels of `grid`, (height, width) or int [N, 2];
    given: read from a file, in the truth's own coordinates. found: bool [N], False where a map had
    no content and the box is all of it."""

    boxes: np.ndarray
    grid: np.ndarray
    given: bool = False
    found: np.ndarray | None = None


@dataclass(kw_only=True)
class Predictions:
    """Everything said of the N images of a ground truth, in its order. boxes, classes (int
    [N, 5], best first, -1 for none), aucs (own and another's, float [N] each) and counts by name;
    methods: the rows to score, in the table's order."""

    boxes: dict[str, Boxes] = field(default_factory=dict)
    classes: dict[str, np.ndarray] = field(default_factory=dict)
    aucs: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    counts: dict[str, MapCounts] = field(default_factory=dict)
    guesses: Guesses | None = None
    methods: dict[str, Method] = field(default_factory=dict)


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


def centred_shares(
    data: str | None, manifest: Manifest | None, given: tuple[float, ...] | None
) -> tuple[tuple[float, float], str]:
    """(height, width) shares of the centred box, and in words where they come from."""
    if given:
        return (given[0], given[-1]), "given by --centred-box"
    if data is not None and manifest is not None and "train" in manifest.splits:
        ledger = read_ledger(data, "train", ["height", "width", "boxes"])
        sizes = np.stack([ledger["height"].to_numpy(), ledger["width"].to_numpy()], axis=1)
        boxes = [truth or [] for truth in ledger["boxes"].to_pylist()]
        shares = fit_centred_box(sizes.astype(int), boxes)
        if shares is not None:
            return shares, "best GT-known localization on the train split's boxes"
    return HALF_AREA, "half of the image's area, since no train image has a known box"


def add_constant_boxes(
    said: Predictions,
    truth: GroundTruth,
    shares: tuple[float, float],
    classes: str | None,
    paper: tuple[float | None, float | None],
) -> None:
    """The rows that need no map: the whole image, and a centred box of these shares."""
    assert truth.sizes is not None
    said.boxes["whole_image"] = Boxes(boxes=whole_image_boxes(truth.sizes), grid=truth.sizes)
    said.boxes["centred_box"] = Boxes(boxes=centred_boxes(truth.sizes, shares), grid=truth.sizes)
    said.methods["whole_image"] = Method(
        title="Whole image", box="whole_image", classes=classes, paper=paper
    )
    said.methods["centred_box"] = Method(title="Centred box", box="centred_box", classes=classes)


def add_mean_map(said: Predictions, source: str, truth: MapTruth, classes: str | None) -> None:
    """The row of one map for all images: the mean of the maps `source`, which has seen no box."""
    counts, n = said.counts[source], len(truth.rows)
    mean = counts.levels / (255 * counts.maps)
    (box,), (found,) = localize(mean[None])
    (levels,) = quantize(stretch(mean[None]))
    at_levels = level_boxes(levels)
    sweep = no_counts(*mean.shape).sweep
    aucs = np.full((2, n), np.nan)
    for image in range(n):
        sweep_image(at_levels, np.array(mean.shape), image, truth, sweep)
        aucs[:, image] = image_aucs(levels, image, truth)
    said.boxes["mean_map"] = Boxes(
        boxes=np.tile(box, (n, 1)), grid=np.array(mean.shape), found=np.full(n, bool(found))
    )
    said.aucs["mean_map"] = (aucs[0], aucs[1])
    said.counts["mean_map"] = MapCounts(sweep=sweep, levels=counts.levels, maps=counts.maps)
    said.methods["mean_map"] = Method(
        title=f"Mean of all {'ALN' if source == 'aln' else 'given'} maps",
        box="mean_map",
        classes=classes,
        map="mean_map",
    )


def add_guesses(said: Predictions, guesses: Guesses) -> None:
    """The row of boxes and classes that a file gave; its first guess is its box."""
    said.guesses = guesses
    said.boxes["predictions"] = Boxes(boxes=guesses.boxes[:, 0], grid=NO_GRID, given=True)
    if (guesses.labels >= 0).any():
        said.classes["file"] = guesses.labels
    said.methods["predictions"] = Method(
        title="Given predictions",
        box="predictions",
        classes="file" if "file" in said.classes else None,
    )


@dataclass(frozen=True, kw_only=True)
class Scorer:
    """Scores boxes against a ground truth under protocols."""

    truth: GroundTruth
    protocol: str

    @property
    def sizes(self) -> np.ndarray:
        """Original (height, width) of each image; none matter where they are unknown, since only
        given boxes are scored then, under a protocol that needs no size."""
        if self.truth.sizes is None:
            return np.ones((len(self.truth.ids), 2), np.int64)
        return self.truth.sizes

    def ious(self, boxes: Boxes, protocol: str, *, first_box: bool = False) -> np.ndarray:
        """IoU of each box with the best (or the first) true box: float64 [N], NaN for none."""
        truths, starts = self.truth.boxes, self.truth.starts
        if first_box:
            truths = truths[starts[:-1][np.diff(starts) > 0]]
            starts = np.concatenate([[0], np.cumsum(np.diff(starts) > 0)])
        owners = np.repeat(np.arange(len(self.sizes)), np.diff(starts))
        read = truth_boxes(truths, self.sizes[owners], protocol)
        if boxes.given:
            mine = truth_boxes(boxes.boxes, self.sizes, protocol)
        else:
            mine = own_boxes(boxes.boxes, boxes.grid, self.sizes, protocol)
        return best_iou(mine, read, starts, PROTOCOLS[protocol].plus)

    def original(self, boxes: Boxes) -> np.ndarray:
        """The boxes in inclusive original pixels, [N, 4]."""
        return boxes.boxes if boxes.given else scale_boxes(boxes.boxes, boxes.grid, self.sizes)

    def outcomes(
        self, said: Predictions, method: Method, protocol: str, *, first_box: bool = False
    ) -> Outcomes:
        """What a method says of each image, compared under a protocol."""
        boxes, labels = said.boxes[method.box], self.truth.labels
        ious = self.ious(boxes, protocol, first_box=first_box)
        right = np.nan_to_num(ious) >= IOU_THRESHOLD
        top1 = top5 = top5_right = None
        if method.classes is not None:
            classes = said.classes[method.classes]
            top1, top5 = top_k(classes, labels, 1), top_k(classes, labels, TOP)
            top5_right = right & top5
            if boxes.given and said.guesses is not None:  # each guess has a box of its own
                top5_right = self._official(said.guesses, protocol, first_box)
        found = np.ones(len(ious), bool) if boxes.found is None else boxes.found
        errors = error_kinds(
            self.original(boxes), found, right, top1, self.truth.boxes, self.truth.starts
        )
        auc, auc_other = said.aucs.get(method.map or "", (None, None))
        sweep = said.counts[method.map].sweep if method.map else None
        return Outcomes(
            ious=ious,
            errors=errors,
            top1=top1,
            top5=top5,
            top5_right=top5_right,
            auc=auc,
            auc_other=auc_other,
            sweep=sweep,
        )

    def _official(self, guesses: Guesses, protocol: str, first_box: bool) -> np.ndarray:
        right = np.zeros(len(guesses.labels), bool)
        for i in range(guesses.labels.shape[1]):
            boxes = Boxes(boxes=guesses.boxes[:, i], grid=NO_GRID, given=True)
            ious = self.ious(boxes, protocol, first_box=first_box)
            hit = np.nan_to_num(ious) >= IOU_THRESHOLD
            right |= hit & (guesses.labels[:, i] == self.truth.labels)
        return right


def variants() -> dict[str, tuple[str, bool]]:
    """The named protocols that gt_known and top1_loc are given under: (protocol, whether only the
    first true box counts)."""
    return {
        f"{protocol}{first}": (protocol, bool(first))
        for first in ("", ", first box")
        for protocol in PROTOCOLS
    }


def score(
    said: Predictions,
    truth: GroundTruth,
    *,
    protocol: str,
    seed: int,
) -> dict[str, dict[str, Any]]:
    """Every figure of every method, by name, see docs/formats.md."""
    scorer = Scorer(truth=truth, protocol=protocol)
    outcomes = {n: scorer.outcomes(said, m, protocol) for n, m in said.methods.items()}
    masks: dict[str, np.ndarray] = {}
    shares = np.zeros(0)
    if truth.sizes is not None:
        masks = subset_masks(truth.boxes, truth.starts, truth.sizes)
        shares = largest_shares(truth.boxes, truth.starts, truth.sizes)
    rows: dict[str, dict[str, Any]] = {}
    for name, method in said.methods.items():
        one = outcomes[name]
        row = {
            "title": method.title,
            "run": method.run,
            "class_from": method.classes,
            "from_map": method.map is not None,
            "paper": None
            if method.paper is None
            else dict(zip(("metric1", "metric2"), method.paper, strict=True)),
            **figures(one),
            **sweep_figures(one.sweep, one.ious, None),
            "curves": curves(one),
            "subsets": {
                subset: {
                    **figures(one, np.flatnonzero(masks[subset])),
                    **sweep_figures(one.sweep, one.ious[masks[subset]], subset),
                }
                for subset in masks
            },
            "box_sizes": size_figures(one, shares) if len(shares) else [],
        }
        found = said.boxes[method.box].found
        if found is not None:
            row["counts"]["nothing_found"] = int((~found).sum())
        if truth.classes is not None:
            parts = class_figures(one, truth.labels, len(truth.classes))
            row["classes"] = dict(zip(truth.classes, parts, strict=True))
        row["protocols"] = {}
        if truth.sizes is not None:
            for variant, (of, first_box) in variants().items():
                part = figures(scorer.outcomes(said, method, of, first_box=first_box))
                row["protocols"][variant] = {
                    figure: part[figure]
                    for figure in ("gt_known", "top1_loc", "top5_loc", "mean_iou", "n")
                }
        rows[name] = row
    for name, bounds in intervals(outcomes, rows, seed).items():
        rows[name]["interval"] = bounds
    return rows


def joined(said: Predictions, truth: GroundTruth, protocol: str, table: pa.Table) -> pa.Table:
    """`table` (a row per image) with everything said of them.

    Per box source X: `X_box` [4] in inclusive original pixels, `X_iou` with the best true box
    (null where none is known), `X_found` for those from maps, `X_error` (see model.metrics.ERRORS,
    the class left aside), and `X_auc`, `X_auc_other` of maps.
    """
    scorer = Scorer(truth=truth, protocol=protocol)
    for name, boxes in said.boxes.items():
        method = Method(title=name, box=name, classes=None)
        one = scorer.outcomes(said, method, protocol)
        known = ~np.isnan(one.ious)
        columns = {
            "box": fixed_lists(scorer.original(boxes)),
            "iou": pa.array(one.ious, from_pandas=True),
        }
        kinds = pa.array(np.array(ERRORS, object)[one.errors], pa.string(), mask=~known)
        columns["error"] = kinds
        if boxes.found is not None:
            columns["found"] = pa.array(boxes.found)
        for column, values in zip(("auc", "auc_other"), said.aucs.get(name, ()), strict=False):
            columns[column] = pa.array(values, from_pandas=True)
        for column, values in columns.items():
            table = table.append_column(f"{name}_{column}", values)
    return table
