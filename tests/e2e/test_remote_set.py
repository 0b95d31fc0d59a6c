"""A set on an S3 server gives training and evaluation the bytes that the local set gives."""

from itertools import islice
from pathlib import Path

import pytest
import torch

from jobs.inspect.__main__ import main
from pipeline.loading.augmentation import Augmentation
from pipeline.loading.cache import CacheConfig, cached_bytes
from pipeline.loading.loader import Batch, Loader
from pipeline.loading.order import Order, Position, shuffle_window
from pipeline.shards.format import read_manifest
from tests import remote
from tests.e2e.commands import words
from tests.pipeline.made_set import assert_same
from tests.remote import Proxy

pytestmark = pytest.mark.slow
CPU = torch.device("cpu")


def train(
    data: str | Path,
    cache: Path,
    rank: int,
    *,
    window: int | None = None,
    limit: int = 1 << 30,
    epoch: int = 0,
    batch_size: int = 16,
) -> list[Batch]:
    """One rank's batches of two epochs, of two ranks."""
    config = CacheConfig(folder=cache, limit_bytes=limit)
    stream = Loader(data, read_manifest(data), cache=config).train(
        Order(batch_size=batch_size, seed=3, window=window),
        Augmentation(translation=0.1),
        start=Position(epoch=epoch, step=1),
        rank=rank,
        ranks=2,
    )
    return list(islice(stream, 112 // batch_size))


@pytest.mark.parametrize("rank", [0, 1])
def test_training_batches_are_the_same_bytes(
    small_set: Path, remote_set: str, proxy: Proxy, tmp_path: Path, rank: int
) -> None:
    data = remote.uri(proxy.endpoint, "small")
    assert_same(train(data, tmp_path, rank), train(small_set, tmp_path, rank))
    assert proxy.gets(".tar") == {f"train-00000{number}.tar": 1 for number in range(4)}


def test_a_cache_of_part_of_the_set_gives_windows_with_the_same_bytes(
    small_set: Path, remote_set: str, tmp_path: Path
) -> None:
    sizes = [cached_bytes(shard) for shard in read_manifest(small_set).splits["train"].shards]
    # Three batches, by which ranks may be apart, lie across the smallest one and both neighbours.
    limit = sum(sorted(sizes)[-3:])
    window = shuffle_window(sizes, limit)
    assert window == 1
    found = train(remote_set, tmp_path, 0, window=window, limit=limit, batch_size=4)
    assert_same(found, train(small_set, tmp_path, 0, window=window, batch_size=4))
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= limit


def test_evaluation_batches_are_the_same_bytes_and_fetch_their_shards_alone(
    small_set: Path, remote_set: str, proxy: Proxy, tmp_path: Path
) -> None:
    def batches(data: str | Path, first: int, stop: int) -> list[Batch]:
        loader = Loader(data, read_manifest(data), cache=CacheConfig(folder=tmp_path))
        return list(loader.evaluation("val", 5, first, stop))

    data = remote.uri(proxy.endpoint, "small")
    assert_same(batches(data, 0, 2), batches(small_set, 0, 2))
    assert proxy.gets(".tar") == {"val-000000.tar": 1}
    assert_same(batches(data, 2, 5), batches(small_set, 2, 5))
    assert proxy.gets(".tar") == {"val-000000.tar": 1, "val-000001.tar": 1}


def test_inspecting_a_remote_set_draws_the_same_pictures(
    small_set: Path, remote_set: str, tmp_path: Path
) -> None:
    cache = words(cache=tmp_path / "cache")
    for data, name, more in ((remote_set, "remote", cache), (str(small_set), "local", [])):
        main([*words(data=data, output=tmp_path / name), *more, "--seconds=0.1"])
    for picture in ("train-batch-0.png", "train-batch-1.png"):
        found, expected = ((tmp_path / x / picture).read_bytes() for x in ("remote", "local"))
        assert found == expected
