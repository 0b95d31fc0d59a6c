"""What the report's tables hold: the content of metrics.json, ordered for reading."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from scipy import stats

from pipeline.evaluation.protocols import IOU_THRESHOLD

OWN = ("aln", "score_maps", "predictions")  # rows that a page is about; the first one present is
CONSTANT = ("whole_image", "centred_box", "mean_map")  # the same box for every image
CLASS_METHODS = ("aln_2", "gradient", "cam", "layercam", "centred_box")  # beside the own
CLASS_ROWS = 25  # worst and best classes shown, where there are more than twice as many


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A column: key in metrics.json, its title, and in a line what it means."""

    key: str
    title: str
    meaning: str
    group: str

    def text(self, value: float | None) -> str:
        """The value as the tables print it, without a unit."""
        return number(value) if self.key in UNITLESS else percent(value)


UNITLESS = ("mean_iou", "auc", "auc_other", "auc_gap")
FIGURES = (
    Figure(
        key="gt_known",
        title="GT-known",
        group="Box",
        meaning="Share of images whose box has an IoU of at least 0.5 with one of the image's true "
        "boxes; the class is given.",
    ),
    Figure(
        key="mean_iou",
        title="Mean IoU",
        group="Box",
        meaning="Mean over images of the box's IoU with the true box that it fits best; from 0 to "
        "1.",
    ),
    Figure(
        key="max_box_acc",
        title="MaxBoxAcc",
        group="Box",
        meaning="GT-known with the box of the map's largest component at the one threshold, the "
        "same for all images, that gives the most (below it). It is chosen on these very images: "
        "an upper bound. Of a row without maps it is the one box.",
    ),
    Figure(
        key="max_box_acc_v2",
        title="MaxBoxAccV2",
        group="Box",
        meaning="As MaxBoxAcc, but any component's box may be right; mean over IoU 0.3, 0.5 and "
        "0.7, each at its own best threshold.",
    ),
    Figure(
        key="top1_loc",
        title="Top-1 loc",
        group="Box and class",
        meaning="Share of images whose box is right and whose first predicted class is the true "
        "one, always predicted on the unmasked image.",
    ),
    Figure(
        key="top5_loc",
        title="Top-5 loc",
        group="Box and class",
        meaning="Share with the box right and the true class among the first five: the complement "
        "of the official ILSVRC localization error.",
    ),
    Figure(
        key="top1_cls",
        title="Top-1",
        group="Class",
        meaning="Share of all images whose first predicted class is the true one.",
    ),
    Figure(
        key="top5_cls",
        title="Top-5",
        group="Class",
        meaning="The same for the first five classes.",
    ),
)
GAP = Figure(
    key="auc_gap",
    title="Gap",
    group="",
    meaning="AUC against the own box less the AUC against another image's.",
)
CLASS_SOURCES = {  # short name, what it stands for, title
    "clean_classifier": ("clean", "the classifier trained on clean images", "Clean classifier"),
    "classifier": ("co-trained", "the one trained against the masks", "Co-trained classifier"),
    "network": ("network", "the pretrained network given", "Network"),
    "other": ("other", "the classes given beside it", "Other classes"),
    "file": ("file", "the guesses' own labels", "Guesses' labels"),
}
ERRORS = {  # in the order of the bars; metrics.py decides which one an image has
    "right": ("right", "box right, and the class where the row has one"),
    "class_wrong": ("class wrong", "box right, class wrong"),
    "too_small": ("too small", "over half of the box lies in a true box"),
    "too_large": ("too large", "the box holds over 0.7 of a true box"),
    "several_instances": ("several", "it covers over 0.3 of two true boxes or more"),
    "elsewhere": ("elsewhere", "none of the other kinds"),
    "nothing_found": ("nothing found", "flat map, so the whole image was taken"),
}
SUBSET_TITLES = {"small_boxes": "box under half the image", "off_centre": "off centre"}
PICTURE_GROUPS = {
    "best": "Best: largest IoU",
    "worst": "Worst: smallest IoU",
    "random": "Random others",
}


def percent(value: float | None, digits: int = 1) -> str:
    """A share as per cent without the sign, or a dash."""
    return "–" if value is None else f"{100 * value:.{digits}f}"


def number(value: float | None) -> str:
    """A value from -1 to 1 with three digits, or a dash."""
    if value is None:
        return "–"
    text = f"{value:.3f}"
    return "0.000" if float(text) == 0 else text.replace("-", "−")


def points(difference: float | None) -> str:
    """A difference of shares in points (hundredths) with its sign, or a dash."""
    if difference is None:
        return "–"
    text = f"{100 * difference:+.1f}"
    return "0.0" if float(text) == 0 else text.replace("-", "−")


def thousands(count: int) -> str:
    """A count with its thousands apart."""
    return f"{count:,}"


def range_text(low: float, high: float) -> str:
    """A range of shares of the image's area, in per cent."""
    return f"{100 * low:g}–{100 * high:g} %"


def group_title(group: str, metrics: dict[str, Any]) -> str:
    """The heading over a group of pictures; an error's tells how many images have it."""
    if group in PICTURE_GROUPS:
        return PICTURE_GROUPS[group]
    name, meaning = ERRORS[group]
    count = metrics["methods"]["aln"]["errors"][group]
    return f"Error, {name}: {meaning} ({thousands(count)} images)"


def parts(metrics: dict[str, Any], kind: str, key: str) -> dict[str, dict[str, Any]]:
    """One subset's or protocol's figures of every row, by method name."""
    return {name: row[kind][key] for name, row in metrics["methods"].items()}


def own_row(metrics: dict[str, Any]) -> str | None:
    """The name of the row that the page is about; None where all are constant."""
    return next((name for name in OWN if name in metrics["methods"]), None)


def class_from(row: dict[str, Any]) -> str:
    """Whose class a row's figures are with, as it stands under the row's name."""
    return f"class: {CLASS_SOURCES[row['class_from'].removesuffix('_2')][0]}"


def class_sources(metrics: dict[str, Any]) -> str:
    """In words, what `class_from`'s names stand for."""
    used = {(row["class_from"] or "").removesuffix("_2") for row in metrics["methods"].values()}
    texts = [f"“{s[0]}”, {s[1]}" for source, s in CLASS_SOURCES.items() if source in used]
    return "; ".join(texts)


def classifiers(metrics: dict[str, Any]) -> dict[str, dict[str, float]]:
    """top1 and top5 of each classifier, by title."""
    found = {}
    for source, (_, _, title) in CLASS_SOURCES.items():
        for suffix, run in (
            ("", " of run 1" if f"{source}_2" in metrics else ""),
            ("_2", " of run 2"),
        ):
            if f"{source}{suffix}" in metrics:
                found[title + run] = metrics[f"{source}{suffix}"]
    return found


def grouped(metrics: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """Method names in groups with titles: constant boxes first, then by run, then the rest."""
    groups: dict[str, list[str]] = {}
    runs = metrics["runs"]
    for name, row in metrics["methods"].items():
        if name in CONSTANT:
            title = "The same for every image"
        elif row["run"] is None:
            title = "Without a run"
        else:
            number = f" {row['run'] + 1}" if len(runs) > 1 else ""
            title = f"Run{number}: {runs[row['run']]}"
        groups.setdefault(title, []).append(name)
    constants = groups.pop("The same for every image", [])
    first = [("The same for every image", constants)] if constants else []
    return first + list(groups.items())


def shown_figures(metrics: dict[str, Any]) -> list[Figure]:
    """The figures that some row has."""
    rows = metrics["methods"].values()
    return [figure for figure in FIGURES if any(row[figure.key] is not None for row in rows)]


def best_values(rows: dict[str, dict[str, Any]], keys: list[str]) -> dict[str, float | None]:
    """The largest value of each key over the rows; None where no row has one."""
    values = {key: [r[key] for r in rows.values() if r.get(key) is not None] for key in keys}
    return {key: max(found, default=None) for key, found in values.items()}


def comparisons(metrics: dict[str, Any]) -> list[dict[str, str]]:
    """GT-known localization of the page's own rows against the constant rows and the others, those
    of a second run aside: what is compared, the difference in points, both figures. Of either side
    its best row counts: maps have a choice of box rules, a constant row has one box. The text names
    the rows."""
    name = own_row(metrics)
    scored = {
        other: row
        for other, row in metrics["methods"].items()
        if row["gt_known"] is not None and row["run"] != 1
    }
    if name is None or name not in scored:
        return []
    own = max(
        (row for other, row in scored.items() if other.startswith(name)),
        key=lambda row: row["gt_known"],
    )
    others = {other: row for other, row in scored.items() if not other.startswith(name)}
    kinds: dict[str, Callable[[str], bool]] = {
        "Best rule against the best box that ignores the image": lambda other: other in CONSTANT,
        "Best rule against the best other method": lambda other: other not in CONSTANT,
    }
    result = []
    for title, belongs in kinds.items():
        of_kind = [row for other, row in others.items() if belongs(other)]
        if of_kind:
            best = max(of_kind, key=lambda row: row["gt_known"])
            text = "; ".join(f"{r['title']}: {percent(r['gt_known'])} %" for r in (own, best))
            difference = points(own["gt_known"] - best["gt_known"])
            result.append({"title": title, "value": difference, "text": text})
    return result


def paired_runs(metrics: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows that both runs have: title, and for each figure (value of run 1, of run 2, difference
    in points as text, whether the intervals are disjoint), None where either has no value."""
    methods = metrics["methods"]
    result = []
    for name, row in methods.items():
        other = methods.get(f"{name}_2")
        if other is None:
            continue
        cells: dict[str, tuple[Any, ...] | None] = {}
        for figure in (*FIGURES, GAP):
            pair = row[figure.key], other[figure.key]
            if None in pair:
                cells[figure.key] = None
                continue
            bounds = row["interval"].get(figure.key), other["interval"].get(figure.key)
            apart = None not in bounds and (
                bounds[0][1] < bounds[1][0] or bounds[1][1] < bounds[0][0]
            )
            cells[figure.key] = (*map(figure.text, pair), points(pair[1] - pair[0]), apart)
        result.append({"name": name, "title": row["title"], "cells": cells})
    return result


def agreement(predictions: pa.Table) -> dict[str, Any] | None:
    """On how many images the boxes of run 1 and run 2 are right, image by image; p_value: of
    McNemar's exact test that both are right equally often. None with one run or no known box."""
    if not {"aln_iou", "aln_2_iou"} <= set(predictions.column_names):
        return None
    first, second = (predictions[f"{name}_iou"].to_numpy() for name in ("aln", "aln_2"))
    known = ~np.isnan(first)  # null becomes NaN
    if not known.any():
        return None
    a, b = first[known] >= IOU_THRESHOLD, second[known] >= IOU_THRESHOLD
    counts = {
        "both": int((a & b).sum()),
        "first": int((a & ~b).sum()),
        "second": int((~a & b).sum()),
        "neither": int((~a & ~b).sum()),
    }
    unequal = counts["first"] + counts["second"]
    p_value = stats.binomtest(counts["second"], unequal).pvalue if unequal else 1.0
    return {**counts, "images": int(known.sum()), "p_value": float(p_value)}


def class_rows(metrics: dict[str, Any]) -> list[dict[str, Any]]:
    """Per class the own row's figures and the others' GT-known, worst first; those without known
    boxes last. Empty where the classes have no names."""
    name, methods, names = own_row(metrics), metrics["methods"], metrics.get("class_names")
    if name is None or not names:
        return []
    others = [other for other in CLASS_METHODS if other in methods]
    rows = [
        {
            "wnid": wnid,
            "name": names[wnid],
            **part,
            "others": [methods[other]["classes"][wnid]["gt_known"] for other in others],
        }
        for wnid, part in methods[name]["classes"].items()
    ]
    rows.sort(key=lambda r: (r["gt_known"] is None, r["gt_known"], r["mean_iou"] or 0.0, r["wnid"]))
    return rows
