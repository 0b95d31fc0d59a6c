"""Several evaluations of the same images: seeds as mean and spread, two methods image by image."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import fmean
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import UserError
from pipeline.evaluation.bootstrap import bootstrap_intervals
from pipeline.evaluation.protocols import IOU_THRESHOLD
from pipeline.evaluation.results import Evaluation, Row, RowFigures

MAIN_MAPS = {  # by kind of source
    "run": "aln",
    "network": "cam",
    "score maps": "given",
    "boxes": "given",
    "constant boxes": "centred box",
}
SAME = "compare evaluations of the same ground truth by one protocol"
AVERAGED = ("figures", "curves", "subsets")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A method of the page: one evaluation, or those of several seeds. members: each row's figures,
    by evaluation; main: the row that the evaluations are about."""

    title: str
    evaluations: tuple[Evaluation, ...]
    members: dict[Row, tuple[RowFigures, ...]]
    main: Row

    @cached_property
    def images(self) -> tuple[pa.Table, ...]:
        """Return images.parquet of each evaluation, sorted by id."""
        return tuple(evaluation.images().sort_by("id") for evaluation in self.evaluations)


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A figure of two rows; interval: 95 %, of second less first."""

    first: float
    second: float
    interval: tuple[float, float]


def entries_of(evaluations: Sequence[Evaluation], titles: Sequence[str]) -> list[Entry]:
    """Return the evaluations by title, in order: those of one title are seeds of one method. Raises
    UserError where their images, true boxes or protocols differ, or the rows of one title."""
    by_title: dict[str, list[Evaluation]] = {}
    for evaluation, title in zip(evaluations, titles, strict=True):
        by_title.setdefault(title, []).append(evaluation)
    entries = []
    for title, chosen in by_title.items():
        members = _members(chosen, title)
        main_map = MAIN_MAPS[chosen[0].metrics["source"]["kind"]]
        rows = [row for row in members if row.map == main_map]
        rule = chosen[0].metrics["rule"]
        main = next((row for row in rows if row.rule == rule), rows[0])
        entries.append(Entry(title=title, evaluations=tuple(chosen), members=members, main=main))
    _check_same_truth(entries)
    return entries


def _members(evaluations: Sequence[Evaluation], title: str) -> dict[Row, tuple[RowFigures, ...]]:
    tables = [{figures.row: figures for figures in e.rows} for e in evaluations]
    for evaluation, table in zip(evaluations, tables, strict=True):
        if differing := table.keys() ^ tables[0].keys():
            raise UserError(
                f"{evaluations[0].folder} and {evaluation.folder} have one title, {title}, but the "
                f"row {differing.pop()} in one alone; give them different titles."
            )
    return {row: tuple(table[row] for table in tables) for row in tables[0]}


def _check_same_truth(entries: Sequence[Entry]) -> None:
    (first, images), *rest = [
        pair for entry in entries for pair in zip(entry.evaluations, entry.images, strict=True)
    ]
    for second, others in rest:
        both = f"{first.folder} and {second.folder}"
        protocols = first.metrics["protocol"], second.metrics["protocol"]
        if protocols[0] != protocols[1]:
            raise UserError(f"{both} have the protocols {protocols[0]} and {protocols[1]}; {SAME}.")
        only = set(images["id"].to_pylist()) ^ set(others["id"].to_pylist())
        if only:
            raise UserError(f"{both}: {len(only)} images are in one only, as {min(only)}; {SAME}.")
        for column in ("label", "boxes"):
            columns = (images["id"], images[column], others[column])
            lines = zip(*(values.to_pylist() for values in columns), strict=True)
            if differing := [name for name, a, b in lines if a != b]:
                raise UserError(
                    f"{both} have another {column} of {len(differing)} images, as {differing[0]}; "
                    f"{SAME}."
                )


def combined(members: Sequence[RowFigures]) -> RowFigures:
    """Return the mean of several seeds' figures; as interval, the lowest and the highest."""
    if len(members) == 1:
        return members[0]
    parts = {name: _mean([getattr(m, name) for m in members]) for name in AVERAGED}
    spread: dict[str, list[float] | None] = {}
    for key in members[0].interval:
        values = [m.figures[key] for m in members]
        spread[key] = None if None in values else [min(values), max(values)]
    return replace(members[0], interval=spread, **parts)


def _mean(values: Sequence[Any]) -> Any:
    """Return the mean of nested dicts and lists of numbers, number by number; None where any is."""
    first = values[0]
    if isinstance(first, dict):
        return {key: _mean([value[key] for value in values]) for key in first}
    if isinstance(first, list):
        return [_mean(items) for items in zip(*values, strict=True)]
    if all(value == first for value in values):
        return first
    return None if None in values else fmean(values)


def first_class(images: pa.Table, column: str, classes: str) -> pa.Array:
    """Return the first of the "classes" or "scores" of a classifier, null where it has none."""
    lists = pc.struct_field(images[column], classes).combine_chunks()
    return pc.list_slice(lists, 0, 1, return_fixed_size_list=True).flatten()


def right_classes(images: pa.Table, classes: str) -> np.ndarray:
    """Return whether the first class of a classifier is the label: bool [N]."""
    same = pc.equal(first_class(images, "classes", classes), images["label"].combine_chunks())
    return same.fill_null(False).to_numpy(zero_copy_only=False)


def compare(first: Entry, second: Entry, seed: int) -> dict[str, Difference]:
    """Return the differences of the figures that both main rows have, paired by image."""
    a, b = _per_image(first), _per_image(second)
    differences = {}
    for figure in [name for name in a if name in b]:
        known = ~np.isnan(a[figure] + b[figure])
        if known.any():
            x, y = a[figure][known], b[figure][known]
            ((low, high),) = bootstrap_intervals((y - x)[:, None], seed).tolist()
            differences[figure] = Difference(first=fmean(x), second=fmean(y), interval=(low, high))
    return differences


def _per_image(entry: Entry) -> dict[str, np.ndarray]:
    """Return the main row's figures that are means over images, image by image, as the mean over
    the seeds: float64 [N], NaN where a figure is not known."""
    row, seeds = entry.main, []
    for evaluation, images in zip(entry.evaluations, entry.images, strict=True):
        table = evaluation.predictions(row.map, row.rule).take(images["image"])
        ious, auc, other = (table[name].to_numpy() for name in ("iou", "auc", "auc_other"))
        right = np.where(np.isnan(ious), np.nan, ious >= IOU_THRESHOLD)
        figures = {"gt_known": right, "mean_iou": ious, "auc_gap": auc - other}
        if row.classes is not None:
            figures["top1_loc"] = right * right_classes(images, row.classes)
        seeds.append(figures)
    return {name: np.mean([figures[name] for figures in seeds], axis=0) for name in seeds[0]}
