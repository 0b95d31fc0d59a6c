"""What jobs.localize draws: a map over its image with the box and the class, and the map alone."""

import functools

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

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
