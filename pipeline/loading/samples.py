"""Random access to a split's stored samples: memory maps of its shards, and where samples lie.

The index is never believed: its entries must tile the shard exactly as the format says, those of
the first and last sample must be what the shard says, and every sample is checked when it is read.
"""

import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.errors import UserError
from pipeline.loading.cache import ShardCache
from pipeline.shards.format import (
    INDEX_VERSION,
    Manifest,
    Shard,
    index_shard,
    sha256_file,
    split_of,
)

BLOCK = tarfile.BLOCKSIZE
LABEL_SIZE, ROW_SIZE = 4, 8
TAIL = 3 * BLOCK + ROW_SIZE  # from the class's header to the row's last byte
SIZE_FIELD, MAGIC_FIELD = slice(124, 135), slice(257, 262)  # of a tar header
JPEG_END = b"\xff\xd9"  # the marker that ends every JPEG file
WORDS = 4  # of an index entry: extension, offset, size, name


def _padded(size: Any) -> Any:
    """Bytes that a member of `size` bytes takes; a number or an array of them."""
    return (size + BLOCK - 1) // BLOCK * BLOCK


def extensions(manifest: Manifest) -> tuple[str, ...]:
    """A sample's members, in the order in which they lie in the shard."""
    return manifest.image_format, "seg", "cls", "row", "json"


@dataclass(frozen=True, kw_only=True)
class Index:
    """A shard's index: int64 [images, members] offsets and sizes in bytes, and the names."""

    offsets: np.ndarray
    sizes: np.ndarray
    names: list[str]  # images * members of them


@dataclass(frozen=True, kw_only=True)
class RawBatch:
    """Samples as they lie in the shards.

    images: uint8 [B, H, W, 3], or JPEG files uint8 [n]. segments: uint8 or uint16 [B, H, W].
    labels, rows: int64 [B].
    """

    images: np.ndarray | list[np.ndarray]
    segments: np.ndarray
    labels: np.ndarray
    rows: np.ndarray


def _bad_index(path: Path, what: str) -> UserError:
    return UserError(
        f"{path.with_suffix('.idx')} does not fit {path.name}: {what}. It is stale or of another "
        "shard, and images would be read from wrong indices; delete both and run jobs.preprocess "
        "again."
    )


def load_index(path: Path, shard: Shard, manifest: Manifest) -> Index:
    """Read the index of the shard at `path` and check that it tiles the shard as the manifest says.

    Raises UserError where it is missing, not whole, or of another shard or format.
    """
    members = extensions(manifest)
    index_path = path.with_suffix(".idx")
    if not index_path.is_file():
        raise UserError(f"{index_path} is missing; run jobs.preprocess again to rebuild the shard.")
    header, _, body = index_path.read_bytes().decode("ascii", "replace").partition("\n")
    words = body.split()
    step = WORDS * len(members)
    try:
        entries = np.array([words[1::WORDS], words[2::WORDS]], dtype=np.int64)
        version, count = header.split()
        whole = version == INDEX_VERSION and int(count) * step == len(words)
        found = [words[n * WORDS :: step] for n in range(len(members))]
    except (ValueError, IndexError, OverflowError):
        whole = False
    if not whole or any(set(column) - {name} for column, name in zip(found, members, strict=True)):
        raise UserError(
            f"{index_path} is not a whole {INDEX_VERSION} index of samples with the members "
            f"{', '.join(members)}; delete it and its shard and run jobs.preprocess again."
        )
    offsets, sizes = entries.reshape(2, -1, len(members))
    index = Index(offsets=offsets, sizes=sizes, names=words[3::WORDS])
    _check_layout(path, index, shard, manifest)
    return index


def _check_layout(path: Path, index: Index, shard: Shard, manifest: Manifest) -> None:
    if len(index.offsets) != shard.images:
        raise _bad_index(
            path, f"it lists {len(index.offsets)} samples, dataset.json says {shard.images}"
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
    ends = (index.offsets + _padded(index.sizes)).ravel()
    wrong = np.flatnonzero(index.offsets.ravel() != np.concatenate([[0], ends[:-1]]) + BLOCK)
    if len(wrong):
        sample = wrong[0] // len(extensions(manifest))
        raise _bad_index(path, f"sample {sample} does not begin where the one before it ends")
    end = int(ends[-1]) if len(ends) else 0
    records = -(-(end + 2 * BLOCK) // tarfile.RECORDSIZE) * tarfile.RECORDSIZE
    if records != shard.bytes:
        raise _bad_index(path, f"its samples end at {end} of {shard.bytes} bytes")


def _check_headers(path: Path, content: np.ndarray, index: Index, sample: int) -> None:
    """Check a sample's index entries against the tar headers in the shard's bytes, uint8 [n]."""
    members = index.offsets.shape[1]
    for member in range(members):
        offset, size = index.offsets[sample, member], index.sizes[sample, member]
        name = index.names[sample * members + member]
        try:
            header = content[offset - BLOCK : offset].tobytes()
            info = tarfile.TarInfo.frombuf(header, "ascii", "strict")
        except (tarfile.TarError, ValueError) as error:
            raise _bad_index(path, f"no {name} lies where it says ({error})") from error
        if (info.name, info.size) != (name, size):
            raise _bad_index(
                path, f"it says {name} of {size} bytes where {info.name} of {info.size} bytes lies"
            )


def verify_shard(path: Path, shard: Shard) -> None:
    """Check every byte of a local shard against its SHA-256, and every entry of its index.

    Raises UserError. `Samples.open` checks the rest.
    """
    found = sha256_file(path)
    if found != shard.sha256:
        raise UserError(
            f"{path} has SHA-256 {found}, dataset.json says {shard.sha256}: it was damaged or "
            "replaced. Delete it and run jobs.preprocess again."
        )
    if index_shard(path) != path.with_suffix(".idx").read_bytes():
        raise _bad_index(path, "its entries are not those of the shard's headers")


class Samples:
    """The samples of a split. A sample's index is its number in the split, shards in order.

    Holds 12 bytes per sample and a map per open shard, but no open file.
    """

    def __init__(self, manifest: Manifest, split: str, cache: ShardCache) -> None:
        """cache: the split's shards as local files."""
        self.manifest, self.cache = manifest, cache
        self.shards = split_of(manifest, split).shards
        self.starts = np.concatenate([[0], np.cumsum([shard.images for shard in self.shards])])
        if self.starts[-1] != split_of(manifest, split).images:
            raise UserError(
                f"the shards of split {split!r} hold {self.starts[-1]} samples by dataset.json, "
                f"the split {split_of(manifest, split).images}; run jobs.preprocess again."
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
                f"says {shard.bytes} bytes. Delete it and run jobs.preprocess again."
            )
        index = load_index(path, shard, self.manifest)
        # Closes the file, which np.memmap would keep open: sets have more shards than processes
        # may have files.
        content = torch.from_file(str(path), size=size, dtype=torch.uint8).numpy()
        for sample in {0, shard.images - 1} if shard.images else ():
            _check_headers(path, content, index, sample)
        part = slice(self.starts[number], self.starts[number + 1])
        self.offsets[part], self.sizes[part] = index.offsets[:, 0], index.sizes[:, 0]
        self.maps[number] = content

    def use_only(self, numbers: Sequence[int], following: Sequence[int]) -> None:
        """Give up all shards but `numbers`, which are needed now, and have these and then those
        of `following` brought in the background.

        Raises UserError where `numbers` exceed the cache's limit.
        """
        for number in self.maps.keys() - set(numbers):
            del self.maps[number]
            self.cache.release(number)
        self.cache.check_limit(numbers)
        self.cache.prefetch([n for n in (*numbers, *following) if n not in self.maps])

    def shard_numbers(self, indices: np.ndarray) -> np.ndarray:
        """Return the number of the shard in which each sample lies: int64 [len(indices)]."""
        return np.searchsorted(self.starts, indices, side="right") - 1

    def read(self, indices: np.ndarray) -> RawBatch:
        """The samples at some indices, copied out of the shards (JPEG files: views of them).

        Opens shards as needed. Raises UserError for a sample that is not where the index says,
        that the manifest does not allow (a class or superpixel label out of range), or whose JPEG
        file is cut off.
        """
        manifest = self.manifest
        numbers = self.shard_numbers(indices)
        for number in sorted(set(numbers.tolist()) - self.maps.keys()):
            self.open(number)
        pixels = manifest.height * manifest.width
        segments = np.empty(
            (len(indices), manifest.height, manifest.width), manifest.segments_dtype
        )
        segment_bytes = segments.view(np.uint8).reshape(len(indices), -1)
        tails = np.empty((len(indices), TAIL), np.uint8)
        raw = manifest.image_format == "rgb"
        images = np.empty((len(indices), 3 * pixels), np.uint8) if raw else None
        files = []
        markers = np.empty((len(indices), len(JPEG_END)), np.uint8)
        sizes = self.sizes[indices]
        starts = self.offsets[indices]
        middles = starts + _padded(sizes) + BLOCK
        ends = middles + _padded(segment_bytes.shape[1])
        table = zip(
            numbers.tolist(),
            starts.tolist(),
            sizes.tolist(),
            middles.tolist(),
            ends.tolist(),
            strict=True,
        )
        for n, (number, start, size, middle, end) in enumerate(table):
            content = self.maps[number]
            if images is not None:
                images[n] = content[start : start + size]
            else:
                files.append(content[start : start + size])
                markers[n] = content[start + size - len(JPEG_END) : start + size]
            segment_bytes[n] = content[middle : middle + segment_bytes.shape[1]]
            tails[n] = content[end : end + TAIL]
        labels = tails[:, BLOCK : BLOCK + LABEL_SIZE].copy().view("<i4")[:, 0].astype(np.int64)
        rows = tails[:, 3 * BLOCK :].copy().view("<i8")[:, 0].astype(np.int64)
        self._check(indices, tails, segments, labels)
        if files and (cut := (markers != np.frombuffer(JPEG_END, np.uint8)).any(axis=1)).any():
            path, sample = self.locate_sample(int(indices[np.argmax(cut)]))
            raise UserError(  # a decoder would make up the rest
                f"the image of sample {sample} of {path} is cut off: a JPEG must end with its end "
                "marker. Delete the shard and run jobs.preprocess again."
            )
        return RawBatch(
            images=files if images is None else images.reshape(*segments.shape, 3),
            segments=segments,
            labels=labels,
            rows=rows,
        )

    def _check(
        self, indices: np.ndarray, tails: np.ndarray, segments: np.ndarray, labels: np.ndarray
    ) -> None:
        """Raise UserError where a sample's last members are not those of a sample, or say what
        the manifest does not allow."""
        sound = np.ones(len(indices), bool)
        for header, size in ((tails[:, :BLOCK], LABEL_SIZE), (tails[:, 2 * BLOCK :], ROW_SIZE)):
            sound &= (header[:, SIZE_FIELD] == np.frombuffer(b"%011o" % size, np.uint8)).all(axis=1)
            sound &= (header[:, MAGIC_FIELD] == np.frombuffer(b"ustar", np.uint8)).all(axis=1)
        if not sound.all():
            path, sample = self.locate_sample(int(indices[np.argmin(sound)]))
            raise _bad_index(path, f"sample {sample} does not lie where it says")
        classes, superpixels = len(self.manifest.classes), self.manifest.max_superpixels
        wrong = (labels < 0) | (labels >= classes)
        if wrong.any():
            path, sample = self.locate_sample(int(indices[np.argmax(wrong)]))
            raise UserError(
                f"sample {sample} of {path} has class {labels[np.argmax(wrong)]}, dataset.json "
                f"has classes 0 to {classes - 1}: the shard is of another set. Delete it and run "
                "jobs.preprocess again."
            )
        if segments.max(initial=0) >= superpixels:
            largest = segments.reshape(len(indices), -1).max(axis=1)
            path, sample = self.locate_sample(int(indices[np.argmax(largest)]))
            raise UserError(
                f"sample {sample} of {path} has superpixel label {largest.max()}, dataset.json "
                f"allows 0 to {superpixels - 1}: the shard is of another set. Delete it and run "
                "jobs.preprocess again."
            )

    def locate_sample(self, index: int) -> tuple[Path, int]:
        """Return the shard file in which a sample lies, and its number in that file."""
        number = int(self.shard_numbers(np.array([index]))[0])
        return self.cache.path(number), index - int(self.starts[number])
