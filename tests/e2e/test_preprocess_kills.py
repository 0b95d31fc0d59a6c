"""Preprocessing whose driver, workers or nodes are killed at any moment writes the same bytes."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from pyarrow import fs

from jobs.preprocess.__main__ import main
from pipeline.synthetic import SyntheticConfig, write_synthetic
from tests import remote
from tests.e2e.commands import ROOT, environment
from tests.jobs.kills import kill_driver_when

pytestmark = pytest.mark.slow
TRAIN, VAL, PER_SHARD = 1500, 100, 25

NODES = """
import sys
import ray
from ray.cluster_utils import Cluster
from pipeline.shards.plan import PreprocessConfig
from pipeline.shards.make import preprocess

source, output = sys.argv[1:]
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
doomed = cluster.add_node(num_cpus=1)
ray.init(address=cluster.address, logging_level="error", log_to_driver=False)
cluster.wait_for_nodes()
killed = []

def show(progress):
    if progress.done >= 300 and not killed:
        killed.append(progress.done)
        cluster.remove_node(doomed, allow_graceful=False)

config = PreprocessConfig(source=source, output=output, samples_per_shard=25)
outcome = preprocess(config, show, lambda: None)
assert killed and killed[0] < outcome.progress.total, killed
"""


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kills") / "images"
    write_synthetic(folder, SyntheticConfig(train_images=TRAIN, val_images=VAL))
    return folder


@pytest.fixture(scope="module")
def whole(images: Path, ray_local: None) -> dict[str, bytes]:
    """The files of a set that nobody interrupted."""
    main([*flags(images, images.parent / "whole")])
    return contents(images.parent / "whole")


def flags(source: Path, output: Path | str) -> list[str]:
    values = ("--source", source, "--output", output, "--samples-per-shard", PER_SHARD)
    return [str(value) for value in values]


def contents(output: Path) -> dict[str, bytes]:
    """Bytes of every file, temporary ones too."""
    paths = (path for path in output.rglob("*") if path.is_file())
    return {str(path.relative_to(output)): path.read_bytes() for path in paths}


def records(output: Path) -> int:
    return len(list(output.glob("*/*.parquet")))


def test_a_driver_killed_at_any_moment_goes_on_with_the_same_bytes(
    images: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    output = tmp_path / "shards"
    moments: list[Callable[[], bool]] = [
        lambda: (output / "plan.json").exists(),
        lambda: any(output.glob("*/.*.tmp")) and records(output) >= 30,
        lambda: (output / "ledger.parquet").exists() or any(output.glob(".ledger*.tmp")),
    ]
    for moment in moments:
        before = {path: path.stat().st_mtime_ns for path in output.glob("*/*.parquet")}
        kill_driver_when(moment, "jobs.preprocess", *flags(images, output))
        assert all(path.stat().st_mtime_ns == then for path, then in before.items())
    (output / "dataset.json").unlink(missing_ok=True)  # the last kill may have come too late
    main(flags(images, output))
    assert contents(output) == whole
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    main(flags(images, output))
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before


def test_a_killed_node_s_shards_are_made_on_another(
    images: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    output = tmp_path / "shards"
    result = subprocess.run(
        [sys.executable, "-c", NODES, str(images), str(output)],
        cwd=ROOT,
        env=environment(PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert contents(output) == {k: v for k, v in whole.items() if not k.endswith(".jpg")}


def test_a_set_is_made_on_object_storage_whoever_is_killed(
    images: Path, whole: dict[str, bytes], s3_endpoint: str, tmp_path: Path
) -> None:
    uri = remote.uri(s3_endpoint, "killed")
    system = remote.client(s3_endpoint)

    def objects() -> dict[str, int]:
        selector = fs.FileSelector("sets/killed", recursive=True, allow_not_found=True)
        found = system.get_file_info(selector)
        return {info.path.removeprefix("sets/killed/"): info.size for info in found if info.is_file}

    kill_driver_when(
        lambda: sum(name.endswith(".parquet") for name in objects()) >= 5,
        *("jobs.preprocess", *flags(images, uri)),
    )
    assert "dataset.json" not in objects()
    main(flags(images, uri))
    fs.copy_files("sets/killed", str(tmp_path), source_filesystem=system)
    assert contents(tmp_path) == whole
