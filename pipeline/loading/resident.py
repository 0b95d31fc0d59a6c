"""A train split that stays in the memory of the device that trains: read once, then batches are
gathered, cropped and flipped there. They are those of `Loader.train`, bit for bit."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from pipeline.loading.augmentation import Augmentation
from pipeline.loading.loader import (
    Batch,
    Decoded,
    Loader,
    Request,
    ahead,
    make_batch,
    on_device,
    training_requests,
)
from pipeline.loading.order import FIRST, Order, Position
from pipeline.shards.format import Manifest, split_of

FREE_SHARE = 0.5  # of a GPU's free memory that a split may take; the nets need some too
CHUNK = 512  # images that are read at once


def split_bytes(manifest: Manifest) -> int:
    """Return how many bytes the train split takes as pixels and superpixels."""
    pixels = manifest.height * manifest.width
    each = pixels * (3 + np.dtype(manifest.segments_dtype).itemsize)
    return each * split_of(manifest, "train").images


def fits(manifest: Manifest, device: torch.device) -> bool:
    """Return whether the device is a GPU with room for the train split."""
    if device.type != "cuda":
        return False
    free, _ = torch.cuda.mem_get_info(device)
    return split_bytes(manifest) <= FREE_SHARE * free


@dataclass(frozen=True)
class Resident:
    """The N images of a train split. images: uint8 [N, H, W, 3] and segments: uint8, or int16 with
    the bits of uint16, [N, H, W], on the device. labels, rows: int64 [N], on the host."""

    manifest: Manifest
    images: Tensor
    segments: Tensor
    labels: np.ndarray
    rows: np.ndarray

    @classmethod
    def read(cls, loader: Loader) -> Self:
        """Read the split onto the loader's device. Raises what `Loader.evaluation` raises."""
        manifest, device = loader.manifest, loader.device
        shape = (split_of(manifest, "train").images, manifest.height, manifest.width)
        dtype = torch.uint8 if manifest.segments_dtype == "uint8" else torch.int16
        images = torch.empty((*shape, 3), dtype=torch.uint8, device=device)
        segments = torch.empty(shape, dtype=dtype, device=device)
        labels, rows = np.empty(shape[0], np.int64), np.empty(shape[0], np.int64)
        first = 0
        for batch in loader.evaluation("train", CHUNK):
            part = slice(first, first + len(batch.labels))
            images[part] = batch.images.permute(0, 2, 3, 1)
            segments[part] = batch.segments.to(dtype)  # from 32768 on it wraps, and back in `_take`
            labels[part], rows[part] = batch.labels.cpu().numpy(), batch.rows.cpu().numpy()
            first = part.stop
        return cls(manifest, images, segments, labels, rows)

    def train(
        self,
        order: Order,
        augmentation: Augmentation,
        *,
        start: Position = FIRST,
        rank: int = 0,
        ranks: int = 1,
    ) -> Iterator[Batch]:
        """Yield the batches that `Loader.train` yields for the same arguments."""
        requests = training_requests(self.manifest, order, augmentation, start, rank, ranks)
        device = self.images.device
        if device.type == "cpu":
            return ahead(make_batch(self._take(request)) for request in requests)
        stream = torch.cuda.Stream(device)
        return ahead(on_device(self._taken(requests, stream), stream))

    def _taken(self, requests: Iterator[Request], stream: torch.cuda.Stream) -> Iterator[Decoded]:
        for request in requests:
            with torch.cuda.stream(stream):
                taken = self._take(request)
            yield taken

    def _take(self, request: Request) -> Decoded:
        """Gather the request's samples."""
        chosen = request.indices
        indices = torch.from_numpy(chosen).to(self.images.device)
        segments = self.segments[indices]
        if segments.dtype == torch.int16:
            segments = segments.view(torch.uint16)
        labels, rows = self.labels[chosen], self.rows[chosen]
        return Decoded(request, labels, rows, self.images[indices], segments)
