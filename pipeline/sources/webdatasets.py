"""WebDataset tars in general: an image and its label side by side under one key."""

import json
import re
from collections import Counter
from collections.abc import Iterator
from hashlib import blake2b
from itertools import groupby
from operator import itemgetter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import SHOWN, UserError
from pipeline.sources import labels
from pipeline.sources.archives import Member, is_archive, members
from pipeline.sources.files import SourceFiles, path_in
from pipeline.sources.labels import MAPPING
from pipeline.sources.listing import (
    Listing,
    ListingBuilder,
    Unread,
    changed,
    normalized,
    stored_array,
    with_columns,
)
from pipeline.sources.unread import add_members

SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev", "eval"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
LABEL_EXTENSIONS = ("cls", "json")
CLASSES = "classes.txt"
MAX_LABEL_BYTES = 1 << 20
MAX_CLASSES = 100  # without a list of them, if no more than a tenth of them occur
NUMBER = re.compile(r"(\d{1,9})(?:\.0*)?")
Row = dict[str, Any]  # columns of an image, as ListingBuilder.add takes them
NO_CLASS = r"^(?:-\d+(?:\.\d*)?|nan|NaN)$"  # stands for an unknown class


def shard_names(files: SourceFiles) -> dict[str, list[str]]:
    """Return the paths of the tars in the source and in its folders of splits, by split, in order.
    A word of the tar's name or its folder's gives the split: `train-000000.tar`,
    `imagenet-val-0001.tar`, `validation/00000.tar`; without such a word it is train."""
    shards: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for folder in ["", *(x for x in files.entries()[0] if x.lower() in SPLITS)]:
        for name in filter(is_archive, files.entries(folder)[1]):
            path = path_in(folder, name)
            words = re.split(r"[^a-z]+", path.lower())
            split = next((SPLITS[word] for word in words if word in SPLITS), "train")
            shards[split].append(path)
    return {split: paths for split, paths in shards.items() if paths}


def list_webdataset(files: SourceFiles) -> Listing:
    """List the images by split, and readable names of the classes. A class is the `cls` member's
    text, else the `label` (or `cls`) of the `json` member."""
    images, unread = {}, dict[str, Unread]()
    for split, paths in shard_names(files).items():
        builder = ListingBuilder()
        shards = files.ahead(lambda path: _rows(files, path), paths)
        for path, (rows, others) in zip(paths, shards, strict=True):
            add_members(unread, path, others)
            for row in rows:
                builder.add(**row)
        images[split] = _with_plain_ids(builder.table())
    return with_classes(files, images)._replace(unread=unread)


def _rows(files: SourceFiles, path: str) -> tuple[list[Row], list[str]]:
    """Return a row for each sample, in the order of the tar, and the members that are not read."""
    shard = path.rpartition("/")[2].rpartition(".")[0]
    parts = [(*_key_and_extension(member.name), member) for member in members(files, path)]
    rows, others = [], [member.name for key, _, member in parts if not key]
    for key, run in groupby(filter(itemgetter(0), parts), key=itemgetter(0)):
        named = [(extension, member) for _, extension, member in run]
        samples = _samples(files, path, named)
        rows += [{"id": f"{shard}/{key}", "path": path} | row for row in samples]
        image = next((x for x in IMAGE_EXTENSIONS if x in dict(named)), None)
        known = (image, *LABEL_EXTENSIONS)
        others += [member.name for extension, member in named if extension not in known]
    return rows, others


def _samples(files: SourceFiles, path: str, run: list[tuple[str, Member]]) -> Iterator[Row]:
    """Yield the columns of each sample in a run of members that share a key. An extension that
    repeats begins the next sample. Samples that would then have different members cannot be told
    apart, so each of their images is a problem."""
    samples: list[dict[str, Member]] = [{}]
    for extension, member in run:
        if extension in samples[-1]:
            samples.append({})
        samples[-1][extension] = member
    alike = all(sample.keys() == samples[0].keys() for sample in samples)
    for sample in samples:
        if alike:
            yield _row(files, path, sample)
        elif not sample.keys().isdisjoint(IMAGE_EXTENSIONS):
            yield {"wnid": None, "problem": "key repeated: no telling which label is this image's"}


def _key_and_extension(path: str) -> tuple[str, str]:
    """Split a path at the first dot of its last name; no key where it is hidden or has no dot."""
    folder, _, name = path.removeprefix("./").rpartition("/")
    start, dot, extension = name.partition(".")
    return (path_in(folder, start), extension.lower()) if start and dot else ("", "")


def _row(files: SourceFiles, path: str, sample: dict[str, Member]) -> Row:
    """Return the columns of an image besides id and path. sample: its members by extension."""
    image = next((sample[x] for x in IMAGE_EXTENSIONS if x in sample), None)
    has = f"the sample has {', '.join(sorted(sample))}"
    if image is None or image.link is not None:
        return {"wnid": None, "problem": f"image missing: {has}"}
    label, problem = None, None
    if "cls" in sample:
        label = _read(files, path, sample["cls"]).decode("utf-8", "replace").strip()
        if "\ufffd" in label or not label.isprintable():
            fault = "its cls is no text in UTF-8; raw integers are not read"
            label, problem = None, f"label unknown: {fault}"
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

    def with_key(table: pa.Table) -> pa.Table:
        return with_columns(table, id=pc.replace_substring_regex(table["id"], "^[^/]*/", ""))

    plain, first = changed(table, with_key), 0
    hashes = stored_array(max(table.num_rows, 1), np.uint64)
    for keys in plain["id"].chunks:
        digests = (blake2b(x.encode(), digest_size=8).digest() for x in keys.to_pylist())
        hashes[first : first + len(keys)] = np.frombuffer(b"".join(digests), np.uint64)
        first += len(keys)
    hashes.sort()
    return table if (hashes[1:] == hashes[:-1]).any() else plain


def with_classes(files: SourceFiles, images: dict[str, pa.Table]) -> Listing:
    """Return the listing, with names in place of class numbers. Where the labels are numbers they
    count the classes from 0, in the order of `LOC_synset_mapping.txt` or `classes.txt` (one per
    line) where one of these exists. A negative number or NaN is the image's problem. Raises
    UserError for numbers among names, and for one too large."""
    mapping = labels.read_names(files.read_optional(MAPPING), MAPPING)
    images = {split: changed(table, _with_unknown) for split, table in images.items()}
    columns = [pc.unique(table["wnid"]).drop_null() for table in images.values()]
    classes = {x for column in columns for x in column.to_pylist()}
    number_of = {x: int(match[1]) for x in classes if (match := NUMBER.fullmatch(x))}
    if not number_of:
        return Listing(images, mapping)
    if len(number_of) < len(classes):
        raise UserError(
            f"{files.location()} has class numbers ({min(number_of)[:SHOWN]!r}) beside names "
            f"({min(classes - {*number_of})[:SHOWN]!r}); write all labels as numbers from 0, or "
            "all as names."
        )
    wnids = [*mapping] or _listed_classes(files)
    count, known = max(number_of.values()) + 1, len(wnids) or max(MAX_CLASSES, 10 * len(classes))
    if count > known:
        limit = f"{known} classes are known" if wnids else f"without a list {known} are allowed"
        raise UserError(
            f"{files.location()} has class number {count - 1} among {len(classes)} that occur; "
            f"{limit}, counted from 0. Repair the label, or list all classes in classes.txt."
        )
    wnids = wnids or [f"{i:0{len(str(count - 1))}}" for i in range(count)]
    numbers = pa.array([*number_of], pa.string())
    names = pa.array([wnids[number] for number in number_of.values()], pa.string())

    def with_name(table: pa.Table) -> pa.Table:
        return with_columns(table, wnid=names.take(pc.index_in(table["wnid"], numbers)))

    relabelled = {split: changed(table, with_name) for split, table in images.items()}
    return Listing(relabelled, mapping, tuple(sorted(wnids)))


def _with_unknown(table: pa.Table) -> pa.Table:
    """Return the table with a problem in place of each label that stands for no class."""
    none = pc.match_substring_regex(table["wnid"], NO_CLASS)
    problem = pc.binary_join_element_wise("label unknown: ", table["wnid"], " is no class", "")
    problem = pc.if_else(none, problem, None)
    return with_columns(
        table,
        wnid=pc.if_else(none, None, table["wnid"]),
        problem=pc.coalesce(table["problem"], problem),
    )


def _listed_classes(files: SourceFiles) -> list[str]:
    """Return the lines of classes.txt; equal ones with their numbers, which keep them apart. Raises
    UserError for a blank line between others, which would shift the numbers."""
    names = [*map(normalized, labels.lines(files.read_optional(CLASSES)))]
    while names and not names[-1]:
        names.pop()
    if "" in names:
        raise UserError(
            f"{files.location(CLASSES)} line {names.index('') + 1} is blank; write a class on "
            "each line, since the lines number them."
        )
    counts = Counter(names)
    return [f"{x} ({i})" if counts[x] > 1 else x for i, x in enumerate(names)]
