"""Everything that draws pixels: superpixel borders, grids, maps as colours, boxes, image files.
Pictures are uint8 [H, W, 3], RGB, unless a docstring says otherwise."""

import base64
import functools
import io
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

LEAST_SIDE = 224  # pixels that the longer side of a small image is enlarged to, at least
COLUMNS = 4  # cells in a row of a grid
GAP, PAIR_GAP = 18, 4  # pixels between cells, and within one
TITLE, CAPTION = 44, 42  # pixels of height
BACKGROUND, INK, FAINT = (255, 255, 255), (20, 20, 20), (110, 110, 110)
BORDER, SHADOW = (255, 235, 0), (0, 0, 0)  # of superpixels
BLEND = 0.45  # weight of the map's colours in an overlay
BOX_COLOUR = (255, 79, 154)
EDGE_COLOUR = (30, 10, 20)  # around the box: pink alone is lost on bright red and on white
LINES_PER_SIDE = 150  # widths of the box's line in the shorter side
TEXTS_PER_SIDE = 22  # heights of the label's text in the shorter side
SMALLEST_TEXT = 9  # pixels; below it letters cannot be read
LABEL_SHARE = 0.25  # of the picture's height that a label may cover
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
Colour = tuple[int, int, int]
_font = functools.cache(ImageFont.load_default)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """An image of a grid, its superpixel labels [H, W], two lines of text, boxes as shares."""

    image: np.ndarray
    segments: np.ndarray
    name: str
    note: str
    boxes: Sequence[Sequence[float]] = ()


def enlarge(image: np.ndarray, scale: int) -> np.ndarray:
    """Repeat each pixel: [H, W, ...] -> [scale * H, scale * W, ...]."""
    return image.repeat(scale, 0).repeat(scale, 1)


def enlargement(height: int, width: int, least: int = LEAST_SIDE) -> int:
    """Return the scale at which the longer side has `least` pixels or more."""
    return max(1, -(-least // max(height, width)))


def with_borders(image: np.ndarray, segments: np.ndarray, scale: int) -> np.ndarray:
    """Return the image, enlarged, with a line past each border between superpixels, and where there
    is room a dark one before it, so that it shows on any colour."""
    picture, labels = enlarge(image, scale), enlarge(segments, scale)
    right = labels[:, 1:] != labels[:, :-1]
    below = labels[1:] != labels[:-1]
    if scale > 1:
        picture[:, :-1][right] = SHADOW
        picture[:-1][below] = SHADOW
    picture[:, 1:][right] = BORDER
    picture[1:][below] = BORDER
    return picture


def tile(rows: Sequence[Sequence[np.ndarray]], gap: int) -> np.ndarray:
    """Lay out pictures of one size in rows on white, `gap` pixels around each."""
    height, width = rows[0][0].shape[:2]
    columns = max(len(row) for row in rows)
    shape = (len(rows) * (height + gap) + gap, columns * (width + gap) + gap, 3)
    sheet = np.full(shape, BACKGROUND, np.uint8)
    for i, row in enumerate(rows):
        for j, picture in enumerate(row):
            y, x = gap + i * (height + gap), gap + j * (width + gap)
            sheet[y : y + height, x : x + width] = picture
    return sheet


def draw_grid(cells: Sequence[Cell], title: str) -> np.ndarray:
    """Draw the cells in rows of four: each image, enlarged, with its boxes, beside itself with
    superpixel borders. The cells' images have one size."""
    drawn = [_draw_cell(cell) for cell in cells]
    grid = tile([drawn[i : i + COLUMNS] for i in range(0, len(drawn), COLUMNS)], GAP)
    heading = _text_lines([(title, 20, INK, 12)], grid.shape[1], TITLE, margin=GAP)
    return np.vstack([heading, grid])


def _draw_cell(cell: Cell) -> np.ndarray:
    scale = enlargement(*cell.segments.shape)
    bordered = with_borders(cell.image, cell.segments, scale)
    between = np.full((len(bordered), PAIR_GAP, 3), BACKGROUND, np.uint8)
    plain = enlarge(cell.image, scale)
    height, width = plain.shape[:2]
    for x0, y0, x1, y1 in cell.boxes:
        box = round(x0 * width), round(y0 * height), round(x1 * width) - 1, round(y1 * height) - 1
        _frame(plain, box, 2, BOX_COLOUR)
    pair = np.hstack([plain, between, bordered])
    lines = [(cell.name, 18, INK, 2), (cell.note, 14, FAINT, 23)]
    return np.vstack([pair, _text_lines(lines, pair.shape[1], CAPTION)])


def _text_lines(
    lines: Sequence[tuple[str, int, Colour, int]], width: int, height: int, margin: int = 0
) -> np.ndarray:
    """Write lines of (text, size, colour, y) on white, each cut to the width."""
    sheet = Image.new("RGB", (width, height), BACKGROUND)
    for text, size, colour, y in lines:
        font = _font(size)
        fitting = _fitting(text, font, width - 2 * margin)
        ImageDraw.Draw(sheet).text((margin, y), fitting, colour, font)
    return np.asarray(sheet)


def _fitting(text: str, font: Font, width: int) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text.rstrip() + "…"


def grey(values: np.ndarray) -> np.ndarray:
    """Return a map in [0, 1] as grey levels 0 to 255: float [H, W] -> uint8 [H, W]."""
    return np.rint(np.clip(values, 0, 1) * 255).astype(np.uint8)


def heat(values: np.ndarray) -> np.ndarray:
    """Return a map as colours: float [H, W] in [0, 1] -> picture. Dark blue is 0, yellow 1."""
    return cv2.applyColorMap(grey(values), cv2.COLORMAP_VIRIDIS)[..., ::-1]


def mask_picture(values: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return a map as grey levels at the image's size: float [h, w] in [0, 1] -> uint8
    [height, width], 255 times the probability, interpolated linearly."""
    levels = np.clip(values, 0, 1).astype(np.float32) * 255
    enlarged = cv2.resize(levels, (width, height), interpolation=cv2.INTER_LINEAR)
    return cv2.convertScaleAbs(enlarged)  # rounds, without further floats of the photo's size


def draw_overlay(pixels: np.ndarray, values: np.ndarray, box: list[int], text: str) -> np.ndarray:
    """Draw the map's colours, the box and a label, if it can be read, over an image. pixels: uint8
    [H, W, 3]; values: float [h, w] in [0, 1], of any size; box: inclusive pixels of the image."""
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


def _frame(picture: np.ndarray, box: Sequence[int], line: int, colour: Colour) -> None:
    """Draw the border of a box, `line` pixels wide and within it; what is outside is cut off."""
    x0, y0, x1, y1 = box
    for inset in range(min(line, (min(x1 - x0, y1 - y0) + 2) // 2)):
        cv2.rectangle(picture, (x0 + inset, y0 + inset), (x1 - inset, y1 - inset), colour)


def _label(text: str, height: int, width: int, pad: int) -> np.ndarray | None:
    """Draw the text on the box's colour, in the largest size that fits; None without one."""
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


def encode_png(picture: np.ndarray) -> bytes:
    """Return a PNG file's bytes, from a picture or grey levels uint8 [H, W]. Raises ValueError for
    a side of more than a million pixels."""
    # OpenCV's default level is 8 times as fast as Pillow's, for files 9 % larger.
    if picture.ndim == 3:
        picture = cv2.cvtColor(picture, cv2.COLOR_RGB2BGR)
    is_encoded, data = cv2.imencode(".png", picture)
    if not is_encoded:
        height, width = picture.shape[:2]
        raise ValueError(f"{width}x{height} pixels do not fit into a PNG of up to 1000000 a side")
    return data.tobytes()


def encode_heat_png(values: np.ndarray) -> bytes:
    """Return a map in `heat`'s colours as a PNG with a palette, a third as large as without."""
    picture = Image.fromarray(grey(values), mode="P")
    picture.putpalette(heat(np.arange(256)[None] / 255).tobytes())
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def encode_jpeg(picture: np.ndarray, quality: int = 92) -> bytes:
    """Return a JPEG file's bytes."""
    options = [cv2.IMWRITE_JPEG_QUALITY, quality]
    return cv2.imencode(".jpg", picture[..., ::-1], options)[1].tobytes()


def data_uri(data: bytes, kind: str) -> str:
    """Return the image file's bytes as a URI for a page, of image/`kind`."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
