"""The sample format: one tar shard per task, written atomically and byte for byte repeatable.

Nothing else in the project knows how a sample lies on disk. `docs/formats.md` describes it.
"""

import hashlib
import json
import tarfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg

from pipeline import storage
from pipeline.errors import UserError
from pipeline.storage import write_atomically

FORMAT_VERSION = 1
MANIFEST_NAME = "dataset.json"
JPEG_QUALITY = 95
INDEX_VERSION = "v1.2"  # of DALI's webdataset index files
MAX_KEY = 90  # bytes; with its extension a name must fit into the 100 of a header

META_JSON = json.JSONEncoder(sort_keys=True, ensure_ascii=True)

# A member's header but for name, size and checksum, and what it adds to the checksum.
HEADER = bytearray(tarfile.TarInfo().tobuf(tarfile.USTAR_FORMAT))
HEADER[124:136], HEADER[148:156] = bytes(12), b" " * 8
HEADER_SUM = sum(HEADER)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One preprocessed image.

    image: uint8 [H, W, 3], RGB, at the stored size.
    segments: uint8 or uint16 [H, W], superpixel labels, contiguous from 0.
    label: class index. row: position of the image's row in the ledger.
    meta: id, wnid, original width and height in pixels, boxes as [x0, y0, x1, y1] in original
        inclusive pixels (an empty list where none are known).
    """

    key: str
    row: int
    label: int
    image: np.ndarray
    segments: np.ndarray
    meta: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Shard:
    """What the data-set manifest says of one shard file."""

    name: str
    images: int
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Split:
    """What the data-set manifest says of one split: images in its shards, rejected ones, and the
    number of images in them per class."""

    images: int
    rejected: int
    shards: tuple[Shard, ...]
    class_counts: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """`dataset.json`: everything a reader of the shards must know.

    classes: wnids (or folder names) in index order. height, width: stored size in pixels.
    image_format: "rgb" or "jpg". segments_dtype: "uint8" or "uint16".
    max_superpixels: the largest number of superpixels in any image.
    mean, std: of the train split's pixels per channel, in 0..255.
    ledger: hexadecimal SHA-256 of the ledger.
    configuration: what the set was made with (source, sizes, superpixels, seed).
    """

    classes: tuple[str, ...]
    class_names: tuple[str, ...]
    height: int
    width: int
    image_format: str
    segments_dtype: str
    max_superpixels: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    splits: dict[str, Split]
    ledger: str = ""
    configuration: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    format: int = FORMAT_VERSION


def sha256_file(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _members(sample: Sample, image_format: str) -> list[tuple[str, bytes]]:
    if image_format == "rgb":
        image = sample.image.tobytes()
    else:
        image = simplejpeg.encode_jpeg(
            np.ascontiguousarray(sample.image), JPEG_QUALITY, colorsubsampling="444"
        )
    return [
        (image_format, image),
        ("seg", sample.segments.astype(sample.segments.dtype.newbyteorder("<")).tobytes()),
        ("cls", int(sample.label).to_bytes(4, "little", signed=True)),
        ("row", int(sample.row).to_bytes(8, "little", signed=True)),
        ("json", META_JSON.encode(sample.meta).encode()),
    ]


def _header(key: bytes, key_sum: int, extension: str, size: int) -> bytes:
    """The USTAR header of a sample's member as tarfile writes it, in a fiftieth of the time.

    key_sum: of the bytes of `key`.
    """
    ending, before, after, ending_sum = _header_parts(len(key), extension, size)
    return b"%b%b%b%06o\0 %b" % (key, ending, before, key_sum + ending_sum, after)


@lru_cache(4096)
def _header_parts(key_bytes: int, extension: str, size: int) -> tuple[bytes, bytes, bytes, int]:
    """What a header holds beside the key and the checksum, and what it adds to the checksum."""
    ending, octal = b"." + extension.encode(), b"%011o" % size
    return (
        ending.ljust(100 - key_bytes, b"\0"),
        bytes(HEADER[100:124] + octal + HEADER[135:148]),
        bytes(HEADER[156:]),
        HEADER_SUM + sum(ending) + sum(octal),
    )


@dataclass(frozen=True, kw_only=True)
class PackedShard:
    """A shard in memory. content: the tar; index: DALI's, as text; images: samples in it."""

    content: bytearray
    index: bytes
    images: int


def pack_shard(samples: Iterable[Sample], image_format: str) -> PackedShard:
    """A shard (a USTAR tar) and its DALI index, about 20 MB for a thousand 64-px samples.

    The bytes depend on the samples alone. Raises UserError for a key with a dot, which would split
    a sample in two when read, or one too long for a header.
    """
    content = bytearray()
    index_lines: list[str] = []
    for sample in samples:
        if "." in sample.key or "/" in sample.key or len(sample.key.encode()) > MAX_KEY:
            raise UserError(
                f"sample key {sample.key!r} holds a dot or slash, or is longer than {MAX_KEY} "
                "bytes; tar readers split a sample at the first dot. Use letters, digits, '-' and "
                "'_' only."
            )
        fields, key = [], sample.key.encode()
        key_sum = sum(key)
        for extension, data in _members(sample, image_format):
            content += _header(key, key_sum, extension, len(data))
            fields.append(f"{extension} {len(content)} {len(data)} {sample.key}.{extension}")
            content += data
            content += bytes(-len(data) % tarfile.BLOCKSIZE)
        index_lines.append(" ".join(fields))
    content += bytes(2 * tarfile.BLOCKSIZE)  # the end of a tar, which is whole records long
    content += bytes(-len(content) % tarfile.RECORDSIZE)
    index = f"{INDEX_VERSION} {len(index_lines)}\n" + "".join(f"{x}\n" for x in index_lines)
    return PackedShard(content=content, index=index.encode(), images=len(index_lines))


def write_shard(place: str | Path, packed: PackedShard) -> Shard:
    """Write a packed shard and its index beside it, both atomically."""
    with ThreadPoolExecutor(2) as threads:  # the disk and the hash take their time side by side
        hashed = threads.submit(hashlib.sha256, packed.content)
        index = threads.submit(write_atomically, storage.with_suffix(place, ".idx"), packed.index)
        write_atomically(place, memoryview(packed.content))
        index.result()
        return Shard(
            name=storage.name(place),
            images=packed.images,
            bytes=len(packed.content),
            sha256=hashed.result().hexdigest(),
        )


def _index_members(words: list[str]) -> dict[str, tuple[int, int]]:
    return {words[i]: (int(words[i + 1]), int(words[i + 2])) for i in range(0, len(words), 4)}


def index_samples(index: bytes) -> list[dict[str, tuple[int, int]]]:
    """What an index's bytes say: for each sample, its members' (offset, size) in bytes.

    Raises ValueError where they are no whole index of this version.
    """
    try:
        header, *lines = index.decode().splitlines()
        version, count = header.split()
        samples = [_index_members(line.split()) for line in lines]
    except IndexError as error:
        raise ValueError(str(error)) from error
    if version != INDEX_VERSION or int(count) != len(lines):
        raise ValueError(f"{version} with {len(lines)} of {count} samples")
    return samples


def read_index(path: Path) -> list[dict[str, tuple[int, int]]]:
    """The index of shard `path`: for each sample, its members' (offset, size) in bytes.

    Raises UserError where the index is missing, of another version or does not fit the shard.
    """
    index_path = path.with_suffix(".idx")
    if not index_path.is_file():
        raise UserError(f"{index_path} is missing; run jobs.preprocess again to rebuild the shard.")
    try:
        samples = index_samples(index_path.read_bytes())
    except ValueError as error:
        raise UserError(
            f"{index_path} is not a whole {INDEX_VERSION} index; delete it and run "
            "jobs.preprocess again to rebuild the shard."
        ) from error
    size = path.stat().st_size
    if samples and max(sum(extent) for extent in samples[-1].values()) > size:
        raise UserError(
            f"{path} has {size} bytes, fewer than its index says: it was cut off or replaced; "
            "delete both and run jobs.preprocess again."
        )
    return samples


def index_shard(path: Path) -> bytes:
    """The index of shard `path`, made anew from its tar headers, as `write_shard` writes it.

    Raises UserError for a file that is not a whole USTAR tar of samples.
    """
    try:
        return index_content(np.memmap(path, np.uint8, mode="r"))
    except ValueError as error:
        raise UserError(
            f"{path} is no shard of samples ({error}); run jobs.preprocess again."
        ) from error


def index_content(content: np.ndarray) -> bytes:
    """The index of a shard from its bytes, uint8 [N]. Raises ValueError where they are no whole
    USTAR tar of samples."""
    lines: list[list[str]] = []
    position, last = 0, None
    try:
        while (header := content[position : position + tarfile.BLOCKSIZE].tobytes())[0]:
            if header[257:262] != b"ustar" or header[156:157] != tarfile.REGTYPE:
                raise ValueError(f"no plain USTAR header at byte {position}")
            name = header[:100].rstrip(b"\0").decode()
            size = int(header[124:135], 8)
            position += tarfile.BLOCKSIZE
            key, extension = name.split(".", 1)
            if key != last:
                lines.append([])
            last = key
            lines[-1].append(f"{extension} {position} {size} {name}")
            position += -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    except IndexError as error:
        raise ValueError(str(error)) from error
    text = "".join(" ".join(line) + "\n" for line in lines)
    return f"{INDEX_VERSION} {len(lines)}\n{text}".encode()


def decode_sample(key: str, members: dict[str, bytes], manifest: Manifest) -> Sample:
    """A sample from its members' bytes (the inverse of `write_shard`)."""
    shape = (manifest.height, manifest.width)
    if manifest.image_format == "rgb":
        image = np.frombuffer(members["rgb"], np.uint8).reshape(*shape, 3)
    else:
        image = simplejpeg.decode_jpeg(members["jpg"])
    dtype = np.dtype(manifest.segments_dtype).newbyteorder("<")
    return Sample(
        key=key,
        row=int.from_bytes(members["row"], "little", signed=True),
        label=int.from_bytes(members["cls"], "little", signed=True),
        image=image,
        segments=np.frombuffer(members["seg"], dtype).reshape(shape),
        meta=json.loads(members["json"]),
    )


def read_sample(place: str | Path, position: int, manifest: Manifest) -> Sample:
    """One sample of the shard at a place, of which its bytes and the index are read.

    Raises UserError where the shard or its index is missing or damaged.
    """
    try:
        extents = index_samples(storage.read_bytes(storage.with_suffix(place, ".idx")))[position]
        with storage.open_input(place) as file:
            members = {name: file.read_at(size, start) for name, (start, size) in extents.items()}
        return decode_sample("", members, manifest)
    except (KeyError, IndexError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{place} cannot be read ({error!r}); run jobs.preprocess again."
        ) from error


def read_shard(path: Path, manifest: Manifest) -> Iterator[Sample]:
    """The samples of one shard in order. Raises UserError for a damaged one."""
    try:
        with tarfile.open(path) as tar:
            key, members = "", dict[str, bytes]()
            for info in tar:
                name, extension = info.name.split(".", 1)
                if name != key and members:
                    yield decode_sample(key, members, manifest)
                    members = {}
                key = name
                file = tar.extractfile(info)
                assert file is not None
                members[extension] = file.read()
            if members:
                yield decode_sample(key, members, manifest)
    except (tarfile.TarError, KeyError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read ({error!r}); delete it and run jobs.preprocess again."
        ) from error


def manifest_to_json(manifest: Manifest) -> str:
    """`dataset.json` as text, with sorted keys."""
    return json.dumps(asdict(manifest), indent=1, sort_keys=True) + "\n"


def manifest_hash(data: str | Path) -> str:
    """Hexadecimal SHA-256 of the set's `dataset.json`: changes with anything in the set, since the
    manifest holds the hash of every shard."""
    return hashlib.sha256(_manifest_bytes(data)).hexdigest()


def _manifest_bytes(data: str | Path) -> bytes:
    try:
        return storage.read_bytes(storage.join(data, MANIFEST_NAME))
    except storage.MissingError as error:
        raise UserError(
            f"{data} holds no {MANIFEST_NAME}: no finished set of shards lies there. "
            f"Make one with: python -m jobs.preprocess --source IMAGES --output {data}"
        ) from error


def read_manifest(data: str | Path) -> Manifest:
    """Read and check `dataset.json` of the set at place `data`, see pipeline/storage.py.

    Raises UserError where no finished set lies there, or one of another format version, and where
    the place cannot be read.
    """
    place, content_bytes = storage.join(data, MANIFEST_NAME), _manifest_bytes(data)
    try:
        content = json.loads(content_bytes)
        version = content["format"]
        if version == FORMAT_VERSION:
            return _manifest(content)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{place} is damaged ({error!r}); run jobs.preprocess again.") from error
    raise UserError(
        f"{place} has format version {version}; this program reads {FORMAT_VERSION}. "
        "Preprocess the images again with this program, or use the one that wrote them."
    )


def _manifest(content: dict[str, Any]) -> Manifest:
    splits = {
        name: Split(
            images=split["images"],
            rejected=split["rejected"],
            shards=tuple(Shard(**shard) for shard in split["shards"]),
            class_counts=tuple(split["class_counts"]),
        )
        for name, split in content.pop("splits").items()
    }
    for name in ("classes", "class_names", "mean", "std"):
        content[name] = tuple(content[name])
    return Manifest(splits=splits, **content)


def split_of(manifest: Manifest, split: str) -> Split:
    """The manifest's entry for one split. Raises UserError, naming those there are."""
    if split not in manifest.splits:
        raise UserError(
            f"the set has no split {split!r}; it has {', '.join(sorted(manifest.splits))}."
        )
    return manifest.splits[split]


def check_sizes(data: str | Path, manifest: Manifest, split: str) -> None:
    """Raise UserError, naming it, for a shard that is missing or whose size is not the manifest's.

    Lists the split's folder instead of asking for each file.
    """
    sizes = storage.file_sizes(storage.join(data, split))
    for shard in split_of(manifest, split).shards:
        size = sizes.get(shard.name)
        if size != shard.bytes:
            remedy = "Upload it" if storage.is_remote(data) else "Delete it and run jobs.preprocess"
            raise UserError(
                f"{storage.join(data, split, shard.name)} "
                f"{'is missing' if size is None else f'has {size} bytes'}; "
                f"{MANIFEST_NAME} says {shard.bytes} bytes. {remedy} again."
            )


def shard_paths(data: str | Path, manifest: Manifest, split: str) -> list[Path]:
    """Paths of a local split's shards, in order, each checked to be there with its recorded size.

    Those of a remote set must be brought here first, see pipeline/loading/cache.py.
    """
    check_sizes(data, manifest, split)
    folder = storage.local_path(data) / split
    return [folder / shard.name for shard in split_of(manifest, split).shards]
