"""Shards -> batches on the training device, a pure function of (seed, epoch, step). The chosen
samples are read out of the shards, JPEG files decoded by NVIDIA DALI, augmented on the device, and
made ahead of use in a thread."""

import itertools
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import simplejpeg
import torch
from torch import Tensor

from pipeline.ahead import run_ahead
from pipeline.errors import UserError
from pipeline.loading.augmentation import Augmentation, Draw, augment, draw
from pipeline.loading.cache import CacheConfig, ShardCache, check_window
from pipeline.loading.order import (
    AHEAD,
    FIRST,
    Order,
    Position,
    epoch_order,
    rank_range,
    step_range,
    steps_per_epoch,
)
from pipeline.loading.samples import Extents, RawBatch, Samples
from pipeline.shards.format import REMAKE, Manifest, split_of

CPU = torch.device("cpu")
THREADS = 1  # of DALI's own on the CPU; a training worker has one core
READERS = 4  # threads that read for a GPU, and DALI's own there


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One rank's share of a global batch. images: uint8 [B, 3, H, W], channels last in memory.
    segments: int64 [B, H, W]. labels, rows (of the ledger): int64 [B]. total: images in the global
    batch. offset: of this share's first image in it."""

    images: Tensor
    segments: Tensor
    labels: Tensor
    rows: Tensor
    total: int
    offset: int


@dataclass(frozen=True)
class Loader:
    """Loads the set of shards at location `data` (see pipeline/storage.py) onto a device. cache:
    where shards of a remote set are kept."""

    data: str | Path
    manifest: Manifest
    device: torch.device = CPU
    cache: CacheConfig = field(default_factory=CacheConfig)

    def train(
        self,
        order: Order,
        augmentation: Augmentation,
        *,
        start: Position = FIRST,
        rank: int = 0,
        ranks: int = 1,
    ) -> Iterator[Batch]:
        """Yield endless batches of the train split for `rank`, from `start` on. Every rank gets as
        many, and every sample comes once an epoch over all ranks. Raises UserError for shards that
        do not fit their manifest or index, fewer samples than ranks, a `start` that is no step of
        an epoch, and a cache that is too small."""
        check_window(self.data, self.manifest, self.cache.limit_bytes, order, ranks)
        with closing(ShardCache(self.data, self.manifest, "train", self.cache)) as cache:
            samples = Samples(self.manifest, "train", cache)
            if not cache.remote:
                for number in range(len(samples.shards)):
                    samples.open(number)
            requests = training_requests(
                self.manifest, order, augmentation, start, rank, ranks, samples.use_only
            )
            yield from ahead(
                _batches(samples, requests, -(-order.batch_size // ranks), self.device)
            )

    def evaluation(
        self, split: str, batch_size: int, first: int = 0, stop: int | None = None
    ) -> Iterator[Batch]:
        """Yield batches number first..stop-1 of the split cut in order, unaugmented, from the
        shards of the range alone. Raises ValueError for batches that the split does not have."""
        batches = -(-split_of(self.manifest, split).images // batch_size)
        stop = batches if stop is None else stop
        if not 0 <= first <= stop <= batches:
            raise ValueError(
                f"batches {first} to {stop} (exclusive) were asked for; split {split!r} has "
                f"{batches} of {batch_size} images."
            )
        with closing(ShardCache(self.data, self.manifest, split, self.cache)) as cache:
            samples = Samples(self.manifest, split, cache)
            requests = _evaluation_requests(samples, batch_size, first, stop)
            yield from ahead(_batches(samples, requests, batch_size, self.device))


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the next batch is to be. indices: int64 [B], of its samples in the split. drawn: None
    where nothing is augmented. total, offset: see `Batch`."""

    indices: np.ndarray
    drawn: Draw | None
    total: int
    offset: int


class Decoded(NamedTuple):
    """A request's samples, with images uint8 [B, H, W, 3] and segments as stored [B, H, W] on the
    device, labels and rows int64 [B] on the host."""

    request: Request
    labels: np.ndarray
    rows: np.ndarray
    images: Tensor
    segments: Tensor


def training_requests(
    manifest: Manifest,
    order: Order,
    augmentation: Augmentation,
    start: Position,
    rank: int,
    ranks: int,
    use_only: Callable[[Sequence[int], Sequence[int]], None] = lambda *_: None,
) -> Iterator[Request]:
    """Yield endless requests of the train split from `start` on. use_only: is called with the
    shards that the next requests need, and with those of the window after them."""
    split = split_of(manifest, "train")
    total, size = split.images, (manifest.height, manifest.width)
    steps = steps_per_epoch(total, order.batch_size, ranks)
    images = [shard.images for shard in split.shards]
    if not 0 <= start.step < steps:
        raise UserError(
            f"there is no step {start.step} to start from: an epoch of {total} images in batches "
            f"of {order.batch_size} has {steps} steps. The position is of another batch size or "
            "set."
        )
    first_step, following = start.step, epoch_order(images, order.seed, start.epoch, order.window)
    for epoch in itertools.count(start.epoch):
        now, following = following, epoch_order(images, order.seed, epoch + 1, order.window)
        windows = [*now.windows, following.windows[0]]
        in_use: list[int] = []
        for step in range(first_step, steps):
            first, stop = step_range(total, steps, step)
            needed = np.searchsorted(now.bounds, [first, stop - 1], side="right").tolist()
            if needed != in_use:
                in_use = needed
                shards = np.concatenate(windows[needed[0] : needed[1] + 1])
                use_only(shards.tolist(), windows[needed[1] + 1].tolist())
            position = Position(epoch=epoch, step=step)
            drawn = draw(stop - first, order.seed, position, size, manifest.mean, augmentation)
            low, high = rank_range(first, stop, rank, ranks)
            yield Request(
                indices=now.indices[low:high],
                drawn=drawn.part(low - first, high - first),
                total=stop - first,
                offset=low - first,
            )
        first_step = 0


def _evaluation_requests(
    samples: Samples, batch_size: int, first: int, stop: int
) -> Iterator[Request]:
    """Yield batches number first..stop-1; a batch's shards are fetched before those after them."""
    in_use: list[int] = []
    last = samples.shard_numbers(np.array([min(stop * batch_size, len(samples)) - 1]))[0]
    for number in range(first, stop):
        indices = np.arange(number * batch_size, min((number + 1) * batch_size, len(samples)))
        needed = np.unique(samples.shard_numbers(indices)).tolist()
        if needed != in_use:
            in_use = needed
            samples.use_only(needed, list(range(needed[-1] + 1, last + 1)))
        yield Request(indices=indices, drawn=None, total=len(indices), offset=0)


def ahead(batches: Iterator[Batch]) -> Iterator[Batch]:
    """Yield the same batches, AHEAD of them made in a thread while the caller works."""
    calls = itertools.repeat(batches)
    made = run_ahead(lambda each: next(each, None), calls, threads=1, depth=AHEAD + 1)
    for batch in made:
        if batch is None:
            return
        yield batch


def _batches(
    samples: Samples, requests: Iterator[Request], max_batch: int, device: torch.device
) -> Iterator[Batch]:
    """Yield the requested batches, complete in the device's memory."""
    stream = None if device.type == "cpu" else torch.cuda.Stream(device)
    if samples.manifest.image_format == "rgb":
        readers = 0 if stream is None else READERS
        decoded = _raw(samples, requests, device, stream, readers)
    else:
        decoded = _decoded(samples, requests, max_batch, device)
    if stream is not None:
        yield from on_device(decoded, stream)
        return
    size = (samples.manifest.height, samples.manifest.width)
    memory = _Memory((*size, 3), "uint8"), _Memory(size, "int64")
    for each in decoded:
        yield make_batch(each, memory)


def on_device(decoded: Iterator[Decoded], stream: torch.cuda.Stream) -> Iterator[Batch]:
    """Yield batches that are complete in a GPU's memory. stream: for the work on them."""
    consumer = torch.cuda.default_stream(stream.device)
    for each in decoded:
        with torch.cuda.stream(stream):
            batch = make_batch(each)
        stream.synchronize()  # this thread alone waits; then DALI may have its memory back
        for tensor in (batch.images, batch.segments, batch.labels, batch.rows):
            tensor.record_stream(consumer)  # whose kernels may outlive the tensor
        yield batch


def make_batch(decoded: Decoded, memory: "tuple[_Memory, _Memory] | None" = None) -> Batch:
    """Make the batch. memory: for images and segments on a CPU; torch keeps that of a GPU."""
    request, labels, rows, images, segments = decoded
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
        labels=torch.from_numpy(labels).to(images.device),
        rows=torch.from_numpy(rows).to(images.device),
        total=request.total,
        offset=request.offset,
    )


class _Memory:
    """Tensors [B, *shape] on the CPU, in memory of earlier batches that nobody uses any more: the
    system clears fresh memory first. Every tensor keeps a view of its array alive; a weak reference
    to the view tells when the array is free again."""

    def __init__(self, shape: tuple[int, ...], dtype: str) -> None:
        self.shape, self.dtype = shape, dtype
        self.arrays: list[np.ndarray] = []
        self.views: list[weakref.ref[np.ndarray]] = []

    def tensor(self, images: int) -> Tensor:
        """Return a tensor of `images` images with any content."""
        free = (n for n, view in enumerate(self.views) if view() is None)
        number = next(free, len(self.arrays))
        if number == len(self.arrays) or len(self.arrays[number]) < images:
            self.arrays[number : number + 1] = [np.empty((images, *self.shape), self.dtype)]
        view = self.arrays[number][:images]
        self.views[number : number + 1] = [weakref.ref(view)]
        return torch.from_numpy(view)


def _raw(
    samples: Samples,
    requests: Iterator[Request],
    device: torch.device = CPU,
    stream: torch.cuda.Stream | None = None,
    readers: int = 0,
) -> Iterator[Decoded]:
    """Yield raw pixels, which need no decoding. readers: threads that read ahead, or 0 for none.
    For a GPU they read into pinned memory, whence one copy on `stream` moves a batch."""
    pinned = device.type == "cuda"

    def read(each: tuple[Request, Extents]) -> tuple[Request, RawBatch]:
        return each[0], samples.read(each[1], pinned=pinned)

    # Shards are mapped here, in the thread in which `requests` releases those that are done with.
    extents = ((request, samples.extents(request.indices)) for request in requests)
    if readers:
        reads = run_ahead(read, extents, threads=readers, depth=readers + 1)
    else:
        reads = (read(each) for each in extents)
    with closing(reads):
        for request, raw in reads:
            with torch.cuda.stream(stream):  # None: no other than this thread's
                memory = torch.from_numpy(raw.memory).to(device, non_blocking=True)
            segments, images = memory.tensor_split([raw.segments.nbytes])
            shape, dtype = raw.segments.shape, getattr(torch, raw.segments.dtype.name)
            images, segments = images.view(*shape, 3), segments.view(dtype).view(shape)
            yield Decoded(request, raw.labels, raw.rows, images, segments)


def _decoded(
    samples: Samples, requests: Iterator[Request], max_batch: int, device: torch.device
) -> Iterator[Decoded]:
    """Yield samples that DALI has decoded on the device, up to `max_batch` at a time."""
    pending: deque[tuple[Request, RawBatch]] = deque()
    source = _read(samples, requests, pending)
    gpu = device.type == "cuda"
    graph = _graph(source, samples.manifest, gpu)(
        batch_size=max_batch,
        num_threads=READERS if gpu else THREADS,
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
                for request, raw in pending:
                    _check_images(samples, request, raw)
                raise UserError(f"DALI cannot decode a batch: {error}") from error
            request, raw = pending.popleft()
            if set(images.shape()) != {(samples.manifest.height, samples.manifest.width, 3)}:
                _check_images(samples, request, raw)
            tensors = (torch.from_dlpack(each.as_tensor()) for each in (images, segments))
            yield Decoded(request, raw.labels, raw.rows, *tensors)
    finally:
        source.close()  # or the shards stay mapped until the pipeline, a cycle, is collected


def _read(
    samples: Samples, requests: Iterator[Request], pending: deque[tuple[Request, RawBatch]]
) -> Generator[tuple[object, object], None, None]:
    """Yield what DALI is fed; it reads ahead, so each request and its samples wait in `pending`."""
    for request in requests:
        raw = samples.read(samples.extents(request.indices))
        pending.append((request, raw))
        yield raw.images, raw.segments


def _graph(source: Iterator[Any], manifest: Manifest, gpu: bool) -> Any:
    """Return the function that makes DALI's pipeline from its options."""
    from nvidia.dali import fn, pipeline_def, types  # here: raw pixels for a CPU need none of it

    segments_type = types.UINT8 if manifest.segments_dtype == "uint8" else types.UINT16

    @pipeline_def
    def graph():  # type: ignore[no-untyped-def]
        files, segments = fn.external_source(
            source=source,
            num_outputs=2,
            batch=True,
            dtype=[types.UINT8, segments_type],
            ndim=[1, 2],
        )
        images = fn.decoders.image(
            files,
            device="mixed" if gpu else "cpu",
            output_type=types.RGB,
            adjust_orientation=False,
        )
        return images, segments.gpu() if gpu else segments

    return graph


def _check_images(samples: Samples, request: Request, raw: RawBatch) -> None:
    """Raise UserError for the first JPEG file that is damaged or of another size."""
    size = (samples.manifest.height, samples.manifest.width, 3)
    for index, file in zip(request.indices, raw.images, strict=True):
        try:
            actual = simplejpeg.decode_jpeg(file).shape
        except ValueError as error:
            actual = error
        if actual != size:
            path, sample = samples.locate_sample(int(index))
            raise UserError(
                f"the image of sample {sample} of {path} is not a JPEG of {size[0]} x {size[1]} "
                f"pixels ({actual}): the shard is damaged or of another set. {REMAKE}"
            )
