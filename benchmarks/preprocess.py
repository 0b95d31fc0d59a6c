"""Preprocessing: the job, one process and Ray Data, side by side.

`python -m benchmarks.preprocess --data FOLDER`, where FOLDER holds imagenet-samples.tar and
tiny-imagenet-20.tar.gz, or one of them; with neither, images are generated. Each way of doing the
work is timed in turn, several rounds, and its fastest round counts; ratios within a run are what
to compare.
"""

import os
import shutil
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray

from benchmarks.machine import hardware, quiet, write_result
from jobs import cli
from pipeline.shards.make import preprocess
from pipeline.shards.plan import PreprocessConfig, make_plan
from pipeline.shards.shard import make_shard
from pipeline.shards.superpixels import superpixels
from pipeline.synthetic import SyntheticConfig, write_synthetic

ARCHIVES = {
    "ImageNet samples": "imagenet-samples.tar",
    "Tiny ImageNet-20": "tiny-imagenet-20.tar.gz",
}
CORES = 2


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """What to measure, and where the result goes."""

    data: Path = cli.option(Path("../shared/data"), help="folder with the archives of images")
    images: int = cli.option(
        4000, help="ImageNet's, which repeat 120; five times as many of the tiny ones"
    )
    rounds: int = cli.option(3, help="of which the fastest counts")
    output: Path = cli.option(Path("benchmarks/results"), help="folder for the dated JSON")


@dataclass(frozen=True, kw_only=True)
class Work:
    """One collection at one size: a folder per class below `folder`."""

    name: str
    folder: Path
    images: int
    size: int
    superpixels: int

    def config(self, output: Path, workers: int | None) -> PreprocessConfig:
        return PreprocessConfig(
            source=str(self.folder),
            output=str(output),
            layout="folders",
            image_size=self.size,
            superpixels=self.superpixels,
            samples_per_shard=max(1, min(PreprocessConfig.samples_per_shard, self.images // 8)),
            workers=workers,
        )


def collections(config: BenchConfig, folder: Path) -> Iterator[tuple[str, Path]]:
    """Folders of class folders with images, by the collection's name."""
    for name, archive in ARCHIVES.items():
        path = config.data / archive
        if not path.is_file():
            print(f"{name}: {path} is not there; left out")
            continue
        with tarfile.open(path) as tar:
            tar.extractall(folder / "unpacked", filter="data")
        found = sorted((folder / "unpacked").rglob("*.JPEG"))
        count = config.images * (5 if name.startswith("Tiny") else 1)
        yield name, spread(found, folder / name.replace(" ", "-"), count)
        shutil.rmtree(folder / "unpacked")
    if not any((config.data / archive).is_file() for archive in ARCHIVES.values()):
        synthetic = SyntheticConfig(train_images=config.images, val_images=0)
        write_synthetic(folder / "unpacked", synthetic)
        found = sorted((folder / "unpacked").rglob("*.JPEG"))
        yield "generated", spread(found, folder / "generated", config.images)


def spread(images: list[Path], folder: Path, count: int) -> Path:
    """`count` copies of files, in rotation, in ten class folders."""
    chosen = images[:: max(1, len(images) // count)]
    for i in range(count):
        target = folder / f"class-{i % 10}" / f"{i:06d}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(chosen[i % len(chosen)], target)
    return folder


def one_process(work: Work, output: Path) -> float:
    """Seconds of make_shard over all shards, without Ray."""
    config = work.config(output, 1)
    plan = make_plan(config)
    started = time.perf_counter()
    for task in plan.tasks:
        make_shard(task, plan.images(task), plan.source, plan.output, config)
    return time.perf_counter() - started


def job(work: Work, output: Path) -> float:
    """Seconds of the job from its first task to its last, as it counts itself."""
    return preprocess(work.config(output, None), quiet, cli.connect_ray).progress.seconds


def _ray_data_batch(batch: dict[str, Any], count: int) -> dict[str, Any]:
    found = [superpixels(np.ascontiguousarray(image), count) for image in batch["image"]]
    return {"image": batch["image"], "segments": np.stack(found)}


def ray_data(work: Work, output: Path) -> float:
    """Seconds of Ray Data: read_images at the stored size, superpixels in map_batches, Parquet."""
    ray.data.DataContext.get_current().enable_progress_bars = False
    started = time.perf_counter()
    images = ray.data.read_images(str(work.folder), size=(work.size, work.size), mode="RGB")
    images.map_batches(
        _ray_data_batch, batch_size=100, fn_kwargs={"count": work.superpixels}
    ).write_parquet(str(output))
    return time.perf_counter() - started


def measure(work: Work, scratch: Path, rounds: int) -> dict[str, float]:
    """Images per second of each way in its fastest round; the ways take turns."""
    ways: dict[str, Callable[[Work, Path], float]] = {
        f"the job, {CORES} workers": job,
        "one process without Ray": one_process,
        "Ray Data": ray_data,
    }
    best = dict.fromkeys(ways, 0.0)
    for round_number in range(rounds):
        for name, way in ways.items():
            path = scratch / f"{name}-{round_number}".replace(" ", "-")
            best[name] = max(best[name], work.images / way(work, path))
            shutil.rmtree(path)
            os.sync()  # what this one left to write would be charged to the next
    return best


def main() -> None:
    config = cli.parse(BenchConfig, None, __doc__ or "")
    started = time.perf_counter()
    # Ray's workers run at nice 15; beside other work that would be measured, not the job.
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112
    ray.init(address="local", num_cpus=CORES, include_dashboard=False, logging_level="warning")
    start_up = time.perf_counter() - started
    results = {}
    with tempfile.TemporaryDirectory() as name:
        for collection, folder in collections(config, Path(name)):
            for size, count in ((64, 100), (224, 400)):
                if size > 64 and collection != "ImageNet samples":
                    continue
                work = Work(
                    name=f"{collection} to {size} px",
                    folder=folder,
                    images=len(list(folder.rglob("*.jpg"))),
                    size=size,
                    superpixels=count,
                )
                scratch = Path(name) / "scratch"
                rates = results[work.name] = measure(work, scratch, config.rounds)
                rows = [[way, f"{rate:.0f}"] for way, rate in rates.items()]
                print(cli.table([work.name, "images/s"], rows), flush=True)
    content = {"hardware": hardware(), "ray_start_seconds": start_up, "images_per_second": results}
    content["images"] = config.images
    write_result(config.output, "preprocess", content)


if __name__ == "__main__":
    cli.run(main)
