"""`python -m benchmarks.loader`: our loader beside others on the same shards, in one run.

At 64 and 224 px, raw and JPEG, every loader has one thread and all of them the same core. They take
turns for some rounds, so that drift of the machine hits all alike; figures are medians over rounds,
ratios medians of each round's ratio. All shuffle, crop (area 0.7 to 1, aspect up to 1.16 times the
image's) and flip images and superpixels together; images come out as uint8 [B, H, W, 3]. Ours and
the loop's superpixels come out as int64, as the nets index by them. Ours alone shuffles the whole
set, crops in fractions of a pixel and checks every sample.
"""

import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
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

from benchmarks.machine import hardware, make_shards, write_result
from jobs import cli
from pipeline.loading.augmentation import Augmentation, draw
from pipeline.loading.loader import Loader
from pipeline.loading.order import Order, Position
from pipeline.shards.format import Manifest, read_index, read_manifest
from pipeline.synthetic import SyntheticConfig

BATCH = 64
CROP = Augmentation()
OURS = "ours"
SHUFFLE = 1000  # samples that the streaming readers shuffle among
SETTLE = 8  # batches before each measurement: those that were made ahead during other loaders'
PAUSE = 0.05  # seconds after each, in which threads make the batches that they are ahead
PACKAGES = ("nvidia-dali-cuda130", "webdataset", "opencv-python-headless", "simplejpeg", "numba")

Batches = Iterator[int]  # each step makes a batch; the number of its images


@dataclass(frozen=True, kw_only=True)
class LoaderBenchConfig:
    """How much to measure, and where the result goes."""

    images: int = cli.option(2000, help="generated images at 64 px; a quarter of them at 224")
    rounds: int = cli.option(7, help="how often the loaders take turns")
    seconds: float = cli.option(0.2, help="how long a loader runs in its turn")
    output: Path = cli.option(Path("benchmarks/results"), help="folder for the dated JSON")


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A set of shards."""

    data: Path
    manifest: Manifest

    @property
    def paths(self) -> list[Path]:
        return [self.data / "train" / shard.name for shard in self.manifest.splits["train"].shards]

    @property
    def size(self) -> tuple[int, int]:
        return self.manifest.height, self.manifest.width


def make_sets(folder: Path, side: int, images: int) -> None:
    """Generated images at `side` pixels as raw and JPEG shards: folder/rgb and folder/jpg."""
    low = max(112, side)
    drawing = SyntheticConfig(
        train_images=images, val_images=0, min_side=low, max_side=low * 9 // 7
    )
    for kind in ("rgb", "jpg"):
        flags = {"image_size": side, "image_format": kind, "samples_per_shard": 250}
        make_shards(folder, drawing, kind, **flags)


def ours(stored: Stored) -> Batches:
    loader = Loader(stored.data, stored.manifest)
    batches = loader.train(Order(batch_size=BATCH), CROP)
    return (len(batch.labels) for batch in batches)


@pipeline_def
def _dali_graph(stored: Stored):  # type: ignore[no-untyped-def]
    """DALI's own reader; one operator crops, resizes and flips, the faster of its ways."""
    manifest = stored.manifest
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
        images = fn.decoders.image(images, output_type=types.RGB)
    else:
        images = fn.reshape(images, shape=[*stored.size, 3])
    segments = fn.reshape(segments, shape=[*stored.size, 1])
    start, end = fn.external_source(
        source=_regions(stored), num_outputs=2, batch=True, dtype=types.FLOAT, ndim=1
    )
    region = {"roi_start": start, "roi_end": end, "size": stored.size}
    images = fn.resize(images, interp_type=types.INTERP_LINEAR, antialias=False, **region)
    segments = fn.resize(segments, interp_type=types.INTERP_NN, **region)
    return images, segments, labels


def _regions(stored: Stored) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    step = 0
    while True:
        position = Position(step=step)
        drawn = draw(BATCH, 0, position, stored.size, stored.manifest.mean, CROP)
        yield drawn.start.astype(np.float32), drawn.end.astype(np.float32)
        step += 1


def dali(stored: Stored) -> Batches:
    graph = _dali_graph(
        stored=stored,
        batch_size=BATCH,
        num_threads=1,
        device_id=None,
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


def streamed(stored: Stored) -> Batches:
    """webdataset and torch's DataLoader, in this process; a worker would be slower on one core."""
    dataset = (
        webdataset.WebDataset(
            [str(path) for path in stored.paths],
            shardshuffle=100,
            select_files=lambda name: not name.endswith(("json", "row")),
            empty_check=False,
        )
        .repeat()
        .shuffle(SHUFFLE)
        .map(partial(_cropped, stored, Random(0)))
        .batched(BATCH, collation_fn=_collated)
    )
    loader = torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=0)
    return (len(tensors[2]) for tensors in loader)


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


def loop(stored: Stored) -> Batches:
    """A plain Python loop over memory maps and the index."""
    random = Random(0)
    for batch in _shuffled(_mapped(stored)):
        images = np.empty((BATCH, *stored.size, 3), np.uint8)
        segments = np.empty((BATCH, *stored.size), np.int64)
        labels = np.empty(BATCH, np.int64)
        for n, (image, labelled, label) in enumerate(batch):
            images[n], segments[n] = _crop(
                _pixels(stored, image), _labels(stored, labelled), random
            )
            labels[n] = int.from_bytes(label.tobytes(), "little")
        yield len([torch.from_numpy(array) for array in (images, segments, labels)][2])


def loaders(stored: Stored) -> dict[str, Batches]:
    return {
        OURS: ours(stored),
        "Python loop, OpenCV": loop(stored),
        "DALI's graph": dali(stored),
        "webdataset + DataLoader": streamed(stored),
    }


def measure(stored: Stored, rounds: int, seconds: float) -> dict[str, list[float]]:
    """Microseconds per image of each loader in each round."""
    running = loaders(stored)
    taken: dict[str, list[float]] = {name: [] for name in running}

    for _ in range(rounds):
        for name, batches in running.items():
            for _ in islice(batches, SETTLE):
                pass
            start, images = time.perf_counter(), 0
            while time.perf_counter() - start < seconds:
                images += next(batches)
            taken[name].append(1e6 * (time.perf_counter() - start) / images)
            time.sleep(PAUSE)
    return taken


def figures(taken: dict[str, list[float]]) -> dict[str, dict[str, Any]]:
    """Medians over the rounds, and the ratio to ours within each round."""
    results = {}
    for name, times in taken.items():
        median = round(float(np.median(times)), 2)
        results[name] = {
            "microseconds_per_image": median,
            "images_per_second": round(1e6 / median),
            "times_ours": round(float(np.median(np.array(times) / taken[OURS])), 3),
        }
    return results


def rates(config: LoaderBenchConfig) -> dict[str, Any]:
    """The figures of all sizes and formats, each printed as a table."""
    results = {}
    with TemporaryDirectory() as name:
        for side, images in ((64, config.images), (224, config.images // 4)):
            make_sets(Path(name) / str(side), side, images)
            for image_format in ("rgb", "jpg"):
                data = Path(name) / str(side) / image_format
                stored = Stored(data=data, manifest=read_manifest(data))
                title = f"{side} px, {'raw' if image_format == 'rgb' else 'JPEG'}"
                results[title] = figures(measure(stored, config.rounds, config.seconds))
                rows = [[loader, *map(str, row.values())] for loader, row in results[title].items()]
                headers = [title, "µs/image", "images/s", "x ours"]
                print(f"{cli.table(headers, rows)}\n", flush=True)
    return results


def main() -> None:
    config = cli.parse(LoaderBenchConfig, None, __doc__ or "")
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    content: dict[str, Any] = {
        "hardware": hardware() | {name: version(name) for name in PACKAGES},
        "batch_size": BATCH,
        "rounds": config.rounds,
        "rates": rates(config),
    }
    write_result(config.output, "loader", content)


if __name__ == "__main__":
    cli.run(main)
