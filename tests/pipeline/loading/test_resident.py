"""A split in the device's memory gives the loader's batches."""

from itertools import islice
from pathlib import Path

import pytest
import torch

from pipeline.loading.augmentation import Augmentation
from pipeline.loading.loader import Loader
from pipeline.loading.order import Order, Position
from pipeline.loading.resident import Resident, fits, split_bytes
from tests.pipeline.made_set import make_samples, write_set

EVERYTHING = Augmentation(min_area=0.4, max_aspect=1.5, translation=0.2)
DEVICES = (
    "cpu",
    pytest.param(
        "cuda",
        marks=pytest.mark.skipif(
            not torch.cuda.is_available(), reason="this machine has no CUDA device"
        ),
    ),
)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("image_format", "dtype"), [("rgb", "uint16"), ("jpg", "uint8")])
def test_batches_are_those_of_the_loader_from_any_position_on_for_every_rank(
    tmp_path: Path, image_format: str, dtype: str, device: str
) -> None:
    manifest = write_set(tmp_path, make_samples(segments_dtype=dtype), image_format)
    loader = Loader(tmp_path, manifest, torch.device(device))
    resident = Resident.read(loader)
    assert resident.images.nbytes + resident.segments.nbytes == split_bytes(manifest)
    for window, rank, start in ((None, 0, Position()), (2, 1, Position(epoch=1, step=2))):
        order = Order(batch_size=16, seed=3, window=window)
        streams = (
            source.train(order, EVERYTHING, start=start, rank=rank, ranks=rank + 1)
            for source in (resident, loader)
        )
        for own, expected in zip(*(islice(stream, 6) for stream in streams), strict=True):
            assert (own.total, own.offset) == (expected.total, expected.offset)
            for name in ("images", "segments", "labels", "rows"):
                ours, theirs = getattr(own, name), getattr(expected, name)
                assert torch.equal(ours, theirs)
                assert (ours.dtype, ours.stride()) == (theirs.dtype, theirs.stride())


def test_a_cpu_keeps_no_split(tmp_path: Path) -> None:
    manifest = write_set(tmp_path, make_samples(), "rgb")
    assert not fits(manifest, torch.device("cpu"))
