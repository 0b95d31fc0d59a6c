"""Hosts that fail during the three jobs: same bytes and figures in the end, one clear line each.

One cluster's life over two hosts, since starting Ray costs most. `make hosts` runs all of it; CI
leaves out those marked slow, which wait for half a minute or start everything anew.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from pipeline.evaluation.results import read_evaluation
from pipeline.shards import make
from pipeline.shards.plan import PreprocessConfig
from pipeline.synthetic import SyntheticConfig, write_synthetic
from tests.conftest import run_here
from tests.e2e.commands import words
from tests.hosts import Host, short_folder, two_hosts

pytestmark = pytest.mark.hosts
CLOCK = list(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))  # Debian's `faketime`
TITLES = {"preprocess": "make_shard", "train": "RayTrainWorker", "evaluate": "score_range"}
FLAGS: dict[str, dict[str, Any]] = {
    "preprocess": {"image_size": 512, "superpixels": 2000, "samples_per_shard": 4},
    "train": {"warmup_epochs": 2, "epochs": 20, "batch_size": 16, "net_width": 8, "workers": 2}
    | {"bottleneck": 16, "log_interval": 1, "checkpoint_interval": 10},
    "evaluate": {"batch_size": 4, "shards": 12, "workers": 2},
}


@dataclass
class Lab:
    """Two hosts of a running Ray, one CPU each, so that every job runs on both; what the jobs read,
    and what they make without a fault."""

    first: Host
    second: Host
    folder: Path  # Ray's
    inputs: Path
    expected: dict[str, Any]

    def start(
        self, name: str, output: Path, host: Host | None = None, **others: Any
    ) -> subprocess.Popen:
        """Start one of the jobs, on the first host if not said otherwise. others: flags."""
        flags = FLAGS[name] | others
        if name == "preprocess":
            flags["source"] = self.inputs / "images"
        else:
            flags["data"] = self.inputs / "shards"
        if name == "evaluate":
            flags["run"] = self.inputs / "train"
        command = [sys.executable, "-m", f"jobs.{name}", *words(output=output, **flags)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return (host or self.first).start(*command, **pipes)

    def at_work(
        self, name: str, output: Path, host: Host | None = None, **others: Any
    ) -> subprocess.Popen:
        """Start a job, and return when it has something to lose and both hosts work for it."""
        job, steps = self.start(name, output, host, **others), output / "metrics.jsonl"

        def works() -> bool:
            if name == "train" and not (steps.exists() and steps.read_text().count("\n") > 20):
                return False
            if name == "preprocess" and not any(output.glob("train/*.parquet")):
                return False
            return all(each.tasks(TITLES[name]) for each in (self.first, self.second))

        wait_for(works, job)
        return job

    def finish(self, name: str, job: subprocess.Popen, output: Path) -> str:
        """Wait for the job's end and compare what it made. Returns its standard error."""
        _, errors = job.communicate(timeout=900)
        assert job.returncode == 0, errors
        assert results(name, output) == self.expected[name]
        return errors


def results(name: str, output: Path) -> Any:
    """Return all bytes of shards and nets, and the figures of an evaluation."""
    if name == "evaluate":
        return read_evaluation(output).rows
    paths = output.glob("**/*.*" if name == "preprocess" else "model/*.safetensors")
    return {str(path.relative_to(output)): path.read_bytes() for path in paths}


def wait_for(condition: Callable[[], bool], job: subprocess.Popen) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert job.poll() is None, job.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)


def steps_of(run: Path) -> list[int]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines]


def send(number: signal.Signals, processes: list[int]) -> None:
    for process in processes:
        with suppress(ProcessLookupError):
            os.kill(process, number)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of generated images, and of small shards of them."""
    inputs = tmp_path_factory.mktemp("faults")
    write_synthetic(inputs / "images", SyntheticConfig(train_images=96, val_images=48))
    small = PreprocessConfig(
        source=str(inputs / "images"),
        output=str(inputs / "shards"),
        image_size=64,
        superpixels=100,
        samples_per_shard=16,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(make, "run_tasks", run_here)
        patch.setattr(make, "metrics", Mock())  # Ray's
        make.preprocess(small, lambda _: None, lambda: None)
    return inputs


@pytest.mark.slow
def test_a_host_that_announces_its_end_is_no_failure_of_a_training(
    inputs: Path, tmp_path: Path
) -> None:
    """Before the others, with hosts of its own at their addresses: `faketime` stops the clock of
    Ray's watcher."""
    log = tmp_path / "log.txt"
    with two_hosts() as hosts, short_folder() as folder:
        lab = Lab(*hosts, folder, inputs, {})
        for host in hosts:
            host.start_ray(folder)
        job = lab.at_work("train", tmp_path, epochs=10_000, max_failures=0)
        lab.second.drain()
        wait_for(lambda: "is gone; waiting" in log.read_text(), job)
        lab.second.kill()
        lab.second.start_ray(folder)
        wait_for(lambda: "went on from the checkpoint" in log.read_text(), job)
        send(signal.SIGTERM, lab.first.processes("\0jobs.train\0"))
        _, errors = job.communicate(timeout=60)
    assert f"{lab.second.name} is about to go: a checkpoint is written" in log.read_text()
    assert "the same command goes on from the checkpoint of step" in errors
    steps = steps_of(tmp_path)
    assert steps == list(range(1, len(steps) + 1))


@pytest.fixture(scope="module")
def lab(inputs: Path) -> Iterator[Lab]:
    with two_hosts() as hosts, short_folder() as folder:
        if CLOCK:
            hosts[1].environment |= {"LD_PRELOAD": str(CLOCK[0]), "FAKETIME": "+1h"}
        lab = Lab(*hosts, folder, inputs, {})
        for host in hosts:
            host.start_ray(folder)
        for name in TITLES:
            _, errors = lab.start(name, inputs / name).communicate(timeout=400)
            lab.expected[name] = results(name, inputs / name)
            assert lab.expected[name], errors
        yield lab


@pytest.mark.skipif(not CLOCK, reason="no libfaketime (Debian: faketime)")
def test_the_clocks_of_these_hosts_are_an_hour_apart(lab: Lab) -> None:
    times = [
        int(host.start("date", "+%s", stdout=subprocess.PIPE).communicate()[0])
        for host in (lab.first, lab.second)
    ]
    assert 3590 < times[1] - times[0] < 3700


@pytest.mark.parametrize("name", TITLES)
def test_a_host_that_dies_takes_nothing_along(lab: Lab, tmp_path: Path, name: str) -> None:
    job = lab.at_work(name, tmp_path)
    lab.second.kill()
    lab.second.start_ray(lab.folder)
    errors = lab.finish(name, job, tmp_path)
    if name == "train":
        log = (tmp_path / "log.txt").read_text()
        assert "waiting since" in log
        assert "training starts again" in log
        assert f"(workers: 2, on {lab.first.name}, {lab.second.name})" in log
    else:
        lines = errors.splitlines()
        (line,) = [line for line in lines if lab.second.address in line]
        lines.remove(line)
        assert len(lines) <= 1  # where the work of the dead host came late
        assert all("it is started once more" in line for line in lines)


@pytest.mark.slow
def test_an_elastic_training_goes_on_with_the_host_that_is_left(lab: Lab, tmp_path: Path) -> None:
    job = lab.at_work("train", tmp_path, workers="1:2")
    lab.second.kill()
    _, errors = job.communicate(timeout=400)
    lab.second.start_ray(lab.folder)
    assert job.returncode == 0, errors
    assert f"(workers: 1, on {lab.first.name})" in (tmp_path / "log.txt").read_text()
    assert steps_of(tmp_path) == list(range(1, 22 * 6 + 1))


@pytest.mark.slow
@pytest.mark.parametrize("name", TITLES)
def test_a_network_that_is_cut_for_30_s_loses_nothing(lab: Lab, tmp_path: Path, name: str) -> None:
    job = lab.at_work(name, tmp_path)
    lab.second.cut()
    time.sleep(30)
    lab.second.restore()
    lab.finish(name, job, tmp_path)


@pytest.mark.parametrize("name", ["preprocess", pytest.param("evaluate", marks=pytest.mark.slow)])
def test_a_host_that_stands_still_holds_up_no_job(lab: Lab, tmp_path: Path, name: str) -> None:
    job = lab.at_work(name, tmp_path)
    still = lab.second.tasks(TITLES[name])
    send(signal.SIGSTOP, still)
    errors = lab.finish(name, job, tmp_path)
    send(signal.SIGCONT, still)
    (line,) = errors.splitlines()
    assert "started once more" in line


@pytest.mark.slow
@pytest.mark.parametrize("name", TITLES)
def test_when_the_head_dies_a_line_says_so_and_the_same_command_goes_on(
    lab: Lab, tmp_path: Path, name: str
) -> None:
    job = lab.at_work(name, tmp_path, lab.second)
    lab.first.kill()
    lab.first.start_ray(lab.folder)
    errors = job.communicate(timeout=120)[1].splitlines()
    assert job.returncode == 1
    (line,) = [line for line in errors if line.startswith("error: ")]
    assert lab.first.address in line
    lab.second.kill()
    finished = [path.with_suffix(".tar") for path in tmp_path.glob("train/*.parquet")]
    written = {path: path.stat().st_mtime_ns for path in finished}
    lab.second.start_ray(lab.folder)
    lab.finish(name, lab.start(name, tmp_path), tmp_path)
    assert {path: path.stat().st_mtime_ns for path in written} == written
    if name == "train":
        assert "went on from the checkpoint" in (tmp_path / "log.txt").read_text()
