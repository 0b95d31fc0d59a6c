"""Preprocessing: its stages alone, one process, the job, a naive script and Ray Data, side by side.

`python -m benchmarks.preprocess --data FOLDER`, where FOLDER holds imagenet-samples.tar and
tiny-imagenet-20.tar.gz (in part, or neither: images are generated then). Each way of doing the work
is timed in turn, several rounds, and its fastest round counts; ratios within a run are what to
compare. scikit-image is no dependency: without it the naive script is left out and said to be.
"""

import json
import os
import shutil
import tarfile
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import date
from functools import partial
from importlib.util import find_spec
from io import BytesIO
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import ray

from benchmarks.machine import hardware, quiet
from jobs import cli
from pipeline.shards.format import Sample, pack_shard, write_shard
from pipeline.shards.images import read_image
from pipeline.shards.make import preprocess
from pipeline.shards.plan import Plan, PreprocessConfig, make_plan
from pipeline.shards.shard import make_shard
from pipeline.shards.superpixels import superpixels
from pipeline.sources.files import SourceFiles
from pipeline.synthetic import SyntheticConfig, write_synthetic

ARCHIVES = {
    "ImageNet samples": "imagenet-samples.tar",
    "Tiny ImageNet-20": "tiny-imagenet-20.tar.gz",
}
CORES = 2
STAGE_IMAGES = 600
NAIVE_SHARE = 4  # the naive script, the slowest by far, makes one image in so many


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


def stages(work: Work, scratch: Path, rounds: int) -> dict[str, float]:
    """Seconds per image of each stage alone, in this process, in its fastest of some rounds."""
    plan = make_plan(work.config(scratch / "stages", 1))
    paths = [row["path"] for task in plan.tasks for row in plan.images(task).to_pylist()]
    scratch.mkdir(exist_ok=True)
    best: dict[str, float] = {}
    for _ in range(rounds + 1):  # the first round compiles
        for name, seconds in _stages_once(work, plan, paths[:STAGE_IMAGES], scratch).items():
            best[name] = min(best.get(name, seconds), seconds)
    return best


def _stages_once(work: Work, plan: Plan, paths: list[str], scratch: Path) -> dict[str, float]:
    spent: dict[str, float] = defaultdict(float)
    samples = []
    with SourceFiles(plan.source) as files:
        for row, path in enumerate(paths):
            times = [time.perf_counter()]
            data = files.read(path)
            times.append(time.perf_counter())
            pixels = read_image(data, work.size, work.size).pixels
            times.append(time.perf_counter())
            segments = superpixels(pixels, work.superpixels)
            times.append(time.perf_counter())
            names = ("read", "decode and resize", "superpixels")
            for name, (start, stop) in zip(names, pairwise(times), strict=True):
                spent[name] += stop - start
            samples.append(
                Sample(key=f"a-{row}", row=row, label=0, image=pixels, segments=segments, meta={})
            )
    started = time.perf_counter()
    packed = pack_shard(samples, "rgb")
    spent["encode and pack"] = time.perf_counter() - started
    started = time.perf_counter()
    write_shard(scratch / "stage.tar", packed)
    spent["hash, write and sync"] = time.perf_counter() - started
    return {name: seconds / len(samples) for name, seconds in spent.items()}


def make_all(plan: Plan, config: PreprocessConfig, first: int = 0, step: int = 1) -> None:
    """Every `step`-th shard, in this process."""
    for task in plan.tasks[first::step]:
        make_shard(task, plan.images(task), plan.source, plan.output, config)


def one_process(work: Work, output: Path) -> float:
    """Seconds of make_shard over all shards, without Ray: the floor."""
    config = work.config(output, 1)
    plan = make_plan(config)
    started = time.perf_counter()
    make_all(plan, config)
    return time.perf_counter() - started


def plain_processes(work: Work, output: Path, pool: ProcessPoolExecutor) -> float:
    """Seconds of the same in CORES processes without Ray: what the machine can do at best."""
    config = work.config(output, 1)
    plan = make_plan(config)
    started = time.perf_counter()
    list(pool.map(partial(make_all, plan, config, step=CORES), range(CORES)))
    return time.perf_counter() - started


def job(work: Work, output: Path, workers: int | None) -> float:
    """Seconds of the job from its first task to its last, as it counts itself."""
    return preprocess(work.config(output, workers), quiet, cli.connect_ray).progress.seconds


def naive(work: Work, output: Path) -> float:
    """Seconds of the script that anybody would write first (PIL, scikit-image and tarfile), in
    proportion to its share of the images."""
    from PIL import Image
    from skimage.segmentation import slic  # type: ignore[import-not-found, unused-ignore]

    output.mkdir(parents=True)
    started = time.perf_counter()
    with tarfile.open(output / "shard.tar", "w") as tar:
        for path in sorted(work.folder.rglob("*.jpg"))[::NAIVE_SHARE]:
            image = Image.open(path).convert("RGB").resize((work.size, work.size))
            pixels = np.asarray(image)
            segments = slic(pixels, work.superpixels, start_label=0).astype(np.uint16)
            for suffix, data in (("rgb", pixels.tobytes()), ("seg", segments.tobytes())):
                info = tarfile.TarInfo(f"{path.stem}.{suffix}")
                info.size = len(data)
                tar.addfile(info, BytesIO(data))
    return NAIVE_SHARE * (time.perf_counter() - started)


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
    """Seconds of each way in its fastest round; the ways take turns."""
    best: dict[str, float] = {}
    with ProcessPoolExecutor(CORES, mp_context=get_context("spawn")) as pool:
        list(pool.map(_warm, range(4 * CORES)))
        ways: dict[str, Callable[[Path], float]] = {
            "one process": partial(one_process, work),
            f"{CORES} plain processes": lambda path: plain_processes(work, path, pool),
            "job, 1 in flight": partial(job, work, workers=1),
            f"job, {CORES} workers": partial(job, work, workers=None),
            "Ray Data": partial(ray_data, work),
        }
        if find_spec("skimage"):
            ways["naive script"] = partial(naive, work)
        for round_number in range(rounds):
            for name, way in ways.items():
                path = scratch / f"{name}-{round_number}".replace(" ", "-")
                seconds = way(path)
                best[name] = min(best.get(name, seconds), seconds)
                shutil.rmtree(path)
                os.sync()  # what this one left to write would be charged to the next
    return best


def _warm(_: int) -> None:
    """Imports what a shard needs, in a process of the pool."""
    superpixels(np.zeros((64, 64, 3), np.uint8), 100)


def ratios(best: dict[str, float]) -> dict[str, float | None]:
    """How many times as fast as others the job is."""
    full = best[f"job, {CORES} workers"]
    naive_seconds = best.get("naive script")
    return {
        f"job on {CORES} / {CORES} x one process": best["one process"] / (CORES * full),
        "job, 1 in flight / one process": best["one process"] / best["job, 1 in flight"],
        f"{CORES} plain processes / {CORES} x one process": best["one process"]
        / (CORES * best[f"{CORES} plain processes"]),
        f"job on {CORES} / {CORES} plain processes": best[f"{CORES} plain processes"] / full,
        f"job on {CORES} / Ray Data": best["Ray Data"] / full,
        f"job on {CORES} / naive script": naive_seconds / full if naive_seconds else None,
        "one process / naive script": (
            naive_seconds / best["one process"] if naive_seconds else None
        ),
    }


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
                micro = {k: 1e6 * v for k, v in stages(work, scratch, config.rounds).items()}
                best = measure(work, scratch, config.rounds)
                rates = {k: work.images / v for k, v in best.items()}
                compared = ratios(best)
                results[work.name] = {
                    "stage_microseconds": micro,
                    "images_per_second": rates,
                    "ratios": compared,
                }
                show(work.name, micro, rates, compared)
    content = {"hardware": hardware(), "ray_start_seconds": start_up, "work": results}
    content["images"] = config.images
    config.output.mkdir(parents=True, exist_ok=True)
    path = config.output / f"{date.today().isoformat()}-preprocess.json"
    path.write_text(json.dumps(content, indent=1) + "\n")
    print(f"starting Ray: {start_up:.1f} s\nwritten to {path}")


def show(
    name: str,
    micro: dict[str, float],
    rates: dict[str, float],
    compared: dict[str, float | None],
) -> None:
    """Print one collection's three tables."""
    print(f"\n{name}")
    print(cli.table(["stage", "us/image"], [[k, f"{v:.1f}"] for k, v in micro.items()]))
    print(cli.table(["way", "images/s"], [[k, f"{v:.0f}"] for k, v in rates.items()]))
    shown = [
        [k, f"{v:.2f}" if v else "skipped: scikit-image is not installed"]
        for k, v in compared.items()
    ]
    print(cli.table(["ratio", ""], shown), flush=True)


if __name__ == "__main__":
    cli.run(main)
