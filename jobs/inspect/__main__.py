"""`python -m jobs.inspect`: batches of a set as training gets them, to look at, and their rate."""

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from jobs import cli
from jobs.cli import option
from jobs.loading import LoadingConfig
from jobs.pictures import Cell, draw_grid, encode_png
from pipeline.errors import UserError
from pipeline.loading.order import Order, Position, steps_per_epoch
from pipeline.shards.format import Manifest, read_manifest, split_of
from pipeline.storage import write_atomically

if TYPE_CHECKING:
    from pipeline.loading.loader import Batch

INSPECTION_NAME = "inspection.json"
SHOWN = 32  # images of a batch in its picture
WARMUP_BATCHES = 5  # before the rate is measured
CLASS_ROWS = 20  # of the printed class mix


@dataclass(frozen=True, kw_only=True)
class InspectConfig(LoadingConfig):
    """What to look at. The train split comes as in training, others as in evaluation."""

    output: Path = option(help=f"folder for a picture per batch and {INSPECTION_NAME}")
    split: str = option("train", help="train: augmented and shuffled; others as they are, in order")
    batches: int = option(2, help="batches to draw")
    batch_size: int = option(32, help="images in a batch, of which up to 32 are drawn")
    seed: int = option(0, help="of order and augmentation")
    epoch: int = option(0, help="whose first batches are taken")
    device: str = option("auto", help="cpu, cuda, or auto: cuda where there is one")
    seconds: float = option(5.0, help="how long to measure the rate")

    def __post_init__(self) -> None:
        super().__post_init__()
        lowest = {"batches": 1, "batch_size": 1, "seed": 0, "epoch": 0, "seconds": 0}
        for name, low in lowest.items():
            if getattr(self, name) < low:
                flag = f"--{name.replace('_', '-')}"
                raise ValueError(f"{flag} {getattr(self, name)} must be at least {low}")
        if self.device not in ("auto", "cpu", "cuda"):
            raise ValueError(f"--device {self.device} must be auto, cpu or cuda")


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What is kept of a batch: class indices [B], and distinct superpixels per image [B]."""

    labels: np.ndarray
    superpixels: np.ndarray


def load(config: InspectConfig, manifest: Manifest) -> "Iterator[Batch]":
    """The split's batches: endless from the train split, one pass over another one."""
    from pipeline.loading.loader import Loader

    gpu = config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())
    device = torch.device("cuda" if gpu else "cpu")
    split = split_of(manifest, config.split)
    steps = steps_per_epoch(split.images, config.batch_size, ranks=1)
    loader = Loader(config.data, manifest, device, config.cache_config())
    if config.split != "train":
        return loader.evaluation(config.split, config.batch_size, 0, steps)
    order = Order(batch_size=config.batch_size, seed=config.seed, window=config.window(manifest))
    return loader.train(order, config.augmentation(), start=Position(epoch=config.epoch))


def see(batch: "Batch") -> Seen:
    """What is kept of a batch."""
    flat = batch.segments.flatten(1).sort(dim=1).values
    distinct = 1 + (flat.diff(dim=1) != 0).sum(dim=1)
    return Seen(labels=batch.labels.cpu().numpy(), superpixels=distinct.cpu().numpy())


def picture(batch: "Batch", manifest: Manifest, title: str) -> np.ndarray:
    """The batch's grid, RGB uint8 [H, W, 3]: each image beside itself with superpixel borders."""
    superpixels = see(batch).superpixels
    images = batch.images[:SHOWN].permute(0, 2, 3, 1).cpu().numpy()
    segments = batch.segments[:SHOWN].cpu().numpy()
    cells = [
        Cell(
            image=images[n],
            segments=segments[n],
            name=manifest.class_names[int(batch.labels[n])].split(",")[0],
            note=f"row {int(batch.rows[n])}, {superpixels[n]} superpixels",
        )
        for n in range(len(images))
    ]
    return draw_grid(cells, title)


def measure(config: InspectConfig, manifest: Manifest) -> tuple[dict[str, Any], list[Seen]]:
    """Images per second into the device's memory, after a warm-up, over --seconds of batches or
    to the end of the split; what was in them is looked at afterwards."""
    stream = load(config, manifest)
    steps = steps_per_epoch(split_of(manifest, config.split).images, config.batch_size, ranks=1)
    for _ in islice(stream, min(WARMUP_BATCHES, steps // 2)):
        pass
    labels, images, batches, last = [], 0, 0, None
    started = time.perf_counter()
    for batch in stream:
        labels.append(batch.labels)
        images, batches, last = images + len(batch.labels), batches + 1, batch
        if time.perf_counter() - started >= config.seconds:
            break
    seconds = time.perf_counter() - started
    assert last is not None
    rate = {
        "images_per_second": round(images / seconds, 1),
        "seconds": round(seconds, 3),
        "images": images,
        "batches": batches,
        "device": str(last.images.device),
    }
    none = np.zeros(0, np.int64)
    return rate, [Seen(labels=part.cpu().numpy(), superpixels=none) for part in labels]


def distinct_classes(seen: Sequence[Seen], class_counts: np.ndarray) -> tuple[float, float]:
    """Distinct classes in a batch on average, and what a random draw from the split would give.

    class_counts: int64 [classes], images of each class in the split.
    """
    found = np.mean([len(np.unique(part.labels)) for part in seen])
    shares = class_counts / class_counts.sum()
    expected = np.mean([(1 - (1 - shares) ** len(part.labels)).sum() for part in seen])
    return float(found), float(expected)


def _tensors(batch: "Batch") -> dict[str, dict[str, Any]]:
    names = ("images", "segments", "labels", "rows")
    tensors = {name: getattr(batch, name) for name in names}
    return {
        name: {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
        for name, tensor in tensors.items()
    }


def inspect(config: InspectConfig) -> dict[str, Any]:
    """Draw the first batches into the output folder, measure the rate, and write both down.

    Returns the content of inspection.json. Raises UserError or UserError.
    """
    manifest = read_manifest(config.data)
    split = split_of(manifest, config.split)
    if config.output.exists() and not config.output.is_dir():
        raise UserError(f"--output {config.output} is a file; give a folder")
    if not split.images:
        raise UserError(f"split {config.split!r} of {config.data} has no images to look at")
    steps = steps_per_epoch(split.images, config.batch_size, ranks=1)
    shown = list(islice(load(config, manifest), config.batches))
    how = "augmented" if config.split == "train" else "as stored"
    config.output.mkdir(parents=True, exist_ok=True)
    names = []
    for number, batch in enumerate(shown):
        images = len(batch.labels)
        part = f"{SHOWN} of its {images}" if images > SHOWN else f"its {images}"
        title = (
            f"{config.split}, batch {number} of {steps} in epoch {config.epoch}: "
            f"{part} images, {how}"
        )
        names.append(f"{config.split}-batch-{number}.png")
        write_atomically(config.output / names[-1], encode_png(picture(batch, manifest, title)))
    rate, measured = measure(config, manifest)
    seen = [see(batch) for batch in shown]
    superpixels = np.concatenate([part.superpixels for part in seen])
    class_counts = np.array(split.class_counts)
    distinct, expected = distinct_classes([*seen, *measured], class_counts)
    labels = np.concatenate([part.labels for part in (*seen, *measured)])
    content = {
        "format": 1,
        "split": config.split,
        "images": split.images,
        "shards": len(split.shards),
        "steps_per_epoch": steps,
        "rate": rate,
        "batch": _tensors(shown[0]),
        "superpixels": {
            "min": int(superpixels.min()),
            "mean": round(float(superpixels.mean()), 2),
            "max": int(superpixels.max()),
            "stored_max": manifest.max_superpixels,
        },
        "classes_per_batch": {"mean": round(distinct, 2), "random_draw": round(expected, 2)},
        "label_counts": dict(
            zip(
                manifest.classes,
                np.bincount(labels, minlength=len(manifest.classes)).tolist(),
                strict=True,
            )
        ),
        "pictures": names,
        **cli.record(config),
    }
    text = json.dumps(content, indent=1) + "\n"
    write_atomically(config.output / INSPECTION_NAME, text.encode())
    return content


def summary(content: dict[str, Any], manifest: Manifest) -> str:
    """The figures as plain text."""
    rate, superpixels, mix = (
        content[name] for name in ("rate", "superpixels", "classes_per_batch")
    )
    rows = [
        [name, " x ".join(map(str, tensor["shape"])), tensor["dtype"]]
        for name, tensor in content["batch"].items()
    ]
    counts, total = content["label_counts"], sum(content["label_counts"].values())
    split_counts = dict(
        zip(manifest.classes, manifest.splits[content["split"]].class_counts, strict=True)
    )
    largest = sorted(counts, key=lambda wnid: (-counts[wnid], wnid))[:CLASS_ROWS]
    classes = [
        [
            manifest.class_names[manifest.classes.index(wnid)].split(",")[0],
            wnid,
            f"{counts[wnid] / total:.1%}",
            f"{split_counts[wnid] / content['images']:.1%}",
        ]
        for wnid in largest
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
        cli.table(["batch", "shape", "dtype"], rows),
        "",
        cli.table([f"class mix of {total} images", "wnid", "seen", "in the split"], classes),
        *([f"and {more} more classes, see {INSPECTION_NAME}"] if more else []),
    ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the job with command-line flags (`--help` lists them)."""
    config = cli.parse(InspectConfig, argv, __doc__ or "")
    content = inspect(config)
    print(summary(content, read_manifest(config.data)))
    for name in content["pictures"]:
        print(f"picture: {config.output / name}")


if __name__ == "__main__":
    cli.run(main)
