"""`python -m benchmarks.image_stages --images FOLDER`: what each choice in making a sample buys.

Side by side in one run and one thread, the versions of a stage taking turns image by image:
decoding JPEGs to each number of eighths, to the least sufficient one or to ours, OpenCV's area
interpolation or ours, a channel's sums from OpenCV's histogram or ours, and fast-slic's settings or
ours, with the colour variance that the superpixels explain and how many there are.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import simplejpeg

from benchmarks.machine import hardware
from jobs import cli
from pipeline.shards.images import DECODE_FACTOR, decoded_size, read_image, resize
from pipeline.shards.pixels import moments
from pipeline.shards.superpixels import ITERATIONS, MIN_SIZE, superpixels

Figures = dict[str, float]  # microseconds by version

ROUNDS = 5
SETTINGS = {
    "fast-slic's own": (10, 0.25),
    "ours": (ITERATIONS, MIN_SIZE),
}  # iterations, smallest piece


@dataclass(frozen=True, kw_only=True)
class StagesConfig:
    """Which images, stored how."""

    images: Path = cli.option(help="folder with JPEG files")
    side: int = cli.option(64, help="height and width of the stored images, pixels")
    superpixels: int = cli.option(100, help="superpixels asked for")
    limit: int = cli.option(200, help="images used")
    output: Path | None = cli.option(None, help="JSON file for the figures, with the hardware")


def microseconds(versions: Mapping[str, Callable[[Any], Any]], inputs: Sequence[Any]) -> Figures:
    """Mean over the inputs of each version's shortest processor time over ROUNDS."""
    best = {name: np.full(len(inputs), np.inf) for name in versions}
    for _ in range(ROUNDS):
        for i, given in enumerate(inputs):
            for name, version in versions.items():
                started = time.process_time_ns()
                version(given)
                best[name][i] = min(best[name][i], time.process_time_ns() - started)
    return {name: float(times.mean()) / 1000 for name, times in best.items()}


def cut(image: np.ndarray, count: int, settings: tuple[int, float]) -> np.ndarray:
    """Superpixels under one of SETTINGS."""
    iterations, min_size = settings
    return superpixels(image, count, iterations=iterations, min_size=min_size)


def decode(data: bytes, side: int, ours: bool) -> np.ndarray:
    """A JPEG at twice the side or more: in the least sufficient eighths of its size, or in those
    that jobs.preprocess decodes to."""
    least = (DECODE_FACTOR * side, DECODE_FACTOR * side)
    if ours:
        height, width, _, _ = simplejpeg.decode_jpeg_header(data)
        least = decoded_size((height, width), (side, side))
    return simplejpeg.decode_jpeg(data, min_height=least[0], min_width=least[1], strict=False)


def decode_eighths(data: bytes, eighths: int) -> np.ndarray:
    """A JPEG at so many eighths of its size."""
    height, width, _, _ = simplejpeg.decode_jpeg_header(data)
    least = {"min_height": -(-height * eighths // 8), "min_width": -(-width * eighths // 8)}
    return simplejpeg.decode_jpeg(data, **least, strict=False)


def histogram_sums(image: np.ndarray) -> np.ndarray:
    """Sums of levels and of their squares by channel, int64 [2, 3], from histograms."""
    counts = [cv2.calcHist([image], [channel], None, [256], [0, 256]) for channel in range(3)]
    powers = np.arange(256)[:, None] ** [1, 2]
    return (np.array(counts, np.int64).reshape(3, 256) @ powers).T


def summed(image: np.ndarray) -> np.ndarray:
    """The same, ours."""
    return moments(image)


def explained_variance(image: np.ndarray, labels: np.ndarray) -> float:
    """Share of the colours' variance between superpixels, 0 to 1."""
    colours, flat = image.reshape(-1, 3).astype(np.float64), labels.ravel()
    counts = np.bincount(flat)
    sums = np.stack([np.bincount(flat, colours[:, c]) for c in range(3)], axis=1)
    mean = colours.mean(axis=0)
    total = ((colours - mean) ** 2).sum()
    between = (sums**2 / counts[:, None]).sum() - len(colours) * (mean**2).sum()
    return float(between / total) if total else 1.0


def measure(config: StagesConfig) -> dict[str, Any]:
    """Microseconds per image of each version of each stage, and what the superpixels explain."""
    side = config.side
    paths = sorted(x for x in config.images.rglob("*") if x.suffix.lower() in (".jpg", ".jpeg"))
    files = [path.read_bytes() for path in paths[: config.limit]]
    scaled = [decode(data, side, ours=True) for data in files]
    stored = [read_image(data, side, side).pixels for data in files]

    cuts = {
        name: partial(cut, count=config.superpixels, settings=SETTINGS[name]) for name in SETTINGS
    }
    area = partial(cv2.resize, dsize=(side, side), interpolation=cv2.INTER_AREA)
    ours = partial(resize, height=side, width=side)
    decoders = {
        **{f"{n}/8": partial(decode_eighths, eighths=n) for n in range(1, 9)},
        "least eighths": partial(decode, side=side, ours=False),
        "ours": partial(decode, side=side, ours=True),
    }
    figures: dict[str, Any] = {
        "decode": microseconds(decoders, files),
        "resize": microseconds({"OpenCV": area, "ours": ours}, scaled),
        "sums": microseconds({"OpenCV's histogram": histogram_sums, "ours": summed}, stored),
        "superpixels": microseconds(cuts, stored),
    }
    for name, version in cuts.items():
        labels = [version(image) for image in stored]
        pairs = zip(stored, labels, strict=True)
        figures[f"superpixels, {name}"] = {
            "explained variance": float(np.mean([explained_variance(*pair) for pair in pairs])),
            "superpixels": float(np.mean([x.max() + 1 for x in labels])),
        }
    return figures | {"images": len(files)}


def main() -> None:
    """Print the table; write it where asked."""
    config = cli.parse(StagesConfig, None, "Measure each choice in making a sample.")
    figures = measure(config)
    rows = [
        [stage, name, f"{value:.0f} us"]
        for stage in ("decode", "resize", "sums", "superpixels")
        for name, value in figures[stage].items()
    ]
    rows += [
        [f"superpixels, {name}", key, f"{value:.4g}"]
        for name in SETTINGS
        for key, value in figures[f"superpixels, {name}"].items()
    ]
    print(f"{figures['images']} images to {config.side} px, {config.superpixels} superpixels")
    print(cli.table(["stage", "version", "per image"], rows))
    if config.output is not None:
        record = cli.record(config) | {"date": str(date.today()), "hardware": hardware()}
        config.output.write_text(json.dumps(record | {"figures": figures}, indent=1) + "\n")


if __name__ == "__main__":
    cli.run(main)
