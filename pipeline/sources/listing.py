"""A collection's images in columns, a hundred bytes each, which lie in files mapped into memory.
The files are temporary and have no names: their space is free once nothing refers to them."""

import hashlib
import io
import os
import tempfile
import unicodedata
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import PurePosixPath
from typing import Any, NamedTuple, TypedDict

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.sources.annotations import Box
from pipeline.storage import naming_full_disk

IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".gif", ".tif"),
    *(".tiff", ".avif", ".jp2", ".heic", ".heif", ".jxl"),  # the last three cannot be decoded
)
BATCH = 4096  # rows that wait as Python objects
CHUNK = 1 << 19  # rows of a file, and about as many in memory at once; a multiple of 8

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
    """A collection as its layout describes it. images: rows by split, train first. names: readable
    ones by wnid. classes: all wnids, sorted; None where only the train images name them. unread:
    what is not read within files."""

    images: dict[str, pa.Table]
    names: dict[str, str]
    classes: tuple[str, ...] | None = None
    unread: dict[str, Unread] | None = None


class ListingBuilder:
    """Collects the rows of one split. schema: SCHEMA with columns after it, if any."""

    def __init__(self, schema: pa.Schema = SCHEMA) -> None:
        self._schema = schema
        self._chunks: list[pa.Table] = []
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
        extra: tuple[Any, ...] = (),
    ) -> None:
        """Add one image, see SCHEMA. A name or class that is not UTF-8 is the image's problem."""
        wnid = wnid and normalized(wnid)
        if wnid and _escaped(wnid) != wnid:
            wnid, problem = None, "label unknown: it is not UTF-8"
        if _escaped(f"{id}{path}") != f"{id}{path}":
            id, path = _escaped(id), _escaped(path)
            problem = "file name is not UTF-8: rename it"
        note, label = note and _escaped(note), None
        sizes = box_size or (None, None)
        self._rows.append(
            (id, path, offset, size, wnid, label, boxes, *sizes, note, problem, *extra)
        )
        if len(self._rows) == BATCH:
            self._flush()

    def table(self, *order: str) -> pa.Table:
        """Return all rows, sorted by the text columns `order`; equal ones keep their order."""
        self._flush()
        self._store()
        chunks, self._chunks = self._chunks, []
        if not chunks:
            return self._schema.empty_table()
        if order:
            for number, chunk in enumerate(chunks):
                chunks[number] = stored(_sorted(chunk, order))
            if len(chunks) > 1:
                chunks = [stored(_sorted(x, order)) for x in _ranges(chunks, order)]
        return pa.concat_tables(chunks)

    def _flush(self) -> None:
        if self._rows:
            columns = dict(zip(self._schema.names, zip(*self._rows, strict=True), strict=True))
            self._batches.append(pa.RecordBatch.from_pydict(columns, self._schema))
            self._rows = []
        if len(self._batches) * BATCH >= CHUNK:
            self._store()

    def _store(self) -> None:
        if self._batches:
            self._chunks.append(stored(pa.Table.from_batches(self._batches)))
            self._batches = []


def stored(table: pa.Table) -> pa.Table:
    """Return the rows in one chunk, mapped from a temporary file."""
    with (
        naming_full_disk(tempfile.gettempdir()),
        tempfile.NamedTemporaryFile(prefix="listing-") as file,
    ):
        with pa.ipc.new_file(file, table.schema) as writer:
            writer.write(table.combine_chunks())
        file.flush()
        with pa.memory_map(file.name) as source:
            return pa.ipc.open_file(source).read_all()


def stored_array(length: int, dtype: type[np.generic]) -> np.ndarray:
    """Return an array of zeros, mapped from a temporary file. length: from 1."""
    with naming_full_disk(tempfile.gettempdir()), tempfile.TemporaryFile() as file:
        # Writing to a mapped page without space would kill the process.
        os.posix_fallocate(file.fileno(), 0, length * np.dtype(dtype).itemsize)
        return np.asarray(np.memmap(file, dtype, "r+", shape=length))


def chunks(table: pa.Table) -> Iterator[pa.Table]:
    """Yield the rows in pieces that fit into memory."""
    return (pa.Table.from_batches([batch]) for batch in table.to_batches(max_chunksize=CHUNK))


def changed(table: pa.Table, function: Callable[[pa.Table], pa.Table]) -> pa.Table:
    """Return the rows as `function` changes them, of which it gets some at a time."""
    pieces = [stored(function(chunk)) for chunk in chunks(table)]
    return pa.concat_tables(pieces) if pieces else function(table)


def taken(table: pa.Table, rows: np.ndarray) -> pa.Table:
    """Return a copy of the rows with these numbers, in their order."""
    # Table.take would gather the texts of all chunks.
    order = np.argsort(rows, kind="stable")
    ascending, first, parts = rows[order].astype(np.int64), 0, []
    for batch in table.to_batches():
        count = int(np.searchsorted(ascending, first + batch.num_rows))
        if count:
            parts.append(batch.take(pa.array(ascending[:count] - first)))
        ascending, first = ascending[count:], first + batch.num_rows
    return pa.Table.from_batches(parts, table.schema).combine_chunks().take(np.argsort(order))


def _sorted(table: pa.Table, order: Sequence[str]) -> pa.Table:
    table = table.combine_chunks()  # quicker to take from
    return table.take(pc.sort_indices(table, [(name, "ascending") for name in order]))


def _ranges(runs: list[pa.Table], order: Sequence[str]) -> Iterator[pa.Table]:
    """Yield the rows of sorted tables in consecutive ranges of `order`, each about a table long."""

    def key(run: pa.Table, row: int) -> list[tuple[bool, str]]:
        values = (run[name][row].as_py() for name in order)
        return [(value is None, value or "") for value in values]  # null comes last

    interval = max(1, CHUNK // len(runs))
    samples = sorted(key(run, row) for run in runs for row in range(0, run.num_rows, interval))
    first = [0] * len(runs)
    for sample in [*samples[len(runs) :: len(runs)], None]:
        last = [
            run.num_rows
            if sample is None
            else bisect_left(range(run.num_rows), sample, key=partial(key, run))
            for run in runs
        ]
        parts = [run[a:b] for run, a, b in zip(runs, first, last, strict=True)]
        first = last
        yield pa.concat_tables(parts)


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
    return changed(table, partial(_labelled, classes=pa.array(classes, pa.string())))


def _labelled(table: pa.Table, classes: pa.Array) -> pa.Table:
    labels = pc.index_in(table["wnid"], classes)
    foreign = pc.binary_join_element_wise(
        "label unknown: no train image has class ", table["wnid"], ""
    )
    unnamed = "label unknown: no folder, annotation or list names its class"
    reason = pc.if_else(pc.is_null(labels), pc.fill_null(foreign, unnamed), None)
    problems = pc.coalesce(table["problem"], reason)
    labels = pc.if_else(pc.is_null(problems), labels, pa.scalar(None, pa.int32()))
    return with_columns(table, label=labels, problem=problems)


class _Hash(io.RawIOBase):
    """A file of which nothing but the SHA-256 is kept."""

    def __init__(self) -> None:
        self.sha256 = hashlib.sha256()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.sha256.update(data)
        return len(data)


def digest(table: pa.Table) -> str:
    """Return the hexadecimal SHA-256 of the rows as Parquet, which no chunks or buffers change."""
    file = _Hash()
    with pq.ParquetWriter(file, table.schema, compression="none", use_dictionary=False) as writer:
        for first in range(0, table.num_rows, CHUNK):
            writer.write_table(table.slice(first, CHUNK).combine_chunks())
    return file.sha256.hexdigest()


def _escaped(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()
