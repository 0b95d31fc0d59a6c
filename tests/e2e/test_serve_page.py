"""The page of jobs.serve in a real browser: desktop and phone, light and dark, no mouse."""

from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
from playwright.sync_api import Browser, Page

from jobs.pictures import encode_png
from jobs.serve.app import Limits
from model.localization import RULES, map_box
from pipeline.evaluation.protocols import scale_boxes
from tests.e2e.pages import CONTRASTS, LEAST_CONTRAST, VIEWS, Visit, opened
from tests.jobs.serve.serving import BOXES, MASK, canned, server

pytestmark = pytest.mark.slow
TOKEN = "0123456789abcdef"
PASTE = """data => {
    const files = new DataTransfer();
    files.items.add(new File([new Uint8Array(data)], "a.png", {type: "image/png"}));
    dispatchEvent(new ClipboardEvent("paste", {clipboardData: files}));
}"""


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with server(canned, Limits(image_bytes=2**20)) as port:
        yield f"http://127.0.0.1:{port}/"


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    path.write_bytes(encode_png(np.full((200, 400, 3), (90, 140, 60), np.uint8)))
    return path


@pytest.fixture(scope="module", params=VIEWS, ids="{0[0]}-{0[1]}".format)
def visit(
    request: pytest.FixtureRequest, browser: Browser, url: str, photo: Path
) -> Iterator[Visit]:
    with opened(browser, request.param) as visit:
        visit.page.goto(url)
        visit.page.set_input_files("#file", photo)
        visit.page.wait_for_selector("#result")
        yield visit


def shown_box(page: Page) -> list[int]:
    """The box that is drawn, in pixels of the photograph of 400 x 200."""
    names = ("x", "y", "width", "height")
    x, y, width, height = (float(page.get_attribute("rect", name) or "") for name in names)
    x0, y0 = round(400 * x), round(200 * y)
    return [x0, y0, x0 + round(400 * width) - 1, y0 + round(200 * height) - 1]


def test_a_photograph_is_shown_with_box_mask_and_classes(visit: Visit) -> None:
    page = visit.page
    assert page.locator("#classes li").all_inner_texts()[0].split("\n") == ["a thing 0", "50.0 %"]
    assert page.locator("input[name=rule]").count() == len(RULES) + 1
    assert page.locator("input[name=rule]:checked").get_attribute("value") == "medoid"
    assert shown_box(page) == BOXES["medoid"]
    over = [page.locator(name).bounding_box() for name in ("#photo", "#shade", "figure svg")]
    assert over[0] == over[1] == over[2]
    assert over[0] is not None
    assert over[0]["width"] == pytest.approx(2 * over[0]["height"], rel=0.01)
    assert visit.errors == []


def test_rule_and_threshold_are_chosen_with_the_keyboard_alone(visit: Visit) -> None:
    page = visit.page
    page.focus("#file")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.value") == "medoid"
    page.keyboard.press("ArrowUp")
    assert shown_box(page) == BOXES["otsu"]
    page.keyboard.press("Tab")
    for key, cut in (("End", 1.0), ("ArrowLeft", 0.99), ("Home", 0.0), ("PageUp", 0.1)):
        page.keyboard.press(key)
        assert page.inner_text("#value") == f"{100 * cut:.0f} %"
        box = map_box((cut < MASK).astype(np.float32))
        whole = np.array([0, 0, 39, 19])
        boxes = np.array([whole if box is None else box])
        sizes = np.array([[20, 40]]), np.array([[200, 400]])
        assert shown_box(page) == scale_boxes(boxes, sizes[0][0], sizes[1])[0].tolist()
    assert page.locator("input[name=rule]:checked").get_attribute("value") == "threshold"
    focus = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert focus == "solid"
    assert visit.errors == []


def test_the_page_fits_and_all_text_stands_out(visit: Visit) -> None:
    assert visit.page.evaluate("document.documentElement.scrollWidth") <= visit.width
    contrasts = visit.page.evaluate(CONTRASTS)
    assert len(contrasts) > 20
    assert [found for found in contrasts if found[0] < LEAST_CONTRAST] == []
    ground = visit.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert ground == ("rgb(247, 247, 245)" if visit.scheme == "light" else "rgb(20, 22, 26)")


def test_a_pasted_photograph_and_a_broken_file_are_answered(
    visit: Visit, photo: Path, tmp_path: Path
) -> None:
    page, large = visit.page, tmp_path / "large.jpg"
    large.write_bytes(bytes(2**20 + 1))  # no image, so that it is sent as it is
    page.set_input_files("#file", large)
    page.wait_for_selector("#error:not(:empty)")
    assert "1048576 bytes" in page.inner_text("#error")
    assert not page.locator("#result").is_visible()
    page.evaluate(PASTE, list(photo.read_bytes()))
    page.wait_for_selector("#result")
    assert page.inner_text("#error") == ""
    failed = [text for text in visit.errors if "413" in text]  # the browser's own line
    assert visit.errors == failed
    visit.errors.clear()
    picture = tmp_path / "page.png"
    page.screenshot(path=picture, full_page=True)
    image = cv2.imread(str(picture))
    assert image is not None
    assert image.shape[1] == visit.width


def test_the_token_is_typed_in_and_the_photograph_sent_again(browser: Browser, photo: Path) -> None:
    with server(canned, Limits(image_bytes=2**20), TOKEN) as port:
        page = browser.new_page()
        page.goto(f"http://127.0.0.1:{port}/")
        page.set_input_files("#file", photo)
        page.wait_for_selector("#secret")
        page.keyboard.type(TOKEN)
        page.keyboard.press("Enter")
        page.wait_for_selector("#result")
        page.close()
