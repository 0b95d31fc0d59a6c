"""The report's charts: curves of metrics.json in, SVG coordinates out; the template draws them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from jobs.evaluate.rows import OTHER_RULES
from jobs.report.tables import CONSTANT, OWN, percent
from pipeline.evaluation.protocols import IOU_THRESHOLD

VIEW = (380.0, 280.0)  # width and height of a chart's view box, in SVG units
LEFT, RIGHT, TOP, BOTTOM = 42.0, 372.0, 24.0, 238.0  # the plot's edges in it
CHARACTER = 5.9  # width of a label's character, and its height, at the labels' font size
LINE_HEIGHT = 12.0
CLEARANCE = 4.5  # units that a label's middle keeps from every line but its own
LABEL_PLACES = 40  # places along a line that are tried for its label

GREY = "grey"
COLOUR_OF = {
    "aln": "a",
    "gradient": "b",
    "lrp": "c",
    "cam": "d",
    "score_maps": "e",
    "layercam": "f",
}
WRITTEN = {"aln": "ALN", "cam": "CAM", "lrp": "LRP", "layercam": "LayerCAM"}
COLOURS = ("a", "b", "c", "d", "e", "f", "g")  # classes of the page's line colours; "a" is ALN's
DASHES = ("", "7 3", "2 3", "9 3 2 3", "12 4")


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line: y values in [0, 1] at the chart's x values. name: for the legend; label: short,
    beside the line; figure: what the legend says of it; peak: index of a point to mark, or None."""

    name: str
    label: str
    values: Sequence[float]
    colour: str
    figure: str
    dash: str = ""
    strong: bool = False
    peak: int | None = None


@dataclass(frozen=True, kw_only=True)
class Line:
    """A series in SVG units. label_at: the middle of its label and the label's angle in degrees,
    None where there is no room for one; peak_at: the marked point."""

    series: Series
    points: str
    label_at: tuple[float, float, float] | None = None
    peak_at: tuple[float, float] | None = None


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Lines with their axes. lines: in the order of drawing; legend: in that of the series;
    ticks: (position, text); mark: x position of a vertical line, and the text at its top."""

    title: str
    x_title: str
    description: str
    lines: tuple[Line, ...]
    legend: tuple[Series, ...]
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    mark: tuple[float, str] | None


def plot_x(value: float) -> float:
    """The abscissa of a value in [0, 1], in SVG units."""
    return LEFT + (RIGHT - LEFT) * value


def plot_y(value: float) -> float:
    """The ordinate of a value in [0, 1], in SVG units, which grow downwards."""
    return BOTTOM - (BOTTOM - TOP) * value


def _label_place(
    x: np.ndarray, lines: Sequence[np.ndarray], own: int, width: float, taken: list[np.ndarray]
) -> tuple[float, float, float] | None:
    best, best_clearance = None, CLEARANCE
    others = [line for i, line in enumerate(lines) if i != own]
    for centre in np.linspace(LEFT + width / 2, RIGHT - width / 2, LABEL_PLACES):
        if not x[0] <= centre <= x[-1]:
            continue
        angle, columns = 0.0, np.array([centre])
        for _ in range(2):  # the steeper the line, the fewer columns its label spans
            half = width / 2 * math.cos(angle)
            columns = np.linspace(max(centre - half, x[0]), min(centre + half, x[-1]), 15)
            heights = np.interp(columns, x, lines[own])
            slope = (heights[-1] - heights[0]) / (columns[-1] - columns[0])
            angle = math.atan(slope)
        bend = np.abs(heights - (heights[0] + slope * (columns - columns[0]))).max()
        area = np.stack([columns, heights], axis=1)
        if bend > LINE_HEIGHT / 4 or heights.max() > BOTTOM - LINE_HEIGHT / 2:
            continue
        if any(_distance(area, other) < 1.3 * LINE_HEIGHT for other in taken):
            continue
        gaps = [np.abs(np.interp(columns, x, line) - heights).min() for line in others]
        clearance = min(gaps, default=math.inf) * math.cos(angle)
        if clearance > best_clearance:
            best, best_clearance = area, clearance
            place = (float(centre), float(heights.mean()), math.degrees(angle))
    if best is None:
        return None
    taken.append(best)
    return place


def _distance(first: np.ndarray, second: np.ndarray) -> float:
    """The smallest distance of the points [n, 2] from the points [m, 2]."""
    return float(np.linalg.norm(first[:, None] - second[None], axis=-1).min())


def place_labels(
    x: np.ndarray, lines: Sequence[np.ndarray], labels: Sequence[str]
) -> list[tuple[float, float, float] | None]:
    """Where each line's label stands on its line, as on a contour map: (x, y of its middle, angle
    in degrees) or None where the line keeps no distance from the others, or is too crooked.

    x, lines: float [K], SVG units. Labels get their places in order, each the one farthest from
    all other lines that is off the labels before it.
    """
    taken: list[np.ndarray] = []
    return [
        _label_place(x, lines, i, CHARACTER * len(label), taken) for i, label in enumerate(labels)
    ]


def line_chart(
    series: Sequence[Series],
    x: Sequence[float],
    *,
    title: str,
    x_title: str,
    mark: tuple[float, str] | None = None,
) -> Chart:
    """A chart of shares over x, both axes from 0 to 1; x: ascending, in [0, 1].

    mark: x of a vertical line that the text names. Strong series are drawn last, over the others.
    """
    ordered = sorted(series, key=lambda s: s.strong)
    xs = np.array([plot_x(value) for value in x])
    ys = [np.array([plot_y(value) for value in s.values]) for s in ordered]
    lines = [
        Line(
            series=s,
            points=" ".join(f"{a:.1f},{b:.1f}" for a, b in zip(xs, y, strict=True)),
            peak_at=None if s.peak is None else (round(xs[s.peak], 1), round(y[s.peak], 1)),
        )
        for s, y in zip(ordered, ys, strict=True)
    ]
    places = place_labels(xs, ys[::-1], [s.label for s in ordered[::-1]])[::-1]
    lines = [replace(line, label_at=at) for line, at in zip(lines, places, strict=True)]
    ticks = [i / 5 for i in range(6)]
    return Chart(
        title=title,
        x_title=x_title,
        description=f"{title}: lines for {', '.join(s.name for s in series)}.",
        lines=tuple(lines),
        legend=tuple(series),
        x_ticks=tuple((plot_x(t), f"{t:g}") for t in ticks),
        y_ticks=tuple((plot_y(t), f"{100 * t:.0f}") for t in ticks),
        mark=None if mark is None else (plot_x(mark[0]), mark[1]),
    )


def short(name: str) -> str:
    """A method's name as a chart's label has room for it: aln_mean_2 -> ALN mean (2)."""
    words = [WRITTEN.get(word, word) for word in name.split("_")]
    if words[-1] == "2":
        words[-1] = "(2)"
    return " ".join(words)


def _series(
    name: str, row: dict[str, Any], values: list[float], position: int, peak: int | None = None
) -> Series:
    """Colours follow the method wherever it is drawn; a second run's or network's are dashed."""
    base = name.removesuffix("_2").removeprefix("network_")
    if base in CONSTANT:
        colour, dash = GREY, DASHES[1 + CONSTANT.index(base)]
    else:
        colour = COLOUR_OF.get(base, COLOURS[1 + position % (len(COLOURS) - 1)])
        dash = DASHES[1] if name.endswith("_2") else DASHES[2] if name != base else ""
    return Series(
        name=row["title"],
        label=short(name),
        values=values,
        figure=percent(row["gt_known"] if peak is None else values[peak]),
        colour=colour,
        dash=dash,
        strong=base in OWN,
        peak=peak,
    )


def _iou_chart(metrics: dict[str, Any], names: list[str], title: str) -> Chart:
    """CorLoc over IoU; rows with the same boxes, so the same curve, are drawn once. The legend is
    in the order of GT-known."""
    rows: dict[str, dict[str, Any]] = {}
    for name in names:
        row = metrics["methods"][name]
        if all(row["curves"]["gt_known"] != other["curves"]["gt_known"] for other in rows.values()):
            rows[name] = row
    order = sorted(rows, key=lambda name: -rows[name]["gt_known"])
    return line_chart(
        [
            _series(name, rows[name], rows[name]["curves"]["gt_known"], list(rows).index(name))
            for name in order
        ],
        rows[order[0]]["curves"]["iou"],
        title=title,
        x_title="IoU asked for",
        mark=(IOU_THRESHOLD, "GT-known"),
    )


def iou_charts(metrics: dict[str, Any]) -> list[Chart]:
    """CorLoc over IoU of the rows with figures, in charts that can be read: the methods by the
    paper's box rule, ALN by all rules, and the second run beside the first one's ALN. The other
    rows by the other rules are in the table alone."""
    names = [name for name, row in metrics["methods"].items() if row["gt_known"] is not None]
    second = [name for name in names if name.endswith("_2")]
    own = [name for name in names if name.startswith("aln_") and name not in second]
    other_rules = [
        name
        for name in names
        if name.removesuffix("_2").endswith(OTHER_RULES) and not name.startswith("aln_")
    ]
    main = [name for name in names if name not in second + own + other_rules]
    beside = [name for name in second if name not in other_rules]
    charts = [(main, "Methods"), (["aln", *own], "ALN by box rule")]
    charts.append((["aln", *beside], "Run 2, beside ALN of run 1"))
    drawn = [_iou_chart(metrics, names, title) for names, title in charts if len(names) > 1]
    return [chart for chart in drawn if len(chart.lines) > 1]


def threshold_charts(metrics: dict[str, Any]) -> list[Chart]:
    """CorLoc over the map's threshold, a chart for each IoU asked for. The best threshold is
    marked; the legend is in the order of the best values. Rows of one map are drawn once."""
    charts = []
    rows = {
        name: row
        for name, row in metrics["methods"].items()
        if row["curves"]["corloc"] is not None and row["gt_known"] is not None
    }
    levels = next((list(row["curves"]["corloc"]) for row in rows.values()), [])
    for level in levels:
        series: list[Series] = []
        for name, row in rows.items():
            values = row["curves"]["corloc"][level]
            if all(values != other.values for other in series):
                series.append(_series(name, row, values, len(series), int(np.argmax(values))))
        series.sort(key=lambda s: -max(s.values))
        grid = next(iter(rows.values()))["curves"]["thresholds"]
        title = f"Right at IoU {level}"
        charts.append(line_chart(series, grid, title=title, x_title="threshold, share of maximum"))
    return charts
