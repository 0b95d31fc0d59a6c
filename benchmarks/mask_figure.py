"""`python -m benchmarks.mask_figure`: masks of several runs on the same images, as one picture.

Columns: the image with its true boxes (green), then for each run the probability of masking each
superpixel with its box (pink), and the image faded by it. The images are those of val, or train
where that is empty, evenly spaced: none is chosen by what the masks make of it.
"""

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from jobs import cli
from jobs.evaluate.config import check_compatible
from jobs.loading import LoadingConfig
from jobs.pictures import heat, png
from jobs.runs import colour_statistics, load_nets
from jobs.train.examples import load_examples
from model.localization import RULES, localize
from model.masking import mask_map
from model.step import normalize
from pipeline.evaluation.protocols import scale_boxes
from pipeline.evaluation.truth import ground_truth_of
from pipeline.shards.format import read_manifest
from pipeline.shards.ledger import read_ledger
from pipeline.storage import write_atomically

SIDE = 128  # pixels of an image in the picture, at least
GAP, TITLE = 6, 26
TRUE_COLOUR, BOX_COLOUR = (0, 230, 90), (255, 79, 154)


@dataclass(frozen=True, kw_only=True)
class FigureConfig(LoadingConfig):
    """What to draw."""

    run: tuple[Path, ...] = cli.option(help="folders of finished trainings on the same shards")
    titles: tuple[str, ...] = cli.option((), help="what each run is called (default: its folder)")
    images: int = cli.option(10, help="rows of the picture")
    rule: str = cli.option("paper", help=f"how a box follows from a map: {', '.join(RULES)}")
    output: Path = cli.option(help="the PNG file to write")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.titles and len(self.titles) != len(self.run):
            raise ValueError(f"{len(self.titles)} --titles for {len(self.run)} runs; give as many")
        if self.rule not in RULES:
            raise ValueError(f"--rule {self.rule} is unknown: one of {', '.join(RULES)}")
        if self.images < 1:
            raise ValueError(f"--images {self.images} must be at least 1")


def boxed(picture: np.ndarray, boxes: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    """The picture, enlarged to SIDE, with frames around boxes (int [N, 4], inclusive pixels)."""
    scale = max(1, -(-SIDE // max(picture.shape[:2])))
    large = np.ascontiguousarray(picture.repeat(scale, 0).repeat(scale, 1))
    for x0, y0, x1, y1 in (boxes * scale + [0, 0, scale - 1, scale - 1]).tolist():
        cv2.rectangle(large, (x0, y0), (x1, y1), colour, 2)
    return large


def draw(config: FigureConfig) -> np.ndarray:
    """The picture, RGB uint8. Raises UserError for runs that do not fit the shards."""
    manifest = read_manifest(config.data)
    examples = load_examples(config, manifest, torch.device("cpu"), config.images)
    columns = ["row", "key", "id", "label", "width", "height", "boxes"]
    truth = ground_truth_of(read_ledger(config.data, examples.split, columns), manifest)
    assert truth.sizes is not None
    pixels = examples.images.permute(0, 2, 3, 1).numpy()
    size = np.array([manifest.height, manifest.width])
    rows = []
    for place, image in zip(examples.places, pixels, strict=True):
        boxes = truth.boxes[truth.starts[place] : truth.starts[place + 1]]
        rows.append([boxed(image, scale_boxes(boxes, truth.sizes[place], size), TRUE_COLOUR)])
    for run in config.run:
        nets = load_nets(run)
        check_compatible(run, nets.config, config.data, manifest)
        x = normalize(examples.images, *colour_statistics(nets.config, examples.images.device))
        with torch.no_grad():
            maps = mask_map(nets.corruption, x, examples.segments, nets.config.superpixels).numpy()
        faded = maps[..., None] * np.array(nets.config.mean) + (1 - maps[..., None]) * pixels
        boxes, _ = localize(maps, config.rule)
        for row, values, box, kept in zip(rows, maps, boxes, faded, strict=True):
            row.append(boxed(heat(values), box[None], BOX_COLOUR))
            row.append(
                boxed(np.rint(kept).astype(np.uint8), np.empty((0, 4), np.int64), BOX_COLOUR)
            )
    height, width = rows[0][0].shape[:2]
    sheet = Image.new(
        "RGB",
        (len(rows[0]) * (width + GAP) + GAP, TITLE + len(rows) * (height + GAP)),
        (255, 255, 255),
    )
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(15)
    for number, title in enumerate(config.titles or [run.name for run in config.run]):
        pen.text((GAP + (1 + 2 * number) * (width + GAP), 4), title, (20, 20, 20), font)
    for y, row in enumerate(rows):
        for x_place, cell in enumerate(row):
            corner = (GAP + x_place * (width + GAP), TITLE + y * (height + GAP))
            sheet.paste(Image.fromarray(cell), corner)
    return np.asarray(sheet)


def main() -> None:
    config = cli.parse(FigureConfig, None, __doc__ or "")
    picture = png(draw(config))
    config.output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(config.output, picture)
    print(f"written to {config.output}")


if __name__ == "__main__":
    cli.run(main)
