"""A picture of a batch: every image enlarged, beside itself with superpixel borders."""

import functools
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


BLEND = 0.45  # weight of the map's colours in an overlay


BOX_COLOUR = (255, 79, 154)


EDGE_COLOUR = (30, 10, 20)  # around the box: pink alone is lost on bright red and on white


LINES_PER_SIDE = 150  # widths of the box's line that the shorter side holds


TEXTS_PER_SIDE = 22  # heights of the label's text that the shorter side holds


SMALLEST_TEXT = 9  # pixels; below it letters cannot be told apart


LABEL_SHARE = 0.25  # of the picture's height that a label may cover


def grey(values: np.ndarray) -> np.ndarray:
    """A map in [0, 1] as grey levels 0 to 255: float [H, W] -> uint8 [H, W]."""
    return np.rint(np.clip(values, 0, 1) * 255).astype(np.uint8)


def heat(values: np.ndarray) -> np.ndarray:
    """Colours for a map of probabilities: float [H, W] in [0, 1] -> RGB uint8 [H, W, 3].

    Dark blue is 0, yellow 1, the same in every picture.
    """
    return cv2.applyColorMap(grey(values), cv2.COLORMAP_VIRIDIS)[..., ::-1]


def draw_overlay(pixels: np.ndarray, values: np.ndarray, box: list[int], text: str) -> np.ndarray:
    """The image with the map's colours, the box and a label over it: uint8 [H, W, 3], RGB.

    pixels: uint8 [H, W, 3]; values: float [h, w] in [0, 1], of any size; box: [x0, y0, x1, y1] in
    inclusive pixels of the image. A picture too small for a readable label gets none.
    """
    height, width = pixels.shape[:2]
    # Colours of the small map enlarged: the same picture as those of the enlarged map, nearly,
    # without a float of 4 bytes per pixel of the photo.
    picture = cv2.resize(heat(values), (width, height), interpolation=cv2.INTER_LINEAR)
    cv2.addWeighted(pixels, 1 - BLEND, picture, BLEND, 0, dst=picture)
    line = max(1, round(min(height, width) / LINES_PER_SIDE))
    edge = -(-line // 3) if min(height, width) >= LINES_PER_SIDE else 0
    x0, y0, x1, y1 = box
    _frame(picture, (x0 - edge, y0 - edge, x1 + edge, y1 + edge), line + 2 * edge, EDGE_COLOUR)
    _frame(picture, (x0, y0, x1, y1), line, BOX_COLOUR)
    label = _label(" ".join(text.split()), height, width, pad=2 * line)
    if label is not None:
        rows, columns = label.shape[:2]
        x = max(0, min(x0, width - columns))
        y = y0 - rows if y0 >= rows else min(y0, height - rows)  # above the box, or at its top
        picture[y : y + rows, x : x + columns] = label
    return picture


def mask_picture(values: np.ndarray, height: int, width: int) -> np.ndarray:
    """A map as grey levels at the image's size: float [h, w] in [0, 1] -> uint8 [height, width],
    255 times the probability, interpolated linearly."""
    levels = np.clip(values, 0, 1).astype(np.float32) * 255
    grey = cv2.resize(levels, (width, height), interpolation=cv2.INTER_LINEAR)
    return cv2.convertScaleAbs(grey)  # rounds, without further floats of the photo's size


def encode_png(picture: np.ndarray) -> bytes:
    """A PNG file's bytes, from uint8 [H, W, 3] (RGB) or [H, W] (grey)."""
    # OpenCV's default level is 8 times as fast as Pillow's, for files 9 % larger.
    if picture.ndim == 3:
        picture = cv2.cvtColor(picture, cv2.COLOR_RGB2BGR)
    return cv2.imencode(".png", picture)[1].tobytes()


def _frame(
    picture: np.ndarray, box: tuple[int, int, int, int], line: int, colour: tuple[int, int, int]
) -> None:
    """Draw the border of a box, `line` pixels wide and within it; what is outside is cut off."""
    x0, y0, x1, y1 = box
    line = min(line, x1 - x0 + 1, y1 - y0 + 1)
    for top, bottom, left, right in (
        (y0, y0 + line, x0, x1 + 1),
        (y1 + 1 - line, y1 + 1, x0, x1 + 1),
        (y0, y1 + 1, x0, x0 + line),
        (y0, y1 + 1, x1 + 1 - line, x1 + 1),
    ):
        picture[max(0, top) : max(0, bottom), max(0, left) : max(0, right)] = colour


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _label(text: str, height: int, width: int, pad: int) -> np.ndarray | None:
    """The text on the box's colour, in the largest size that fits a picture; None where no
    readable one does."""
    largest = max(SMALLEST_TEXT, round(min(height, width) / TEXTS_PER_SIDE))
    for size in range(largest, SMALLEST_TEXT - 1, -1):
        left, top, right, bottom = ImageDraw.Draw(Image.new("L", (1, 1))).textbbox(
            (0, 0), text, font=_font(size), anchor="lt"
        )
        columns, rows = int(right - left) + 2 * pad, int(bottom - top) + 2 * pad
        if columns > width:
            continue
        if rows > LABEL_SHARE * height:
            return None
        label = Image.new("RGB", (columns, rows), BOX_COLOUR)
        ImageDraw.Draw(label).text((pad, pad), text, fill="black", font=_font(size), anchor="lt")
        return np.asarray(label)
    return None
