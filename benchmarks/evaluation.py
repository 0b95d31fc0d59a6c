"""`python -m benchmarks.evaluation`: what an evaluation costs, and what a second core adds.

The nets have random weights and the paper's four layers, the images are generated: neither changes
the cost. The paper evaluates an image in 93 ms. Costs are processor time of one thread. Rates of
one and of two processes are measured in turns, each process pinned to a core: of a loop in
registers, of the nets' bare passes, of all that a task does, without Ray; then of the job's tasks.
What two bare processes do not reach, the job cannot.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing import Queue, get_context
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.machine import hardware, quiet, write_result
from jobs import cli
from jobs.evaluate.__main__ import evaluate
from jobs.evaluate.config import EvaluateConfig
from jobs.evaluate.maps import MAPS, Inputs, RunSource
from jobs.evaluate.scorer import MapTruth, map_truth
from jobs.evaluate.tasks import load_source, score_batch, set_up_process
from jobs.loading import LoadingConfig
from jobs.runs import colour_statistics, new_nets, save_nets
from jobs.train.config import TrainConfig
from jobs.train.trainer import model_config
from model.masking import normalize
from pipeline.compiled import njit
from pipeline.evaluation.truth import ground_truth_of
from pipeline.loading.loader import Batch, Loader
from pipeline.shards.format import read_manifest
from pipeline.shards.ledger import read_ledger
from pipeline.shards.make import preprocess
from pipeline.shards.plan import PreprocessConfig
from pipeline.synthetic import SyntheticConfig, write_synthetic

PAPER_MS = 93.0
BATCH = 100
LOOP = 30_000_000  # iterations
TASKS = 8  # of the job
STEADY = ", once all tasks work"
BATCHES = 4  # that a bare process works on in a turn
Answer = tuple[str, int, float]
KINDS = {"ALN": False, "all maps": True}  # the latter with the baselines'


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """How much to measure, and where the result goes."""

    images: int = cli.option(2000, help="generated images")
    turns: int = cli.option(5, low=1, help="how often each is measured")
    output: Path = cli.option(Path("benchmarks/results"), help="folder for the dated JSON")


@njit(cache=True)
def spin(iterations: int) -> int:
    """Compute in registers alone."""
    value = 1
    for _ in range(iterations):
        value = (value * 1103515245 + 12345) & 0x7FFFFFFF
    return value


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a process evaluates."""

    config: EvaluateConfig
    source: RunSource
    batch: Batch
    truth: MapTruth

    def score(self) -> None:
        """Do what a task does with a batch."""
        score_batch(self.config, self.source, self.batch, self.truth)

    def passes(self) -> None:
        """Make the nets' passes alone; with baselines also those of their maps."""
        nets, batch = self.source.nets, self.batch
        x = normalize(batch.images, *colour_statistics(nets.config, batch.images.device))
        x = x.contiguous(memory_format=torch.channels_last)
        with torch.inference_mode():
            for net in (nets.clean_classifier, nets.classifier, nets.corruption):
                net(x)
        inputs = Inputs(
            images=x,
            labels=batch.labels,
            segments=batch.segments,
            superpixels=self.source.superpixels,
        )
        for name, source in MAPS.items():
            if self.source.baselines and source.of_run is not None and name != "aln":
                source.of_run(nets, inputs)


def new_work(data: Path, run: Path, baselines: bool) -> Work:
    """Set up this process as that of a task, and read what a batch needs."""
    device, manifest = set_up_process(use_gpu=False), read_manifest(data)
    config = EvaluateConfig(data=str(data), run=run, output="unused", baselines=baselines)
    source = load_source(config, manifest, device)
    assert isinstance(source, RunSource)
    ledger = read_ledger(str(data), "val")
    known = ground_truth_of(ledger, manifest.classes, manifest.class_names)
    truth = map_truth(known, ledger["row"].to_numpy(), "devkit", 0)
    batch = next(iter(Loader(data, manifest).evaluation("val", BATCH)))
    return Work(config=config, source=source, batch=batch, truth=truth)


def cpu_seconds(work: Callable[[], Any], turns: int) -> float:
    """Return the median processor time of a call, after one that does not count."""
    seconds = []
    for turn in range(turns + 1):
        start = time.process_time()
        work()
        if turn:
            seconds.append(time.process_time() - start)
    return statistics.median(seconds)


def costs(data: Path, run: Path, turns: int) -> dict[str, float]:
    """Return milliseconds per image of all that a task does and of the bare passes, and the
    ratio."""
    result: dict[str, float] = {}
    for name, baselines in KINDS.items():
        work = new_work(data, run, baselines)
        own, bare = (1000 * cpu_seconds(f, turns) / BATCH for f in (work.score, work.passes))
        result |= {name: own, f"{name}, bare passes": bare, f"{name}, ratio": own / bare}
    return result


def bare_process(
    rank: int, data: Path, run: Path, turns: int, meet: Barrier, answers: "Queue[Answer]"
) -> None:
    """Be one of two processes of a core each: rank 0 does each kind of work alone, then both do it
    at the same time. Answer with the work, how many did it, and the seconds."""
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[rank]})
    works: dict[str, Callable[[], Any]] = {"a loop in registers": partial(spin, LOOP)}
    for name, baselines in KINDS.items():
        work = new_work(data, run, baselines)
        works[f"the nets' passes, {name}"] = work.passes
        works[f"a task's work without Ray, {name}"] = work.score
    for work_once in works.values():
        work_once()
    for _ in range(turns):
        for name, work_once in works.items():
            for count in (1, 2):
                meet.wait()
                if rank < count:
                    start = time.perf_counter()
                    for _ in range(BATCHES):
                        work_once()
                    answers.put((name, count, time.perf_counter() - start))


def bare_gains(data: Path, run: Path, turns: int) -> dict[str, list[float]]:
    """Return, of each kind of work, the rate of two bare processes over that of one, by turn."""
    context = get_context("spawn")
    meet, answers = context.Barrier(2), context.Queue()
    processes = [
        context.Process(target=bare_process, args=(rank, data, run, turns, meet, answers))
        for rank in (0, 1)
    ]
    for process in processes:
        process.start()
    seconds: dict[str, dict[int, list[float]]] = {}
    for _ in range(turns * 3 * (1 + 2 * len(KINDS))):
        name, count, own = answers.get(timeout=300)
        seconds.setdefault(name, {1: [], 2: []})[count].append(own)
    for process in processes:
        process.join()
    return {
        name: (2 * np.array(by[1]) / np.reshape(by[2], (turns, 2)).max(axis=1)).tolist()
        for name, by in seconds.items()
    }


def job_rates(data: Path, run: Path, images: int, turns: int) -> dict[str, list[float]]:
    """Return the images per second of the job in each turn, Ray started before, and under NAME +
    STEADY of its tasks once as many have ended as run at a time."""
    rates: dict[str, list[float]] = {}
    for name, baselines in KINDS.items():
        for workers in (1, 2) * turns:
            ends: list[float] = []

            def progress(*_: int, ends: list[float] = ends) -> None:
                ends.append(time.perf_counter())

            config = EvaluateConfig(
                data=str(data),
                run=run,
                output=data.parent / "evaluation",
                baselines=baselines,
                workers=workers,
                shards=TASKS,
            )
            started = time.perf_counter()
            evaluate(config, progress)
            key, left = f"{name}, {workers} at a time", images * (1 - workers / TASKS)
            rates.setdefault(key, []).append(images / (ends[-1] - started))
            steady = left / (ends[-1] - ends[workers - 1])
            rates.setdefault(key + STEADY, []).append(steady)
    return rates


def spread(values: Sequence[float], form: str) -> list[str]:
    """Return the median and the range as text."""
    return [f"{statistics.median(values):{form}}", f"{min(values):{form}} to {max(values):{form}}"]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print and write the results."""
    config = cli.parse(BenchConfig, argv, __doc__ or "")
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 - as bare processes
    cli.connect_ray()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        synthetic = SyntheticConfig(train_images=64, val_images=config.images)
        write_synthetic(folder / "images", synthetic)
        data, run = folder / "shards", folder / "run"
        asked = PreprocessConfig(source=str(folder / "images"), output=str(data), superpixels=196)
        preprocess(asked, quiet, cli.connect_ray)
        training = TrainConfig(loading=LoadingConfig(data=str(data)), output=str(run))
        run.mkdir()
        save_nets(run, new_nets(model_config(training, read_manifest(data))), {})
        rates = job_rates(data, run, config.images, config.turns)
        gains = bare_gains(data, run, config.turns)
        milliseconds = costs(data, run, config.turns)
    for name in KINDS:
        for kind in (STEADY, ""):
            two, one = (rates[f"{name}, {workers} at a time{kind}"] for workers in (2, 1))
            gains[f"the job, {name}{kind}"] = (np.array(two) / np.array(one)).tolist()
    speedup = PAPER_MS * float(np.median(rates["ALN, 1 at a time"])) / 1000
    print(cli.table(["", "CPU ms/image"], [[k, f"{v:.3f}"] for k, v in milliseconds.items()]))
    for title, values, form in (
        ("the job, images/s", rates, ".0f"),
        ("two processes over one", gains, ".2f"),
    ):
        print(cli.table([title, "", ""], [[k, *spread(v, form)] for k, v in values.items()]))
    print(f"the paper's 93 ms / ours for ALN on one core: {speedup:.1f}")
    content = {
        "hardware": hardware(),
        "milliseconds_per_image": milliseconds,
        "images_per_second": rates,
        "two_processes_over_one": gains,
        "paper_ms_over_ours": speedup,
    }
    write_result(config.output, "evaluation", content)


if __name__ == "__main__":
    cli.run(main)
