"""WebDataset tars in general: an image and its label side by side under one key."""

import json
import re
from itertools import groupby
from operator import itemgetter
from typing import Any

import pyarrow as pa

from pipeline.errors import SHOWN, UserError
from pipeline.sources import labels
from pipeline.sources.archives import Member, is_archive, members
from pipeline.sources.files import SourceFiles, path_in
from pipeline.sources.listing import Listing, ListingBuilder, with_columns

SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
MAX_LABEL_BYTES = 1 << 20
MAX_CLASSES = 1 << 20
NUMBER = re.compile(r"\d{1,9}")


def shard_names(files: SourceFiles) -> dict[str, list[str]]:
    """Return the paths of the tars in the source and in its folders of splits, by split, in order.

    A word of the tar's name or its folder's gives the split: `train-000000.tar`,
    `imagenet-val-0001.tar`, `validation/00000.tar`; without such a word it is train.
    """
    shards: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for folder in ["", *(x for x in files.entries()[0] if x.lower() in SPLITS)]:
        for name in filter(is_archive, files.entries(folder)[1]):
            path = path_in(folder, name)
            words = re.split(r"[^a-z]+", path.lower())
            split = next((SPLITS[word] for word in words if word in SPLITS), "train")
            shards[split].append(path)
    return {split: paths for split, paths in shards.items() if paths}


def list_webdataset(files: SourceFiles) -> Listing:
    """List the images by split, and readable names of the classes.

    A class is the `cls` member's text, else the `label` (or `cls`) of the `json` member. Where all
    are numbers they count the classes from 0, in the order of `LOC_synset_mapping.txt` or
    `classes.txt` (one per line) where one of these exists.
    """
    images = {}
    for split, paths in shard_names(files).items():
        builder = ListingBuilder()
        for rows in files.ahead(lambda path: _rows(files, path), paths):
            for row in rows:
                builder.add(**row)
        images[split] = _with_plain_ids(builder.table())
    return _with_classes(files, images)


def _rows(files: SourceFiles, path: str) -> list[dict[str, Any]]:
    """Return a row for each run of members that share a key."""
    shard = path.rpartition("/")[2].rpartition(".")[0]
    parts = ((*_key_and_extension(member.name), member) for member in members(files, path))
    return [
        {"id": f"{shard}/{key}", "path": path} | _row(files, path, {x: y for _, x, y in run})
        for key, run in groupby(filter(itemgetter(0), parts), key=itemgetter(0))
    ]


def _key_and_extension(path: str) -> tuple[str, str]:
    """Split a path at the first dot of its last name; no key where it is hidden or has no dot."""
    folder, _, name = path.removeprefix("./").rpartition("/")
    start, dot, extension = name.partition(".")
    return (path_in(folder, start), extension.lower()) if start and dot else ("", "")


def _row(files: SourceFiles, path: str, sample: dict[str, Member]) -> dict[str, Any]:
    """Return the columns of an image besides id and path. sample: its members by extension."""
    image = next((sample[x] for x in IMAGE_EXTENSIONS if x in sample), None)
    has = f"the sample has {', '.join(sorted(sample))}"
    if image is None or image.link is not None:
        return {"wnid": None, "problem": f"image missing: {has}"}
    label, problem = None, None
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
    """Return the label in a sample's JSON, or the reason why it has none."""
    try:
        content = json.loads(data)
        label = content.get("label", content.get("cls"))
    except (ValueError, AttributeError, RecursionError) as error:
        return None, f"label unknown: its json does not parse ({str(error)[:SHOWN]})"
    if isinstance(label, str | int) and not isinstance(label, bool):
        return str(label).strip(), None
    return None, "label unknown: its json has no text or whole number as label"


def _with_plain_ids(table: pa.Table) -> pa.Table:
    """Return the table with keys alone as ids where no two shards share a key."""
    keys = [id.split("/", 1)[1] for id in table["id"].to_pylist()]
    return with_columns(table, id=keys) if len({*keys}) == len(keys) else table


def _with_classes(files: SourceFiles, images: dict[str, pa.Table]) -> Listing:
    """Return the listing, with wnids in place of class numbers."""
    names = labels.read_names(files.read_optional("LOC_synset_mapping.txt"), " ")
    wnids = [*names] or list(filter(None, labels.lines(files.read_optional("classes.txt"))))
    classes = {x for table in images.values() for x in table["wnid"].to_pylist() if x is not None}
    if not classes or not all(map(NUMBER.fullmatch, classes)):
        return Listing(images, names)
    count, known = max(map(int, classes)) + 1, len(wnids) or MAX_CLASSES
    if count > known:
        raise UserError(
            f"{files.location()} has class number {count - 1}; {known} classes are known, "
            "counted from 0."
        )
    wnids = wnids or [f"{i:0{len(str(count - 1))}}" for i in range(count)]
    wnid_of = {None: None} | {x: wnids[int(x)] for x in classes}
    relabelled = {
        split: with_columns(table, wnid=[wnid_of[x] for x in table["wnid"].to_pylist()])
        for split, table in images.items()
    }
    return Listing(relabelled, names, tuple(sorted(wnids)))
