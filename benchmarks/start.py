"""`python -m benchmarks.start`: how long the commands take to begin, beside another checkout.

In turns, on a machine that does nothing else: the help of each command; a photograph by
jobs.localize; jobs.train from its start to its first step on two workers, and of that what Ray and
Ray Train take for workers that do nothing. `--before CHECKOUT` runs the same in another version of
the project, whose environment is this one.
"""

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import cv2
import ray

from benchmarks.machine import hardware, quiet, write_result
from jobs import cli
from pipeline.errors import UserError
from pipeline.shards.make import preprocess
from pipeline.shards.plan import PreprocessConfig
from pipeline.synthetic import SyntheticConfig, write_synthetic

COMMANDS = (
    *("preprocess", "inspect", "train", "evaluate", "report", "localize", "serve"),
    *("demo", "shipped"),
)
PROCESSES = 2  # of a training
RAY_NAME = "Ray, started and ended"
RAY_TRAIN_NAME = "Ray Train, workers that do nothing"
RAY = "from jobs import cli; cli.connect_ray()"
RAY_TRAIN = f"""
from ray.train import ScalingConfig
from ray.train.torch import TorchTrainer
from jobs import cli
cli.connect_ray()
TorchTrainer(lambda: None, scaling_config=ScalingConfig(num_workers={PROCESSES})).fit()
"""


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """How often to measure, beside what, and where the result goes."""

    before: Path | None = cli.option(None, help="another checkout of the project")
    turns: int = cli.option(5, low=1, help="how often each is started")
    output: Path = cli.option(Path("benchmarks/results"), help="folder for the dated JSON")


def ended(checkout: Path, words: Sequence[str]) -> float:
    """Return the seconds that Python takes in a checkout. Raises UserError where it fails."""
    started, command = time.perf_counter(), [sys.executable, *words]
    result = subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=False)
    if result.returncode:
        raise UserError(f"{words} in {checkout} failed: {result.stderr[-500:]}")
    return time.perf_counter() - started


def localized(checkout: Path, photo: Path, folders: Any) -> float:
    """Return the seconds that the box of a photograph takes."""
    output = photo.with_name(f"boxes-{next(folders)}")
    return ended(checkout, ("-m", "jobs.localize", str(photo), "--output", str(output)))


def first_step(checkout: Path, data: Path, folders: Any) -> float:
    """Return the seconds until a training has made its first step. Raises UserError where it ends
    before."""
    output = data.with_name(f"run-{next(folders)}")
    flags = ("--warmup-epochs", "1", "--epochs", "0", "--log-interval", "1", "--batch-size", "64")
    words = ("-m", "jobs.train", "--data", str(data), "--output", str(output), *flags)
    started = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, *words], cwd=checkout, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        while not (output / "metrics.jsonl").exists():
            if process.poll() is not None:
                raise UserError(f"{words} in {checkout} ended without a step")
            time.sleep(0.02)
        return time.perf_counter() - started


def works_of(folder: Path) -> dict[str, Callable[[Path], float]]:
    """Return what is measured, by name: functions of a checkout."""
    write_synthetic(folder / "images", SyntheticConfig(train_images=64, val_images=1))
    source, data = folder / "images", folder / "shards"
    asked = PreprocessConfig(source=str(source), output=str(data), superpixels=196)
    preprocess(asked, quiet, cli.connect_ray)
    ray.shutdown()
    photo = folder / "photo.jpg"
    image = cv2.imread(str(next(source.rglob("*.JPEG"))))
    assert image is not None
    cv2.imwrite(str(photo), cv2.resize(image, (500, 375)))
    folders = count()
    helps = {f"jobs.{name} --help": ("-m", f"jobs.{name}", "--help") for name in COMMANDS}
    return {
        **{name: partial(ended, words=words) for name, words in helps.items()},
        "a photograph by jobs.localize": partial(localized, photo=photo, folders=folders),
        "jobs.train to its first step": partial(first_step, data=data, folders=folders),
        RAY_NAME: partial(ended, words=("-c", RAY)),
        RAY_TRAIN_NAME: partial(ended, words=("-c", RAY_TRAIN)),
    }


def measure(
    config: BenchConfig, works: Mapping[str, Callable[[Path], float]]
) -> Iterator[dict[str, list[float]]]:
    """Yield the seconds of each start in the turns so far, by name and checkout (now, before)."""
    seconds: dict[str, list[float]] = {}
    for _ in range(config.turns):
        for name, work in works.items():
            if config.before is not None and name not in (RAY_NAME, RAY_TRAIN_NAME):
                seconds.setdefault(f"{name}, before", []).append(work(config.before.resolve()))
            seconds.setdefault(f"{name}, now", []).append(work(cli.ROOT))
        yield seconds


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print and write the results, after each turn."""
    config = cli.parse(BenchConfig, argv, __doc__ or "")
    content: dict[str, Any] = {"hardware": hardware(), "load_average_before": os.getloadavg()[0]}
    with TemporaryDirectory() as name:
        for seconds in measure(config, works_of(Path(name))):
            rows = [
                [key, f"{statistics.median(own):.2f}", f"{min(own):.2f} to {max(own):.2f}"]
                for key, own in seconds.items()
            ]
            print(cli.table(["seconds", "median", "range"], rows), flush=True)
            write_result(config.output, "start", content | {"seconds": seconds})


if __name__ == "__main__":
    cli.run(main)
