import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: two cores are shared with Ray's workers

import pytest
from hypothesis import HealthCheck, settings

from pipeline.shards import make
from pipeline.shards.format import read_manifest
from pipeline.shards.plan import PreprocessConfig
from pipeline.synthetic import SyntheticConfig, write_synthetic
from tests import remote
from tests.e2e.commands import words

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
def evaluations(small_set: Path, ray_local: None) -> tuple[Path, Path, Path]:
    """Evaluations of the small set's val images: of two runs of random nets, and of the boxes of
    the second one's ALN as a file, without shards."""
    from jobs.evaluate.__main__ import main as evaluate  # here: most tests need no nets
    from tests.jobs.conftest import write_random_run

    folder = small_set.parent
    first, second, boxes = (folder / f"evaluation-{name}" for name in ("0", "1", "boxes"))
    export, classes = folder / "export", folder / "classes.txt"
    for seed, output in enumerate((first, second)):
        run = folder / f"run-{seed}"
        write_random_run(run, small_set, seed)
        evaluate(words(data=small_set, run=run, output=output, export=export))
    classes.write_text("\n".join(read_manifest(small_set).classes))
    files = {"ground_truth": export / "metadata", "predictions": export / "boxes/aln.parquet"}
    evaluate(words(**files, classes=classes, output=boxes))
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
