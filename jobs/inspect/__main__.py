"""`python -m jobs.inspect`: pictures of batches as training gets them, and the loader's rate."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Literal

import numpy as np

from jobs import cli
from jobs.cli import option
from jobs.loading import LoadingConfig, choose_device
from jobs.pictures import Cell, draw_grid, encode_png
from pipeline.errors import UserError
from pipeline.loading.order import Order
from pipeline.shards.format import Manifest, read_manifest
from pipeline.storage import is_file, join, make_folder, write_atomically

if TYPE_CHECKING:
    from pipeline.loading.loader import Batch

MOST_DRAWN = 32  # images of a batch in its picture
WARMUP_BATCHES = 5  # before the rate is measured


@dataclass(frozen=True, kw_only=True)
class InspectConfig(LoadingConfig):
    """What to look at: the first batches of a training with these flags."""

    output: str = option(help="folder or URI for a picture per batch")
    batches: int = option(2, low=1, help="batches to draw")
    batch_size: int = option(32, low=1, help="images in a batch, of which up to 32 are drawn")
    seed: int = option(0, low=0, help="of order and augmentation")
    device: Literal["auto", "cpu", "cuda"] = option("auto", help="auto: cuda where there is one")
    seconds: float = option(5.0, low=0, help="how long to measure the rate")


def load(config: InspectConfig, manifest: Manifest) -> "Iterator[Batch]":
    """Yield batches of the train split, without end."""
    from pipeline.loading.loader import Loader

    loader = Loader(config.data, manifest, choose_device(config.device), config.cache_config())
    order = Order(batch_size=config.batch_size, seed=config.seed, window=config.window(manifest))
    return loader.train(order, config.augmentation())


def draw_batch(batch: "Batch", manifest: Manifest, title: str) -> np.ndarray:
    """Draw the batch's first images, each beside itself with superpixel borders."""
    images = batch.images[:MOST_DRAWN].permute(0, 2, 3, 1).cpu().numpy()
    segments = batch.segments[:MOST_DRAWN].cpu().numpy()
    cells = []
    for n, (image, labels) in enumerate(zip(images, segments, strict=True)):
        name = manifest.class_names[int(batch.labels[n])].split(",")[0]
        note = f"row {int(batch.rows[n])}, {len(np.unique(labels))} superpixels"
        cells.append(Cell(image=image, segments=labels, name=name, note=note))
    return draw_grid(cells, title)


def measure(config: InspectConfig, manifest: Manifest) -> str:
    """Measure images/s into the device's memory over --seconds, and return the rate in words."""
    stream = load(config, manifest)
    for _ in islice(stream, WARMUP_BATCHES):
        pass
    images, seconds, started = 0, 0.0, time.perf_counter()
    while seconds < config.seconds or not images:
        batch = next(stream)
        images += len(batch.labels)
        seconds = time.perf_counter() - started
    return f"{images / seconds:,.0f} images/s into {batch.labels.device} memory, of {images} images"


def inspect(config: InspectConfig, manifest: Manifest) -> list[str]:
    """Draw the first batches into the output folder. Raises UserError for one that is a file."""
    if is_file(config.output):
        raise UserError(f"--output {config.output} is a file; give a folder")
    make_folder(config.output)
    paths = []
    for number, batch in enumerate(islice(load(config, manifest), config.batches)):
        title = f"train, batch {number}: {len(batch.labels)} images, augmented"
        paths.append(join(config.output, f"train-batch-{number}.png"))
        write_atomically(paths[-1], encode_png(draw_batch(batch, manifest, title)))
    return paths


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command with its flags (`--help` lists them)."""
    config = cli.parse(InspectConfig, argv, __doc__ or "")
    manifest = read_manifest(config.data)
    for path in inspect(config, manifest):
        print(f"picture: {path}")
    print(f"rate: {measure(config, manifest)}")


if __name__ == "__main__":
    cli.run(main)
