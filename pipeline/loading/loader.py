"""Shards -> batches on the training device.

What a batch holds and how it is augmented is a pure function of (seed, epoch, step), see
order.py and augmentation.py. Here the chosen samples are read out of the
shards, decoded and moved by NVIDIA DALI where there is something to decode or to move, augmented
on the device, and made ahead of use in a thread.
"""

import weakref
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import simplejpeg
import torch
from nvidia.dali import fn, pipeline_def, types
from torch import Tensor

from pipeline.errors import UserError
from pipeline.loading.augmentation import Augmentation, Draw, augment, draw
from pipeline.loading.cache import DEFAULT_LIMIT, GIB, ShardCache, check_window, default_folder
from pipeline.loading.order import (
    AHEAD,
    Position,
    epoch_order,
    rank_range,
    step_range,
    steps_per_epoch,
)
from pipeline.loading.samples import Samples, Stored
from pipeline.shards.format import Manifest, split_of

THREADS = 1  # of DALI's own on the CPU; a training worker has one core


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One rank's share of a global batch, on the loader's device.

    images: uint8 [B, 3, H, W], channels last in memory, as convolutions want them. segments:
    int64 [B, H, W], superpixel labels (not every label survives a crop). labels: int64 [B].
    index: int64 [B], the images' rows in the ledger. total: number of images in the global batch,
    over all ranks. offset: place of this share's first image in it.
    """

    images: Tensor
    segments: Tensor
    labels: Tensor
    index: Tensor
    total: int
    offset: int


@dataclass(frozen=True, kw_only=True)
class _Request:
    """What the next batch is to be; drawn is None where there is no augmentation."""

    places: np.ndarray
    drawn: Draw | None
    total: int
    offset: int


@pipeline_def
def _graph(source, manifest: Manifest, gpu: bool):  # type: ignore[no-untyped-def]
    jpeg = manifest.image_format == "jpg"
    segments_type = types.UINT8 if manifest.segments_dtype == "uint8" else types.UINT16
    images, segments = fn.external_source(
        source=source,
        num_outputs=2,
        batch=True,
        dtype=[types.UINT8, segments_type],
        ndim=[1 if jpeg else 3, 2],
    )
    if jpeg:
        images = fn.decoders.image(
            images,
            device="mixed" if gpu else "cpu",
            output_type=types.RGB,
            adjust_orientation=False,
        )
    elif gpu:
        images = images.gpu()
    return images, segments.gpu() if gpu else segments


def _read(
    samples: Samples, requests: Iterator[_Request], pending: deque[tuple[_Request, Stored]]
) -> Generator[tuple[object, object], None, None]:
    """What DALI is fed; each request with its samples is left in `pending` too."""
    for request in requests:
        stored = samples.read(request.places)
        pending.append((request, stored))
        yield stored.images, stored.segments


def _decoded(
    samples: Samples, requests: Iterator[_Request], max_batch: int, device: torch.device
) -> Iterator[tuple[_Request, Stored, Tensor, Tensor]]:
    """Each request with its samples and, by DALI, their images uint8 [B, H, W, 3] and segments
    as stored [B, H, W] on the device."""
    pending: deque[tuple[_Request, Stored]] = deque()
    source = _read(samples, requests, pending)
    gpu = device.type == "cuda"
    graph = _graph(
        source=source,
        manifest=samples.manifest,
        gpu=gpu,
        batch_size=max_batch,
        num_threads=THREADS,
        device_id=(device.index or 0) if gpu else None,
        prefetch_queue_depth=2,
        exec_dynamic=True,  # outputs own their memory, so tensors need no copy
    )
    graph.build()
    try:
        while True:
            try:
                images, segments = graph.run()
            except StopIteration:
                return
            except RuntimeError as error:
                for request, stored in pending:
                    _check_images(samples, request, stored)
                raise UserError(f"DALI cannot decode a batch: {error}") from error
            request, stored = pending.popleft()
            if set(images.shape()) != {(samples.manifest.height, samples.manifest.width, 3)}:
                _check_images(samples, request, stored)
            yield (
                request,
                stored,
                torch.from_dlpack(images.as_tensor()),
                torch.from_dlpack(segments.as_tensor()),
            )
    finally:
        source.close()  # or the shards stay mapped until the pipeline, a cycle, is collected


def _check_images(samples: Samples, request: _Request, stored: Stored) -> None:
    """Raise UserError for the first JPEG file that is damaged or of another size."""
    size = (samples.manifest.height, samples.manifest.width, 3)
    for place, file in zip(request.places, stored.images, strict=True):
        try:
            found = simplejpeg.decode_jpeg(file).shape if file.ndim == 1 else file.shape
        except ValueError as error:
            found = error
        if found != size:
            path, sample = samples.locate_sample(int(place))
            raise UserError(
                f"the image of sample {sample} of {path} is not a JPEG of {size[0]} x {size[1]} "
                f"pixels ({found}): the shard is damaged or of another set. Delete it and run "
                "jobs.preprocess again."
            )


class _Memory:
    """Tensors [B, *shape] on the CPU, in memory that was used before and that no tensor refers to
    any more: new pages can cost more than what is written into them."""

    def __init__(self, shape: tuple[int, ...], dtype: str) -> None:
        self.shape, self.dtype = shape, dtype
        self.arrays: list[np.ndarray] = []
        self.views: list[weakref.ref[np.ndarray]] = []  # of each, what its tensors keep alive

    def tensor(self, images: int) -> Tensor:
        """A tensor of `images` images with any content."""
        place = next((n for n, view in enumerate(self.views) if view() is None), len(self.arrays))
        if place == len(self.arrays) or len(self.arrays[place]) < images:
            self.arrays[place : place + 1] = [np.empty((images, *self.shape), self.dtype)]
        view = self.arrays[place][:images]
        self.views[place : place + 1] = [weakref.ref(view)]
        return torch.from_numpy(view)


def _raw(
    samples: Samples, requests: Iterator[_Request]
) -> Iterator[tuple[_Request, Stored, Tensor, Tensor]]:
    """As `_decoded`, for raw pixels on a CPU, which need neither decoding nor moving."""
    for request in requests:
        stored = samples.read(request.places)
        assert isinstance(stored.images, np.ndarray)
        yield request, stored, torch.from_numpy(stored.images), torch.from_numpy(stored.segments)


def _batch(
    request: _Request,
    stored: Stored,
    images: Tensor,
    segments: Tensor,
    memory: tuple[_Memory, _Memory] | None = None,
) -> Batch:
    """memory: for images and segments on a CPU; torch itself keeps that of a GPU."""
    if request.drawn is not None:
        count, out = len(images), None
        if memory is not None:
            out = memory[0].tensor(count), memory[1].tensor(count)
        images, segments = augment(images, segments, request.drawn, out)
    elif memory is not None:
        segments = memory[1].tensor(len(segments)).copy_(segments)
    else:  # copies, since DALI takes its memory back
        images, segments = images.clone(), segments.to(torch.int64)
    return Batch(
        images=images.permute(0, 3, 1, 2),
        segments=segments,
        labels=torch.from_numpy(stored.labels).to(images.device),
        index=torch.from_numpy(stored.rows).to(images.device),
        total=request.total,
        offset=request.offset,
    )


def _batches(
    samples: Samples, requests: Iterator[_Request], max_batch: int, device: torch.device
) -> Iterator[Batch]:
    """The requested batches, complete in the device's memory."""
    if device.type == "cpu":
        size = (samples.manifest.height, samples.manifest.width)
        memory = _Memory((*size, 3), "uint8"), _Memory(size, "int64")
        raw = samples.manifest.image_format == "rgb"
        decoded = _raw(samples, requests) if raw else _decoded(samples, requests, max_batch, device)
        for parts in decoded:
            yield _batch(*parts, memory)
        return
    stream, consumer = torch.cuda.Stream(device), torch.cuda.default_stream(device)
    for parts in _decoded(samples, requests, max_batch, device):
        with torch.cuda.stream(stream):
            batch = _batch(*parts)
        stream.synchronize()  # this thread alone waits; then DALI may have its memory back
        for tensor in (batch.images, batch.segments, batch.labels, batch.index):
            tensor.record_stream(consumer)  # whose kernels may outlive the tensor
        yield batch


def _ahead(batches: Iterator[Batch]) -> Iterator[Batch]:
    """The same batches, made in a thread while the caller works on those before."""
    thread = ThreadPoolExecutor(1, thread_name_prefix="loader")
    try:
        ready: deque[Future[Batch | None]] = deque()
        for _ in range(AHEAD):
            ready.append(thread.submit(next, batches, None))
        while (batch := ready.popleft().result()) is not None:
            ready.append(thread.submit(next, batches, None))
            yield batch
    finally:
        thread.shutdown(cancel_futures=True)


def _training_requests(
    samples: Samples,
    *,
    batch_size: int,
    rank: int,
    ranks: int,
    seed: int,
    start: Position,
    window: int | None,
    augmentation: Augmentation,
) -> Iterator[_Request]:
    """Endless requests from `start` on; a window's shards are asked for one window ahead."""
    manifest, total = samples.manifest, len(samples)
    steps = steps_per_epoch(total, batch_size, ranks)
    images = [shard.images for shard in samples.shards]
    if not 0 <= start.step < steps:
        raise UserError(
            f"there is no step {start.step} to start from: an epoch of {total} images in batches "
            f"of {batch_size} has {steps} steps. The position is of another batch size or set."
        )
    epoch, first_step = start.epoch, start.step
    order = epoch_order(images, seed, epoch, window)
    while True:
        following = epoch_order(images, seed, epoch + 1, window)
        windows = [*order.windows, following.windows[0]]
        held: list[int] = []
        for step in range(first_step, steps):
            first, stop = step_range(total, steps, step)
            needed = np.searchsorted(order.bounds, [first, stop - 1], side="right").tolist()
            if needed != held:
                held = needed
                now = np.concatenate(windows[needed[0] : needed[1] + 1])
                samples.hold(now.tolist(), windows[needed[1] + 1].tolist())
            position = Position(epoch=epoch, step=step)
            size = (manifest.height, manifest.width)
            drawn = draw(stop - first, seed, position, size, manifest.mean, augmentation)
            low, high = rank_range(first, stop, rank, ranks)
            yield _Request(
                places=order.places[low:high],
                drawn=drawn.part(low - first, high - first),
                total=stop - first,
                offset=low - first,
            )
        epoch, first_step, order = epoch + 1, 0, following


def _evaluation_requests(
    samples: Samples, batch_size: int, first: int, stop: int
) -> Iterator[_Request]:
    """Batches number first..stop-1; a batch's shards are asked for, and then those after them."""
    held: list[int] = []
    last = samples.shard_numbers(np.array([min(stop * batch_size, len(samples)) - 1]))[0]
    for number in range(first, stop):
        places = np.arange(number * batch_size, min((number + 1) * batch_size, len(samples)))
        needed = np.unique(samples.shard_numbers(places)).tolist()
        if needed != held:
            held = needed
            samples.hold(needed, list(range(needed[-1] + 1, last + 1)))
        yield _Request(places=places, drawn=None, total=len(places), offset=0)


def train_batches(
    data: str | Path,
    manifest: Manifest,
    *,
    batch_size: int,
    rank: int,
    ranks: int,
    seed: int,
    start: Position,
    augmentation: Augmentation,
    device: torch.device,
    window: int | None = None,
    cache_folder: Path | None = None,
    cache_bytes: int = round(DEFAULT_LIMIT * GIB),
) -> Iterator[Batch]:
    """Endless batches of the train split for `rank`, from `start` on, in the order of positions.

    data: place of the set, see pipeline/storage.py; shards of a remote one are kept within
    `cache_bytes` in `cache_folder`. batch_size: images per step over all ranks, at most (see
    `step_range`). window: how many shards are shuffled together (see `epoch_order`).
    Every rank gets the same number of batches, and every sample comes exactly once an epoch over
    all ranks, in an order and with an augmentation that depend on (seed, window, epoch, step)
    alone. Raises UserError for shards that do not fit their manifest or index, before the first
    batch where the set is local, for fewer samples than ranks, for a `start` that is no step of an
    epoch, and for a cache that cannot hold the shards of every batch.
    """
    check_window(data, manifest, cache_bytes, window, batch_size, ranks)
    with closing(
        ShardCache(data, manifest, "train", cache_folder or default_folder(), cache_bytes)
    ) as cache:
        samples = Samples(manifest, "train", cache)
        if not cache.remote:
            for number in range(len(samples.shards)):
                samples.open(number)
        requests = _training_requests(
            samples,
            batch_size=batch_size,
            rank=rank,
            ranks=ranks,
            seed=seed,
            start=start,
            window=window,
            augmentation=augmentation,
        )
        yield from _ahead(_batches(samples, requests, -(-batch_size // ranks), device))


def evaluation_batches(
    data: str | Path,
    manifest: Manifest,
    split: str,
    *,
    batch_size: int,
    first: int,
    stop: int,
    device: torch.device,
    cache_folder: Path | None = None,
    cache_bytes: int = round(DEFAULT_LIMIT * GIB),
) -> Iterator[Batch]:
    """Batches number first..stop-1 of the split cut in order, unaugmented.

    A batch is the same whatever range it is asked for in, so any sharding computes the same. Only
    the shards of the range are opened. data, cache_folder, cache_bytes: as in `train_batches`.
    Raises ValueError for batches that the split does not have.
    """
    batches = -(-split_of(manifest, split).images // batch_size)
    if not 0 <= first <= stop <= batches:
        raise ValueError(
            f"batches {first} to {stop} (exclusive) were asked for; split {split!r} has {batches} "
            f"of {batch_size} images."
        )
    with closing(
        ShardCache(data, manifest, split, cache_folder or default_folder(), cache_bytes)
    ) as cache:
        samples = Samples(manifest, split, cache)
        requests = _evaluation_requests(samples, batch_size, first, stop)
        yield from _ahead(_batches(samples, requests, batch_size, device))
