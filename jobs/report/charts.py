"""The report's charts, drawn by matplotlib as SVG, which the page inverts on a dark ground."""

import io
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from jobs.pictures import data_uri
from jobs.report.tables import CONSTANT, Line
from pipeline.evaluation.protocols import IOU_THRESHOLD

SIZE = (5.0, 3.6)  # inches of 72 SVG units; the page scales the drawing
PLOT = (0.1, 0.14, 0.87, 0.78)  # left, bottom, width and height of the axes, in shares
COLOURS = ("#0063a8", "#00755c", "#756400", "#a0307c", "#5b3fb5", "#b34700", "#1b1d21")
MAPS = ("aln", "gradient", "lrp", "cam", "given", "layercam")  # in the order of their colours
SOFT, GRID = "#5a606a", "#cdd0d3"
DASHES = ("", "6 2.5", "2 2", "8 2 2 2", "11 3", "5 2 1.5 2 1.5 2")
WIDTH, STRONG_WIDTH = 1.6, 3.0  # of lines, in SVG units
OPTIONS = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "report",  # the same file in every run
    "font.size": 11,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color"), SOFT),
    "ytick.color": SOFT,
    "grid.color": GRID,
    "axes.spines.left": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.major.size": 0,
    "xtick.major.pad": 6,
    "ytick.major.size": 0,
}


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A line of a chart. values: float [K] in [0, 1]; spread: the lowest and the highest of the
    seeds, float [2, K], or None; colour: #rrggbb; dash: an SVG dash array."""

    line: Line
    values: np.ndarray
    spread: np.ndarray | None
    colour: str
    dash: str

    @property
    def width(self) -> float:
        """The line's width in SVG units."""
        return STRONG_WIDTH if self.line.own else WIDTH


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A drawing; curves: in the order of the legend."""

    title: str
    curves: tuple[Curve, ...]
    svg: str

    @property
    def uri(self) -> str:
        """The drawing as a data URI."""
        return data_uri(self.svg.encode(), "svg+xml")


def iou_charts(lines: Sequence[Line]) -> list[Chart]:
    """Draw CorLoc over the IoU. Of one entry: all maps by the paper's box rule, and the main map by
    every rule. Of several: their main rows side by side, and the maps of each."""
    known = [x for x in lines if x.r.figures["n"]]
    main = [x for x in known if x.own]
    if len(main) > 1:
        sets = {"Side by side": [x for x in known if x.constant or x.own]}
        for own in main:
            of_entry = [x for x in known if x.entry == own.entry and not x.constant]
            sets[f"Maps of {own.entry}"] = of_entry
    else:
        sets = {"Methods": [x for x in known if x.primary]}
        for own in main:
            of_map = [x for x in known if x.r.row.map == own.r.row.map]
            sets[f"{own.r.title} by box rule"] = of_map
    charts = []
    for title, shown in sets.items():
        curves = _curves(shown)
        if len(curves) > 1:
            charts.append(_draw(curves, shown[0].r.curves["iou"], title))
    return charts


def _curves(lines: Sequence[Line]) -> list[Curve]:
    """Return the lines' curves over the IoU, the best first. Equal ones are drawn once. Rows of one
    map share a colour and differ by dash; the main rows of several methods have a colour each."""
    mains = [line for line in lines if line.own]
    curves: list[Curve] = []
    for line in lines:
        members = np.array([member.curves["gt_known"] for member in line.members])
        mean, name = members.mean(axis=0), line.r.row.map
        if any((mean == other.values).all() for other in curves):
            continue
        order = MAPS.index(name) if name in MAPS else len(MAPS)
        if len(mains) > 1 and line.own:
            order = mains.index(line)
        colour = SOFT if line.constant else COLOURS[order % len(COLOURS)]
        alike = sum(other.line.r.row.map == name for other in curves)
        dash = 1 + CONSTANT.index(name) if line.constant else alike % len(DASHES)
        curves.append(
            Curve(
                line=line,
                values=mean,
                spread=np.stack([members.min(0), members.max(0)]) if len(members) > 1 else None,
                colour=colour,
                dash=DASHES[dash],
            )
        )
    return sorted(curves, key=lambda curve: -curve.line.r.figures["gt_known"])


def _draw(curves: Sequence[Curve], x: Sequence[float], title: str) -> Chart:
    with matplotlib.rc_context(OPTIONS):  # type: ignore[arg-type]
        figure = Figure(figsize=SIZE)
        axes = figure.add_axes(PLOT)
        axes.set(xlim=(0, 1), ylim=(0, 1.005), xlabel="IoU asked for")
        axes.set_yticks(np.arange(6) / 5, [f"{20 * i}" for i in range(6)])
        axes.set_title("images right, %", loc="left", size=11, x=-0.09)
        axes.axvline(IOU_THRESHOLD, color=SOFT, linewidth=1, dashes=(2, 3))
        axes.text(IOU_THRESHOLD + 0.015, 0.95, "GT-known")
        for curve in sorted(curves, key=lambda curve: curve.line.own):
            (drawn,) = axes.plot(x, curve.values, color=curve.colour, linewidth=curve.width)
            if curve.dash:
                drawn.set_dashes([float(length) / curve.width for length in curve.dash.split()])
            if curve.spread is not None:
                axes.fill_between(x, *curve.spread, color=curve.colour, alpha=0.2, linewidth=0)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return Chart(title=title, curves=tuple(curves), svg=file.getvalue())
