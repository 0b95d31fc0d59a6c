"""The report: which images it shows, that it stands alone, and that it shows the figures."""

import base64
import copy
import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import chain
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pytest

from jobs.evaluate.config import EvaluateConfig
from jobs.pictures import heat
from jobs.report.__main__ import PER_GROUP, Picture, choose, most_different, render, report_pictures
from jobs.report.charts import (
    BOTTOM,
    LEFT,
    RIGHT,
    TOP,
    Series,
    iou_charts,
    line_chart,
    place_labels,
    short,
)
from jobs.report.tables import agreement, class_rows, comparisons, grouped, number, percent, points
from pipeline.shards.ledger import read_ledger
from tests.jobs.report.made_metrics import made_metrics, made_predictions

VOID = {"meta", "link", "br", "img"}
HOSTILE = """<script>alert('x')</script>"><img src=x onerror="alert(1)">'&amp;"""
NOTHING = pa.table({})


class Page(HTMLParser):
    """Collects text, references, the tables' cells and the words in bold, and checks that tags
    close in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.references: list[str] = []
        self.alternatives: list[str | None] = []
        self.counts: dict[str, int] = {}
        self.text = ""
        self.tables: dict[str, list[list[str]]] = {}  # cells of the rows, by the region's label
        self.best: list[tuple[int, str]] = []  # column and text of what is marked as the best
        self._region = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.counts[tag] = self.counts.get(tag, 0) + 1
        values = dict(attrs)
        self.references += [v or "" for k, v in attrs if k in ("src", "href", "srcset", "data")]
        assert not [name for name in values if name.startswith("on")]
        if tag == "img":
            self.alternatives.append(values.get("alt"))
        if values.get("role") == "region":
            self._region = values["aria-label"] or ""
        if tag == "table":
            self.tables[self._region] = []
        elif tag == "tr":
            self.tables[self._region].append([])
        elif tag in ("td", "th"):
            self.tables[self._region][-1].append("")
        if values.get("class") == "best":
            self.best.append((len(self.tables[self._region][-1]) - 1, self._region))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if {"td", "th"} & set(self.open):
            self.tables[self._region][-1][-1] += " " + data.strip()

    def row(self, region: str, title: str) -> list[str]:
        """The one row of a table whose first cell starts with the title, less that cell."""
        (found,) = [
            r for r in self.tables[region] if re.match(rf" {re.escape(title)}( class|$)", r[0])
        ]
        return [" ".join(cell.split()) for cell in found[1:]]


@pytest.fixture(scope="module")
def config(small_set: Path, random_run: Path) -> EvaluateConfig:
    return EvaluateConfig(data=str(small_set), run=(random_run,), output=small_set.parent / "eval")


@pytest.fixture(scope="module")
def predictions(small_set: Path) -> pa.Table:
    """Invented boxes and classes of two runs for the 24 val images: image i has IoU i / 24 in run
    1 and, but for the first two, the same in run 2; from 0.5 on every third is of another class."""
    columns = ["row", "key", "id", "label", "shard", "width", "height", "boxes"]
    table = read_ledger(small_set, "val", columns)
    n = table.num_rows
    labels = table["label"].to_numpy()
    ious = np.arange(n) / n
    kinds = [
        "right" if iou >= 0.5 else "too_small" if i % 2 else "elsewhere"
        for i, iou in enumerate(ious)
    ]
    named = np.where(np.arange(n) % 3 == 0, (labels + 1) % 8, labels)
    for end, of_run in (
        ("", ious),
        ("_2", np.where(np.arange(n) < 2, [0.9, 0.8] * (n // 2), ious)),
    ):
        for name, values in {
            f"aln{end}_box": [[1, 2, 10 + i, 20] for i in range(n)],
            f"aln{end}_iou": of_run.tolist(),
            f"aln{end}_found": [True] * n,
            f"aln{end}_error": kinds,
            f"classifier{end}_classes": [[c, (c + 2) % 8] for c in named.tolist()],
            f"classifier{end}_scores": [[0.75, 0.25]] * n,
        }.items():
            table = table.append_column(name, pa.array(values))
    return table


@pytest.fixture(scope="module")
def pictures(config: EvaluateConfig, predictions: pa.Table) -> dict[str, list[Picture]]:
    return report_pictures(config, predictions)


def page_of(metrics: dict[str, Any], predictions: pa.Table = NOTHING) -> Page:
    return Page(render(metrics, predictions, {}))


def test_heat_is_dark_at_zero_and_yellow_at_one_without_stretching() -> None:
    colours = heat(np.array([[0.0, 1.0, 2.0, 0.5]])).astype(int)
    assert colours[0, 0].tolist() == [68, 1, 84]  # viridis
    assert colours[0, 1].tolist() == [253, 231, 37]
    assert colours[0, 2].tolist() == [253, 231, 37]
    assert abs(colours[0, 3] - [33, 145, 140]).max() <= 2


def test_best_worst_and_random_are_disjoint_and_in_order() -> None:
    ious = np.array([0.5, np.nan, 0.9, 0.0, 0.7, 0.0, 0.3, np.nan, 0.9])
    none = [None] * 9
    groups = choose(ious, none, 2, seed=0)
    assert groups["best"] == [2, 8]
    assert groups["worst"] == [3, 5]
    assert len(groups["random"]) == 2
    assert not set(groups["random"]) & {2, 8, 3, 5}
    assert groups == choose(ious, none, 2, seed=0)
    everything = choose(ious, none, 100, seed=0)
    assert sorted(chain(*everything.values())) == list(range(9))
    assert choose(np.full(3, np.nan), none[:3], 2, seed=0)["best"] == []


def test_each_kind_of_error_shows_images_of_that_kind_alone() -> None:
    errors = ["right", "too_small", None, "too_small", "too_small", "elsewhere", "class_wrong"]
    groups = choose(np.linspace(0, 1, 7), errors, 2, seed=3)
    assert len(groups["too_small"]) == 2
    assert set(groups["too_small"]) <= {1, 3, 4}
    assert (groups["elsewhere"], groups["class_wrong"]) == ([5], [6])
    assert groups["nothing_found"] == groups["too_large"] == []
    assert "right" not in groups


def test_the_most_different_images_come_in_order_and_equal_or_unknown_ones_never() -> None:
    first = np.array([0.1, 0.5, np.nan, 0.9, 0.3])
    second = np.array([0.4, 0.5, np.nan, 0.1, 0.2])
    assert most_different(first, second, 9) == [3, 0, 4]
    assert most_different(first, second, 2) == [3, 0]


def test_pictures_show_the_chosen_images_at_the_stored_size(
    predictions: pa.Table, pictures: dict[str, list[Picture]]
) -> None:
    rows = {row["id"]: row for row in predictions.to_pylist()}
    best = sorted((row["aln_iou"] for row in rows.values()), reverse=True)[:PER_GROUP]
    assert [picture.views[0].iou for picture in pictures["best"]] == best
    for picture in chain(*pictures.values()):
        (view,) = picture.views
        row = rows[picture.id]
        assert (view.box, picture.truths) == (row["aln_box"], row["boxes"])
        for uri in (picture.image, view.map, view.masked):
            data = np.frombuffer(base64.b64decode(uri.split(",")[1]), np.uint8)
            image = cv2.imdecode(data, cv2.IMREAD_COLOR)
            assert image is not None
            assert image.shape == (32, 32, 3)


def test_a_map_keeps_the_colours_of_heat_in_its_smaller_file(
    config: EvaluateConfig, pictures: dict[str, list[Picture]]
) -> None:
    view = pictures["best"][0].views[0]
    data = np.frombuffer(base64.b64decode(view.map.split(",")[1]), np.uint8)
    decoded = cv2.imdecode(data, cv2.IMREAD_COLOR)
    assert decoded is not None
    colours = {tuple(colour) for colour in decoded[..., ::-1].reshape(-1, 3).tolist()}
    assert colours <= {tuple(c) for c in heat(np.arange(256)[None] / 255)[0].tolist()}


def test_a_right_box_with_a_wrong_class_is_an_error_of_the_class(
    predictions: pa.Table, pictures: dict[str, list[Picture]]
) -> None:
    shown = {p.id for p in pictures["class_wrong"]}
    ids = predictions["id"].to_pylist()
    assert shown == {ids[i] for i in (12, 15, 18, 21)}
    assert all(p.views[0].error == "class_wrong" for p in pictures["class_wrong"])
    assert all(p.views[0].predicted != p.label for p in pictures["class_wrong"])


def test_two_runs_show_both_views_where_they_differ_most(
    config: EvaluateConfig, predictions: pa.Table
) -> None:
    both = replace(config, run=config.run * 2)
    groups = report_pictures(both, predictions)
    ids = predictions["id"].to_pylist()
    assert [p.id for p in groups["differ"]] == ids[:2]
    assert [[v.iou for v in p.views] for p in groups["differ"]] == [
        [0.0, 0.9],
        [pytest.approx(1 / 24), 0.8],
    ]
    assert all(len(p.views) == 1 for p in groups["best"])
    page = Page(render(made_metrics(runs=2), predictions, groups))
    assert "Where the runs differ most" in page.text


@pytest.mark.parametrize("changes", [{"data": None}, {"run": ()}])
def test_without_shards_or_run_there_are_no_pictures(
    config: EvaluateConfig, changes: dict[str, Any]
) -> None:
    without = copy.copy(config)
    for name, value in changes.items():
        object.__setattr__(without, name, value)
    assert report_pictures(without, NOTHING) == {}


@pytest.mark.parametrize("runs", [0, 1, 2])
def test_the_page_stands_alone_and_is_well_formed(
    runs: int, pictures: dict[str, list[Picture]]
) -> None:
    shown = pictures if runs else {}
    html = render(made_metrics(runs=runs), NOTHING, shown)
    page = Page(html)
    assert page.open == []
    assert all(reference.startswith(("data:", "#")) for reference in page.references)
    ids = re.findall(r' id="([^"]+)"', html)
    assert len(set(ids)) == len(ids)
    assert {r[1:] for r in page.references if r.startswith("#")} <= set(ids)
    assert "script" not in page.counts
    assert not re.search(r"url\(|@import|https?:", html)
    assert page.counts.get("img", 0) == 3 * sum(map(len, shown.values()))
    assert all(page.alternatives)
    assert page.counts["caption"] == page.counts["table"]
    assert 'name="viewport"' in html
    assert "prefers-color-scheme: dark" in html


def test_the_table_shows_every_method_with_its_figures_intervals_and_the_papers() -> None:
    metrics = made_metrics()
    metrics["methods"]["aln"] |= {"gt_known": 0.7654, "mean_iou": 0.61749}
    metrics["methods"]["aln"]["interval"] |= {"gt_known": [0.7, 0.8211], "mean_iou": None}
    metrics["methods"]["cam"] |= {"max_box_acc": 0.5, "max_box_acc_threshold": 0.07}
    page = page_of(metrics)
    titles = {" ".join(row[0].split()) for row in page.tables["All methods"]}
    for row in metrics["methods"].values():
        assert any(title.startswith(row["title"]) for title in titles)
    assert page.row("All methods", "ALN")[:2] == ["76.5 70.0–82.1", "0.617"]
    assert page.row("All methods", "ALN")[-3:] == ["56.5", "45.5", "500"]
    assert page.row("All methods", "Whole image")[-3:] == ["41.0", "34.3", "500"]
    assert page.row("All methods", "CAM")[-3:] == ["", "", "500"]
    assert page.row("All methods", "CAM")[2].split() == ["50.0", "at", "0.07"]
    assert "ILSVRC val" in page.text


def test_the_best_of_each_column_is_marked_and_ties_are_all_marked() -> None:
    metrics = made_metrics()
    for i, row in enumerate(metrics["methods"].values()):
        row["gt_known"] = 0.5 if i in (1, 4) else 0.25
    page = page_of(metrics)
    marked = [column for column, region in page.best if region == "All methods"]
    assert marked.count(1) == 2
    figures = 8
    assert set(marked) == set(range(1, figures + 1))
    for row in (page.row("All methods", "Centred box"), page.row("All methods", "LRP")):
        assert row[0].startswith("50.0")


def test_protocol_subsets_sizes_and_errors_show_their_numbers() -> None:
    metrics = made_metrics()
    aln = metrics["methods"]["aln"]
    aln["protocols"]["int224"] = {"gt_known": 0.1234, "top1_loc": 0.1, "mean_iou": 0.3456}
    aln["subsets"]["off_centre"] |= {"gt_known": 0.2222, "top1_loc": 0.1111}
    aln["box_sizes"][0] |= {"gt_known": None, "mean_iou": None, "n": 0}
    aln["box_sizes"][1] |= {"gt_known": 0.3333, "mean_iou": 0.25}
    kinds = ("right", "class_wrong", "too_small", "too_large", "several_instances", "elsewhere")
    aln["errors"] = dict(zip((*kinds, "nothing_found"), (5, 3, 1, 0, 0, 1, 0), strict=True))
    page = page_of(metrics)
    assert page.row("Protocols", "ALN")[2] == "12.3 10.0 · 0.346"
    assert page.row("What the image adds", "ALN")[-1] == "22.2 11.1"
    assert page.row("What the image adds", "ALN")[:3] == ["0.800", "0.720", "0.080"]
    assert page.row("By object size", "ALN")[:2] == ["–", "33.3 0.250"]
    assert page.row("Where boxes fail", "ALN")[1:] == [
        "50.0",
        "30.0",
        "10.0",
        "0",
        "0",
        "10.0",
        "0",
    ]


def test_stacked_bars_have_the_counts_as_widths() -> None:
    """A bar of each method, of the own row's size bins, and of its classes."""
    metrics = made_metrics()
    html = render(metrics, NOTHING, {})
    bars = re.findall(r'<span class="stack".*?</span>', html, re.DOTALL)
    aln = metrics["methods"]["aln"]
    classes = {row["name"]: row for row in class_rows(metrics)}
    parts = [*metrics["methods"].values(), *aln["box_sizes"], *classes.values()]
    assert len(bars) == len(parts)
    for bar, part in zip(bars, parts, strict=True):
        widths = [int(width) for width in re.findall(r"flex:(\d+) 0 0", bar)]
        assert sum(widths) == part["n"]
        assert sorted(widths) == sorted(filter(None, part["errors"].values()))


def test_two_runs_are_compared_in_points_and_disjoint_intervals_are_marked() -> None:
    metrics = made_metrics(runs=2)
    methods = metrics["methods"]
    methods["aln"] |= {"gt_known": 0.5, "mean_iou": 0.7}
    methods["aln_2"] |= {"gt_known": 0.6234, "mean_iou": 0.6911, "top5_cls": None}
    methods["aln"]["interval"] |= {"gt_known": [0.45, 0.55], "mean_iou": [0.65, 0.75]}
    methods["aln_2"]["interval"] |= {"gt_known": [0.5501, 0.66], "mean_iou": [0.6, 0.72]}
    page = page_of(metrics)
    row = page.row("Two runs compared", "ALN")
    assert row[:2] == ["+12.3 50.0 → 62.3", "−0.9 0.700 → 0.691"]
    assert row[7] == "–"
    html = render(metrics, NOTHING, {})
    assert '<b class="best">+12.3</b>' in html
    assert '<b class="best">−0.9</b>' not in html
    assert "Two runs" not in page_of(made_metrics(runs=1)).text


def test_agreement_counts_pairs_and_tests_them_exactly() -> None:
    #        both, only 1, five times only 2, neither twice, unknown
    first = [0.9, 0.8, 0.1, 0.2, 0.3, 0.4, 0.0, 0.49, 0.1, None]
    second = [0.5, 0.2, 0.6, 0.6, 0.6, 0.6, 0.6, 0.2, 0.1, None]
    found = agreement(made_predictions({"aln": first, "aln_2": second}))
    assert found is not None
    assert [found[k] for k in ("both", "first", "second", "neither", "images")] == [1, 1, 5, 2, 9]
    assert found["p_value"] == pytest.approx(2 * (1 + 6) / 2**6)  # McNemar: 1 or fewer of 6 flips
    same = agreement(made_predictions({"aln": [0.9, 0.1], "aln_2": [0.9, 0.1]}))
    assert same is not None
    assert same["p_value"] == 1.0
    assert agreement(made_predictions({"aln": first})) is None
    assert agreement(made_predictions({"aln": [None], "aln_2": [None]})) is None


def test_the_tiles_compare_the_best_row_of_either_side_within_the_first_run() -> None:
    metrics = made_metrics(runs=2)
    shares = {"whole_image": 0.3, "centred_box": 0.45, "gradient": 0.7, "cam": 0.2, "aln": 0.5}
    shares |= {"aln_mean": 0.6, "aln_quantile": 0.55, "aln_clean_class": 0.5, "mean_map": 0.1}
    for name, row in metrics["methods"].items():
        row["gt_known"] = shares.get(name, 0.1 if name in ("lrp", "layercam") else 0.99)
    found = comparisons(metrics)
    assert [c["value"] for c in found] == ["+15.0", "−10.0"]
    assert found[0]["text"] == "ALN, threshold mean: 60.0 %; Centred box: 45.0 %"
    assert found[1]["text"] == "ALN, threshold mean: 60.0 %; Gradient saliency, blurred: 70.0 %"
    for name in [name for name in metrics["methods"] if name.startswith("aln")]:
        del metrics["methods"][name]
    assert comparisons(metrics) == []


def test_curves_of_baselines_are_drawn_by_the_papers_box_rule_alone() -> None:
    metrics = made_metrics(runs=2)
    methods = metrics["methods"]
    for name in ("cam", "cam_2"):
        other = "cam_quantile" + name.removeprefix("cam")
        methods[other] = methods["gradient"] | {"title": f"{methods[name]['title']}, by quantile"}
    drawn = [series.name for chart in iou_charts(metrics) for series in chart.legend]
    assert {"CAM", "CAM, run 2", "ALN, area quantile"} <= set(drawn)
    assert not any("by quantile" in name for name in drawn)


def test_rows_are_grouped_by_where_they_come_from() -> None:
    metrics = made_metrics(runs=2)
    groups = dict(grouped(metrics))
    assert list(groups) == [
        "The same for every image",
        "Run 1: runs/trial-0",
        "Run 2: runs/trial-1",
    ]
    assert sorted(chain(*groups.values())) == sorted(metrics["methods"])


def test_worst_and_best_classes_are_shown_where_there_are_many() -> None:
    metrics = made_metrics(classes=1000, images=3000)
    for i, part in enumerate(metrics["methods"]["aln"]["classes"].values()):
        part["gt_known"] = i / 1000
    html = render(metrics, NOTHING, {})
    page = Page(html)
    worst = page.tables["The 25 worst classes of 1000, worst first"]
    best = page.tables["The 25 best classes, best first; metrics.json has all"]
    assert [row[0].split()[1] for row in worst[1:]] == [str(i) for i in range(25)]
    assert [row[0].split()[1] for row in best[1:]] == [str(i) for i in range(999, 974, -1)]
    assert best[1][1].split() == ["99.9"]
    assert len(html) < 1_000_000


def test_names_from_the_data_cannot_become_markup(pictures: dict[str, list[Picture]]) -> None:
    metrics = made_metrics(runs=2)
    metrics["class_names"][next(iter(metrics["class_names"]))] = HOSTILE
    metrics["runs"][0] = HOSTILE
    metrics["commit"] = metrics["split"] = HOSTILE
    metrics["configuration"]["data"] = HOSTILE
    metrics["methods"]["cam"]["title"] = HOSTILE
    view = replace(pictures["best"][0].views[0], predicted=HOSTILE)
    hostile = replace(pictures["best"][0], id=HOSTILE, label=HOSTILE, views=(view,))
    page = Page(render(metrics, NOTHING, {"best": [hostile]}))
    assert "script" not in page.counts
    assert page.counts["img"] == 3
    assert page.open == []
    assert page.text.count("<script>alert('x')</script>") >= 8
    assert page.alternatives[0] == f"Image {HOSTILE} with the true boxes and the predicted one"


def test_a_set_without_known_boxes_still_has_a_page() -> None:
    metrics = made_metrics()
    names = ("gt_known", "top1_loc", "top5_loc", "mean_iou", "auc", "auc_other", "auc_gap")
    sweeps = ("max_box_acc", "max_box_acc_v2", "max_box_acc_threshold")
    unknown = dict.fromkeys((*names, *sweeps))
    for row in metrics["methods"].values():
        row |= unknown | {"n": 0}
        row["interval"] = {}
        row["errors"] = dict.fromkeys(row["errors"], 0)
        parts = row["classes"].values(), row["subsets"].values(), row["protocols"].values()
        for part in chain(*parts, row["box_sizes"]):
            part |= dict.fromkeys(name for name in names if name in part) | {"n": 0}
    page = page_of(metrics)
    assert not re.search(r"\b(None|nan)\b", page.text.split("Configuration")[0])
    assert "500 evaluated, each exactly once, of which 0 have known boxes" in page.text
    assert "svg" not in page.counts


def test_ground_truth_alone_gives_a_page_without_classes_and_pictures() -> None:
    metrics = made_metrics(runs=0)
    metrics["split"] = None
    page = page_of(metrics)
    assert "constant boxes" in page.text
    assert "Top-1" not in page.text
    assert "Classes" not in page.text
    assert "None" not in page.text.split("Configuration")[0]
    for row in metrics["methods"].values():  # without image sizes no more is known
        row |= {"subsets": {}, "box_sizes": [], "protocols": {}}
    assert {"Protocols", "By object size"}.isdisjoint(page_of(metrics).tables)


def test_numbers_are_printed_with_a_dash_for_none_and_a_true_minus() -> None:
    assert [percent(v) for v in (None, 0.0, 0.12345, 1.0)] == ["–", "0.0", "12.3", "100.0"]
    assert [number(v) for v in (None, -1e-5, -0.0421)] == ["–", "0.000", "−0.042"]
    assert [points(v) for v in (None, 0.0004, -0.0004, 0.01, -0.5)] == [
        "–",
        "0.0",
        "0.0",
        "+1.0",
        "−50.0",
    ]
    assert [short(n) for n in ("aln_mean_2", "whole_image")] == ["ALN mean (2)", "whole image"]


def test_a_chart_puts_values_where_its_axes_say() -> None:
    series = Series(
        name="One", label="one", values=[0.0, 0.5, 1.0], figure="50.0", colour="a", peak=2
    )
    chart = line_chart([series], [0.0, 0.5, 1.0], title="T", x_title="x", mark=(0.5, "half"))
    middle = ((LEFT + RIGHT) / 2, (TOP + BOTTOM) / 2)
    assert chart.lines[0].points == (
        f"{LEFT:.1f},{BOTTOM:.1f} {middle[0]:.1f},{middle[1]:.1f} {RIGHT:.1f},{TOP:.1f}"
    )
    assert chart.lines[0].peak_at == (RIGHT, TOP)
    assert chart.mark == (middle[0], "half")
    assert (chart.x_ticks[0], chart.x_ticks[-1]) == ((LEFT, "0"), (RIGHT, "1"))
    assert (chart.y_ticks[0], chart.y_ticks[-1]) == ((BOTTOM, "0"), (TOP, "100"))


def test_labels_stand_on_their_lines_and_off_all_others() -> None:
    x = np.linspace(LEFT, RIGHT, 20)
    lines = [np.full(20, 60.0), np.linspace(80, 200, 20), np.linspace(120, 220, 20)]
    places = place_labels(x, lines, ["one", "another", "third"])
    for own, place in enumerate(places):
        assert place is not None
        gaps = [abs(float(np.interp(place[0], x, line)) - place[1]) for line in lines]
        assert gaps[own] < 1
        assert min(gaps[:own] + gaps[own + 1 :]) > 10
    assert place_labels(x, [lines[0], lines[0] + 3], ["one", "two"]) == [None, None]


def test_every_row_is_drawn_in_some_chart_and_equal_curves_once() -> None:
    metrics = made_metrics(runs=2)
    html = render(metrics, NOTHING, {})
    drawn = set(re.findall(r"<polyline[^>]*><title>([^<]+)</title>", html))
    same_boxes = {"ALN, clean classifier's class", "ALN, clean classifier's class, run 2"}
    titles = {row["title"] for row in metrics["methods"].values()}
    assert {title.replace("&#39;", "'") for title in drawn} == titles - same_boxes
