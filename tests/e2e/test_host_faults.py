"""Hosts that fail during the jobs: same bytes in the end, nothing lost, one clear line each.

One cluster's life over two hosts, since starting Ray costs most: `make hosts` runs it.
"""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline.synthetic import SyntheticConfig, write_synthetic
from tests.e2e.commands import words
from tests.hosts import Host, short_folder, two_hosts

pytestmark = pytest.mark.hosts
SHARDS = 40
BIG = ["--image-size=512", "--superpixels=2000", "--samples-per-shard=4", "--image-format=jpg"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults") / "images"
    write_synthetic(folder, SyntheticConfig(train_images=4 * (SHARDS - 2), val_images=8))
    return folder


@pytest.fixture(scope="module")
def cluster() -> Iterator[tuple[Host, Host, Path]]:
    """Two hosts of a running Ray; the second one has a CPU of its own."""
    with two_hosts() as hosts, short_folder() as folder:
        for host in hosts:
            host.start_ray(folder, cpus=1)
        yield *hosts, folder


@pytest.fixture(scope="module")
def expected(cluster: tuple[Host, Host, Path], source: Path) -> dict[str, bytes]:
    """The files of the set, made without a fault."""
    return files_of(finished(preprocess(cluster[0], source, source.parent / "whole")))


def preprocess(host: Host, source: Path, output: Path) -> tuple[subprocess.Popen, Path]:
    command = [sys.executable, "-m", "jobs.preprocess", *words(source=source, output=output), *BIG]
    return host.start(*command, stdout=subprocess.PIPE, stderr=subprocess.PIPE), output


def finished(job: tuple[subprocess.Popen, Path]) -> Path:
    _, errors = job[0].communicate(timeout=300)
    assert job[0].returncode == 0, errors
    return job[1]


def files_of(output: Path) -> dict[str, bytes]:
    paths = (
        path for path in output.rglob("*") if path.suffix in (".tar", ".idx", ".json", ".parquet")
    )
    return {str(path.relative_to(output)): path.read_bytes() for path in paths}


def wait_for(condition: Callable[[], bool], job: subprocess.Popen) -> None:
    deadline = time.monotonic() + 200
    while not condition():
        assert job.poll() is None, job.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)


def half_done(job: tuple[subprocess.Popen, Path]) -> None:
    wait_for(lambda: len(list(job[1].glob("*/*.parquet"))) > SHARDS // 4, job[0])


def test_a_host_that_dies_takes_no_image_along(
    cluster: tuple[Host, Host, Path], source: Path, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    first, second, folder = cluster
    job = preprocess(first, source, tmp_path / "shards")
    half_done(job)
    second.kill()
    assert files_of(finished(job)) == expected
    second.start_ray(folder, cpus=1)


def test_a_network_that_is_cut_for_30_s_loses_nothing(
    cluster: tuple[Host, Host, Path], source: Path, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    first, second, _ = cluster
    job = preprocess(first, source, tmp_path / "shards")
    half_done(job)
    second.cut()
    time.sleep(30)
    second.restore()
    assert files_of(finished(job)) == expected


def test_a_dead_head_is_one_line_and_the_same_command_goes_on(
    cluster: tuple[Host, Host, Path], source: Path, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    first, second, folder = cluster
    job = preprocess(first, source, tmp_path / "shards")
    half_done(job)
    first.kill(but=job[0])
    _, errors = job[0].communicate(timeout=120)
    assert job[0].returncode == 1
    assert len([line for line in errors.splitlines() if line.startswith("error: ")]) == 1
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "shards").glob("*/*.tar")}
    second.kill()
    for host in (first, second):
        host.start_ray(folder, cpus=1)
    assert files_of(finished(preprocess(first, source, tmp_path / "shards"))) == expected
    assert {path: path.stat().st_mtime_ns for path in made} == made
