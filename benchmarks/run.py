"""`make bench`: rates of each stage, side by side in one run on this machine, and their ratios.

Absolute rates drift with the machine; the ratios are what to compare. The table goes to the
terminal and, with the hardware, to benchmarks/results/.
"""

import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import ray
import torch

from jobs import cli
from model.classifier import Classifier
from model.corruption import CorruptionNet
from model.masking import gumbel_difference
from model.step import adversarial_step, clean_step
from pipeline.loading.augmentation import Augmentation
from pipeline.loading.loader import evaluation_batches, train_batches
from pipeline.loading.order import Position
from pipeline.shards.format import read_manifest
from pipeline.shards.make import Progress, make_shard, preprocess
from pipeline.shards.plan import PreprocessConfig, make_plan
from pipeline.synthetic import SyntheticConfig, write_synthetic

CPU = torch.device("cpu")
BATCH = 64
REPEATS = 3


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """How much to measure, and where the result goes."""

    images: int = cli.option(2000, help="generated train images")
    output: Path = cli.option(Path("benchmarks/results"), help="folder for the dated JSON")


def best_rate(work: Callable[[], int]) -> float:
    """Images per second in the fastest of a few runs; `work` returns its number of images."""
    rates = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        count = work()
        rates.append(count / (time.perf_counter() - start))
    return max(rates)


def quiet(progress: Progress) -> None:
    """Show nothing: printing is not measured."""


def preprocess_rates(folder: Path, images: int) -> dict[str, float]:
    """The function that makes a shard, alone in this process, and the job on 1 and 2 workers."""

    def config(output: str, workers: int) -> PreprocessConfig:
        return PreprocessConfig(
            source=str(folder / "images"),
            output=str(folder / output),
            samples_per_shard=250,
            workers=workers,
        )

    floor_config = config("floor", 1)
    plan = make_plan(floor_config)

    def floor() -> int:
        for task in plan.tasks:
            make_shard(task, plan.images(task), plan.source, plan.output, floor_config)
        return images

    rates = {"preprocess, one process without Ray": best_rate(floor)}
    for workers in (1, 2):
        fastest = 0.0
        for repeat in range(REPEATS):
            job = config(f"job-{workers}-{repeat}", workers)
            done = preprocess(job, quiet, cli.connect_ray).progress
            fastest = max(fastest, done.done / done.seconds)
        rates[f"preprocess, Ray job, {workers} in flight"] = fastest
    return rates


def loader_rates(data: Path) -> dict[str, float]:
    """One loader in one thread, with and without augmentation."""
    manifest = read_manifest(data)
    batches = train_batches(
        data,
        manifest,
        batch_size=BATCH,
        rank=0,
        ranks=1,
        seed=0,
        start=Position(),
        augmentation=Augmentation(),
        device=CPU,
    )

    def augmented() -> int:
        return sum(len(next(batches).labels) for _ in range(30))

    def plain() -> int:
        found = evaluation_batches(
            data, manifest, "train", batch_size=BATCH, first=0, stop=30, device=CPU
        )
        return sum(len(batch.labels) for batch in found)

    return {"load, augmented": best_rate(augmented), "load, as stored": best_rate(plain)}


def step_rates() -> dict[str, float]:
    """The gradients of one step in one thread, data at hand, default nets at 64 px."""
    torch.set_num_threads(1)
    images = torch.randn(BATCH, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    segments = torch.randint(0, 196, (BATCH, 64, 64))
    labels = torch.randint(0, 8, (BATCH,))
    noise = gumbel_difference((BATCH, 196), torch.Generator().manual_seed(0))
    classifier, corruption = Classifier(8, 24), CorruptionNet((64, 64), 24, 256)
    torch.nn.utils.convert_conv2d_weight_memory_format(classifier, torch.channels_last)
    torch.nn.utils.convert_conv2d_weight_memory_format(corruption, torch.channels_last)

    def warmup() -> int:
        clean_step(classifier, images, labels, BATCH)
        return BATCH

    def adversarial(joint: bool) -> Callable[[], int]:
        def step() -> int:
            adversarial_step(
                corruption,
                classifier,
                images,
                segments,
                labels,
                noise,
                total=BATCH,
                joint=joint,
                area_weight=1.0,
                area_power=2,
                clean_weight=1.0,
            )
            return BATCH

        return step

    return {
        "step, warm-up": best_rate(warmup),
        "step, corruption only": best_rate(adversarial(joint=False)),
        "step, joint with clean images": best_rate(adversarial(joint=True)),
    }


def hardware() -> dict[str, str | int]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.machine(),
        "cores": os.cpu_count() or 0,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "ray": ray.__version__,
    }


def main() -> None:
    config = cli.parse(BenchConfig, None, __doc__ or "")
    ray.init(address="local", include_dashboard=False, logging_level="warning")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        synthetic = SyntheticConfig(train_images=config.images, val_images=0)
        write_synthetic(folder / "images", synthetic)
        rates = preprocess_rates(folder, config.images)
        rates |= loader_rates(folder / "job-1-0")
    rates |= step_rates()
    floor = rates["preprocess, one process without Ray"]
    ratios = {
        "job on 1 / one process": rates["preprocess, Ray job, 1 in flight"] / floor,
        "job on 2 / one process": rates["preprocess, Ray job, 2 in flight"] / floor,
        "augmented load / warm-up step": rates["load, augmented"] / rates["step, warm-up"],
        "warm-up / joint step": rates["step, warm-up"] / rates["step, joint with clean images"],
    }
    print(cli.table(["stage", "images/s"], [[k, f"{v:.0f}"] for k, v in rates.items()]))
    print(cli.table(["ratio", ""], [[k, f"{v:.2f}"] for k, v in ratios.items()]))
    content = {"hardware": hardware(), "images_per_second": rates, "ratios": ratios}
    config.output.mkdir(parents=True, exist_ok=True)
    path = config.output / f"{date.today().isoformat()}-stages.json"
    path.write_text(json.dumps(content, indent=1) + "\n")
    print(f"written to {path}")


if __name__ == "__main__":
    cli.run(main)
