"""The report in a real browser: at desktop and phone width, in light and dark."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser

from jobs.report.__main__ import render
from jobs.report.compare import Entry, entries_of
from jobs.report.pictures import report_pictures
from pipeline.evaluation.results import read_evaluation
from tests.e2e.pages import CONTRASTS, LEAST_CONTRAST, VIEWS, Visit, opened

pytestmark = pytest.mark.slow
LONG = "a_name_without_a_space_" * 5


@pytest.fixture(scope="module")
def entries(
    evaluations: tuple[Path, Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> list[Entry]:
    """Two seeds of one method beside boxes, with names that nothing breaks but the page."""
    folder = tmp_path_factory.mktemp("report") / "evaluation"
    shutil.copytree(evaluations[0], folder)
    metrics = json.loads((folder / "metrics.json").read_text())
    metrics["class_names"] = dict.fromkeys(metrics["class_names"], LONG)
    metrics["source"]["name"] = LONG
    (folder / "metrics.json").write_text(json.dumps(metrics))
    chosen = [read_evaluation(path) for path in (folder, *evaluations[1:])]
    return entries_of(chosen, ["seeds", "seeds", LONG])


@pytest.fixture(scope="module")
def report(entries: list[Entry], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(render(entries, report_pictures(entries, 0), ""))
    return path


@pytest.fixture(scope="module", params=VIEWS, ids="{0[0]}-{0[1]}".format)
def visit(request: pytest.FixtureRequest, browser: Browser, report: Path) -> Iterator[Visit]:
    with opened(browser, request.param, offline=True) as visit:
        visit.page.goto(report.as_uri())
        yield visit


def test_the_page_opens_offline_without_errors_or_requests(visit: Visit, report: Path) -> None:
    assert visit.errors == []
    assert [url for url in visit.requests if not url.startswith("data:")] == [report.as_uri()]


def test_the_page_itself_never_scrolls_sideways(visit: Visit) -> None:
    assert visit.page.evaluate("document.documentElement.scrollWidth") <= visit.width
    # What is wider than the page can be reached, since its own box scrolls.
    cut_off = visit.page.evaluate("""() => [...document.querySelectorAll("main *")].filter(
        e => e.getBoundingClientRect().right > innerWidth + 1
          && !e.closest(".scroll, .pictures, pre")).map(e => e.outerHTML.slice(0, 200))""")
    assert cut_off == []
    wide = visit.page.locator(".scroll").first
    visible, whole = wide.evaluate("e => [e.clientWidth, e.scrollWidth]")
    assert whole > visible if visit.width == 390 else whole == visible


def test_no_cell_runs_into_its_neighbour(visit: Visit) -> None:
    wider = visit.page.evaluate(
        """() => [...document.querySelectorAll("th, td")]
          .filter(cell => cell.scrollWidth > cell.clientWidth + 1)
          .map(cell => cell.textContent.trim())"""
    )
    assert wider == []


def test_the_methods_name_stays_in_view_when_a_table_is_scrolled(visit: Visit) -> None:
    scroll = visit.page.locator(".scroll").first
    left = "e => e.querySelector('tr.own th').getBoundingClientRect().left"
    before = scroll.evaluate(left)
    scroll.evaluate("e => { e.scrollLeft = 10000 }")
    assert scroll.evaluate(left) == before
    scroll.evaluate("e => { e.scrollLeft = 0 }")


def test_all_text_stands_out_from_its_ground(visit: Visit) -> None:
    contrasts = visit.page.evaluate(CONTRASTS)
    assert len(contrasts) > 500
    assert [found for found in contrasts if found[0] < LEAST_CONTRAST] == []


def test_every_picture_is_there_with_its_boxes_over_it(visit: Visit, entries: list[Entry]) -> None:
    panels = visit.page.evaluate("""() => [...document.querySelectorAll(".panel")].map(panel => {
        const [image, boxes] = [panel.querySelector("img"), panel.querySelector("svg")];
        const place = e => { const r = e.getBoundingClientRect();
                             return [r.left, r.top, r.width, r.height].map(Math.round); };
        return {loaded: image.complete && image.naturalWidth, alt: image.alt,
                image: place(image), boxes: boxes && place(boxes)};
    })""")
    shown = sum(map(len, report_pictures(entries, 0).values()))
    assert len(panels) == 2 * shown > 30  # each image, and the map of the first seed
    for panel in panels:
        assert panel["loaded"] == 32
        assert panel["alt"]
        assert min(panel["image"][2:]) > 20
        assert panel["boxes"] == panel["image"]


def test_page_and_charts_take_the_colours_of_the_scheme(visit: Visit) -> None:
    ground = visit.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert ground == ("rgb(247, 247, 245)" if visit.scheme == "light" else "rgb(20, 22, 26)")
    charts = visit.page.evaluate("""() => [...document.querySelectorAll(".chart img")].map(
        image => [image.complete && image.naturalWidth, getComputedStyle(image).filter])""")
    filters = {"light": "none", "dark": "invert(1) hue-rotate(180deg)"}
    assert charts
    assert all(width and drawn == filters[visit.scheme] for width, drawn in charts)
