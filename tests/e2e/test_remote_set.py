"""Files on an S3 server give every command what local ones give."""

from itertools import islice
from pathlib import Path

import pytest
import torch
from PIL import Image

from jobs.evaluate import __main__ as evaluate
from jobs.inspect import __main__ as inspect
from jobs.localize import __main__ as localize
from jobs.runs import load_nets
from jobs.train import __main__ as train
from jobs.train.state import finished_nets
from jobs.train.worker import write_state
from pipeline import storage
from pipeline.evaluation.results import read_evaluation
from pipeline.loading.augmentation import Augmentation
from pipeline.loading.cache import CacheConfig, cached_bytes
from pipeline.loading.loader import Batch, Loader
from pipeline.loading.order import Order, Position, shuffle_window
from pipeline.shards.format import read_manifest
from tests import remote
from tests.e2e.commands import words
from tests.jobs.train.small import config_for, equal, new_trainer, train_epochs
from tests.jobs.train.test_checks import claim
from tests.pipeline.made_set import assert_same, stored_samples
from tests.remote import Proxy

pytestmark = pytest.mark.slow
CPU = torch.device("cpu")


def batches_of(
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
    assert_same(batches_of(data, tmp_path, rank), batches_of(small_set, tmp_path, rank))
    assert proxy.gets(".tar") == {f"train-00000{number}.tar": 1 for number in range(4)}


def test_a_cache_of_part_of_the_set_gives_windows_with_the_same_bytes(
    small_set: Path, remote_set: str, tmp_path: Path
) -> None:
    sizes = [cached_bytes(shard) for shard in read_manifest(small_set).splits["train"].shards]
    # Three batches, by which ranks may be apart, lie across the smallest one and both neighbours.
    limit = sum(sorted(sizes)[-3:])
    window = shuffle_window(sizes, limit)
    assert window == 1
    found = batches_of(remote_set, tmp_path, 0, window=window, limit=limit, batch_size=4)
    assert_same(found, batches_of(small_set, tmp_path, 0, window=window, batch_size=4))
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


def test_inspecting_a_remote_set_draws_the_same_pictures_at_a_uri(
    small_set: Path, remote_set: str, s3_endpoint: str, tmp_path: Path
) -> None:
    cache, outputs = words(cache=tmp_path / "cache"), (remote.uri(s3_endpoint, "drawn"), tmp_path)
    for data, output, more in zip((remote_set, small_set), outputs, (cache, []), strict=True):
        inspect.main([*words(data=data, output=output), *more, "--seconds=0.1"])
    for picture in ("train-batch-0.png", "train-batch-1.png"):
        far, near = (storage.read_bytes(storage.join(output, picture)) for output in outputs)
        assert far == near


def test_a_run_on_s3_is_trained_evaluated_and_used_over_a_network_that_breaks(
    small_set: Path, remote_set: str, proxy: Proxy, ray_local: None, tmp_path: Path
) -> None:
    """It begins from another run's warm-up. Each file of `broken` fails once, and the weights and
    masks are those of local files."""
    broken = {"metrics.jsonl", "model.safetensors", "state.json", "images.parquet", "boxes.json"}
    proxy.fault = lambda method, name, before: (
        None if before or name not in broken else 503 if method == "PUT" else (100,)
    )
    picture = tmp_path / "picture.png"
    Image.fromarray(stored_samples(small_set, "val")[0].image).save(picture)
    warmup, run, evaluation, boxes, data = (
        remote.uri(proxy.endpoint, name) for name in ("warmup", "run", "figures", "boxes", "small")
    )
    source = new_trainer(config_for(small_set, output=warmup))
    claim(source.config)
    train_epochs(source, 3)
    write_state(source)
    cached = words(data=data, cache=tmp_path / "cache", workers=1)
    flags = words(warmup_from=warmup, output=run, epochs=2, batch_size=16, target=0.2)
    train.main([*cached, *flags, *words(net_width=8, bottleneck=16)])
    evaluate.main([*cached, *words(run=run, output=evaluation)])
    localize.main([*words(run=run, output=boxes), str(picture)])
    assert {name for (_, name), count in proxy.counts.items() if count > 1} >= broken

    local = new_trainer(config_for(small_set, warmup_from=warmup))
    local.take_warmup(warmup)
    train_epochs(local, 2)
    nets = load_nets(run)
    assert equal(nets.corruption, finished_nets(local.state, local.model).corruption)
    assert read_evaluation(evaluation).metrics["images"] == 24
    assert storage.is_file(storage.join(evaluation, "report.html"))
    storage.download(run, tmp_path / "run")
    localize.main([*words(run=tmp_path / "run", output=tmp_path / "boxes"), str(picture)])
    mask = storage.read_bytes(storage.join(boxes, "masks", "picture.png"))
    assert mask == (tmp_path / "boxes" / "masks" / "picture.png").read_bytes()
