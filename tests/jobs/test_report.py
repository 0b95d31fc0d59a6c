"""The report: which images it shows, that it stands alone, and that it shows the figures."""

import base64
import copy
import re
from html.parser import HTMLParser
from itertools import chain
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from jobs.cli import record
from jobs.evaluation import EvaluateConfig, Evaluation, evaluate
from jobs.report import PER_GROUP, Picture, choose, heat, render, report_pictures

VOID = {"meta", "link", "br"}


class Page(HTMLParser):
    """Collects text and references, and checks that tags close in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.references: list[str] = []
        self.counts: dict[str, int] = {}
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.counts[tag] = self.counts.get(tag, 0) + 1
        self.references += [v or "" for k, v in attrs if k in ("src", "href", "srcset", "data")]
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


@pytest.fixture(scope="module")
def config(small_set: Path, random_run: Path) -> EvaluateConfig:
    output = small_set.parent / "eval"
    return EvaluateConfig(data=small_set, run=random_run, output=output, batch_size=12, workers=2)


@pytest.fixture(scope="module")
def evaluation(config: EvaluateConfig, ray_local: None) -> Evaluation:
    return evaluate(config, lambda done, batches: None)


@pytest.fixture(scope="module")
def metrics(config: EvaluateConfig, evaluation: Evaluation) -> dict[str, Any]:
    return {**evaluation.metrics, **record(config)}


@pytest.fixture(scope="module")
def pictures(config: EvaluateConfig, evaluation: Evaluation) -> dict[str, list[Picture]]:
    return report_pictures(config, evaluation.predictions)


def test_heat_is_dark_at_zero_and_yellow_at_one_without_stretching() -> None:
    colours = heat(np.array([[0.0, 1.0, 2.0, 0.5]])).astype(int)
    assert colours[0, 0].tolist() == [68, 1, 84]  # viridis
    assert colours[0, 1].tolist() == [253, 231, 37]
    assert colours[0, 2].tolist() == [253, 231, 37]
    assert abs(colours[0, 3] - [33, 145, 140]).max() <= 2


def test_best_worst_and_random_are_disjoint_and_in_order() -> None:
    ious = np.array([0.5, np.nan, 0.9, 0.0, 0.7, 0.0, 0.3, np.nan, 0.9])
    groups = choose(ious, 2, seed=0)
    assert groups["best"] == [2, 8]
    assert groups["worst"] == [3, 5]
    assert len(groups["random"]) == 2
    assert not set(groups["random"]) & {2, 8, 3, 5}
    assert groups == choose(ious, 2, seed=0)
    everything = choose(ious, 100, seed=0)
    assert sorted(chain(*everything.values())) == list(range(9))
    assert choose(np.full(3, np.nan), 2, seed=0)["best"] == []


def test_pictures_show_the_chosen_images_at_the_stored_size(
    evaluation: Evaluation, pictures: dict[str, list[Picture]]
) -> None:
    rows = {row["id"]: row for row in evaluation.predictions.to_pylist()}
    best = sorted((row["aln_iou"] for row in rows.values()), reverse=True)[:PER_GROUP]
    assert [picture.iou for picture in pictures["best"]] == best
    for picture in chain(*pictures.values()):
        row = rows[picture.id]
        assert (picture.box, picture.truths) == (row["aln_box"], row["boxes"])
        for uri in (picture.image, picture.map, picture.masked):
            data = np.frombuffer(base64.b64decode(uri.split(",")[1]), np.uint8)
            image = cv2.imdecode(data, cv2.IMREAD_COLOR)
            assert image is not None
            assert image.shape == (32, 32, 3)


def test_the_page_stands_alone_and_is_well_formed(
    metrics: dict[str, Any], evaluation: Evaluation, pictures: dict[str, list[Picture]]
) -> None:
    html = render(metrics, evaluation.predictions, pictures)
    page = Page(html)
    assert page.open == []
    assert all(reference.startswith("data:") for reference in page.references)
    assert "script" not in page.counts
    assert "url(" not in html
    assert page.counts["image"] == 3 * sum(map(len, pictures.values()))
    assert 'name="viewport"' in html
    assert "prefers-color-scheme: dark" in html


def test_the_page_shows_every_method_with_its_figures_and_intervals(
    metrics: dict[str, Any], evaluation: Evaluation, pictures: dict[str, list[Picture]]
) -> None:
    text = Page(render(metrics, evaluation.predictions, pictures)).text
    words = re.sub(r"\s+", " ", text)
    for row in metrics["methods"].values():
        low, high = (f"{100 * bound:.1f}" for bound in row["interval"]["gt_known"])
        assert f"{row['title']} {100 * row['gt_known']:.1f}{low} to {high}" in words
    for fact in (metrics["commit"], metrics["model_sha256"], metrics["box_rule"]):
        assert fact in words
    for name in metrics["class_names"].values():
        assert name in words


def test_histogram_bars_add_up_to_the_images(
    metrics: dict[str, Any], evaluation: Evaluation
) -> None:
    html = render(metrics, evaluation.predictions, {"best": [], "worst": [], "random": []})
    counts = [int(n) for n in re.findall(r"<title>IoU [\d.]+ to [\d.]+: (\d+) images", html)]
    assert len(counts) == 5 * 20
    for i in range(5):
        assert sum(counts[20 * i : 20 * (i + 1)]) == evaluation.predictions.num_rows


def test_names_from_the_data_cannot_become_markup(
    metrics: dict[str, Any], evaluation: Evaluation
) -> None:
    changed = copy.deepcopy(metrics)
    wnid = next(iter(changed["class_names"]))
    changed["class_names"][wnid] = "<script>alert('x')</script>"
    page = Page(render(changed, evaluation.predictions, {"best": [], "worst": [], "random": []}))
    assert "script" not in page.counts
    assert "<script>alert('x')</script>" in page.text


def test_a_set_without_known_boxes_still_has_a_page(
    metrics: dict[str, Any], evaluation: Evaluation
) -> None:
    changed = copy.deepcopy(metrics)
    unknown = {"gt_known": None, "top1_loc": None, "mean_iou": None, "n": 0}
    for row in changed["methods"].values():
        row |= unknown
        row["interval"] |= {"gt_known": None, "top1_loc": None, "mean_iou": None}
        for part in row["classes"].values():
            part |= unknown
    page = Page(render(changed, evaluation.predictions, {"best": [], "worst": [], "random": []}))
    assert "None" not in page.text.split("Configuration")[0]
    assert "24 evaluated, each exactly once, of which 0 have known boxes" in page.text
