"""The format of shards and their manifest (docs/formats.md): no other file knows it."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import storage
from pipeline.errors import UserError
from pipeline.tar import BLOCK, HEADER, RECORD, pack_header, padded, parse_header

FORMAT_VERSION = 1
MANIFEST_NAME = "dataset.json"
JPEG_QUALITY = 95
INDEX_VERSION = "v1.2"  # of DALI's webdataset index files

WORDS = 4  # of an index entry: extension, offset, size, name
REMAKE = "Delete it and preprocess again, which makes what is missing."

META_JSON = json.JSONEncoder(sort_keys=True, ensure_ascii=True)

# The members between the superpixels and the json, which are the same size in every sample.
TAIL = np.dtype(
    [
        ("label_header", HEADER),
        ("label", "<i4"),
        ("label_padding", f"V{BLOCK - 4}"),
        ("row_header", HEADER),
        ("row", "<i8"),
    ]
)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One preprocessed image. image: uint8 [H, W, 3]. segments: uint8 or uint16 [H, W], labels
    contiguous from 0. row: of the ledger. meta: id, wnid, original width and height, boxes in
    inclusive original pixels (empty where none are known)."""

    key: str
    row: int
    label: int
    image: np.ndarray
    segments: np.ndarray
    meta: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One shard file in the manifest."""

    name: str
    images: int
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Split:
    """One split in the manifest. images: in its shards. rejected: images of the source that are
    not. class_counts: images in the shards per class."""

    images: int
    rejected: int
    shards: tuple[Shard, ...]
    class_counts: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """`dataset.json`. classes: wnids (or folder names) in index order. height, width: stored size.
    mean, std: of the train split's pixels per channel, in 0..255. ledger: its SHA-256.
    configuration: source, sizes, superpixels, seed. unread: files that are no images of the set, by
    reason: `files`, their number, and `examples`."""

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
    unread: dict[str, dict[str, Any]] = field(default_factory=dict)
    format: int = FORMAT_VERSION


def sha256_file(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def extensions(manifest: Manifest) -> tuple[str, ...]:
    """Return a sample's members in their order in the shard."""
    return manifest.image_format, "seg", "cls", "row", "json"


def _members(sample: Sample, image_format: str) -> list[tuple[str, bytes]]:
    import simplejpeg  # here: whoever reads manifests alone needs none

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


class ShardPacker:
    """Packs samples into a shard and its DALI index; the bytes depend on the samples alone.
    content: the tar so far, about 20 MB for a thousand 64-px samples. lines: the index so far."""

    def __init__(self, image_format: str) -> None:
        self.image_format, self.content = image_format, bytearray()
        self.lines: list[list[str]] = []

    @property
    def images(self) -> int:
        """The number of samples so far."""
        return len(self.lines)

    def index(self) -> bytes:
        """Return DALI's index of the samples so far."""
        return _index_text(self.lines)

    def add(self, sample: Sample) -> None:
        """Append a sample, whose key has no dot, where tar readers split a name, and no slash."""
        self.lines.append([])
        for extension, data in _members(sample, self.image_format):
            name = f"{sample.key}.{extension}"
            self.content += pack_header(name.encode(), len(data))
            self.lines[-1].append(f"{extension} {len(self.content)} {len(data)} {name}")
            self.content += data
            self.content += bytes(padded(len(data)) - len(data))


def _index_text(samples: list[list[str]]) -> bytes:
    """Return DALI's index of samples, each a list of entries: extension, offset, size and name."""
    lines = [f"{INDEX_VERSION} {len(samples)}", *(" ".join(entries) for entries in samples)]
    return "".join(f"{line}\n" for line in lines).encode()


def write_shard(location: str | Path, packer: ShardPacker) -> Shard:
    """Write the samples packed and their index beside it, both atomically, and end the packer."""
    content = packer.content
    content += bytes(2 * BLOCK)  # the end of a tar
    content += bytes(-len(content) % RECORD)
    storage.write_atomically(storage.with_suffix(location, ".idx"), packer.index())
    with ThreadPoolExecutor(1) as thread:  # disk and hash take their time side by side
        sha256 = thread.submit(hashlib.sha256, content)
        storage.write_atomically(location, memoryview(content))
        return Shard(
            name=storage.name(location),
            images=packer.images,
            bytes=len(content),
            sha256=sha256.result().hexdigest(),
        )


@dataclass(frozen=True, kw_only=True)
class Index:
    """A shard's index: int64 [samples, members] offsets and sizes in bytes, and the names."""

    offsets: np.ndarray
    sizes: np.ndarray
    names: list[list[str]]


def parse_index(content: bytes, manifest: Manifest) -> Index:
    """Read an index. Raises ValueError where it is not a whole one of the manifest's members."""
    members = extensions(manifest)
    header, _, body = content.decode("ascii", "replace").partition("\n")
    words, step = body.split(), WORDS * len(members)
    entries = np.array([words[1::WORDS], words[2::WORDS]], dtype=np.int64)
    version, count = header.split()
    if (version, int(count) * step) != (INDEX_VERSION, len(words)):
        raise ValueError(f"{version} with {len(words)} words for {count} samples")
    if any(set(words[WORDS * n :: step]) - {name} for n, name in enumerate(members)):
        raise ValueError("other members")
    offsets, sizes = entries.reshape(2, -1, len(members))
    names = [words[i + 3 : i + step : WORDS] for i in range(0, len(words), step)]
    return Index(offsets=offsets, sizes=sizes, names=names)


def read_index(path: Path, manifest: Manifest) -> Index:
    """Read the index of shard `path`. Raises UserError where it is missing or not a whole one."""
    index_path = path.with_suffix(".idx")
    if not index_path.is_file():
        raise UserError(f"{index_path} is missing; preprocess again to make the shard again.")
    try:
        return parse_index(index_path.read_bytes(), manifest)
    except (ValueError, IndexError, OverflowError) as error:
        raise UserError(
            f"{index_path} is not a whole {INDEX_VERSION} index of samples with the members "
            f"{', '.join(extensions(manifest))} ({error}). {REMAKE}"
        ) from error


def index_shard(path: Path) -> bytes:
    """Make the index of shard `path` from its tar headers, as `write_shard` writes it. Raises
    UserError for a file that is not a whole USTAR tar of samples."""
    try:
        return index_content(np.memmap(path, np.uint8, mode="r"))
    except ValueError as error:
        raise UserError(f"{path} is no shard of samples ({error}). {REMAKE}") from error


def index_content(content: np.ndarray) -> bytes:
    """Make the index of a shard from its bytes, uint8 [N]. Raises ValueError for no whole tar."""
    samples: list[list[str]] = []
    position, last = 0, None
    while (block := content[position : position + BLOCK].tobytes()) != bytes(BLOCK):
        header = parse_header(block)
        if header.kind != b"0":
            raise ValueError(f"no plain file at byte {position}")
        key, extension = header.name.split(".", 1)
        position += BLOCK
        if key != last:
            samples.append([])
        last = key
        samples[-1].append(f"{extension} {position} {header.size} {header.name}")
        position += padded(header.size)
    return _index_text(samples)


def decode_sample(key: str, members: dict[str, bytes], manifest: Manifest) -> Sample:
    """Decode a sample from its members' bytes. Raises KeyError or ValueError."""
    import simplejpeg

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


def read_samples(
    location: str | Path, manifest: Manifest, positions: Iterable[int] | None = None
) -> Iterator[Sample]:
    """Yield the samples at these positions of a shard, all by default; other bytes are not read.
    Raises UserError where the shard or its index is missing or damaged."""
    try:
        index = parse_index(storage.read_bytes(storage.with_suffix(location, ".idx")), manifest)
        with storage.open_input(location) as file:
            for position in range(len(index.names)) if positions is None else positions:
                extents = zip(index.sizes[position], index.offsets[position], strict=True)
                members = [file.read_at(int(size), int(offset)) for size, offset in extents]
                named = dict(zip(extensions(manifest), members, strict=True))
                yield decode_sample(index.names[position][0].split(".")[0], named, manifest)
    except UserError:
        raise
    except (KeyError, IndexError, ValueError) as error:
        raise UserError(f"{location} cannot be read ({error!r}). {REMAKE}") from error


def read_sample(location: str | Path, position: int, manifest: Manifest) -> Sample:
    """Read one sample of a shard, see `read_samples`."""
    return next(read_samples(location, manifest, [position]))


def manifest_to_json(manifest: Manifest) -> str:
    """Return `dataset.json` as text, with sorted keys."""
    return json.dumps(asdict(manifest), indent=1, sort_keys=True) + "\n"


def manifest_hash(data: str | Path) -> str:
    """Return the hexadecimal SHA-256 of the set's `dataset.json`. It changes with anything in the
    set, since the manifest holds the hash of every shard."""
    return hashlib.sha256(_manifest_bytes(data)).hexdigest()


def _manifest_bytes(data: str | Path) -> bytes:
    try:
        return storage.read_bytes(storage.join(data, MANIFEST_NAME))
    except storage.MissingError as error:
        raise UserError(
            f"{data} holds no {MANIFEST_NAME}: no finished set of shards lies there. "
            "Preprocess images into it, or name another folder."
        ) from error


def read_manifest(data: str | Path) -> Manifest:
    """Read and check `dataset.json` of the set at location `data`. Raises UserError where no
    finished set lies there, or one of another format version."""
    location, content_bytes = storage.join(data, MANIFEST_NAME), _manifest_bytes(data)
    try:
        content = json.loads(content_bytes)
        version = content["format"]
        if version == FORMAT_VERSION:
            return _manifest(content)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{location} is damaged ({error!r}). {REMAKE}") from error
    raise UserError(
        f"{location} has format version {version}; this program reads {FORMAT_VERSION}. "
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


def shards_by_name(manifest: Manifest) -> dict[str, Shard]:
    """Return the shards of all splits by their names."""
    return {shard.name: shard for split in manifest.splits.values() for shard in split.shards}


def split_of(manifest: Manifest, split: str) -> Split:
    """Return the manifest's entry for one split. Raises UserError, naming the splits it has."""
    if split not in manifest.splits:
        splits = ", ".join(sorted(manifest.splits))
        raise UserError(f"the set has no split {split!r}; it has {splits}.")
    return manifest.splits[split]


def check_sizes(data: str | Path, manifest: Manifest, split: str) -> None:
    """Raise UserError, naming it, for a shard that is missing or whose size is not the manifest's.
    Lists the split's folder instead of asking for each file."""
    _, sizes = storage.entries(storage.join(data, split))
    for shard in split_of(manifest, split).shards:
        size = sizes.get(shard.name)
        if size != shard.bytes:
            remedy = "Upload it again." if storage.is_remote(data) else REMAKE
            raise UserError(
                f"{storage.join(data, split, shard.name)} "
                f"{'is missing' if size is None else f'has {size} bytes'}; "
                f"{MANIFEST_NAME} says {shard.bytes} bytes. {remedy}"
            )
