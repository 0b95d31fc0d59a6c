"""Shards -> batches, by NVIDIA DALI on the CPU or a GPU.

What a batch holds and how it is cropped is a pure function of (seed, epoch, step): an order of
the whole split, cut into steps and the steps into ranks. So a position is two integers, any
number of ranks sees the same global batches, and nothing has to be saved to resume. DALI reads
the chosen samples out of memory-mapped shards, decodes, crops, flips and moves them.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types
from torch import Tensor

from pipeline.shards import Card, DataError, read_index, shard_paths, split_of

THREADS = 1  # of DALI's own on the CPU; a training worker has one core


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Random crop and flip, the same for an image and its superpixels.

    min_area: the smallest share of the image that a crop keeps, in (0, 1]. max_aspect: the
    largest factor by which a crop's aspect differs from the image's, at least 1. flip: whether
    half of the crops are mirrored left to right.
    """

    min_area: float = 0.7
    max_aspect: float = 1.16
    flip: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.min_area <= 1 or self.max_aspect < 1:
            raise ValueError(
                f"min_area {self.min_area} must lie in (0, 1], "
                f"max_aspect {self.max_aspect} be at least 1"
            )


@dataclass(frozen=True, kw_only=True)
class Position:
    """The next batch: `step` of `epoch`, both from 0."""

    epoch: int = 0
    step: int = 0


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One rank's share of a global batch, on the loader's device.

    images: uint8 [B, 3, H, W]. segments: int64 [B, H, W], superpixel labels (not every label
    survives a crop). labels: int64 [B]. index: int64 [B], the images' rows in the ledger.
    total: number of images in the global batch, over all ranks. offset: place of this share's
    first image in it.
    """

    images: Tensor
    segments: Tensor
    labels: Tensor
    index: Tensor
    total: int
    offset: int


def steps_per_epoch(samples: int, batch_size: int, ranks: int) -> int:
    """Global batches in an epoch: as many as needed for none to exceed `batch_size`.

    Raises DataError where some rank would get an empty batch and hang the others.
    """
    steps = -(-samples // max(1, batch_size))
    if steps == 0 or samples // steps < ranks:
        raise DataError(
            f"{samples} images in batches of {batch_size} cannot give each of {ranks} workers an "
            "image in every step; use fewer workers, or a larger batch size or set."
        )
    return steps


def step_range(samples: int, steps: int, step: int) -> tuple[int, int]:
    """First and past-last place in the epoch's order of global batch `step`.

    Batches differ by one image at most and together hold every place exactly once, so there is
    neither a remainder nor padding.
    """
    return samples * step // steps, samples * (step + 1) // steps


def rank_range(first: int, stop: int, rank: int, ranks: int) -> tuple[int, int]:
    """The part of places first..stop-1 that falls to `rank`, even to one image."""
    size = stop - first
    return first + size * rank // ranks, first + size * (rank + 1) // ranks


def epoch_order(samples: int, seed: int, epoch: int) -> np.ndarray:
    """A uniformly random order of all samples: int64 [samples]."""
    return np.random.default_rng([seed, epoch]).permutation(samples)


def crop_regions(
    total: int, seed: int, position: Position, size: tuple[int, int], augmentation: Augmentation
) -> tuple[np.ndarray, np.ndarray]:
    """Start and end of the crop of each image of a global batch: two float32 [total, 2], (y, x)
    in pixels of an image of `size` (H, W). start x > end x means: mirrored."""
    rng = np.random.default_rng([seed, position.epoch, position.step])
    area, aspect, place_y, place_x, mirror = rng.random((5, total))
    area = augmentation.min_area + (1 - augmentation.min_area) * area
    stretch = np.exp(np.log(augmentation.max_aspect) * (2 * aspect - 1))
    shares = np.minimum(np.sqrt([area / stretch, area * stretch]), 1).T
    extent = shares * np.array(size)
    start = (np.array(size) - extent) * np.stack([place_y, place_x], axis=1)
    end = start + extent
    mirrored = (mirror < 0.5) & augmentation.flip
    start[mirrored, 1], end[mirrored, 1] = end[mirrored, 1], start[mirrored, 1]
    return start.astype(np.float32), end.astype(np.float32)


class Samples:
    """Random access to a split's samples: memory maps of the shards and their index.

    A sample's place is its position in the split, shards in order.
    """

    def __init__(self, data: Path, card: Card, split: str) -> None:
        self.card = card
        self.maps: list[np.ndarray] = []
        tables = []
        for number, path in enumerate(shard_paths(data, card, split)):
            index = read_index(path)
            names = (card.image_format, "seg", "cls", "row")
            try:
                extents = [[number, *(x for n in names for x in m[n])] for m in index]
            except KeyError as error:
                raise DataError(
                    f"{path.with_suffix('.idx')} names no {error} member for some sample; the "
                    "shard is foreign or damaged: delete it and run jobs.preprocess again."
                ) from error
            tables.append(np.array(extents, np.int64).reshape(-1, 9))
            self.maps.append(
                np.memmap(path, np.uint8, mode="r") if index else np.zeros(0, np.uint8)
            )
        self.table = np.concatenate(tables) if tables else np.zeros((0, 9), np.int64)
        if len(self.table) != split_of(card, split).images:
            raise DataError(
                f"the indexes of split {split!r} hold {len(self.table)} samples, dataset.json "
                f"says {split_of(card, split).images}; run jobs.preprocess again."
            )

    def __len__(self) -> int:
        return len(self.table)

    def _bytes(self, place: int, member: int) -> np.ndarray:
        shard, offset, size = self.table[place, [0, 1 + 2 * member, 2 + 2 * member]]
        return self.maps[shard][offset : offset + size]

    def encoded_images(self, places: np.ndarray) -> list[np.ndarray]:
        """The images' stored bytes: JPEG files uint8 [n], or pixels uint8 [H, W, 3]."""
        files = [self._bytes(place, 0) for place in places]
        if self.card.image_format == "jpg":
            return files
        return [file.reshape(self.card.height, self.card.width, 3) for file in files]

    def segments(self, places: np.ndarray) -> list[np.ndarray]:
        """The superpixel maps, uint8 or uint16 [H, W, 1]."""
        shape, dtype = (self.card.height, self.card.width, 1), self.card.segments_dtype
        return [self._bytes(place, 1).view(dtype).reshape(shape) for place in places]

    def labels_and_rows(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Class indices and ledger rows, int64 [len(places)] each."""
        labels = np.concatenate([self._bytes(place, 2) for place in places]).view("<i4")
        rows = np.concatenate([self._bytes(place, 3) for place in places]).view("<i8")
        return labels.astype(np.int64), rows.astype(np.int64)


@dataclass(frozen=True, kw_only=True)
class _Request:
    """What the graph is to make next; crops are None where there is no augmentation."""

    places: np.ndarray
    starts: np.ndarray | None
    ends: np.ndarray | None
    total: int
    offset: int


@pipeline_def
def _graph(source, card: Card, augment: bool, gpu: bool):  # type: ignore[no-untyped-def]
    segments_type = types.UINT8 if card.segments_dtype == "uint8" else types.UINT16
    jpeg = card.image_format == "jpg"
    outputs = fn.external_source(
        source=source,
        num_outputs=4 if augment else 2,
        batch=True,
        dtype=[types.UINT8, segments_type, types.FLOAT, types.FLOAT][: 4 if augment else 2],
        ndim=[1 if jpeg else 3, 3, 1, 1][: 4 if augment else 2],
        layout=["" if jpeg else "HWC", "HWC", "", ""][: 4 if augment else 2],
    )
    images, segments = outputs[:2]
    if jpeg:
        images = fn.decoders.image(
            images,
            device="mixed" if gpu else "cpu",
            output_type=types.RGB,
            adjust_orientation=False,
        )
    elif gpu:
        images = images.gpu()
    if gpu:
        segments = segments.gpu()
    if augment:
        region = {"size": [card.height, card.width], "roi_start": outputs[2], "roi_end": outputs[3]}
        images = fn.resize(images, interp_type=types.INTERP_LINEAR, antialias=False, **region)
        segments = fn.resize(segments, interp_type=types.INTERP_NN, **region)
    return fn.transpose(images, perm=[2, 0, 1]), fn.cast(segments, dtype=types.INT64)


def _run(
    samples: Samples,
    requests: Iterator[_Request],
    max_batch: int,
    augment: bool,
    device: torch.device,
) -> Iterator[Batch]:
    pending: deque[tuple[np.ndarray, np.ndarray, int, int]] = deque()

    def source() -> tuple[object, ...]:
        request = next(requests)  # StopIteration ends the pipeline
        labels_and_rows = samples.labels_and_rows(request.places)
        pending.append((*labels_and_rows, request.total, request.offset))
        arrays = (samples.encoded_images(request.places), samples.segments(request.places))
        return (*arrays, request.starts, request.ends) if augment else arrays

    gpu = device.type == "cuda"
    graph = _graph(
        source=source,
        card=samples.card,
        augment=augment,
        gpu=gpu,
        batch_size=max_batch,
        num_threads=THREADS,
        device_id=(device.index or 0) if gpu else None,
        prefetch_queue_depth=2,
        exec_dynamic=True,  # outputs own their memory, so tensors need no copy
    )
    graph.build()
    while True:
        try:
            images, segments = graph.run()
        except StopIteration:
            return
        labels, rows, total, offset = pending.popleft()
        yield Batch(
            images=torch.from_dlpack(images.as_tensor()),
            segments=torch.from_dlpack(segments.as_tensor()).squeeze(-1),
            labels=torch.from_numpy(labels).to(device, non_blocking=True),
            index=torch.from_numpy(rows).to(device, non_blocking=True),
            total=total,
            offset=offset,
        )


def train_batches(
    data: Path,
    card: Card,
    *,
    batch_size: int,
    rank: int,
    ranks: int,
    seed: int,
    start: Position,
    augmentation: Augmentation,
    device: torch.device,
) -> Iterator[Batch]:
    """Endless batches of the train split for `rank`, from `start` on, in the order of positions.

    batch_size: images per step over all ranks, at most (see `step_range`). Every rank gets the
    same number of batches, and every sample comes exactly once an epoch over all ranks, in an
    order and with crops that depend on (seed, epoch, step) alone. Raises DataError for shards
    that do not fit their card or index, and for fewer samples than ranks.
    """
    samples = Samples(data, card, "train")
    steps = steps_per_epoch(len(samples), batch_size, ranks)

    def requests() -> Iterator[_Request]:
        epoch, first_step = start.epoch, start.step
        while True:
            order = epoch_order(len(samples), seed, epoch)
            for step in range(first_step, steps):
                first, stop = step_range(len(samples), steps, step)
                position = Position(epoch=epoch, step=step)
                size = (card.height, card.width)
                starts, ends = crop_regions(stop - first, seed, position, size, augmentation)
                low, high = rank_range(first, stop, rank, ranks)
                part = slice(low - first, high - first)
                yield _Request(
                    places=order[low:high],
                    starts=starts[part],
                    ends=ends[part],
                    total=stop - first,
                    offset=low - first,
                )
            epoch, first_step = epoch + 1, 0

    yield from _run(samples, requests(), -(-batch_size // ranks), True, device)


def evaluation_batches(
    data: Path,
    card: Card,
    split: str,
    *,
    batch_size: int,
    first: int,
    stop: int,
    device: torch.device,
) -> Iterator[Batch]:
    """Batches number first..stop-1 of the split cut in order, unaugmented.

    A batch is the same whatever range it is asked for in, so any sharding computes the same.
    """
    samples = Samples(data, card, split)

    def requests() -> Iterator[_Request]:
        for number in range(first, stop):
            places = np.arange(number * batch_size, min((number + 1) * batch_size, len(samples)))
            yield _Request(places=places, starts=None, ends=None, total=len(places), offset=0)

    yield from _run(samples, requests(), batch_size, False, device)
