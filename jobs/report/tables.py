"""What the report's tables hold: the rows of the evaluations, ordered and named for reading."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from jobs.report.compare import Entry, combined
from pipeline.evaluation.results import CLASSES, RowFigures

CONSTANT = ("whole image", "centred box", "mean map")  # the same box for every image


class Figure(NamedTuple):
    """A column: key in metrics.json, the heading above it, and its title."""

    key: str
    group: str
    title: str

    def text(self, value: float | None) -> str:
        """Return the value as the tables print it, without a unit."""
        return number(value) if self.key in ("mean_iou", "auc_gap") else percent(value)


FIGURES = (
    Figure("gt_known", "Box", "GT-known"),
    Figure("mean_iou", "Box", "Mean IoU"),
    Figure("max_box_acc", "Box", "MaxBoxAcc"),
    Figure("max_box_acc_v2", "Box", "MaxBoxAccV2"),
    Figure("top1_loc", "Box and class", "Top-1 loc"),
    Figure("top5_loc", "Box and class", "Top-5 loc"),
    Figure("top1_cls", "Class", "Top-1"),
    Figure("top5_cls", "Class", "Top-5"),
)
GAP = Figure("auc_gap", "Pixel AUC", "Gap")
PAIRED = (*(x for x in FIGURES if x.key in ("gt_known", "mean_iou", "top1_loc")), GAP)
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
    "differ": "Where the evaluations differ most",
    "best": "Best: largest IoU",
    "worst": "Worst: smallest IoU",
    "random": "Random others",
}


def percent(value: float | None, digits: int = 1) -> str:
    """Return a share as per cent without the sign, or a dash."""
    return "–" if value is None else f"{100 * value:.{digits}f}"


def number(value: float | None) -> str:
    """Return a value from -1 to 1 with three digits, or a dash."""
    if value is None:
        return "–"
    text = f"{value:.3f}"
    return "0.000" if float(text) == 0 else text.replace("-", "−")


def points(difference: float | None) -> str:
    """Return a difference of shares in points (hundredths) with its sign, or a dash."""
    if difference is None:
        return "–"
    text = f"{100 * difference:+.1f}"
    return "0.0" if float(text) == 0 else text.replace("-", "−")


def group_title(group: str, main: "Line") -> str:
    """Return the heading over a group of pictures; an error's tells how many images have it."""
    if group in PICTURE_GROUPS:
        return PICTURE_GROUPS[group]
    name, meaning = ERRORS[group]
    count = main.members[0].figures["errors"][group]
    return f"Error, {name}: {meaning} ({count:,.0f} images)"


@dataclass(frozen=True, kw_only=True)
class Line:
    """A row of the page's tables. r: its figures, the mean where `members` are several seeds;
    entry: the title of its method; note: what tells rows of one title apart; own: the row that its
    method is about."""

    r: RowFigures
    members: tuple[RowFigures, ...]
    entry: str
    note: str
    own: bool

    @property
    def constant(self) -> bool:
        """Return whether the box is the same for every image."""
        return self.r.row.map in CONSTANT

    @property
    def primary(self) -> bool:
        """Return whether the box follows by the paper's rule, or by none."""
        return self.r.row.rule in (None, "paper")

    @property
    def name(self) -> str:
        return f"{self.r.title}, {self.note}" if self.note else self.r.title


def page_lines(entries: Sequence[Entry]) -> list[Line]:
    """Return the rows that the page shows, constant boxes first. Of several entries, those by the
    paper's rule and by each one's own, and equal constant boxes once."""
    lines: list[Line] = []
    for entry in entries:
        for row, members in entry.members.items():
            line = Line(
                r=combined(members),
                members=members,
                entry=entry.title,
                note=_note(members[0], entry.title if len(entries) > 1 else ""),
                own=row == entry.main,
            )
            known = [(x.r.row.map, x.r.figures["gt_known"]) for x in lines if x.constant]
            again = (row.map, line.r.figures["gt_known"]) in known
            shown = line.primary or row.rule == entry.main.rule
            if len(entries) == 1 or (shown and not again):
                lines.append(line)
    return sorted(lines, key=lambda line: not line.constant)


def _note(figures: RowFigures, entry: str) -> str:
    row = figures.row
    rule = "" if row.rule in (None, "paper") else f"by {row.rule}"
    classes = f"class: {row.classes}" if row.classes else ""
    return ", ".join(filter(None, (entry, rule, classes)))


def groups(lines: Sequence[Line], entries: Sequence[Entry]) -> list[tuple[str, list[Line]]]:
    """Return the lines under headings: constant boxes, then each entry's."""
    result = {"The same for every image": [x for x in lines if x.constant]}
    for entry, title in zip(entries, headings(entries), strict=True):
        result[title] = [x for x in lines if x.entry == entry.title and not x.constant]
    return [(title, of_group) for title, of_group in result.items() if of_group]


def headings(entries: Sequence[Entry]) -> list[str]:
    """Return what was evaluated by each entry; the title goes before where there are several."""
    result = []
    for entry in entries:
        sources = [evaluation.metrics["source"] for evaluation in entry.evaluations]
        names = ", ".join(f"{source['kind']} {source['name']}".strip() for source in sources)
        title = f"{entry.title}: " if len(entries) > 1 else ""
        seeds = f" (mean of {len(sources)})" if len(sources) > 1 else ""
        result.append(f"{title}{names}{seeds}")
    return result


def class_sources(lines: Sequence[Line]) -> str:
    """Return in words what the rows' notes mean by their classes."""
    used = {line.r.row.classes for line in lines}
    return "; ".join(f"“{name}”, {text}" for name, text in CLASSES.items() if name in used)


def shown_figures(lines: Sequence[Line]) -> list[Figure]:
    """Return the figures that some row has."""
    return [f for f in FIGURES if any(line.r.figures[f.key] is not None for line in lines)]


def best_values(parts: Sequence[dict[str, Any]], keys: Sequence[str]) -> dict[str, float | None]:
    """Return the largest value of each key over the rows' figures; None where no row has one."""
    return {
        key: max((part[key] for part in parts if part.get(key) is not None), default=None)
        for key in keys
    }
