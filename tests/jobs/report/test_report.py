"""The report of real evaluations: that it shows their figures, pictures and differences, and stands
alone."""

import base64
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from itertools import chain
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.pictures import heat
from jobs.report import tables
from jobs.report.__main__ import main, render
from jobs.report.charts import COLOURS, SOFT, iou_charts
from jobs.report.compare import Entry, combined, compare, entries_of
from jobs.report.pictures import choose, most_different, report_pictures
from pipeline.errors import UserError
from pipeline.evaluation.results import Row, RowFigures, read_evaluation
from tests.pipeline.made_set import stored_samples

ROOT = Path(__file__).parents[3]
VOID = {"meta", "link", "br", "img"}
HOSTILE = """<script>alert('x')</script>"><img src=x onerror="alert(1)">'&amp;"""
ALN = Row(map="aln", rule="paper", classes="co-trained")
Evaluations = tuple[Path, Path, Path]


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
        self.best: list[tuple[int, str]] = []  # column and region of what is marked as the best
        self._region = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.counts[tag] = self.counts.get(tag, 0) + 1
        values = dict(attrs)
        links = ("src", "href", "xlink:href", "srcset", "data")
        self.references += [value or "" for name, value in attrs if name in links]
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
        """The one row of a table with this first cell, less that cell."""
        rows = [[" ".join(cell.split()) for cell in row] for row in self.tables[region]]
        (cells,) = [row[1:] for row in rows if row[0] == title]
        return cells


def entries(*folders: Path, titles: tuple[str, ...] = ()) -> list[Entry]:
    return entries_of([read_evaluation(f) for f in folders], titles or [f.name for f in folders])


def page(*folders: Path, titles: tuple[str, ...] = ()) -> Page:
    """The page without pictures."""
    return Page(render(entries(*folders, titles=titles), {}, "none asked for"))


def edited(folder: Path, target: Path, edit: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of an evaluation whose metrics.json was changed, and whose tables may be."""
    shutil.copytree(folder, target)
    metrics = json.loads((target / "metrics.json").read_text())
    del metrics["sha256"]
    edit(metrics)
    (target / "metrics.json").write_text(json.dumps(metrics))
    return target


def aln_figures(folder: Path) -> RowFigures:
    return next(figures for figures in read_evaluation(folder).rows if figures.row == ALN)


def rows_as_shown(folder: Path) -> list[RowFigures]:
    """The rows of an evaluation, constant boxes first."""
    return sorted(read_evaluation(folder).rows, key=lambda r: r.row.map not in tables.CONSTANT)


@pytest.fixture(scope="module")
def run_page(evaluations: Evaluations) -> Page:
    return page(evaluations[0])


def test_the_command_writes_one_page_the_same_each_time(
    evaluations: Evaluations, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("one", "two"):
        output = tmp_path / name / "report.html"
        main([*map(str, evaluations[:2]), "--output", str(output)])
        assert str(output) in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "one").iterdir()] == ["report.html"]
    pages = [(tmp_path / name / "report.html").read_bytes() for name in ("one", "two")]
    assert pages[0] == pages[1]
    with pytest.raises(UserError, match=f"--output {tmp_path}"):
        main([str(evaluations[0]), "--output", str(tmp_path)])


def test_the_page_of_boxes_needs_no_nets_and_few_packages(
    evaluations: Evaluations, tmp_path: Path
) -> None:
    """As on a machine with numpy, opencv, pyarrow, jinja2 and matplotlib alone."""
    blocked = ("torch", "ray", "numba", "scipy", "simplejpeg", "safetensors", "nvidia")
    others = [tmp_path / name / "evaluation" for name in ("exp-a", "exp-b")]
    for other in others:
        shutil.copytree(evaluations[2], other)
    outputs = [tmp_path / "one.html", tmp_path / "two.html"]
    code = f"""
import sys
sys.modules.update(dict.fromkeys({blocked!r}))
from jobs.report.__main__ import main
main([{str(evaluations[2])!r}, "--output", {str(outputs[0])!r}])
main([*{[str(path) for path in others]!r}, "--output", {str(outputs[1])!r}])
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    one, two = (Page(output.read_text()) for output in outputs)
    assert "pictures" in one.text
    rows = [row[0] for row in two.tables["All methods"] if "Given boxes" in row[0]]
    for folder in others:  # folders above tell them apart
        assert sum(str(folder) in row for row in rows) == 1


@pytest.mark.parametrize(
    ("members", "titles", "panels"),
    [
        ((0,), (), 3),
        ((2,), (), 0),
        ((0, 1), ("ALN", "ALN"), 3),
        ((0, 1, 2), (), 3),
        ((0, 1, 2), ("ALN", "ALN", "boxes"), 2),
    ],
)
def test_the_page_stands_alone_and_is_well_formed(
    evaluations: Evaluations, members: tuple[int, ...], titles: tuple[str, ...], panels: int
) -> None:
    shown = entries(*(evaluations[i] for i in members), titles=titles)
    groups = report_pictures(shown, 0) if 0 in members else {}
    html = render(shown, groups, "")
    page = Page(html)
    assert page.open == []
    assert all(reference.startswith(("data:", "#")) for reference in page.references)
    ids = re.findall(r' id="([^"]+)"', html)
    assert len(set(ids)) == len(ids)
    assert {r[1:] for r in page.references if r.startswith("#")} <= set(ids)
    assert "script" not in page.counts
    assert not re.search(r"@import|https?:|url\((?!#)", html)
    charts = len(iou_charts(tables.page_lines(shown)))
    assert page.counts["img"] == panels * sum(map(len, groups.values())) + charts
    assert all(page.alternatives)
    assert page.counts["caption"] == page.counts["table"]
    assert page.counts["style"] == 1
    assert not re.search(r"\b(None|nan)\b", page.text.split("Configuration")[0])


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
    ious = np.array([[0.1, 0.5, np.nan, 0.9, 0.3], [0.4, 0.5, np.nan, 0.1, 0.2], [0.4] * 5])
    assert most_different(ious[:2], 9) == [3, 0, 4]
    assert most_different(ious, 2) == [3, 0]


def decoded(uri: str) -> np.ndarray:
    data = np.frombuffer(base64.b64decode(uri.split(",")[1]), np.uint8)
    image = cv2.imdecode(data, cv2.IMREAD_COLOR)
    assert image is not None
    return image[..., ::-1]


def test_pictures_show_the_chosen_images_with_their_boxes_and_maps(
    evaluations: Evaluations, small_set: Path
) -> None:
    evaluation = read_evaluation(evaluations[0])
    pictures = report_pictures(entries(evaluations[0]), 0)
    stored = {sample.row: sample.image for sample in stored_samples(small_set, "val")}
    images = {row["id"]: row for row in evaluation.images().to_pylist()}
    boxes = evaluation.predictions("aln", "paper").to_pylist()
    best = sorted((box["iou"] for box in boxes), reverse=True)[: len(pictures["best"])]
    assert [picture.views[0].iou for picture in pictures["best"]] == best
    colours = {tuple(colour) for colour in heat(np.arange(256)[None] / 255)[0].tolist()}
    for picture in chain(*pictures.values()):
        (view,) = picture.views
        assert view.map
        assert picture.covered
        row = images[picture.id]
        box = boxes[row["image"]]
        assert (view.box, view.iou) == (box["box"], box["iou"])
        assert picture.truths == row["boxes"]
        for uri in (picture.image, view.map, picture.covered):
            assert decoded(uri).shape == (32, 32, 3)
        assert {tuple(c) for c in decoded(view.map).reshape(-1, 3).tolist()} <= colours
        loss = abs(decoded(picture.image).astype(int) - stored[row["row"]])
        assert loss.mean() < 10  # JPEG's


def test_a_right_box_with_a_wrong_class_is_an_error_of_the_class(
    evaluations: Evaluations, tmp_path: Path
) -> None:
    """Of random nets no box is right: here all are."""
    target = edited(evaluations[0], tmp_path / "right", lambda _: None)
    boxes = pq.read_table(target / "predictions.parquet").drop_columns("error")
    boxes = boxes.append_column("error", pa.array(["right"] * len(boxes)))
    pq.write_table(boxes, target / "predictions.parquet")
    (entry,) = entries(target)
    classes = entry.images[0]["classes"].to_pylist()
    labels = entry.images[0]["label"].to_pylist()
    wrong = sum(c["co-trained"][0] != label for c, label in zip(classes, labels, strict=True))
    groups = report_pictures([entry], 0)
    assert 0 < len(groups["class_wrong"]) == min(6, wrong)
    for picture in groups["class_wrong"]:
        assert picture.views[0].error == "class_wrong"
        assert picture.views[0].predicted != picture.label


@pytest.mark.parametrize("damage", ["gone", "others"])
def test_pictures_are_left_out_where_the_shards_are_gone_or_others(
    evaluations: Evaluations, small_set: Path, tmp_path: Path, damage: str
) -> None:
    data = tmp_path / "shards"
    if damage == "others":
        shutil.copytree(small_set, data)
        for shard in (data / "val").iterdir():
            shutil.copy(small_set / "train" / shard.name.replace("val", "train"), shard)
    target = edited(evaluations[0], tmp_path / "e", lambda m: m.update(data=str(data)))
    main([str(target), "--output", str(tmp_path / "report.html")])
    html = (tmp_path / "report.html").read_text()
    assert 'class="panel"' not in html
    assert re.search(rf"Left out: .*{data}", html)


def test_the_table_shows_every_row_with_its_figures_and_intervals(
    evaluations: Evaluations, run_page: Page
) -> None:
    shown = [row for row in run_page.tables["All methods"][2:] if len(row) > 1]
    for cells, row in zip(shown, rows_as_shown(evaluations[0]), strict=True):
        name = " ".join(cells[0].split())
        assert name.startswith(row.title)
        assert name.endswith(f"class: {row.row.classes}")
        assert (f"by {row.row.rule}" in name) == (row.row.rule not in ("paper", None))
        low, high = row.interval["gt_known"] or (None, None)
        expected = [row.figures["gt_known"], low, high]
        numbers = re.findall(r"[\d.]+", cells[1])
        assert numbers == [tables.percent(value) for value in expected]
        assert cells[2].split()[0] == tables.number(row.figures["mean_iou"])
        assert cells[-1].strip() == "24"
        paper = [tables.percent(value) for value in row.paper.values()] if row.paper else ["", ""]
        assert [cell.strip() for cell in cells[-3:-1]] == paper


def test_the_best_of_each_column_is_marked_and_ties_are_all_marked(
    evaluations: Evaluations, run_page: Page
) -> None:
    rows = read_evaluation(evaluations[0]).rows
    marked = [column for column, region in run_page.best if region == "All methods"]
    for column, key in enumerate(["gt_known", "mean_iou", "max_box_acc", "max_box_acc_v2"], 1):
        values = [row.figures[key] for row in rows]
        assert marked.count(column) == values.count(max(values))


def test_other_tables_show_the_rows_figures(evaluations: Evaluations, run_page: Page) -> None:
    own = aln_figures(evaluations[0])
    percent, number, name = tables.percent, tables.number, "ALN class: co-trained"
    cells = run_page.row("What the image adds", name)
    off_centre = own.subsets["off_centre"]
    assert cells[:2] == [number(own.figures["auc"]), number(own.figures["auc_other"])]
    assert cells[-1] == f"{percent(off_centre['gt_known'])} {percent(off_centre['top1_loc'])}"
    errors = own.figures["errors"]
    shares = [percent(errors[k] / own.figures["n"]) if errors[k] else "0" for k in tables.ERRORS]
    assert run_page.row("Where boxes fail", name)[1:] == shares


def test_seeds_are_shown_by_mean_and_range(evaluations: Evaluations) -> None:
    shares = [aln_figures(folder).figures["gt_known"] for folder in evaluations[:2]]
    assert shares[0] != shares[1]
    seeds = page(*evaluations[:2], titles=("ALN", "ALN"))
    texts = [tables.percent(value) for value in (sum(shares) / 2, min(shares), max(shares))]
    assert seeds.row("All methods", "ALN class: co-trained")[0] == "{} {}–{}".format(*texts)
    assert "(mean of 2)" in seeds.text
    assert "Image by image" not in seeds.text


def test_the_mean_of_a_figure_that_a_seed_lacks_is_unknown(evaluations: Evaluations) -> None:
    (entry,) = entries(*evaluations[:2], titles=("ALN", "ALN"))
    first, second = entry.members[ALN]
    second = type(second)(**vars(second) | {"figures": second.figures | {"gt_known": None}})
    mean = combined([first, second])
    assert mean.figures["gt_known"] is None
    assert mean.interval["gt_known"] is None
    middle = (first.figures["mean_iou"] + second.figures["mean_iou"]) / 2
    assert mean.figures["mean_iou"] == pytest.approx(middle)
    assert mean.figures["n"] == 24


def test_two_methods_are_compared_image_by_image(evaluations: Evaluations) -> None:
    first, second, given = entries(*evaluations)
    runs, boxes = (compare(first, other, seed=0) for other in (second, given))
    figures = [aln_figures(folder).figures for folder in evaluations[:2]]
    for name, difference in runs.items():
        assert difference.first == pytest.approx(figures[0][name])
        assert difference.second == pytest.approx(figures[1][name])
        low, high = difference.interval
        assert low <= difference.second - difference.first <= high
    assert set(runs) == {"gt_known", "top1_loc", "mean_iou", "auc_gap"}
    assert set(boxes) == {"gt_known", "top1_loc", "mean_iou"}
    # The boxes are those of the second run's ALN.
    assert boxes["mean_iou"].second == pytest.approx(figures[1]["mean_iou"])


def test_pairing_leaves_what_the_images_share_out_of_the_interval(
    evaluations: Evaluations,
) -> None:
    first, second = entries(evaluations[1], evaluations[1], titles=("a", "b"))
    same = compare(first, second, seed=0)
    assert same["mean_iou"].interval == (0, 0)
    low, high = aln_figures(evaluations[1]).interval["mean_iou"] or (0, 0)
    assert high - low > 0.01


def test_a_comparison_shows_differences_in_points(evaluations: Evaluations) -> None:
    first, second, _ = entries(*evaluations)
    row = page(*evaluations).row("Image by image", "evaluation-1 less evaluation-0")
    difference = compare(first, second, seed=0)["gt_known"]
    assert row[0].split()[0] == tables.points(difference.second - difference.first)
    assert row[0].split()[1:4:2] == [tables.points(bound) for bound in difference.interval]


def move_a_box(images: pa.Table) -> pa.Table:
    boxes = [[[0, 0, 1, 1]], *images["boxes"].to_pylist()[1:]]
    column = pa.array(boxes, images["boxes"].type)
    return images.drop_columns("boxes").append_column("boxes", column)


@pytest.mark.parametrize(
    ("protocol", "damage", "fact"),
    [
        ("devkit", lambda images: images.slice(1), "ILSVRC2012_val_00000001"),
        ("devkit", move_a_box, "boxes.*1 image.*ILSVRC2012_val_00000001"),
        ("int224", lambda images: images, "devkit and int224"),
    ],
)
def test_evaluations_of_other_ground_truth_are_refused(
    evaluations: Evaluations,
    tmp_path: Path,
    protocol: str,
    damage: Callable[[pa.Table], pa.Table],
    fact: str,
) -> None:
    other = edited(evaluations[1], tmp_path / "other", lambda m: m.update(protocol=protocol))
    path = other / "images.parquet"
    pq.write_table(damage(pq.read_table(path)), path)
    with pytest.raises(UserError, match=rf"(?s){evaluations[0]}.*{other}.*{fact}"):
        entries(evaluations[0], other)


def test_one_title_for_other_rows_is_refused(evaluations: Evaluations) -> None:
    with pytest.raises(UserError, match=f"{evaluations[2]}.*titles"):
        entries(evaluations[0], evaluations[2], titles=("same", "same"))


@pytest.mark.parametrize(
    ("arguments", "fact"), [("{} --titles a b", "--titles"), ("{} {}/../run", "given twice")]
)
def test_titles_and_evaluations_must_match(
    evaluations: Evaluations, capsys: pytest.CaptureFixture[str], arguments: str, fact: str
) -> None:
    folder = evaluations[0]
    words = arguments.replace("run", folder.name).replace("{}", str(folder)).split()
    with pytest.raises(SystemExit):
        main([*words, "--output", "unused.html"])
    assert fact in capsys.readouterr().err


def points_of(svg: str, colour: str) -> np.ndarray:
    """The points of the curve of this colour, in SVG units."""
    paths = re.findall(r'<path d="([^"]+)"[^>]*style="fill: none; stroke: ([^;]+)', svg)
    (path,) = [d for d, stroke in paths if stroke == colour]
    return np.array([[float(v) for v in pair] for pair in re.findall(r"[ML] (\S+) (\S+)", path)])


def test_a_chart_draws_each_curve_where_its_values_are(evaluations: Evaluations) -> None:
    lines = tables.page_lines(entries(evaluations[1]))
    chart = iou_charts(lines)[0]
    for curve in chart.curves:
        if curve.line.r.row.map not in ("aln", "lrp"):
            continue
        points = points_of(chart.svg, curve.colour)
        x, y = curve.line.r.curves["iou"], curve.line.r.curves["gt_known"]
        assert np.corrcoef(points[:, 0], x)[0, 1] == pytest.approx(1)
        assert np.corrcoef(points[:, 1], y)[0, 1] == pytest.approx(-1)  # SVG's axis points down
    assert {c.colour for c in chart.curves if c.line.r.row.map == "aln"} == {COLOURS[0]}
    assert {c.colour for c in chart.curves if c.line.constant} == {SOFT}


def test_side_by_side_all_maps_are_shown_by_the_rule_of_their_evaluation_too(
    evaluations: Evaluations, tmp_path: Path
) -> None:
    other = shutil.copytree(evaluations[1], tmp_path / "other")
    metrics = json.loads((other / "metrics.json").read_text())
    (other / "metrics.json").write_text(json.dumps(metrics | {"rule": "otsu"}))
    lines = tables.page_lines(entries(evaluations[0], other))
    rules = {(x.entry, x.r.row.map): set[str | None]() for x in lines}
    for x in lines:
        rules[x.entry, x.r.row.map].add(x.r.row.rule)
    for name in ("aln", "cam", "layercam", "gradient"):
        assert rules[evaluations[0].name, name] == {"paper"}
        assert rules["other", name] == {"paper", "otsu"}
    assert {x.r.row.rule for x in lines if x.own} == {"paper", "otsu"}


def test_rows_with_the_same_boxes_are_drawn_once_and_all_others_are(
    evaluations: Evaluations,
) -> None:
    lines = tables.page_lines(entries(evaluations[0]))
    methods, rules = iou_charts(lines)
    drawn = [tuple(curve.values) for curve in methods.curves]
    assert len(set(drawn)) == len(drawn)
    assert set(drawn) == {tuple(x.r.curves["gt_known"]) for x in lines if x.primary}
    assert {curve.line.r.row.map for curve in rules.curves} == {"aln"}


def test_names_from_the_data_cannot_become_markup(evaluations: Evaluations, tmp_path: Path) -> None:
    def edit(metrics: dict[str, Any]) -> None:
        metrics["class_names"] = dict.fromkeys(metrics["class_names"], HOSTILE)
        metrics["source"]["name"] = metrics["commit"] = metrics["split"] = HOSTILE
        metrics["configuration"]["data"] = metrics["rows"][5]["title"] = HOSTILE

    hostile = edited(evaluations[0], tmp_path / "hostile", edit)
    html = render(entries(hostile, hostile, titles=(HOSTILE, "b")), {}, HOSTILE)
    page = Page(html)
    assert "script" not in page.counts
    assert all(reference.startswith(("data:", "#")) for reference in page.references)
    assert page.open == []
    assert page.text.count("<script>alert('x')</script>") >= 12


def test_a_set_without_known_boxes_still_has_a_page(
    evaluations: Evaluations, tmp_path: Path
) -> None:
    def unknown(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: 0 if k == "n" else unknown(v) for k, v in value.items()}
        return None if isinstance(value, float) else value

    def edit(metrics: dict[str, Any]) -> None:
        metrics["with_boxes"] = 0
        for row in metrics["rows"]:
            for part in ("figures", "interval", "subsets"):
                row[part] = unknown(row[part])
            row["interval"] = dict.fromkeys(row["interval"])
            row["figures"]["errors"] = dict.fromkeys(row["figures"]["errors"], 0)

    shown = page(edited(evaluations[0], tmp_path / "e", edit))
    assert not re.search(r"\b(None|nan)\b", shown.text.split("Configuration")[0])
    assert "of which 0 have known boxes" in shown.text
    assert {"svg", "img"}.isdisjoint(shown.counts)


def test_numbers_are_printed_with_a_dash_for_none_and_a_true_minus() -> None:
    assert [tables.percent(v) for v in (None, 0.0, 0.12345, 1.0)] == ["–", "0.0", "12.3", "100.0"]
    assert [tables.number(v) for v in (None, -1e-5, -0.0421)] == ["–", "0.000", "−0.042"]
    differences = [tables.points(v) for v in (None, 0.0004, -0.0004, 0.01, -0.5)]
    assert differences == ["–", "0.0", "0.0", "+1.0", "−50.0"]
