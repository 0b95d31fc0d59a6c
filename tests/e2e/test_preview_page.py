"""A split's page in a real browser: at desktop and phone width, in light and dark."""

from pathlib import Path

import pytest
from playwright.sync_api import Browser

from jobs.preprocess.preview import render
from pipeline.shards.format import read_manifest
from tests.e2e.test_report_page import CONTRASTS, LEAST_CONTRAST

PANELS = """() => [...document.querySelectorAll(".panel")].map(panel => {
  const [image, drawn] = [panel.querySelector("img"), panel.querySelector("svg")];
  const box = e => { const r = e.getBoundingClientRect();
                     return [r.left, r.top, r.width, r.height].map(Math.round); };
  return [image.naturalWidth, box(image), drawn && box(drawn)];
})"""
BARS = """() => [...document.querySelectorAll(".bars i")].map(bar => bar.offsetHeight)"""


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_the_page_fits_reads_well_and_asks_for_nothing(
    browser: Browser, small_set: Path, tmp_path: Path, width: int, scheme: str
) -> None:
    page_file = tmp_path / "preview.html"
    page_file.write_text(render(str(small_set), read_manifest(small_set), "train"))
    requests: list[str] = []
    with browser.new_page(
        viewport={"width": width, "height": 800},
        color_scheme="dark" if scheme == "dark" else "light",
    ) as page:
        page.on("request", lambda request: requests.append(request.url))
        page.goto(page_file.as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") == width
        panels = page.evaluate(PANELS)
        bars = page.evaluate(BARS)
        contrasts = page.evaluate(CONTRASTS)
    assert [url for url in requests if not url.startswith("data:")] == [page_file.as_uri()]
    assert len(panels) == 2 * 24
    for plain, bordered in zip(panels[::2], panels[1::2], strict=True):
        assert plain[0] == 32
        assert plain[1] == plain[2], "boxes are drawn over the image"
        assert bordered[0] == 320
        assert min(*plain[1][2:], *bordered[1][2:]) > 100
    assert max(bars) > 100
    assert len(contrasts) > 80
    assert [pair for pair in contrasts if pair[0] < LEAST_CONTRAST] == []
