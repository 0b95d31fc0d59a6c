"""Random access to a split's stored samples: memory maps of its shards, and where samples lie. The
index is not trusted. Its entries must tile the shard exactly as the format says, those of the first
and last sample must fit the shard's headers, and every sample is checked when it is read."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from pipeline.errors import UserError
from pipeline.loading.cache import ShardCache
from pipeline.shards.format import (
    REMAKE,
    TAIL,
    Index,
    Manifest,
    Shard,
    extensions,
    index_shard,
    read_index,
    sha256_file,
    split_of,
)
from pipeline.tar import BLOCK, RECORD, octal, padded, parse_header

JPEG_END = b"\xff\xd9"  # the marker that ends every JPEG file


@dataclass(frozen=True, kw_only=True)
class Extents:
    """Where samples lie in memory. indices: int64 [B]. addresses: int64 [B], of the images, and
    sizes: int32 [B], theirs. maps: the shards that hold them, mapped for as long as this lives;
    numbers: int64 [B], the index of each sample's in `maps`."""

    indices: np.ndarray
    addresses: np.ndarray
    sizes: np.ndarray
    maps: list[np.ndarray]
    numbers: np.ndarray


@dataclass(frozen=True, kw_only=True)
class RawBatch:
    """Samples as they lie in the shards. memory: uint8 [n], the segments and after them, where they
    are pixels, the images; both are views of it. images: uint8 [B, H, W, 3], or JPEG files uint8
    [n]. segments: uint8 or uint16 [B, H, W]. labels, rows: int64 [B]."""

    memory: np.ndarray
    images: np.ndarray | list[np.ndarray]
    segments: np.ndarray
    labels: np.ndarray
    rows: np.ndarray


def _bad_index(path: Path, reason: str) -> UserError:
    return UserError(
        f"{path.with_suffix('.idx')} does not fit {path.name}: {reason}. It is stale or of another "
        "shard, and wrong bytes would be read as images. Delete both and preprocess again."
    )


def _check_layout(path: Path, index: Index, shard: Shard, manifest: Manifest) -> None:
    if len(index.offsets) != shard.images:
        raise _bad_index(
            path, f"it names {len(index.offsets)} samples, dataset.json says {shard.images}"
        )
    pixels = manifest.height * manifest.width
    expected = {"seg": pixels * np.dtype(manifest.segments_dtype).itemsize, "cls": 4, "row": 8}
    if manifest.image_format == "rgb":
        expected["rgb"] = 3 * pixels
    for column, name in enumerate(extensions(manifest)):
        wrong = np.flatnonzero(index.sizes[:, column] != expected.get(name, index.sizes[:, column]))
        if len(wrong):
            raise _bad_index(
                path,
                f"{name} of sample {wrong[0]} has {index.sizes[wrong[0], column]} bytes, which "
                f"must be {expected[name]} at {manifest.height} x {manifest.width} pixels",
            )
    ends = (index.offsets + padded(index.sizes)).ravel()
    wrong = np.flatnonzero(index.offsets.ravel() != np.concatenate([[0], ends[:-1]]) + BLOCK)
    if len(wrong):
        sample = wrong[0] // len(extensions(manifest))
        raise _bad_index(path, f"sample {sample} does not begin where the one before it ends")
    end = int(ends[-1]) if len(ends) else 0
    records = -(-(end + 2 * BLOCK) // RECORD) * RECORD
    if records != shard.bytes:
        raise _bad_index(path, f"its samples end at {end} of {shard.bytes} bytes")


def _check_headers(path: Path, content: np.ndarray, index: Index, sample: int) -> None:
    """Check a sample's index entries against the tar headers in the shard's bytes, uint8 [n]."""
    entries = zip(
        index.offsets[sample].tolist(),
        index.sizes[sample].tolist(),
        index.names[sample],
        strict=True,
    )
    for offset, size, name in entries:
        try:
            header = parse_header(content[offset - BLOCK : offset].tobytes())
        except ValueError as error:
            raise _bad_index(path, f"{name} is not at byte {offset} ({error})") from error
        if (header.name, header.size) != (name, size):
            raise _bad_index(
                path,
                f"it says {name} of {size} bytes at byte {offset}, the shard has {header.name} of "
                f"{header.size} bytes",
            )


def verify_shard(path: Path, shard: Shard) -> None:
    """Check every byte of a local shard against its SHA-256, and every entry of its index. Raises
    UserError. `Samples.open` checks the rest."""
    sha256 = sha256_file(path)
    if sha256 != shard.sha256:
        raise UserError(
            f"{path} has SHA-256 {sha256}, dataset.json says {shard.sha256}: it was damaged or "
            f"replaced. {REMAKE}"
        )
    if index_shard(path) != path.with_suffix(".idx").read_bytes():
        raise _bad_index(path, "its entries are not those of the shard's headers")


def _files(extents: Extents) -> list[np.ndarray]:
    """Return the bytes of each image, views of the shards."""
    begins = np.array([each.ctypes.data for each in extents.maps], np.int64)
    offsets = (extents.addresses - begins[extents.numbers]).tolist()
    parts = zip(extents.numbers.tolist(), offsets, extents.sizes.tolist(), strict=True)
    return [extents.maps[number][offset : offset + size] for number, offset, size in parts]


class Samples:
    """The samples of a split. A sample's index is its number in the split, shards in order. Holds
    12 bytes per sample and a map per open shard, but no open file."""

    def __init__(self, manifest: Manifest, split: str, cache: ShardCache) -> None:
        """cache: the split's shards as local files."""
        self.manifest, self.cache = manifest, cache
        self.shards = split_of(manifest, split).shards
        self.starts = np.concatenate([[0], np.cumsum([shard.images for shard in self.shards])])
        if self.starts[-1] != split_of(manifest, split).images:
            raise UserError(
                f"the shards of split {split!r} hold {self.starts[-1]} samples by dataset.json, "
                f"the split {split_of(manifest, split).images}; preprocess again."
            )
        self.maps: dict[int, np.ndarray] = {}
        self.offsets = np.zeros(len(self), np.int64)  # of the images
        self.sizes = np.zeros(len(self), np.int32)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def open(self, number: int) -> None:
        """Map a shard and read its index. Raises UserError where they do not fit the manifest."""
        if number in self.maps:
            return
        shard, path = self.shards[number], self.cache.path(number)
        size = path.stat().st_size if path.is_file() else None
        if size != shard.bytes:
            raise UserError(
                f"{path} {'is missing' if size is None else f'has {size} bytes'}; dataset.json "
                f"says {shard.bytes} bytes. {REMAKE}"
            )
        index = read_index(path, self.manifest)
        _check_layout(path, index, shard, self.manifest)
        # np.memmap would keep the file open, and sets have more shards than processes may have
        # open files.
        content = torch.from_file(str(path), size=size, dtype=torch.uint8).numpy()
        for sample in {0, shard.images - 1} if shard.images else ():
            _check_headers(path, content, index, sample)
        part = slice(self.starts[number], self.starts[number + 1])
        self.offsets[part], self.sizes[part] = index.offsets[:, 0], index.sizes[:, 0]
        self.maps[number] = content

    def use_only(self, numbers: Sequence[int], following: Sequence[int]) -> None:
        """Release all shards but `numbers`, and fetch these and then `following` ahead of use.
        Raises UserError where `numbers` exceed the cache's limit."""
        for number in self.maps.keys() - set(numbers):
            del self.maps[number]
            self.cache.release(number)
        self.cache.check_limit(numbers)
        self.cache.prefetch([n for n in (*numbers, *following) if n not in self.maps])

    def shard_numbers(self, indices: np.ndarray) -> np.ndarray:
        """Return the number of the shard in which each sample lies: int64 [len(indices)]."""
        return np.searchsorted(self.starts, indices, side="right") - 1

    def extents(self, indices: np.ndarray) -> Extents:
        """Return where samples lie, their shards mapped. Raises UserError where a shard does not
        fit the manifest."""
        used, numbers = np.unique(self.shard_numbers(indices), return_inverse=True)
        for number in used.tolist():
            self.open(number)
        maps = [self.maps[number] for number in used.tolist()]
        begins = np.array([each.ctypes.data for each in maps], np.int64)
        return Extents(
            indices=indices,
            addresses=begins[numbers] + self.offsets[indices],
            sizes=self.sizes[indices],
            maps=maps,
            numbers=numbers,
        )

    def read(self, extents: Extents, *, pinned: bool = False) -> RawBatch:
        """Copy samples out of the shards (JPEG files: views of them). pinned: into memory from
        which a GPU copies while the host goes on. May run in several threads at once. Raises
        UserError for a sample that is not where the index says, that the manifest does not allow,
        or that is cut off."""
        from pipeline.loading.copying import copy_bytes  # here: a driver does not need numba

        manifest, count = self.manifest, len(extents.indices)
        raw = manifest.image_format == "rgb"
        pixels = manifest.height * manifest.width
        width = pixels * np.dtype(manifest.segments_dtype).itemsize
        memory = torch.empty(
            count * (width + 3 * pixels * raw), dtype=torch.uint8, pin_memory=pinned
        ).numpy()
        segments, images = memory[: count * width], memory[count * width :]
        tails = np.empty(count, TAIL)
        addresses = extents.addresses
        if raw:
            copy_bytes(addresses, images.reshape(count, -1))
        addresses = addresses + padded(extents.sizes) + BLOCK
        copy_bytes(addresses, segments.reshape(count, width))
        addresses = addresses + padded(width)
        copy_bytes(addresses, tails.view(np.uint8).reshape(count, -1))
        shape = (count, manifest.height, manifest.width)
        batch = RawBatch(
            memory=memory,
            images=images.reshape(*shape, 3) if raw else _files(extents),
            segments=segments.view(manifest.segments_dtype).reshape(shape),
            labels=tails["label"].astype(np.int64),
            rows=tails["row"].astype(np.int64),
        )
        self._check(extents.indices, batch, tails)
        return batch

    def _check(self, indices: np.ndarray, batch: RawBatch, tails: np.ndarray) -> None:
        """Raise UserError for a sample that is none, or that the manifest does not allow."""
        sound = np.ones(len(indices), bool)
        for header, member in (("label_header", "label"), ("row_header", "row")):
            sound &= tails[header]["size"] == octal(TAIL[member].itemsize)
            sound &= tails[header]["magic"] == b"ustar"
        if not sound.all():
            path, sample = self.locate_sample(int(indices[np.argmin(sound)]))
            raise _bad_index(path, f"sample {sample} does not lie where it says")
        labels, classes = batch.labels, len(self.manifest.classes)
        for n in np.flatnonzero((labels < 0) | (labels >= classes))[:1]:
            raise self._foreign(indices[n], f"class {labels[n]}", f"classes 0 to {classes - 1}")
        allowed = self.manifest.max_superpixels
        if batch.segments.max(initial=0) >= allowed:
            largest = batch.segments.reshape(len(indices), -1).max(axis=1)
            n = int(np.argmax(largest))
            raise self._foreign(
                indices[n], f"superpixel label {largest[n]}", f"labels 0 to {allowed - 1}"
            )
        if self.manifest.image_format == "jpg":
            for n, file in enumerate(batch.images):
                if file[-len(JPEG_END) :].tobytes() != JPEG_END:  # a decoder would make up the rest
                    path, sample = self.locate_sample(int(indices[n]))
                    raise UserError(
                        f"the image of sample {sample} of {path} is cut off: a JPEG must end with "
                        f"its end marker. {REMAKE}"
                    )

    def _foreign(self, index: int, value: str, allowed: str) -> UserError:
        path, sample = self.locate_sample(int(index))
        return UserError(
            f"sample {sample} of {path} has {value}, dataset.json allows {allowed}: the shard is "
            f"of another set. {REMAKE}"
        )

    def locate_sample(self, index: int) -> tuple[Path, int]:
        """Return the shard file in which a sample lies, and its number in that file."""
        number = int(self.shard_numbers(np.array([index]))[0])
        return self.cache.path(number), index - int(self.starts[number])
