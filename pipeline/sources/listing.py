"""A collection's images in columns, a hundred bytes each: a tenth of what Python objects take."""

import hashlib
import unicodedata
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any, NamedTuple, TypedDict

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.sources.annotations import Box

IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".gif", ".tif"),
    *(".tiff", ".avif", ".jp2", ".heic", ".heif", ".jxl"),  # the last three cannot be decoded
)
BATCH = 4096  # rows that wait as Python objects

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("path", pa.string()),  # of a file, relative to the source, with forward slashes
        ("offset", pa.int64()),  # of the image in that file, in bytes; null: it is the whole file
        ("size", pa.int64()),  # of the image, in bytes; null as above
        ("wnid", pa.string()),  # null where unknown
        ("label", pa.int32()),  # position of the wnid in the classes; null beside a problem
        # inclusive [x0, y0, x1, y1], neither sorted nor clipped yet, in pixels of an image of
        # box_width x box_height, of the file's own size where those are null
        ("boxes", pa.list_(pa.list_(pa.int32(), 4))),
        ("box_width", pa.int32()),
        ("box_height", pa.int32()),
        ("note", pa.string()),  # an oddity of the labels that leaves the image usable
        ("problem", pa.string()),  # the reason why it cannot be used, as `kind: detail`
    ]
)


class Unread(TypedDict):
    """The number of files that have one reason, and the first of each of up to NAMED folders."""

    files: int
    examples: list[str]


class Listing(NamedTuple):
    """A collection as its layout describes it.

    images: rows by split, train first. names: readable ones by wnid. classes: all wnids, sorted;
    None where only the train images name them. unread: what is not read within files.
    """

    images: dict[str, pa.Table]
    names: dict[str, str]
    classes: tuple[str, ...] | None = None
    unread: dict[str, Unread] | None = None


class ListingBuilder:
    """Collects the rows of one split."""

    def __init__(self) -> None:
        self._batches: list[pa.RecordBatch] = []
        self._rows: list[tuple[Any, ...]] = []

    def add(
        self,
        *,
        id: str,
        path: str,
        wnid: str | None,
        offset: int | None = None,
        size: int | None = None,
        boxes: Sequence[Box] = (),
        box_size: tuple[int, int] | None = None,
        note: str | None = None,
        problem: str | None = None,
    ) -> None:
        """Add one image, see SCHEMA. A name or class that is not UTF-8 is the image's problem."""
        wnid = wnid and normalized(wnid)
        if wnid and _escaped(wnid) != wnid:
            wnid, problem = None, "label unknown: it is not UTF-8"
        if _escaped(f"{id}{path}") != f"{id}{path}":
            id, path = _escaped(id), _escaped(path)
            problem = "file name is not UTF-8: rename it"
        note, label = note and _escaped(note), None
        self._rows.append(
            (id, path, offset, size, wnid, label, boxes, *(box_size or (None, None)), note, problem)
        )
        if len(self._rows) == BATCH:
            self._flush()

    def table(self, *order: str) -> pa.Table:
        """Return all rows, sorted by the columns `order`; equal ones keep their order."""
        self._flush()
        table = pa.Table.from_batches(self._batches, SCHEMA)
        self._batches = []
        keys = [(name, "ascending") for name in order]
        return table.take(pc.sort_indices(table, keys)).combine_chunks() if keys else table

    def _flush(self) -> None:
        if self._rows:
            columns = dict(zip(SCHEMA.names, zip(*self._rows, strict=True), strict=True))
            self._batches.append(pa.RecordBatch.from_pydict(columns, SCHEMA))
            self._rows = []


def normalized(text: str) -> str:
    """Return text in Unicode's form NFC without outer blanks: what looks the same is the same."""
    return unicodedata.normalize("NFC", text).strip()


def is_image(name: str) -> bool:
    """Return whether a file of this name is taken for an image."""
    return name.lower().endswith(IMAGE_SUFFIXES)


def stem(path: str) -> str:
    """Return the last name of a path without its suffix."""
    return PurePosixPath(path).stem


def with_columns(table: pa.Table, **columns: Any) -> pa.Table:
    """Return the rows with other values in these columns of SCHEMA."""
    for name, column in columns.items():
        field = SCHEMA.field(name)
        values = column if isinstance(column, pa.ChunkedArray) else pa.array(column, field.type)
        table = table.set_column(SCHEMA.get_field_index(name), field, values)
    return table


def with_labels(table: pa.Table, classes: Sequence[str]) -> pa.Table:
    """Return the rows with their labels, and with a problem where `classes` lacks the wnid."""
    labels = pc.index_in(table["wnid"], pa.array(classes, pa.string()))
    foreign = pc.binary_join_element_wise(
        "label unknown: no train image has class ", table["wnid"], ""
    )
    unnamed = "label unknown: no folder, annotation or list names its class"
    reason = pc.if_else(pc.is_null(labels), pc.fill_null(foreign, unnamed), None)
    problems = pc.coalesce(table["problem"], reason)
    labels = pc.if_else(pc.is_null(problems), labels, pa.scalar(None, pa.int32()))
    # In one chunk: taking rows out of many would gather all of them each time.
    return with_columns(table, label=labels, problem=problems).combine_chunks()


def digest(table: pa.Table) -> str:
    """Return the hexadecimal SHA-256 of the rows' values, which no chunks or buffers change."""
    sha = hashlib.sha256()
    for name in table.column_names:
        _update(sha, pa.concat_arrays(table[name].chunks) if table.num_rows else table[name])
    return sha.hexdigest()


def _update(sha: Any, array: pa.Array) -> None:
    if not len(array):
        return
    sha.update(np.packbits(array.is_valid().to_numpy(zero_copy_only=False)))
    if pa.types.is_nested(array.type):
        if pa.types.is_list(array.type):  # not of a fixed size
            _update_numbers(sha, pc.list_value_length(array))
        _update(sha, array.flatten())
    elif pa.types.is_string(array.type):
        filled = pc.fill_null(array, "")
        _update_numbers(sha, pc.binary_length(filled))
        offsets = np.frombuffer(filled.buffers()[1], np.int32)[filled.offset :][: len(filled) + 1]
        if offsets[-1] > offsets[0]:
            sha.update(memoryview(filled.buffers()[2])[offsets[0] : offsets[-1]])
    else:
        _update_numbers(sha, array)


def _update_numbers(sha: Any, array: pa.Array) -> None:
    sha.update(np.ascontiguousarray(pc.fill_null(array, 0).to_numpy(zero_copy_only=False)))


def _escaped(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()
