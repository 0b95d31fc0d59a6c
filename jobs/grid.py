"""A picture of a batch: every image enlarged, beside itself with superpixel borders."""

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

TARGET = 224  # pixels that an image's longer side is enlarged to, at least
COLUMNS = 4
GAP, PAIR_GAP = 18, 4  # pixels between cells, and within one
TITLE, CAPTION = 44, 40  # pixels of height
BACKGROUND, INK, FAINT = (255, 255, 255), (20, 20, 20), (110, 110, 110)
BORDER, SHADOW = (255, 235, 0), (0, 0, 0)
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One image: uint8 [H, W, 3], RGB, its superpixel labels [H, W], and its two lines of text."""

    image: np.ndarray
    segments: np.ndarray
    name: str
    note: str


def with_borders(image: np.ndarray, segments: np.ndarray, scale: int) -> np.ndarray:
    """The image, `scale` times as large, with lines between superpixels: uint8 [sH, sW, 3].

    A line takes the first pixel row or column past each border, and where there is room the last
    before it is dark, so that it shows on any colour.
    """
    picture = image.repeat(scale, 0).repeat(scale, 1)
    labels = segments.repeat(scale, 0).repeat(scale, 1)
    right = np.zeros(labels.shape, bool)
    right[:, 1:] = labels[:, 1:] != labels[:, :-1]
    below = np.zeros(labels.shape, bool)
    below[1:] = labels[1:] != labels[:-1]
    if scale > 1:
        picture[:, :-1][right[:, 1:]] = SHADOW
        picture[:-1][below[1:]] = SHADOW
    picture[right | below] = BORDER
    return picture


def _fitting(text: str, font: Font, width: int) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text.rstrip() + "…"


def draw_grid(cells: Sequence[Cell], title: str) -> np.ndarray:
    """All cells in rows of four, as RGB uint8 [H, W, 3]. The cells' images have one size."""
    height, width = cells[0].segments.shape
    scale = max(1, -(-TARGET // max(height, width)))
    pair = 2 * width * scale + PAIR_GAP
    step_x, step_y = pair + GAP, height * scale + CAPTION + GAP
    columns = min(COLUMNS, len(cells))
    rows = -(-len(cells) // columns)
    sheet = Image.new("RGB", (columns * step_x + GAP, rows * step_y + TITLE + GAP), BACKGROUND)
    pen = ImageDraw.Draw(sheet)
    heading, bold, small = (ImageFont.load_default(size) for size in (20, 18, 14))
    pen.text((GAP, 12), _fitting(title, heading, sheet.width - 2 * GAP), INK, heading)
    for number, cell in enumerate(cells):
        row, column = divmod(number, columns)
        x, y = GAP + column * step_x, TITLE + GAP + row * step_y
        plain = cell.image.repeat(scale, 0).repeat(scale, 1)
        bordered = with_borders(cell.image, cell.segments, scale)
        sheet.paste(Image.fromarray(plain), (x, y))
        sheet.paste(Image.fromarray(bordered), (x + width * scale + PAIR_GAP, y))
        below = y + height * scale + 2
        pen.text((x, below), _fitting(cell.name, bold, pair), INK, bold)
        pen.text((x, below + 21), _fitting(cell.note, small, pair), FAINT, small)
    return np.asarray(sheet)


def png(picture: np.ndarray) -> bytes:
    """An RGB picture as a PNG file's bytes."""
    return cv2.imencode(".png", picture[..., ::-1])[1].tobytes()
