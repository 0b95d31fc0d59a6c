"""Pages in a real browser: at desktop and phone width, in light and dark."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from playwright.sync_api import Browser, Page

VIEWS = [(1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")]
LEAST_CONTRAST = 4.5  # WCAG 2, level AA, for text of any size

# Every text's contrast with what lies behind it: [ratio, text], the lowest first.
CONTRASTS = """() => {
  const canvas = document.createElement("canvas"), seen = new Map();
  canvas.width = canvas.height = 1;
  const context = canvas.getContext("2d", {willReadFrequently: true});
  const rgba = colour => {
    if (!seen.has(colour)) {
      context.clearRect(0, 0, 1, 1);
      context.fillStyle = colour;
      context.fillRect(0, 0, 1, 1);
      const [r, g, b, a] = context.getImageData(0, 0, 1, 1).data;
      seen.set(colour, [r, g, b, a / 255]);
    }
    return seen.get(colour);
  };
  const behind = element => {
    const layers = [];
    for (let e = element; e; e = e.parentElement)
      layers.push(rgba(getComputedStyle(e).backgroundColor));
    const over = (under, [r, g, b, a]) => [r, g, b].map((c, i) => c * a + under[i] * (1 - a));
    return layers.reverse().reduce(over, [255, 255, 255]);
  };
  const luminance = colour => colour.slice(0, 3)
    .map(c => c / 255).map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const found = [];
  for (const element of document.body.querySelectorAll("*")) {
    const own = [...element.childNodes].filter(n => n.nodeType === Node.TEXT_NODE);
    const text = own.map(n => n.data.trim()).join("");
    if (!text || element.tagName === "title" || !element.getClientRects().length) continue;
    const style = getComputedStyle(element);
    const ink = luminance(rgba(element.tagName === "text" ? style.fill : style.color));
    const ground = luminance(behind(element));
    found.push([(Math.max(ink, ground) + 0.05) / (Math.min(ink, ground) + 0.05), text]);
  }
  return found.sort((a, b) => a[0] - b[0]);
}"""


@dataclass(frozen=True, kw_only=True)
class Visit:
    """A page that was opened, what went wrong meanwhile, and the URLs that it asked for."""

    page: Page
    width: int
    scheme: str
    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


@contextmanager
def opened(browser: Browser, view: tuple[int, Any], **options: Any) -> Iterator[Visit]:
    """Yield an empty page of one of VIEWS, which notes what goes wrong."""
    width, scheme = view
    context = browser.new_context(
        viewport={"width": width, "height": 900}, color_scheme=scheme, **options
    )
    visit = Visit(page=context.new_page(), width=width, scheme=scheme)
    visit.page.on("console", lambda message: visit.errors.append(f"{message.type}: {message.text}"))
    visit.page.on("pageerror", lambda error: visit.errors.append(str(error)))
    visit.page.on("requestfailed", lambda failed: visit.errors.append(f"lost: {failed.url[:200]}"))
    visit.page.on("request", lambda sent: visit.requests.append(sent.url))
    yield visit
    context.close()
