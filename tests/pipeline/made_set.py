"""Small sets of made-up samples, written as shards without any preprocessing."""

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch

from pipeline.loading.loader import Batch
from pipeline.shards.format import (
    Manifest,
    Sample,
    ShardPacker,
    Split,
    read_manifest,
    read_samples,
    write_shard,
)

CLASSES = tuple("abcdefg")
SUPERPIXELS = 300  # what the manifest allows
COUNTS = (20, 20, 13)  # samples in each shard
MEAN = (120.2, 60.7, 30.0)


def make_samples(
    count: int = sum(COUNTS), size: tuple[int, int] = (24, 32), segments_dtype: str = "uint8"
) -> list[Sample]:
    """Patches of 4 px in noisy colours as image, noise as superpixels; ledger rows from 1000."""
    random = np.random.default_rng(0)
    height, width = size
    coarse = random.integers(0, 256, (count, -(-height // 4), -(-width // 4), 3), np.uint8)
    images = coarse.repeat(4, axis=1).repeat(4, axis=2)[:, :height, :width]
    labels = min(SUPERPIXELS, np.iinfo(segments_dtype).max + 1)
    return [
        Sample(
            key=f"train-{n:08d}",
            row=1000 + n,
            label=n % len(CLASSES),
            image=images[n],
            segments=random.integers(0, labels, size).astype(segments_dtype),
            meta={"id": f"{n:04d}"},
        )
        for n in range(count)
    ]


def pack_shard(samples: Iterable[Sample], image_format: str) -> ShardPacker:
    """Pack a shard of these samples, as preprocessing does."""
    packer = ShardPacker(image_format)
    for sample in samples:
        packer.add(sample)
    return packer


def write_set(
    folder: Path,
    samples: Sequence[Sample],
    image_format: str = "rgb",
    counts: Sequence[int] = COUNTS,
) -> Manifest:
    """Write the samples as shards of a train split, so many in each; the set's manifest."""
    (folder / "train").mkdir(parents=True)
    ends = np.cumsum(counts).tolist()
    shards = tuple(
        write_shard(
            folder / "train" / f"train-{n:06d}.tar",
            pack_shard(samples[end - count : end], image_format),
        )
        for n, (count, end) in enumerate(zip(counts, ends, strict=True))
    )
    height, width = samples[0].segments.shape
    split = Split(images=ends[-1], rejected=0, shards=shards, class_counts=())
    return Manifest(
        classes=CLASSES,
        class_names=CLASSES,
        height=height,
        width=width,
        image_format=image_format,
        segments_dtype=str(samples[0].segments.dtype),
        max_superpixels=SUPERPIXELS,
        mean=MEAN,
        std=(1.0, 1.0, 1.0),
        splits={"train": split},
    )


def stored_samples(data: Path, split: str) -> list[Sample]:
    """Read all samples of a finished set's split, in order."""
    manifest = read_manifest(data)
    shards = [data / split / shard.name for shard in manifest.splits[split].shards]
    return [sample for path in shards for sample in read_samples(path, manifest)]


def assert_same(found: list[Batch], expected: list[Batch]) -> None:
    """Every tensor equal to the last bit, and the numbers too."""
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        for field in dataclasses.fields(Batch):
            values = getattr(one, field.name), getattr(other, field.name)
            if isinstance(values[0], torch.Tensor):
                assert torch.equal(*values), field.name
            else:
                assert values[0] == values[1], field.name
