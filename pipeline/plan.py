"""What to make of a collection of images: the parameters, the shards, and whose output it is."""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.shards import FORMAT_VERSION, DataError, write_atomically
from pipeline.sources import Source, SourceImage, find_layout, list_images
from pipeline.superpixels import check_superpixels

PLAN_NAME = "plan.json"
# The packages that decide the bytes of a shard.
VERSIONS = ("fast-slic", "numpy", "opencv-python-headless", "pillow", "pyarrow", "simplejpeg")
# What may differ between two runs that share one output.
FREE_FIELDS = ("source", "output", "layout", "workers", "max_bad_share")


def _flag(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class PreprocessConfig:
    """What to preprocess, and how. Raises ValueError for a value out of range."""

    source: str = field(metadata={"help": "folder with the images"})
    output: str = field(metadata={"help": "folder for the shards; an unfinished one is continued"})
    layout: str = _flag("auto", "auto, ilsvrc, tiny-imagenet or folders")
    image_size: int = _flag(64, "height and width of the stored images, pixels; 32 to 512")
    superpixels: int = _flag(100, "superpixels asked for per image; an image can have fewer")
    compactness: float = _flag(10.0, "weight of place against colour in superpixels; above 0")
    image_format: str = _flag("rgb", "rgb (raw) or jpg (quality 95, a third of the size)")
    samples_per_shard: int = _flag(1000, "source images per shard; from 1")
    workers: int | None = _flag(None, "Ray tasks in flight; by default one per CPU of the cluster")
    seed: int = _flag(0, "of the order of the train images; from 0")
    max_bad_share: float = _flag(
        0.01, "share of rejected images, 0 to 1, above which the job fails"
    )

    def __post_init__(self) -> None:
        checks = {
            "image_size": (32 <= self.image_size <= 512, "32 to 512"),
            "compactness": (0 < self.compactness <= 1000, "above 0, up to 1000"),
            "image_format": (self.image_format in ("rgb", "jpg"), "rgb or jpg"),
            "samples_per_shard": (self.samples_per_shard >= 1, "from 1"),
            "workers": (self.workers is None or self.workers >= 1, "from 1"),
            "seed": (self.seed >= 0, "from 0"),
            "max_bad_share": (0 <= self.max_bad_share <= 1, "0 to 1"),
        }
        for name, (good, allowed) in checks.items():
            if not good:
                raise ValueError(
                    f"{name} {getattr(self, name)} is out of range; allowed: {allowed}"
                )
        check_superpixels(self.image_size, self.image_size, self.superpixels)


@dataclass(frozen=True, kw_only=True)
class ShardTask:
    """The images of one shard. Image i has row `first_row` + i of the ledger."""

    split: str
    number: int
    first_row: int
    images: tuple[SourceImage, ...]

    @property
    def name(self) -> str:
        return f"{self.split}-{self.number:06d}"

    def part(self, output: Path) -> Path:
        """Path of the ledger part; the shard and its index lie beside it."""
        return output / self.split / f"{self.name}.parquet"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is to be made. fingerprint: content of plan.json; two plans that differ in it would
    write other bytes."""

    source: Path
    output: Path
    listed: Source
    tasks: tuple[ShardTask, ...]
    fingerprint: dict[str, Any]


def make_plan(config: PreprocessConfig) -> Plan:
    """List the source and divide it into shards: train shuffled over the whole set, val in order.

    Raises DataError for paths or a source that cannot be used.
    """
    source, output = _local_path(config.source), _local_path(config.output)
    if output.is_relative_to(source):
        raise DataError(f"output {output} lies inside source {source}; choose one outside it.")
    found = find_layout(source) if config.layout == "auto" else config.layout
    listed = list_images(source, found)
    tasks, digest, row = [], hashlib.sha256(), 0
    for split, images in listed.images.items():
        if split == "train":
            order = np.random.default_rng(config.seed).permutation(len(images))
            images = tuple(images[i] for i in order)
        for image in images:
            digest.update(repr(image).encode())
        for number, start in enumerate(range(0, len(images), config.samples_per_shard)):
            chunk = images[start : start + config.samples_per_shard]
            tasks.append(ShardTask(split=split, number=number, first_row=row, images=chunk))
            row += len(chunk)
    fingerprint = {
        "format": FORMAT_VERSION,
        "configuration": {k: v for k, v in asdict(config).items() if k not in FREE_FIELDS},
        "layout": found,
        "images": {split: len(images) for split, images in listed.images.items()},
        "listing": digest.hexdigest(),
        "versions": {name: version(name) for name in VERSIONS},
    }
    return Plan(
        source=source, output=output, listed=listed, tasks=tuple(tasks), fingerprint=fingerprint
    )


def _local_path(text: str) -> Path:
    if "://" in text:
        raise DataError(f"{text}: only local paths are supported; copy it to this machine.")
    return Path(text).expanduser().resolve()


def claim_output(plan: Plan) -> None:
    """Make the output folder this plan's own, or raise DataError where it is another's."""
    path = plan.output / PLAN_NAME
    if path.is_file():
        try:
            there = json.loads(path.read_text())
        except ValueError as error:
            raise DataError(f"{path} is damaged ({error}); delete {plan.output}.") from error
        if there != plan.fingerprint:
            raise DataError(
                f"{plan.output} holds shards of another configuration "
                f"({_difference(there, plan.fingerprint)}); choose another output or delete it."
            )
    elif plan.output.exists() and (not plan.output.is_dir() or any(plan.output.iterdir())):
        raise DataError(
            f"{plan.output} is not empty and holds no {PLAN_NAME}; choose an empty folder."
        )
    for split in plan.listed.images:
        folder = plan.output / split
        folder.mkdir(parents=True, exist_ok=True)
        for temporary in [*folder.glob(".*.tmp"), *plan.output.glob(".*.tmp")]:
            temporary.unlink(missing_ok=True)
    if not path.is_file():
        content = json.dumps(plan.fingerprint, indent=1, sort_keys=True) + "\n"
        write_atomically(path, content.encode())


def _difference(there: dict[str, Any], now: dict[str, Any]) -> str:
    """The first thing in which two fingerprints differ, in words."""
    for name in ("format", "layout", "configuration", "images", "versions"):
        old, new = there.get(name), now[name]
        if isinstance(old, dict) and isinstance(new, dict):
            for key in sorted({*old, *new}):
                if old.get(key) != new.get(key):
                    return f"{name} {key}: {old.get(key)} there, {new.get(key)} now"
        elif old != new:
            return f"{name}: {old} there, {new} now"
    return "the source's files, labels or boxes have changed since"
