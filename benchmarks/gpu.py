"""`python -m benchmarks.gpu` (`make gpu`): what is asked of a machine with a GPU, in 8 minutes.

Every result is written as soon as it is measured, so that a run that is cut short keeps what it
has. A part that fails is recorded with its error, and the others follow. `--device cpu` and small
numbers try the script itself.
"""

import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ray
import torch

from benchmarks import network_training, training
from benchmarks.machine import hardware, quiet, write_result
from jobs import cli
from jobs.evaluate.__main__ import evaluate
from jobs.evaluate.config import EvaluateConfig
from jobs.runs import new_nets, save_nets
from model.controller import ControllerState
from pipeline.errors import UserError
from pipeline.loading.loader import Batch
from pipeline.shards.make import preprocess
from pipeline.shards.plan import PreprocessConfig
from pipeline.synthetic import SyntheticConfig, write_synthetic

IMAGENET = 1_281_167  # train images
SETTLE = 8  # batches before a rate is measured
PROFILED = 5  # steps of each kind
WAITS = (  # operations that make the host wait for the GPU
    *("aten::_local_scalar_dense", "cudaStreamSynchronize", "cudaDeviceSynchronize"),
    *("cudaEventSynchronize", "cudaMemcpy"),
)
PRECISIONS = ("bfloat16", "float32")


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """How much to measure, and where the result goes."""

    device: str = cli.option("cuda", help="cuda or cpu")
    tests: bool = cli.option(True, help="first run the tests that need a GPU")
    train_images: int = cli.option(32_768, help="generated, of 64 px once they are shards")
    val_images: int = cli.option(50_000, help="generated, to evaluate")
    batch_sizes: tuple[int, ...] = cli.option((256, 1024), help="images per step")
    steps: int = cli.option(20, help="steps in a turn")
    turns: int = cli.option(5, low=1, help="how often each of the compared is measured")
    seconds: float = cli.option(2.0, help="how long a loader's rate is measured")
    network_batch: int = cli.option(64, help="images per step over the pretrained network")
    output: Path = cli.option(Path("benchmarks/results"), help="folder for the dated JSON")


Result = dict[str, Any]


def tests(config: BenchConfig, _: Path) -> Result:
    """Run the tests that need a GPU. Raises UserError where one fails."""
    if not config.tests:
        return {}
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=cli.ROOT)
    if result.returncode:
        raise UserError(result.stdout[-2000:])
    return {"summary": result.stdout.strip().splitlines()[-1]}


def preprocessing(config: BenchConfig, folder: Path) -> Result:
    """Make the images and their shards."""
    images = SyntheticConfig(train_images=config.train_images, val_images=config.val_images)
    write_synthetic(folder / "images", images)
    asked = PreprocessConfig(
        source=str(folder / "images"), output=str(folder / "shards"), superpixels=196
    )
    cli.connect_ray()
    seconds = preprocess(asked, quiet, cli.connect_ray).progress.seconds
    ray.shutdown()  # whose processes would share the cores
    return {"images_per_second": (config.train_images + config.val_images) / seconds}


def setting_of(config: BenchConfig, folder: Path, batch_size: int) -> training.Setting:
    """Return what the functions of benchmarks.training measure."""
    bench = training.BenchConfig(
        steps=config.steps, turns=config.turns, batch_size=batch_size, device=config.device
    )
    return training.Setting(config=bench, folder=folder)


def rate(batches: Iterator[Batch], seconds: float) -> float:
    """Return images per second into the device's memory."""
    for _ in islice(batches, SETTLE):
        pass
    started, images = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        images += len(next(batches).labels)
    return images / (time.perf_counter() - started)


def loading(config: BenchConfig, folder: Path) -> Result:
    """Measure the loader, and a set that stays in the device's memory."""
    rates = {}
    for size in config.batch_sizes:
        setting = setting_of(config, folder, size)
        for name, resident in (("loader", False), ("resident", True)):
            batches = setting.batches(resident=resident)
            rates[f"{name}, {size} a batch"] = rate(batches, config.seconds)
    return {"images_per_second": rates}


def steps(config: BenchConfig, folder: Path) -> Result:
    """Measure every phase fed and unfed, and work out an epoch of ImageNet."""
    rates, ratios, epochs = {}, {}, {}
    for size in config.batch_sizes:
        for precision in PRECISIONS:
            name = f"{precision}, {size} a step"
            setting = setting_of(config, folder, size)
            own = rates[name] = training.fed_and_unfed(setting, "--precision", precision)
            ratios[name] = training.ratios(own)
            epochs[name] = IMAGENET / own["joint, resident"]
    return {"images_per_second": rates, "ratios": ratios, "imagenet_joint_epoch_seconds": epochs}


def evaluation(config: BenchConfig, folder: Path) -> Result:
    """Evaluate untrained nets on the val images."""
    run, seconds = folder / "untrained", {}
    trainer = setting_of(config, folder, 64).trainer()
    run.mkdir()
    save_nets(run, new_nets(trainer.model), {})
    cli.connect_ray()
    for name, baselines in (("ALN", False), ("all maps", True)):
        for workers in (None, os.cpu_count()):
            asked = EvaluateConfig(
                data=str(folder / "shards"),
                run=run,
                output=folder / "evaluation",
                baselines=baselines,
                workers=workers,
            )
            started = time.perf_counter()
            evaluate(asked, lambda *_: None)
            key = f"{name}, {workers or 'the usual'} tasks"
            seconds[key] = time.perf_counter() - started
    ray.shutdown()
    return {"images": config.val_images, "seconds_of_all_images": seconds}


def network(config: BenchConfig, folder: Path) -> Result:
    """Measure steps and inference over the pretrained network beside its bare passes."""
    bench = network_training.BenchConfig(
        batch_size=config.network_batch,
        steps=config.steps,
        turns=config.turns,
        device=config.device,
    )
    rates, ratios = network_training.measure(bench, folder / "network")
    return {"images_per_second": rates, "over_bare_passes": ratios}


def profile(config: BenchConfig, folder: Path) -> Result:
    """Count what waits for the GPU in steps of each kind, and name the dearest operations.
    torch's profiler itself synchronizes once."""
    setting = setting_of(config, folder, config.batch_sizes[0])
    trainer, batch = setting.trainer("--precision", "bfloat16"), next(setting.batches())

    def steps_of_each_kind() -> None:
        trainer.warmup_step(batch)
        for joint in (True, False):
            trainer.state.controller = ControllerState(area_weight=1.0, accuracy=0.5, joint=joint)
            trainer.adversarial_step(batch)

    steps_of_each_kind()  # recorded
    with torch.profiler.profile() as profiler:
        for _ in range(PROFILED):
            steps_of_each_kind()
    events = profiler.key_averages()
    waits = {event.key: event.count for event in events if event.key in WAITS}
    lines = events.table(sort_by="self_device_time_total", row_limit=12).splitlines()
    return {"steps": 3 * PROFILED, "waits": waits, "dearest": lines}


PARTS: tuple[Callable[[BenchConfig, Path], Result], ...] = (
    *(tests, preprocessing, loading, steps, evaluation, network, profile),
)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and write the results. Raises UserError in the end where a part failed."""
    config = cli.parse(BenchConfig, argv, __doc__ or "")
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112
    torch.set_num_threads(1)  # the work is the GPU's; a worker of jobs.train has one core
    content: dict[str, Any] = {"hardware": hardware()}
    with TemporaryDirectory() as name:
        for part in PARTS:
            started = time.perf_counter()
            try:
                result = part(config, Path(name))
            except Exception as error:  # so that the parts after it are measured
                traceback.print_exc()
                result = {"error": f"{type(error).__name__}: {error}"}
            taken = round(time.perf_counter() - started, 1)
            content[part.__name__] = {**result, "seconds": taken}
            print(f"{part.__name__}: {taken} s", flush=True)
            write_result(config.output, f"gpu-{config.device}", content)
    failed = [part.__name__ for part in PARTS if "error" in content[part.__name__]]
    if failed:
        raise UserError(f"failed: {', '.join(failed)}; their errors are above and in the file")


if __name__ == "__main__":
    cli.run(main)
