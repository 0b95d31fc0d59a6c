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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import cv2

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
    trainings: int = cli.option(5, low=0, help="how often what needs Ray is")
    output: Path = cli.option(Path("benchmarks/results"), help="folder for the dated JSON")


def run(checkout: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a checkout. Raises UserError where it fails."""
    command = [sys.executable, *words]
    result = subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=False)
    if result.returncode:
        raise UserError(f"{words} in {checkout} failed: {result.stderr[-500:]}")
    return result


def ended(checkout: Path, *words: str) -> float:
    """Return the seconds that a process takes."""
    started = time.perf_counter()
    run(checkout, *words)
    return time.perf_counter() - started


def localized(checkout: Path, photo: Path, folders: Any) -> float:
    """Return the seconds that the box of a photograph takes."""
    output = photo.with_name(f"boxes-{next(folders)}")
    return ended(checkout, "-m", "jobs.localize", str(photo), "--output", str(output))


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


def measure(config: BenchConfig, folder: Path) -> dict[str, list[float]]:
    """Return the seconds of each start in each turn; those of the other checkout under NAME,
    before."""
    write_synthetic(folder / "images", SyntheticConfig(train_images=64, val_images=1))
    source, data = folder / "images", folder / "shards"
    asked = PreprocessConfig(source=str(source), output=str(data), superpixels=196)
    preprocess(asked, quiet, cli.connect_ray)
    import ray  # here: the imports above are those of the commands

    ray.shutdown()
    photo = folder / "photo.jpg"
    image = cv2.imread(str(next(source.rglob("*.JPEG"))))
    assert image is not None
    cv2.imwrite(str(photo), cv2.resize(image, (500, 375)))
    works: dict[str, Callable[[Path], float]] = {
        f"jobs.{name} --help": lambda checkout, name=name: ended(  # type: ignore[misc]
            checkout, "-m", f"jobs.{name}", "--help"
        )
        for name in COMMANDS
    }
    folders = count()
    works["a photograph by jobs.localize"] = partial(localized, photo=photo, folders=folders)
    trained: dict[str, Callable[[Path], float]] = {
        "Ray, started and ended": lambda checkout: ended(checkout, "-c", RAY),
        "Ray Train, workers that do nothing": lambda checkout: ended(checkout, "-c", RAY_TRAIN),
        "jobs.train to its first step": partial(first_step, data=data, folders=folders),
    }
    checkouts = {"": cli.ROOT}
    if config.before is not None:
        checkouts[", before"] = config.before.resolve()
    seconds: dict[str, list[float]] = {}
    for turns, group in ((config.turns, works), (config.trainings, trained)):
        for _ in range(turns):
            for name, work in group.items():
                for label, checkout in checkouts.items():
                    seconds.setdefault(name + label, []).append(work(checkout))
    return seconds


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print and write the results."""
    config = cli.parse(BenchConfig, argv, __doc__ or "")
    load = os.getloadavg()[0]
    with TemporaryDirectory() as name:
        seconds = measure(config, Path(name))
    rows = []
    for name, own in seconds.items():
        if name.endswith(", before"):
            continue
        row = [name]
        for values in (seconds.get(f"{name}, before"), own):
            row += (
                ["-", "-"]
                if values is None
                else [f"{statistics.median(values):.2f}", f"{min(values):.2f} to {max(values):.2f}"]
            )
        rows.append(row)
    print(cli.table(["seconds, median and range", "before", "", "now", ""], rows))
    content = {"hardware": hardware(), "load_average_before": load, "seconds": seconds}
    write_result(config.output, "start", content)


if __name__ == "__main__":
    cli.run(main)
