"""Hosts that fail while the three jobs run: same bytes and figures in the end, one clear line each.

One cluster's life over two hosts, since starting Ray costs most: `make hosts` runs it.
"""

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
CPUS = 3  # of each host: both then run tasks of both jobs and a worker of the training
BIG = {"image_size": 512, "superpixels": 2000, "samples_per_shard": 4, "image_format": "jpg"}
NETS = {"warmup_epochs": 2, "epochs": 20, "batch_size": 16, "net_width": 8, "bottleneck": 16}
OFTEN = {"log_interval": 1, "checkpoint_interval": 10}


@dataclass
class Jobs:
    """The three jobs, at work at once: their processes and outputs by name."""

    processes: dict[str, subprocess.Popen]
    folder: Path

    def finish(self) -> dict[str, str]:
        """Wait for their ends. Returns what each wrote to standard error."""
        errors = {name: job.communicate(timeout=400)[1] for name, job in self.processes.items()}
        assert not any(job.returncode for job in self.processes.values()), errors
        return errors

    def results(self) -> dict[str, Any]:
        """Return all bytes of the shards and of the nets, and the figures of the evaluation."""
        paths = [
            path
            for pattern in ("shards/**/*.*", "run/model/*.safetensors")
            for path in self.folder.glob(pattern)
        ]
        figures = {"figures": read_evaluation(self.folder / "evaluation").rows}
        return figures | {str(path.relative_to(self.folder)): path.read_bytes() for path in paths}

    def steps(self) -> int:
        """Return the steps that the training has logged."""
        log = self.folder / "run" / "metrics.jsonl"
        return len(log.read_text().splitlines()) if log.exists() else 0


@dataclass
class Lab:
    """Two hosts of a running Ray, what the jobs read, and what they make without a fault."""

    first: Host
    second: Host
    folder: Path  # Ray's
    inputs: Path
    expected: dict[str, Any]

    def start(self, host: Host, name: str, output: Path) -> subprocess.Popen:
        """Start one of the three jobs on a host."""
        data, run = self.inputs / "shards", self.inputs / "whole" / "run"
        flags = {
            "preprocess": words(source=self.inputs / "images", workers=3, **BIG),
            "train": words(data=data, workers=2, **NETS, **OFTEN),
            "evaluate": words(data=data, run=run, workers=1, shards=12, batch_size=4),
        }[name]
        target = {"preprocess": "shards", "train": "run", "evaluate": "evaluation"}[name]
        command = [sys.executable, "-m", f"jobs.{name}", *flags, f"--output={output / target}"]
        return host.start(*command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def jobs(self, host: Host, output: Path) -> Jobs:
        """Start the three jobs on a host, and return when the other one works for each of them.

        Tasks are stopped until the training takes its steps: it is slow to start, they are quick.
        """
        other, jobs = (self.second if host is self.first else self.first), Jobs({}, output)
        for name, title, count in (("preprocess", "make_shard", 3), ("evaluate", "score_range", 1)):
            jobs.processes[name] = self.start(host, name, output)
            wait_for(lambda: len(self.tasks(title)) == count, jobs)  # noqa: B023
            send(signal.SIGSTOP, self.tasks(title))
        jobs.processes["train"] = self.start(host, "train", output)
        wait_for(lambda: jobs.steps() > 20, jobs)
        send(signal.SIGCONT, self.tasks())
        titles = ("make_shard", "score_range", "RayTrainWorker")
        wait_for(lambda: all(map(other.tasks, titles)), jobs)
        return jobs

    def tasks(self, title: str = "") -> list[int]:
        """Return the process ids of Ray's workers on both hosts whose title begins so."""
        return self.first.tasks(title) + self.second.tasks(title)


def send(number: signal.Signals, processes: list[int]) -> None:
    for process in processes:
        with suppress(ProcessLookupError):
            os.kill(process, number)


def wait_for(condition: Callable[[], bool], jobs: Jobs) -> None:
    deadline = time.monotonic() + 200
    while not condition():
        for name, job in jobs.processes.items():
            assert job.poll() is None, (name, job.communicate())
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
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
        make.preprocess(small, lambda progress: None, lambda: None)
    with two_hosts() as hosts, short_folder() as folder:
        for host in hosts:
            host.start_ray(folder, CPUS)
        lab = Lab(*hosts, folder, inputs, {})
        whole = Jobs({}, inputs / "whole")
        for names in (("preprocess", "train"), ("evaluate",)):
            whole.processes = {name: lab.start(hosts[0], name, whole.folder) for name in names}
            whole.finish()
        lab.expected.update(whole.results())
        yield lab


def test_a_host_that_dies_takes_nothing_along(lab: Lab, tmp_path: Path) -> None:
    jobs = lab.jobs(lab.first, tmp_path)
    lab.second.kill()
    lab.second.start_ray(lab.folder, CPUS)
    errors = jobs.finish()
    assert jobs.results() == lab.expected
    for name in ("preprocess", "evaluate"):
        (line,) = errors[name].splitlines()
        assert lab.second.address in line
    log = (tmp_path / "run" / "log.txt").read_text()
    assert f"{lab.second.name} is gone; waiting since" in log
    assert "2 workers start again on" in log


def test_a_network_that_is_cut_for_30_s_loses_nothing(lab: Lab, tmp_path: Path) -> None:
    jobs = lab.jobs(lab.first, tmp_path)
    lab.second.cut()
    time.sleep(30)
    lab.second.restore()
    jobs.finish()
    assert jobs.results() == lab.expected


def test_a_host_that_stands_still_holds_up_neither_preprocessing_nor_evaluation(
    lab: Lab, tmp_path: Path
) -> None:
    jobs = Jobs({}, tmp_path)
    for name in ("preprocess", "evaluate"):
        jobs.processes[name] = lab.start(lab.first, name, tmp_path)
    wait_for(lambda: all(map(lab.second.tasks, ("make_shard", "score_range"))), jobs)
    send(signal.SIGSTOP, lab.second.tasks())
    errors = jobs.finish()
    send(signal.SIGCONT, lab.second.tasks())
    (tmp_path / "run").symlink_to(lab.inputs / "whole" / "run")
    assert jobs.results() == lab.expected
    assert all("far longer" in error for error in errors.values())


def test_when_the_head_dies_each_job_ends_with_a_line_and_the_same_command_goes_on(
    lab: Lab, tmp_path: Path
) -> None:
    jobs = lab.jobs(lab.second, tmp_path)
    lab.first.kill()
    lab.first.start_ray(lab.folder, CPUS)
    for name, job in jobs.processes.items():
        errors = job.communicate(timeout=120)[1].splitlines()
        assert job.returncode == 1
        (line,) = [line for line in errors if line.startswith("error: ")]
        assert lab.first.address in line, name
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "shards").glob("*/*.tar")}
    lab.second.kill()
    lab.second.start_ray(lab.folder, CPUS)
    jobs.processes = {name: lab.start(lab.first, name, tmp_path) for name in jobs.processes}
    jobs.finish()
    assert jobs.results() == lab.expected
    assert {path: path.stat().st_mtime_ns for path in written} == written
    assert "went on from the checkpoint" in (tmp_path / "run" / "log.txt").read_text()
