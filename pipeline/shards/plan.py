"""What to make of a collection of images: the parameters, and the shards."""

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline import storage
from pipeline.errors import UserError
from pipeline.shards.format import FORMAT_VERSION
from pipeline.shards.superpixels import check_superpixels
from pipeline.sources.files import SourceFiles
from pipeline.sources.find import LAYOUTS, Source, find_layout, list_images
from pipeline.sources.listing import digest, taken

SIDES = range(32, 513)  # of a stored image, pixels
SIZE = re.compile(r"(\d{1,4})(?:x(\d{1,4}))?")
# The packages that decide the bytes of a shard.
VERSIONS = ("fast-slic", "numpy", "opencv-python-headless", "pillow", "pyarrow", "simplejpeg")
# What may differ between two runs that share one output.
FREE_FIELDS = ("source", "output", "layout", "workers", "max_bad_share")


def _flag(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class PreprocessConfig:
    """What to preprocess, and how. Raises ValueError for a value out of range."""

    source: str = field(
        metadata={
            "help": "folder with the images or archives, one archive, or a list of images (.csv, "
            ".parquet); or its URI (s3://...)"
        }
    )
    output: str = field(
        metadata={"help": "folder or URI (s3://...) for the shards; an unfinished one is continued"}
    )
    layout: str = _flag("auto", f"auto, {', '.join(LAYOUTS)}")
    image_size: int | str = _flag(
        64, "pixels of the stored images: one number for squares, else HEIGHTxWIDTH; 32 to 512"
    )
    superpixels: int = _flag(100, "superpixels asked for per image; an image can have fewer")
    compactness: float = _flag(10.0, "weight of position against colour in superpixels; above 0")
    image_format: str = _flag("rgb", "rgb (raw) or jpg (quality 95, a third of the size)")
    samples_per_shard: int = _flag(1000, "source images per shard; from 1")
    workers: int | None = _flag(
        None, "Ray tasks in flight; by default one runs and one waits for each CPU of the cluster"
    )
    seed: int = _flag(0, "of the order of the train images; from 0")
    max_bad_share: float = _flag(0.01, "share of rejected images, 0 to 1, above which it fails")

    def __post_init__(self) -> None:
        size = SIZE.fullmatch(str(self.image_size))
        sides = [int(side) for side in size.groups(size[1])] if size else []
        if size and sides[0] == sides[1]:  # one way to write each size, since plans are compared
            object.__setattr__(self, "image_size", sides[0])
        checks = {
            "image_size": (
                bool(sides) and all(side in SIDES for side in sides),
                "32 to 512, or two of them as HEIGHTxWIDTH",
            ),
            "compactness": (0 < self.compactness <= 1000, "above 0, up to 1000"),
            "image_format": (self.image_format in ("rgb", "jpg"), "rgb or jpg"),
            "samples_per_shard": (self.samples_per_shard >= 1, "from 1"),
            "workers": (self.workers is None or self.workers >= 1, "from 1"),
            "seed": (self.seed >= 0, "from 0"),
            "max_bad_share": (0 <= self.max_bad_share <= 1, "0 to 1"),
        }
        for name, (good, allowed) in checks.items():
            if not good:
                value = getattr(self, name)
                raise ValueError(f"{name} {value} is out of range; allowed: {allowed}")
        check_superpixels(self.height, self.width, self.superpixels)

    @property
    def height(self) -> int:
        """Of the stored images, in pixels."""
        return int(str(self.image_size).split("x")[0])

    @property
    def width(self) -> int:
        """Of the stored images, in pixels."""
        return int(str(self.image_size).split("x")[-1])


@dataclass(frozen=True, kw_only=True)
class ShardTask:
    """One shard: `rows` images, of which image i has row `first_row` + i of the ledger."""

    split: str
    number: int
    first_row: int
    rows: int

    @property
    def name(self) -> str:
        return f"{self.split}-{self.number:06d}"

    def record(self, output: str) -> str:
        """Return the location of the shard's record; the shard and its index lie beside it."""
        return storage.join(output, self.split, f"{self.name}.parquet")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All that is to be made. order: uint32 [images], the number of each ledger row's image in its
    split's table. fingerprint: content of plan.json, which decides the bytes."""

    source: str
    output: str
    collection: Source
    tasks: tuple[ShardTask, ...]
    order: np.ndarray
    fingerprint: dict[str, Any]

    def images(self, task: ShardTask) -> pa.Table:
        """Return a copy of the listed rows of one shard, in its order, and nothing more to send."""
        rows = self.order[task.first_row : task.first_row + task.rows]
        return taken(self.collection.images[task.split], rows)


def make_plan(config: PreprocessConfig) -> Plan:
    """List the source and divide it into shards: train shuffled over the whole set, val in order.
    Raises UserError for paths or a source that cannot be used."""
    source, output = location_of(config.source), location_of(config.output)
    if f"{output}/".startswith(f"{source}/"):
        raise UserError(f"output {output} lies inside source {source}; choose one outside it.")
    with SourceFiles(source) as files:
        layout = find_layout(files) if config.layout == "auto" else config.layout
        collection = list_images(files, layout)
    counts = {split: table.num_rows for split, table in collection.images.items()}
    fingerprint = {
        "format": FORMAT_VERSION,
        "configuration": {k: v for k, v in asdict(config).items() if k not in FREE_FIELDS},
        "layout": layout,
        "images": counts,
        "listing": {split: digest(table) for split, table in collection.images.items()},
        "versions": {name: version(name) for name in VERSIONS},
    }
    return Plan(
        source=source,
        output=output,
        collection=collection,
        tasks=tuple(shard_tasks(counts, config.samples_per_shard)),
        order=_order(counts, config.seed),
        fingerprint=fingerprint,
    )


def _order(counts: dict[str, int], seed: int) -> np.ndarray:
    """Return a random permutation for train, the listed order for other splits. In memory, 4 bytes
    an image: shuffled in a mapped file it would wait for the disk."""
    order, first = np.arange(sum(counts.values()), dtype=np.uint32), 0
    for split, count in counts.items():
        part = order[first : first + count]
        part -= np.uint32(first)
        if split == "train":
            np.random.default_rng(seed).shuffle(part)
        first += count
    return order


def shard_tasks(counts: dict[str, int], samples_per_shard: int) -> Iterator[ShardTask]:
    """Yield the shards of a set with these numbers of images by split, train first, in order."""
    row = 0
    for split, count in counts.items():
        for number, start in enumerate(range(0, count, samples_per_shard)):
            rows = min(samples_per_shard, count - start)
            yield ShardTask(split=split, number=number, first_row=row, rows=rows)
            row += rows


def location_of(text: str) -> str:
    """Return the location that a user wrote, for processes in any working folder. Raises UserError
    for the home folder of a user who has none."""
    try:
        return storage.absolute(text if "://" in text else Path(text).expanduser())
    except RuntimeError as error:  # ~NAME of nobody
        raise UserError(f"{text} names no user's home folder; write the whole path.") from error
