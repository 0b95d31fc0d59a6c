import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: two cores are shared with Ray's workers

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, settings

from pipeline.evaluation.results import read_evaluation
from pipeline.evaluation.truth import ground_truth_of
from pipeline.shards import make
from pipeline.shards.format import read_manifest
from pipeline.shards.ledger import read_ledger
from pipeline.shards.plan import PreprocessConfig
from pipeline.synthetic import SyntheticConfig, write_synthetic
from tests import remote
from tests.pipeline.evaluation.files import write_metadata

settings.register_profile(
    "tests",
    max_examples=60,
    deadline=None,
    derandomize=True,  # the same examples in every run
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
settings.load_profile("tests")


@pytest.fixture(scope="session")
def ray_local() -> Iterator[None]:
    """A local Ray of two CPUs, shared by all tests that submit tasks."""
    import ray

    assert not ray.is_initialized(), "an earlier test started Ray without asking for ray_local"
    os.environ.update(remote.CREDENTIALS)  # workers keep the environment of this moment
    ray.init(
        address="local",  # not a cluster that somebody else started on this machine
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        _system_config={"metrics_report_interval_ms": 200},
    )
    yield
    ray.shutdown()


def run_here(
    function: Callable[..., Any],
    items: Iterable[Any],
    arguments: Callable[[Any], tuple],
    at_once: int | None = None,
    *,
    gpus: float = 0.0,
    tick: Callable[[], None] = lambda: None,
) -> Iterator[tuple[Any, Any]]:
    """Stand in for `pipeline.tasks.run_tasks`: the same calls, in this process, without Ray."""
    for item in items:
        yield item, function(*arguments(item))
        tick()


@pytest.fixture(scope="session")
def small_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of a generated set: 64 train and 24 val images of 8 classes at 32 px."""
    folder = tmp_path_factory.mktemp("small")
    write_synthetic(folder / "images", SyntheticConfig(train_images=64, val_images=24))
    config = PreprocessConfig(
        source=str(folder / "images"),
        output=str(folder / "shards"),
        image_size=32,
        superpixels=25,
        samples_per_shard=20,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(make, "run_tasks", run_here)
        patch.setattr(make, "metrics", Mock())  # Ray's
        make.preprocess(config, lambda progress: None, lambda: None)
    return folder / "shards"


@pytest.fixture(scope="session")
def evaluations(small_set: Path) -> tuple[Path, Path, Path]:
    """Evaluations of the small set's val images: of two runs of random nets, and of the boxes of
    the second one's ALN as a file, without shards."""
    import torch  # here, as the others: most tests need no nets

    from jobs.evaluate import tasks
    from jobs.evaluate.__main__ import evaluate
    from jobs.evaluate.config import EvaluateConfig
    from tests.jobs.conftest import write_random_run

    folder, manifest = small_set.parent, read_manifest(small_set)
    first, second, boxes = (folder / f"evaluation-{name}" for name in ("0", "1", "boxes"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "run_tasks", run_here)
        patch.setattr(tasks, "set_up_process", lambda use_gpu: torch.device("cpu"))
        patch.setattr(tasks, "check_hosts", Mock())
        patch.setattr(tasks, "connect_ray", Mock())
        patch.setattr(tasks, "ray", Mock(put=lambda x: x, cluster_resources=lambda: {"CPU": 1}))
        for seed, output in enumerate((first, second)):
            run = folder / f"run-{seed}"
            write_random_run(run, small_set, seed)
            evaluate(EvaluateConfig(data=str(small_set), run=run, output=output), lambda *_: None)
    images = read_evaluation(second).images()
    found = read_evaluation(second).predictions("aln", "paper")["box"].to_pylist()
    labels = [classes["co-trained"] for classes in images["classes"].to_pylist()]
    guesses = {"id": images["id"], "labels": labels, "boxes": [[box] * 5 for box in found]}
    pq.write_table(pa.table(guesses), folder / "boxes.parquet")
    (folder / "classes.txt").write_text("\n".join(manifest.classes))
    ledger = read_ledger(small_set, "val")
    truth = ground_truth_of(ledger, manifest.classes, manifest.class_names)
    config = EvaluateConfig(
        ground_truth=write_metadata(folder / "metadata", truth),
        predictions=folder / "boxes.parquet",
        classes=folder / "classes.txt",
        output=boxes,
    )
    evaluate(config, lambda *_: None)
    return first, second, boxes


@pytest.fixture(scope="session")
def s3_endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An S3 server on loopback, with credentials for it in the environment."""
    os.environ.update(remote.CREDENTIALS)
    with remote.s3_server(tmp_path_factory.mktemp("s3")) as endpoint:
        yield endpoint


@pytest.fixture(scope="session")
def remote_set(small_set: Path, s3_endpoint: str) -> str:
    """URI of the small set on the S3 server."""
    return remote.upload(small_set, s3_endpoint, "small")


@pytest.fixture
def proxy(s3_endpoint: str) -> Iterator[remote.Proxy]:
    """A proxy before the S3 server that counts requests and can break them."""
    proxy = remote.Proxy(s3_endpoint)
    yield proxy
    proxy.stop()
