"""Batches on a CPU are written into memory that was used before, and JPEG files are decoded without
DALI: nobody may tell."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline import loader
from pipeline.augmentation import Augmentation
from pipeline.cache import ShardCache
from pipeline.order import Position
from pipeline.samples import Samples
from pipeline.shards import Card, Sample, Split, write_shard

CPU = torch.device("cpu")
SIZE = (24, 32)
SAMPLES = 40


def write_set(folder: Path, image_format: str) -> Card:
    (folder / "train").mkdir(parents=True)
    rng = np.random.default_rng(0)
    samples = [
        Sample(
            key=f"train-{row:08d}",
            row=row,
            label=row % 3,
            image=rng.integers(0, 256, (*SIZE, 3), dtype=np.uint8),
            segments=rng.integers(0, 50, SIZE, dtype=np.uint8),
            meta={},
        )
        for row in range(SAMPLES)
    ]
    shard = write_shard(folder / "train" / "train-000000.tar", samples, image_format)
    return Card(
        classes=tuple("abc"),
        class_names=tuple("abc"),
        height=SIZE[0],
        width=SIZE[1],
        image_format=image_format,
        segments_dtype="uint8",
        max_superpixels=50,
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        splits={
            "train": Split(images=SAMPLES, rejected=0, shards=(shard,), class_counts=(14, 13, 13))
        },
    )


def stream(data: Path, card: Card) -> Iterator[loader.Batch]:
    return loader.train_batches(
        data,
        card,
        batch_size=8,
        rank=0,
        ranks=1,
        seed=0,
        start=Position(),
        augmentation=Augmentation(),
        device=CPU,
    )


@pytest.mark.parametrize("image_format", ["rgb", "jpg"])
def test_memory_is_not_used_again_while_a_batch_a_view_or_an_array_refers_to_it(
    tmp_path: Path, image_format: str
) -> None:
    card = write_set(tmp_path, image_format)
    kept: list[list[Tensor]] = []
    copies: list[list[Tensor]] = []
    for batch in islice(stream(tmp_path, card), 30):
        array = batch.images.numpy()[2:]
        kept.append([batch.images[:1], batch.segments[1:3], torch.from_numpy(array)])
        copies.append([part.clone() for part in kept[-1]])
        del batch, array
    for parts, expected in zip(kept, copies, strict=True):
        assert all(map(torch.equal, parts, expected))


def test_batches_that_are_done_with_leave_their_memory_to_later_ones(tmp_path: Path) -> None:
    card = write_set(tmp_path, "rgb")
    places = {batch.images.data_ptr() for batch in islice(stream(tmp_path, card), 60)}
    assert len(places) <= loader.AHEAD + 2  # one is made, one is used


def test_jpeg_files_have_the_same_pixels_through_dali_and_around_it(tmp_path: Path) -> None:
    card = write_set(tmp_path, "jpg")
    samples = Samples(card, "train", ShardCache(tmp_path, card, "train", tmp_path, 0))

    def requests() -> Iterator[loader._Request]:
        for first in range(0, SAMPLES, 8):
            places = np.arange(first, first + 8)
            yield loader._Request(places=places, drawn=None, total=8, offset=0)

    through = list(loader._decoded(samples, requests(), 8, CPU))
    around = list(loader._jpeg(samples, requests()))
    assert len(through) == len(around) == SAMPLES // 8
    for one, other in zip(through, around, strict=True):
        assert torch.equal(one[2], other[2])
        assert torch.equal(one[3], other[3])
