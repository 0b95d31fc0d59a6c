"""WebDataset tars of others: an image and its label side by side under one key."""

import json
import re
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from pipeline.errors import UserError
from pipeline.sources import labels
from pipeline.sources.archives import Member, is_archive, members
from pipeline.sources.files import SourceFiles, joined
from pipeline.sources.listing import Listed, Rows, replaced

SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
MAX_LABEL_BYTES = 1 << 20
MAX_CLASSES = 1 << 20
NUMBER = re.compile(r"\d{1,9}")

Sample = dict[str, Member]  # by extension


def shard_names(files: SourceFiles) -> dict[str, list[str]]:
    """The paths of the tars in the source and in its folders of splits, by split, in order.

    A split is told by a word of the tar's name or its folder's: `train-000000.tar`,
    `imagenet-val-0001.tar`, `validation/00000.tar`; what names none is train.
    """
    found: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for folder in ["", *(x for x in files.entries()[0] if x.lower() in SPLITS)]:
        for name in filter(is_archive, files.entries(folder)[1]):
            path = joined(folder, name)
            words = re.split(r"[^a-z]+", path.lower())
            found[next((SPLITS[word] for word in words if word in SPLITS), "train")].append(path)
    return {split: paths for split, paths in found.items() if paths}


def list_webdataset(files: SourceFiles) -> Listed:
    """The images by split and readable names of the classes.

    A class is the `cls` member's text, else the `label` (or `cls`) of the `json` member. Where all
    are numbers they count the classes from 0, in the order of `LOC_synset_mapping.txt` or
    `classes.txt` (one per line) where one of these is there.
    """
    images = {}
    for split, paths in shard_names(files).items():
        rows = Rows()
        for path, found in zip(paths, files.ahead(lambda x: _rows(files, x), paths), strict=True):
            for row in found:
                rows.add(path=path, **row)
        images[split] = _with_plain_ids(rows.table())
    return _with_classes(files, images)


def _rows(files: SourceFiles, path: str) -> list[dict[str, Any]]:
    shard = path.rpartition("/")[2].rpartition(".")[0]
    return [
        {"id": f"{shard}/{key}"} | _row(files, path, sample)
        for key, sample in _samples(members(files, path))
    ]


def _samples(listed: Iterator[Member]) -> Iterator[tuple[str, Sample]]:
    key: str | None = None
    sample: Sample = {}
    for member in listed:
        folder, _, name = member.name.removeprefix("./").rpartition("/")
        if name.startswith(".") or "." not in name:
            continue
        first, _, extension = name.partition(".")
        if joined(folder, first) != key and key is not None:
            yield key, sample
            sample = {}
        key = joined(folder, first)
        sample[extension.lower()] = member
    if key is not None:
        yield key, sample


def _row(files: SourceFiles, path: str, sample: Sample) -> dict[str, Any]:
    image = next((sample[x] for x in IMAGE_EXTENSIONS if x in sample), None)
    has = f"the sample has {', '.join(sorted(sample))}"
    if image is None or image.link is not None:
        return {"wnid": None, "problem": f"image missing: {has}"}
    label: str | None = None
    problem: str | None = None
    if "cls" in sample:
        label = _read(files, path, sample["cls"]).decode("utf-8", "replace").strip()
        if "\ufffd" in label or not label.isprintable():
            label, problem = None, "label unknown: its cls is no text; raw integers are not read"
    elif "json" in sample:
        label, problem = _json_label(_read(files, path, sample["json"]))
    if not label:
        label, problem = None, problem or f"label unknown: {has}"
    return {"wnid": label, "offset": image.offset, "size": image.size, "problem": problem}


def _read(files: SourceFiles, path: str, member: Member) -> bytes:
    return files.read(path, member.offset, min(member.size, MAX_LABEL_BYTES))


def _json_label(data: bytes) -> tuple[str | None, str | None]:
    """The label in a sample's JSON, or why there is none."""
    try:
        content = json.loads(data)
        label = content.get("label", content.get("cls"))
    except (ValueError, AttributeError, RecursionError) as error:
        return None, f"label unknown: its json does not parse ({str(error)[: labels.SHOWN]})"
    if isinstance(label, str | int) and not isinstance(label, bool):
        return str(label).strip(), None
    return None, "label unknown: its json has no text or whole number as label"


def _with_plain_ids(table: pa.Table) -> pa.Table:
    """Keys alone where no two shards share one."""
    keys = [id.split("/", 1)[1] for id in table["id"].to_pylist()]
    return replaced(table, id=keys) if len({*keys}) == len(keys) else table


def _with_classes(files: SourceFiles, images: dict[str, pa.Table]) -> Listed:
    here = files.entries()[1]
    names: dict[str, str] = {}
    listed: list[str] = []
    if "LOC_synset_mapping.txt" in here:
        names = labels.read_names(files.read("LOC_synset_mapping.txt"), " ")
        listed = list(names)
    elif "classes.txt" in here:
        listed = [
            x.strip() for x in labels.text(files.read("classes.txt")).splitlines() if x.strip()
        ]
    told = {x for table in images.values() for x in table["wnid"].to_pylist() if x is not None}
    if not told or not all(map(NUMBER.fullmatch, told)):
        return Listed(images, names)
    count = max(map(int, told)) + 1
    if count > (len(listed) or MAX_CLASSES):
        raise UserError(
            f"{files.place('')} has class number {count - 1}; "
            f"{len(listed) or MAX_CLASSES} classes are known, counted from 0."
        )
    digits = len(str(count - 1))
    wnids = listed or [f"{i:0{digits}}" for i in range(count)]
    named = {x: wnids[int(x)] for x in told}
    relabelled = {
        split: replaced(table, wnid=[x and named[x] for x in table["wnid"].to_pylist()])
        for split, table in images.items()
    }
    return Listed(relabelled, names, tuple(sorted(wnids)))
