"""`python -m benchmarks.loader`: our loader beside others on the same shards, in one run.

At 64 and 224 px, raw and JPEG, every loader has one thread and all of them the same core, so what
threads and worker processes do counts too. They take turns for some rounds, so that drift of the
machine hits all alike; figures are medians over rounds, ratios medians of each round's ratio.
All shuffle, crop (area 0.7 to 1, aspect up to 1.16 times the image's) and flip images and
superpixels together; images come out as uint8 [B, H, W, 3] and superpixels as stored. Ours come
out as int64, as the nets index by them, in a global random order, from crops in fractions of a
pixel and with every sample checked, all of which costs more.

Then memory over epochs and over the number of shards, and what windows of shards do to the order.
"""

import json
import math
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

import cv2
import numpy as np
import simplejpeg
import torch
import webdataset
from nvidia.dali import fn, pipeline_def, types

from benchmarks.machine import hardware, quiet
from jobs import cli
from pipeline.errors import UserError
from pipeline.loading.augmentation import Augmentation, draw
from pipeline.loading.loader import Loader
from pipeline.loading.order import Order, Position, epoch_order
from pipeline.shards.format import (
    Manifest,
    Sample,
    Shard,
    Split,
    pack_shard,
    read_index,
    read_manifest,
    write_shard,
)
from pipeline.shards.make import preprocess
from pipeline.shards.plan import PreprocessConfig
from pipeline.synthetic import SyntheticConfig, write_synthetic

BATCH = 64
CROP = Augmentation()
PLAIN = Augmentation(min_area=1.0, max_aspect=1.0, flip=False)
COLOUR = replace(CROP, brightness=0.3, contrast=0.3, saturation=0.3)
OURS = "ours, crop + flip"
WITH_WORKER = "webdataset + DataLoader, a worker"
SHUFFLE = 1000  # samples that the streaming readers shuffle among
SETTLE = 8  # batches before each measurement: those that were made ahead during other loaders'
PAUSE = 0.05  # seconds after each, in which threads make the batches that they are ahead
PACKAGES = ("nvidia-dali-cuda130", "webdataset", "opencv-python-headless", "simplejpeg", "numba")
SMALL = 32  # side of the images in the sets of many shards
MEMORY_IMAGES = 20_000  # in each of them
MEMORY_EPOCHS = 4
IMAGENET = (1281, 1000)  # shards and images in each, as ImageNet's train split makes them
CLASSES = 1000
ORDER_BATCH = 256

Batches = Iterator[int]  # each step makes a batch on the device; the number of its images


@dataclass(frozen=True, kw_only=True)
class LoaderBenchConfig:
    """How much to measure, and where the result goes."""

    images: int = cli.option(2000, help="generated images at 64 px; a quarter of them at 224")
    rounds: int = cli.option(7, help="how often the loaders take turns")
    seconds: float = cli.option(0.2, help="how long a loader runs in its turn")
    shards: int = cli.option(1000, help="shards of the larger set in the memory test; 0: no test")
    device: str = cli.option("auto", help="cpu, cuda, or auto: cuda where there is one")
    output: Path = cli.option(Path("benchmarks/results"), help="folder for the dated JSON")

    def __post_init__(self) -> None:
        if self.device not in ("auto", "cpu", "cuda"):
            raise ValueError(f"--device {self.device} must be auto, cpu or cuda")


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A set of shards and where its batches go."""

    data: Path
    manifest: Manifest
    device: torch.device

    @property
    def paths(self) -> list[Path]:
        return [self.data / "train" / shard.name for shard in self.manifest.splits["train"].shards]

    @property
    def size(self) -> tuple[int, int]:
        return self.manifest.height, self.manifest.width


def make_sets(folder: Path, side: int, images: int) -> None:
    """Generated images at `side` pixels as raw and JPEG shards: folder/rgb and folder/jpg."""
    largest = max(112, side)
    write_synthetic(
        folder / "images",
        SyntheticConfig(
            train_images=images, val_images=0, min_side=largest, max_side=largest * 9 // 7
        ),
    )
    for image_format in ("rgb", "jpg"):
        config = PreprocessConfig(
            source=str(folder / "images"),
            output=str(folder / image_format),
            image_size=side,
            image_format=image_format,
            superpixels=196,
            samples_per_shard=250,
        )
        preprocess(config, quiet, cli.connect_ray)


def ours(stored: Stored, augmentation: Augmentation) -> Batches:
    loader = Loader(stored.data, stored.manifest, stored.device)
    batches = loader.train(Order(batch_size=BATCH), augmentation)
    return (len(batch.labels) for batch in batches)


def ours_as_stored(stored: Stored) -> Batches:
    """Without augmentation and in order, as an evaluation reads. The manifest names every shard
    many times, so that the pass does not end."""
    train, times = stored.manifest.splits["train"], 50
    long = replace(train, images=times * train.images, shards=times * train.shards)
    while True:
        manifest = replace(stored.manifest, splits={"train": long})
        batches = Loader(stored.data, manifest, stored.device).evaluation(
            "train", BATCH, 0, long.images // BATCH
        )
        yield from (len(batch.labels) for batch in batches)


@pipeline_def
def _dali_graph(stored: Stored, way: str):  # type: ignore[no-untyped-def]
    """DALI's own reader and operators. way: "slice", "region" or "" (no augmentation)."""
    manifest, gpu = stored.manifest, stored.device.type == "cuda"
    segments_type = types.UINT8 if manifest.segments_dtype == "uint8" else types.UINT16
    images, segments, labels = fn.readers.webdataset(  # type: ignore[misc]
        paths=[str(path) for path in stored.paths],
        index_paths=[str(path.with_suffix(".idx")) for path in stored.paths],
        ext=[manifest.image_format, "seg", "cls"],
        dtypes=[types.UINT8, segments_type, types.INT32],
        missing_component_behavior="error",
        random_shuffle=True,
        initial_fill=SHUFFLE,
    )
    if manifest.image_format == "jpg":
        images = fn.decoders.image(images, device="mixed" if gpu else "cpu", output_type=types.RGB)
    else:
        images = fn.reshape(images.gpu() if gpu else images, shape=[*stored.size, 3])
    segments = fn.reshape(segments.gpu() if gpu else segments, shape=[*stored.size, 1])
    linear = {"interp_type": types.INTERP_LINEAR, "antialias": False, "size": stored.size}
    nearest = {"interp_type": types.INTERP_NN, "size": stored.size}
    if way == "slice":
        corner, extent = fn.random_crop_generator(
            np.array(stored.size),
            random_area=[CROP.min_area, 1.0],
            random_aspect_ratio=[1 / CROP.max_aspect, CROP.max_aspect],
        )
        flip = fn.random.coin_flip()
        images = fn.resize(fn.slice(images, corner, extent, axes=[0, 1]), **linear)
        segments = fn.resize(fn.slice(segments, corner, extent, axes=[0, 1]), **nearest)
        images, segments = fn.flip(images, horizontal=flip), fn.flip(segments, horizontal=flip)
    if way == "region":  # one operator crops, resizes and flips; what is drawn comes by batches
        start, end = fn.external_source(
            source=_regions(stored), num_outputs=2, batch=True, dtype=types.FLOAT, ndim=1
        )
        images = fn.resize(images, roi_start=start, roi_end=end, **linear)
        segments = fn.resize(segments, roi_start=start, roi_end=end, **nearest)
    return images, segments, labels.gpu() if gpu else labels


def _regions(stored: Stored) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    step = 0
    while True:
        position = Position(step=step)
        drawn = draw(BATCH, 0, position, stored.size, stored.manifest.mean, CROP)
        yield drawn.start.astype(np.float32), drawn.end.astype(np.float32)
        step += 1


def dali(stored: Stored, way: str) -> Batches:
    graph = _dali_graph(
        stored=stored,
        way=way,
        batch_size=BATCH,
        num_threads=1,
        device_id=(stored.device.index or 0) if stored.device.type == "cuda" else None,
        prefetch_queue_depth=2,
        exec_dynamic=True,
    )
    graph.build()
    while True:
        outputs = [torch.from_dlpack(output.as_tensor()) for output in graph.run()]
        yield len(outputs[2])


def _pixels(stored: Stored, file: Any) -> np.ndarray:
    """An image's member as RGB uint8 [H, W, 3]. simplejpeg decodes faster than OpenCV, and
    its quick modes gained nothing that could be told from noise."""
    if stored.manifest.image_format == "jpg":
        return simplejpeg.decode_jpeg(file)
    return np.frombuffer(file, np.uint8).reshape(*stored.size, 3)


def _labels(stored: Stored, file: Any) -> np.ndarray:
    return np.frombuffer(file, stored.manifest.segments_dtype).reshape(stored.size)


def _crop(image: np.ndarray, segments: np.ndarray, random: Random) -> tuple[np.ndarray, np.ndarray]:
    """The same crops in whole pixels by OpenCV, which is faster than its warpAffine."""
    height, width = segments.shape
    area = random.uniform(CROP.min_area, 1)
    stretch = math.exp(math.log(CROP.max_aspect) * random.uniform(-1, 1))
    rows = round(height * min(1, math.sqrt(area / stretch)))
    columns = round(width * min(1, math.sqrt(area * stretch)))
    y, x = random.randint(0, height - rows), random.randint(0, width - columns)
    part = slice(y, y + rows), slice(x, x + columns)
    image = cv2.resize(image[part], (width, height), interpolation=cv2.INTER_LINEAR)
    segments = cv2.resize(segments[part], (width, height), interpolation=cv2.INTER_NEAREST)
    if random.random() < 0.5:
        return cv2.flip(image, 1), cv2.flip(segments, 1)
    return image, segments


def _on_device(stored: Stored, tensors: list[torch.Tensor]) -> int:
    if stored.device.type == "cuda":
        tensors = [tensor.pin_memory().to(stored.device, non_blocking=True) for tensor in tensors]
    return len(tensors[2])


def _cropped(stored: Stored, random: Random, sample: dict[str, Any]) -> tuple[Any, Any, int]:
    image = _pixels(stored, sample[stored.manifest.image_format])
    cropped = _crop(image, _labels(stored, sample["seg"]), random)
    return *cropped, int.from_bytes(sample["cls"], "little")


def _collated(samples: list[tuple[Any, Any, int]]) -> list[torch.Tensor]:
    images, segments, labels = zip(*samples, strict=True)
    return [
        torch.from_numpy(np.stack(images)),
        torch.from_numpy(np.stack(segments)),
        torch.tensor(labels),
    ]


def _needed(name: str) -> bool:
    return not name.endswith(("json", "row"))


def streamed(stored: Stored, workers: int) -> Batches:
    """webdataset and torch's DataLoader, in this process or with a worker."""
    dataset = (
        webdataset.WebDataset(
            [str(path) for path in stored.paths],
            shardshuffle=100,
            select_files=_needed,
            empty_check=False,
        )
        .repeat()
        .shuffle(SHUFFLE)
        .map(partial(_cropped, stored, Random(0)))
        .batched(BATCH, collation_fn=_collated)
    )
    loader = torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=workers)
    return (_on_device(stored, tensors) for tensors in loader)


def _mapped(stored: Stored) -> list[tuple[np.ndarray, ...]]:
    """The image's, the superpixels' and the class's bytes of every sample."""
    samples = []
    for path in stored.paths:
        content = np.memmap(path, np.uint8, mode="r").view(np.ndarray)
        index = read_index(path, stored.manifest)
        for offsets, sizes in zip(index.offsets[:, :3], index.sizes[:, :3], strict=True):
            extents = zip(offsets, sizes, strict=True)
            samples.append(tuple(content[start : start + size] for start, size in extents))
    return samples


def _shuffled(samples: list[Any]) -> Iterator[list[Any]]:
    random = np.random.default_rng(0)
    while True:
        order = random.permutation(len(samples)).tolist()
        for first in range(0, len(order) - BATCH + 1, BATCH):
            yield [samples[n] for n in order[first : first + BATCH]]


def loop(stored: Stored, segments_dtype: str) -> Batches:
    """A plain Python loop over memory maps and the index."""
    random = Random(0)
    for batch in _shuffled(_mapped(stored)):
        images = np.empty((BATCH, *stored.size, 3), np.uint8)
        segments = np.empty((BATCH, *stored.size), segments_dtype)
        labels = np.empty(BATCH, np.int64)
        for n, (image, labelled, label) in enumerate(batch):
            images[n], segments[n] = _crop(
                _pixels(stored, image), _labels(stored, labelled), random
            )
            labels[n] = int.from_bytes(label.tobytes(), "little")
        tensors = [torch.from_numpy(array) for array in (images, segments, labels)]
        yield _on_device(stored, tensors)


def floor(stored: Stored) -> Batches:
    """Every byte that a batch needs is copied once, in random order; nothing else."""
    samples = _mapped(stored)
    buffer = np.empty(max(sum(map(len, sample)) for sample in samples), np.uint8)
    for batch in _shuffled(samples):
        for sample in batch:
            start = 0
            for member in sample:
                buffer[start : start + len(member)] = member
                start += len(member)
        yield len(batch)


def loaders(stored: Stored) -> dict[str, Batches]:
    return {
        WITH_WORKER: streamed(stored, 1),
        "webdataset + DataLoader, no worker": streamed(stored, 0),
        OURS: ours(stored, CROP),
        "ours, crop + flip + colours": ours(stored, COLOUR),
        "ours, shuffled alone": ours(stored, PLAIN),
        "ours, as stored": ours_as_stored(stored),
        "DALI, slice + resize + flip": dali(stored, "slice"),
        "DALI, resize of a region": dali(stored, "region"),
        "DALI, as stored": dali(stored, ""),
        "Python loop + OpenCV": loop(stored, stored.manifest.segments_dtype),
        "Python loop + OpenCV, int64 as ours": loop(stored, "int64"),
        "bytes copied alone": floor(stored),
    }


@dataclass(frozen=True, kw_only=True)
class Turn:
    """Microseconds per image of one loader in one round: on the clock, and of this process's CPU
    time, which other programs disturb less."""

    clock: float
    cpu: float


def measure(stored: Stored, rounds: int, seconds: float) -> dict[str, list[Turn]]:
    """What each loader takes in each round."""
    running = loaders(stored)
    taken: dict[str, list[Turn]] = {name: [] for name in running}

    def wait() -> None:
        if stored.device.type == "cuda":
            torch.cuda.synchronize(stored.device)

    for _ in range(rounds):
        for name, batches in running.items():
            for _ in islice(batches, SETTLE):
                pass
            wait()
            start, cpu, images = time.perf_counter(), time.process_time(), 0
            while time.perf_counter() - start < seconds:
                images += next(batches)
            wait()
            spent = time.perf_counter() - start, time.process_time() - cpu
            taken[name].append(Turn(clock=1e6 * spent[0] / images, cpu=1e6 * spent[1] / images))
            time.sleep(PAUSE)
    return taken


def figures(taken: dict[str, list[Turn]]) -> dict[str, dict[str, Any]]:
    """Medians over the rounds, quartiles, and the ratios to ours within each round."""
    times = {
        name: np.array([(turn.clock, turn.cpu) for turn in turns]) for name, turns in taken.items()
    }
    found = {}
    for name, each in times.items():
        low, median, high = np.quantile(each[:, 0], [0.25, 0.5, 0.75]).round(2).tolist()
        ratio, cpu_ratio = np.median(each / times[OURS], axis=0).round(3).tolist()
        found[name] = {
            "microseconds_per_image": median,
            "quartiles": [low, high],
            "cpu_microseconds_per_image": round(float(np.median(each[:, 1])), 2),
            "images_per_second": round(1e6 / median),
            "times_ours": ratio,
            "cpu_times_ours": cpu_ratio,
        }
        if name == WITH_WORKER:  # whose CPU time is not this process's
            del found[name]["cpu_microseconds_per_image"], found[name]["cpu_times_ours"]
    return found


def small_set(folder: Path, shards: int) -> Manifest:
    """A set of MEMORY_IMAGES tiny images in so many shards."""
    each = MEMORY_IMAGES // shards
    (folder / "train").mkdir(parents=True)
    written: list[Shard] = []
    image, segments = np.zeros((SMALL, SMALL, 3), np.uint8), np.zeros((SMALL, SMALL), np.uint8)
    for number in range(shards):
        samples = [
            Sample(key=f"{row:08d}", row=row, label=0, image=image, segments=segments, meta={})
            for row in range(number * each, (number + 1) * each)
        ]
        path = folder / "train" / f"train-{number:06d}.tar"
        written.append(write_shard(path, pack_shard(samples, "rgb")))
    split = Split(
        images=shards * each, rejected=0, shards=tuple(written), class_counts=(shards * each,)
    )
    return Manifest(
        classes=("n",),
        class_names=("n",),
        height=SMALL,
        width=SMALL,
        image_format="rgb",
        segments_dtype="uint8",
        max_superpixels=1,
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        splits={"train": split},
    )


def _status(name: str) -> float:
    """MiB of a kind of this process's memory, see proc(5)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return round(int(next(x for x in lines if x.startswith(name)).split()[1]) / 1024, 1)


def memory(folder: Path, shards: int) -> dict[str, Any]:
    """Time to open a set of so many shards, and this process's memory after each epoch."""
    manifest = small_set(folder, shards)
    stored = Stored(data=folder, manifest=manifest, device=torch.device("cpu"))
    before = {"anonymous": _status("RssAnon"), "files": len(list(Path("/proc/self/fd").iterdir()))}
    start = time.perf_counter()
    batches = ours(stored, CROP)
    seen = next(batches)
    opened = time.perf_counter() - start
    anonymous = []
    for epoch in range(MEMORY_EPOCHS):
        while seen < (epoch + 1) * manifest.splits["train"].images:
            seen += next(batches)
        anonymous.append(_status("RssAnon"))
    return {
        "shards": shards,
        "images": manifest.splits["train"].images,
        "seconds_to_first_batch": round(opened, 3),
        "anonymous_mib_before": before["anonymous"],
        "anonymous_mib_after_epochs": anonymous,
        "resident_mib": _status("VmRSS"),
        "open_files_before": before["files"],
        "open_files": len(list(Path("/proc/self/fd").iterdir())),
    }


def order_figures(window: int | None) -> dict[str, Any]:
    """What an epoch's order does to a set like ImageNet's, its shards' classes mixed (as
    jobs.preprocess writes them) or in the order of the classes.

    displacement: mean distance between an image's places in one epoch and in the next, over their
    number; a uniformly random order has a third. shards, classes: different ones in a batch.
    """
    shards, each = IMAGENET
    images = [each] * shards
    first, second = (epoch_order(images, 0, epoch, window).indices for epoch in (0, 1))
    inverse = [np.argsort(places) for places in (first, second)]
    moved = np.abs(inverse[0] - inverse[1]).mean() / len(first)
    mixed = np.random.default_rng(0).permutation(len(first)) * CLASSES // len(first)
    by_class = np.arange(len(first)) * CLASSES // len(first)
    batches = first[: len(first) // ORDER_BATCH * ORDER_BATCH].reshape(-1, ORDER_BATCH)[::20]

    def distinct(values: np.ndarray) -> float:
        return round(float(np.mean([len(np.unique(batch)) for batch in values])), 1)

    return {
        "window": window or shards,
        "displacement": round(float(moved), 3),
        "shards_in_batch": distinct(batches // each),
        "classes_in_batch": distinct(mixed[batches]),
        "classes_in_batch_if_shards_are_sorted": distinct(by_class[batches]),
    }


def alone(work: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a function in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(work, *arguments).result()


def rates(config: LoaderBenchConfig, device: torch.device) -> dict[str, Any]:
    """The figures of all sizes and formats, each printed as a table."""
    results = {}
    with TemporaryDirectory() as name:
        for side, images in ((64, config.images), (224, config.images // 4)):
            alone(make_sets, Path(name) / str(side), side, images)
            for image_format in ("rgb", "jpg"):
                data = Path(name) / str(side) / image_format
                stored = Stored(data=data, manifest=read_manifest(data), device=device)
                found = figures(measure(stored, config.rounds, config.seconds))
                title = f"{side} px, {'raw' if image_format == 'rgb' else 'JPEG'}"
                results[title] = found
                rows = [
                    [
                        loader,
                        f"{row['microseconds_per_image']:.1f}",
                        f"{row['images_per_second']:,}",
                        f"{row['times_ours']:.2f}",
                        f"{row.get('cpu_times_ours', math.nan):.2f}",
                    ]
                    for loader, row in found.items()
                ]
                print(
                    cli.table([title, "µs/image", "images/s", "x ours", "x ours, CPU"], rows),
                    flush=True,
                )
                print()
    return results


def main() -> None:
    config = cli.parse(LoaderBenchConfig, None, __doc__ or "")
    gpu = config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())
    if gpu and not torch.cuda.is_available():
        raise UserError("--device cuda: there is no CUDA device here; give cpu or auto")
    device = torch.device("cuda" if gpu else "cpu")
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    content: dict[str, Any] = {
        "hardware": {
            **hardware(),
            "device": str(device),
            "numpy": np.__version__,
            **{name: version(name) for name in PACKAGES},
        },
        "batch_size": BATCH,
        "rounds": config.rounds,
        "rates": rates(config, device),
    }
    if config.shards:
        content["memory"] = []
        for shards in (min(100, config.shards), config.shards):
            with TemporaryDirectory() as name:
                content["memory"].append(alone(memory, Path(name), shards))
        names = list(content["memory"][0])
        rows = [[name, *(str(part[name]) for part in content["memory"])] for name in names]
        print(cli.table(["memory", "few shards", "many"], rows))
        print()
    content["order"] = [order_figures(window) for window in (None, 128, 32, 8)]
    names = list(content["order"][0])
    rows = [[name, *(str(part[name]) for part in content["order"])] for name in names]
    print(cli.table(["order", "", "", "", ""], rows))
    config.output.mkdir(parents=True, exist_ok=True)
    path = config.output / f"{date.today().isoformat()}-loader.json"
    path.write_text(json.dumps(content, indent=1) + "\n")
    print(f"written to {path}")


if __name__ == "__main__":
    cli.run(main)
