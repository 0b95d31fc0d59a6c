"""`python -m benchmarks.shipped_picture`: docs/shipped.jpg, drawings and what the shipped net says.

Above each drawing of `pipeline/synthetic.py`; below what its mask leaves dark, and its box.
"""

import cv2
import numpy as np

from jobs import cli
from jobs.locate import Located, locate, prepare
from jobs.pictures import BOX_COLOUR, encode_jpeg, encode_png, mask_picture, tile
from jobs.shipped import load_shipped
from pipeline.storage import write_atomically
from pipeline.synthetic import SyntheticConfig, draw_image

COLUMNS, SIDE, GAP = 6, 200, 8
FIRST = 100  # image of the split val; the next ones follow
DARKEST = 0.15  # share of the light that is left where the mask is 0


def spotlit(image: np.ndarray, result: Located) -> np.ndarray:
    """Return the image darkened where the mask is low, with its box."""
    light = mask_picture(result.map, *image.shape[:2])[..., None] / 255
    picture = (image * (DARKEST + (1 - DARKEST) * light)).astype(np.uint8)
    x0, y0, x1, y1 = result.box
    return cv2.rectangle(picture, (x0, y0), (x1, y1), BOX_COLOUR, 2)


def main() -> None:
    """Draw the picture."""
    nets = load_shipped()
    drawing = SyntheticConfig(min_side=SIDE, max_side=SIDE)
    images = [draw_image(drawing, "val", FIRST + i)[0] for i in range(COLUMNS)]
    prepared = [prepare(nets.config, encode_png(image)) for image in images]
    results = locate(nets, prepared, batch_size=COLUMNS)
    found = [spotlit(*pair) for pair in zip(images, results, strict=True)]
    write_atomically(cli.ROOT / "docs" / "shipped.jpg", encode_jpeg(tile([images, found], GAP)))


if __name__ == "__main__":
    cli.run(main)
