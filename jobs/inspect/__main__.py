"""`python -m jobs.inspect`: pictures of batches as training gets them, and the loader's rate."""

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from torch import Tensor

from jobs import cli
from jobs.cli import option
from jobs.loading import LoadingConfig, choose_device
from jobs.pictures import Cell, draw_grid, encode_png
from pipeline.errors import UserError
from pipeline.loading.order import Order, Position, steps_per_epoch
from pipeline.shards.format import Manifest, read_manifest, split_of
from pipeline.storage import write_atomically

if TYPE_CHECKING:
    from pipeline.loading.loader import Batch

INSPECTION_NAME = "inspection.json"
MOST_DRAWN = 32  # images of a batch in its picture
WARMUP_BATCHES = 5  # before the rate is measured
CLASS_ROWS = 20  # of the printed class mix


@dataclass(frozen=True, kw_only=True)
class InspectConfig(LoadingConfig):
    """What to look at. The train split comes as in training, others as in evaluation."""

    output: Path = option(help=f"folder for a picture per batch and {INSPECTION_NAME}")
    split: str = option("train", help="train: augmented and shuffled; others as they are, in order")
    batches: int = option(2, low=1, help="batches to draw")
    batch_size: int = option(32, low=1, help="images in a batch, of which up to 32 are drawn")
    seed: int = option(0, low=0, help="of order and augmentation")
    epoch: int = option(0, low=0, help="whose first batches are taken")
    device: Literal["auto", "cpu", "cuda"] = option("auto", help="auto: cuda where there is one")
    seconds: float = option(5.0, low=0, help="how long to measure the rate")


def load(config: InspectConfig, manifest: Manifest) -> "Iterator[Batch]":
    """Yield the split's batches: endless ones of the train split, one pass over another split."""
    from pipeline.loading.loader import Loader

    device = choose_device(config.device)
    loader = Loader(config.data, manifest, device, config.cache_config())
    if config.split != "train":
        return loader.evaluation(config.split, config.batch_size)
    order = Order(batch_size=config.batch_size, seed=config.seed, window=config.window(manifest))
    return loader.train(order, config.augmentation(), start=Position(epoch=config.epoch))


def count_superpixels(segments: Tensor) -> np.ndarray:
    """Count the distinct superpixels of each image: labels [B, H, W] -> int64 [B]."""
    labels = segments.flatten(1).sort(dim=1).values
    return (1 + (labels.diff(dim=1) != 0).sum(dim=1)).cpu().numpy()


def draw_batch(batch: "Batch", manifest: Manifest, title: str) -> np.ndarray:
    """Draw the batch's first images, each beside itself with superpixel borders."""
    superpixels = count_superpixels(batch.segments)
    images = batch.images[:MOST_DRAWN].permute(0, 2, 3, 1).cpu().numpy()
    segments = batch.segments[:MOST_DRAWN].cpu().numpy()
    cells = [
        Cell(
            image=images[n],
            segments=segments[n],
            name=_short(manifest.class_names[int(batch.labels[n])]),
            note=f"row {int(batch.rows[n])}, {superpixels[n]} superpixels",
        )
        for n in range(len(images))
    ]
    return draw_grid(cells, title)


def _short(class_name: str) -> str:
    return class_name.split(",")[0]


def measure(config: InspectConfig, manifest: Manifest) -> tuple[dict[str, Any], list[np.ndarray]]:
    """Measure images per second into the device's memory, after a warm-up, over --seconds of
    batches or to the end of the split. Return the rate, and the class indices of each batch."""
    stream = load(config, manifest)
    steps = steps_per_epoch(split_of(manifest, config.split).images, config.batch_size, ranks=1)
    for _ in islice(stream, min(WARMUP_BATCHES, steps // 2)):
        pass
    labels, seconds = [], 0.0
    started = time.perf_counter()
    for batch in stream:
        labels.append(batch.labels)
        seconds = time.perf_counter() - started
        if seconds >= config.seconds:
            break
    images = sum(map(len, labels))
    rate = {
        "images_per_second": round(images / seconds, 1),
        "seconds": round(seconds, 3),
        "images": images,
        "batches": len(labels),
        "device": str(labels[0].device),
    }
    return rate, [part.cpu().numpy() for part in labels]


def class_mix(labels: Sequence[np.ndarray], class_counts: np.ndarray) -> tuple[float, float]:
    """Return the mean number of distinct classes in a batch, and that of a random draw from the
    split. labels: each batch's class indices; class_counts: int64 [classes], of the split."""
    distinct = np.mean([len(np.unique(batch)) for batch in labels])
    shares = class_counts / class_counts.sum()
    expected = np.mean([(1 - (1 - shares) ** len(batch)).sum() for batch in labels])
    return float(distinct), float(expected)


def _tensors(batch: "Batch") -> dict[str, dict[str, Any]]:
    tensors = {name: getattr(batch, name) for name in ("images", "segments", "labels", "rows")}
    return {
        name: {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
        for name, tensor in tensors.items()
    }


def inspect(config: InspectConfig) -> dict[str, Any]:
    """Draw the first batches into the output folder, measure the rate, and write both down.

    Returns the content of inspection.json. Raises UserError for a set or output that cannot be
    used.
    """
    manifest = read_manifest(config.data)
    split = split_of(manifest, config.split)
    if config.output.exists() and not config.output.is_dir():
        raise UserError(f"--output {config.output} is a file; give a folder")
    if not split.images:
        raise UserError(f"split {config.split!r} of {config.data} has no images to look at")
    config.output.mkdir(parents=True, exist_ok=True)
    batches = list(islice(load(config, manifest), config.batches))
    names = _write_pictures(config, manifest, batches)
    rate, measured = measure(config, manifest)
    labels = [*(batch.labels.cpu().numpy() for batch in batches), *measured]
    superpixels = np.concatenate([count_superpixels(batch.segments) for batch in batches])
    distinct, expected = class_mix(labels, np.array(split.class_counts))
    label_counts = np.bincount(np.concatenate(labels), minlength=len(manifest.classes)).tolist()
    content = {
        "format": 1,
        "split": config.split,
        "images": split.images,
        "shards": len(split.shards),
        "steps_per_epoch": steps_per_epoch(split.images, config.batch_size, ranks=1),
        "rate": rate,
        "batch": _tensors(batches[0]),
        "superpixels": {
            "min": int(superpixels.min()),
            "mean": round(float(superpixels.mean()), 2),
            "max": int(superpixels.max()),
            "stored_max": manifest.max_superpixels,
        },
        "classes_per_batch": {"mean": round(distinct, 2), "random_draw": round(expected, 2)},
        "label_counts": dict(zip(manifest.classes, label_counts, strict=True)),
        "pictures": names,
        **cli.record(config),
    }
    text = json.dumps(content, indent=1) + "\n"
    write_atomically(config.output / INSPECTION_NAME, text.encode())
    return content


def _write_pictures(
    config: InspectConfig, manifest: Manifest, batches: "Sequence[Batch]"
) -> list[str]:
    steps = steps_per_epoch(split_of(manifest, config.split).images, config.batch_size, ranks=1)
    how = "augmented" if config.split == "train" else "as stored"
    names = []
    for number, batch in enumerate(batches):
        images = len(batch.labels)
        part = f"{MOST_DRAWN} of its {images}" if images > MOST_DRAWN else f"its {images}"
        title = (
            f"{config.split}, batch {number} of {steps} in epoch {config.epoch}: "
            f"{part} images, {how}"
        )
        names.append(f"{config.split}-batch-{number}.png")
        write_atomically(config.output / names[-1], encode_png(draw_batch(batch, manifest, title)))
    return names


def summary(content: dict[str, Any], manifest: Manifest) -> str:
    """Return the figures of inspection.json as plain text."""
    rate, superpixels, mix = (
        content[name] for name in ("rate", "superpixels", "classes_per_batch")
    )
    tensors = [
        [name, " x ".join(map(str, tensor["shape"])), tensor["dtype"]]
        for name, tensor in content["batch"].items()
    ]
    counts = np.array([*content["label_counts"].values()])
    split_counts = manifest.splits[content["split"]].class_counts
    classes = [
        [
            _short(manifest.class_names[index]),
            manifest.classes[index],
            f"{counts[index] / counts.sum():.1%}",
            f"{split_counts[index] / content['images']:.1%}",
        ]
        for index in np.argsort(-counts, kind="stable")[:CLASS_ROWS]
    ]
    more = len(counts) - len(classes)
    lines = [
        f"{content['split']}: images {content['images']}, shards {content['shards']}, steps an "
        f"epoch {content['steps_per_epoch']}",
        f"rate: {rate['images_per_second']:,.0f} images/s into {rate['device']} memory, over "
        f"{rate['batches']} batches in {rate['seconds']:.1f} s after a warm-up",
        f"superpixels per image as loaded: {superpixels['min']} to {superpixels['max']}, mean "
        f"{superpixels['mean']:.1f} (stored: up to {superpixels['stored_max']})",
        f"classes in a batch: {mix['mean']:.1f}, a random draw has {mix['random_draw']:.1f}",
        "",
        cli.table(["batch", "shape", "dtype"], tensors),
        "",
        cli.table(
            [f"class mix of {counts.sum()} images", "wnid", "loaded", "in the split"], classes
        ),
        *([f"and {more} more classes, see {INSPECTION_NAME}"] if more else []),
    ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command with its flags (`--help` lists them)."""
    config = cli.parse(InspectConfig, argv, __doc__ or "")
    content = inspect(config)
    print(summary(content, read_manifest(config.data)))
    for name in content["pictures"]:
        print(f"picture: {config.output / name}")


if __name__ == "__main__":
    cli.run(main)
