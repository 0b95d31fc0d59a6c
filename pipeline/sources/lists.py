"""A list of images: one CSV or Parquet file with path, label and, where known, boxes of each."""

import csv
import io
import posixpath
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial, reduce
from itertools import chain, groupby
from operator import itemgetter
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.errors import NAMED, SHOWN, UserError
from pipeline.sources.annotations import parse_boxes, parse_size
from pipeline.sources.files import SourceFiles, is_list
from pipeline.sources.listing import BATCH, SCHEMA, Listing, ListingBuilder, Unread
from pipeline.sources.webdatasets import SPLITS, with_classes

NEEDED, CORNERS, SIZE = ("path", "label"), ("x0", "y0", "x1", "y1"), ("width", "height")
KNOWN = (*NEEDED, "split", *CORNERS, *SIZE)
SCHEMES = ("s3", "gs", "gcs", "abfs", "abfss", "file")  # of URIs that may be in a list

Row = dict[str, Any]  # texts by column
LINES = pa.schema([*SCHEMA, pa.field("split", pa.string()), pa.field("line", pa.string())])


def list_rows(files: SourceFiles) -> Listing:
    """List the images by split, train without a column `split`, each with all boxes of its lines.
    Columns: docs/formats.md. A line that cannot be used is listed with its problem. Raises
    UserError where the file is no such list, and where two lines of one image contradict."""
    if not is_list(files.only or ""):
        raise UserError(
            f"source {files.source} is no .csv or .parquet file, which the list layout reads; name "
            "the file itself."
        )
    columns, rows = _columns_and_rows(files)
    lines = ListingBuilder(LINES)
    for line, row in rows:
        path, problem = _path(files, row.get("path") or "")
        lines.add(id=path or f"({line})", path=path, **_image(line, row, problem))
    builders = {split: ListingBuilder() for split in ("train", "val", "test")}
    batches = lines.table("id").to_batches(BATCH)
    in_order = chain.from_iterable(batch.to_pylist() for batch in batches)
    for id, same in groupby(in_order, key=itemgetter("id")):
        image = reduce(partial(_merged, files.location()), same)
        row = {name: image[name] for name in ("path", "wnid", "boxes", "note", "problem")}
        builders[image["split"] or "train"].add(id=id, box_size=_size(image), **row)
    tables = {split: builder.table() for split, builder in builders.items()}
    others = [name for name in columns if name not in KNOWN]
    reason = f"column: none of {', '.join(KNOWN)}"
    unread = {reason: Unread(files=len(others), examples=others[:NAMED])} if others else None
    return with_classes(files, tables)._replace(unread=unread)


def _columns_and_rows(files: SourceFiles) -> tuple[list[str], Iterator[tuple[str, Row]]]:
    """Return the columns' names, and each line with its number. Raises UserError."""
    location, name = files.location(), files.only or ""
    try:
        file = files.open(name)
    except OSError as error:
        raise UserError(f"{location} cannot be read ({error.strerror}); check its name.") from error
    if not name.lower().endswith(".csv"):
        return _parquet_rows(file, location)
    reader = csv.reader(io.TextIOWrapper(file, "utf-8-sig", "replace", newline=""), strict=True)
    with _naming_line(reader, location):
        columns = _checked_columns(next(reader, []), location)
    return columns, _csv_rows(reader, columns, location)


def _parquet_rows(file: BinaryIO, location: str) -> tuple[list[str], Iterator[tuple[str, Row]]]:
    with _refusing_damage(location):
        parquet = pq.ParquetFile(file)
        names = parquet.schema_arrow.names
    columns = _checked_columns(names, location)
    known = {name: x for name, x in zip(names, columns, strict=True) if x in KNOWN}

    def rows() -> Iterator[Row]:
        with _refusing_damage(location):
            for batch in parquet.iter_batches(BATCH, columns=[*known]):
                table = pa.Table.from_batches([batch])
                table = table.rename_columns([known[name] for name in table.column_names])
                table = table.cast(pa.schema([(name, pa.string()) for name in table.column_names]))
                table.validate(full=True)
                yield from table.to_pylist()

    return columns, ((f"row {number}", row) for number, row in enumerate(rows(), 1))


@contextmanager
def _refusing_damage(location: str) -> Iterator[None]:
    """Raise UserError where a Parquet file cannot be read."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        detail = " ".join(str(error).split())[: 2 * SHOWN]
        raise UserError(
            f"{location} cannot be read ({detail}); expected a Parquet file with text or numbers "
            "in its columns."
        ) from error


def _csv_rows(reader: Any, columns: list[str], location: str) -> Iterator[tuple[str, Row]]:
    with _naming_line(reader, location):
        for cells in filter(None, reader):
            named = zip(columns, map(str.strip, cells), strict=False)
            row: Row = {name: cell for name, cell in named if name in KNOWN}
            if len(cells) > len(columns):
                row["problem"] = f"line damaged: {len(cells)} cells below {len(columns)} names"
            yield f"line {reader.line_num}", row


@contextmanager
def _naming_line(reader: Any, location: str) -> Iterator[None]:
    """Raise UserError, naming the line, where a CSV reader fails."""
    try:
        yield
    except csv.Error as error:
        raise UserError(
            f"{location} line {reader.line_num} is not CSV ({error}); repair its quotes."
        ) from error


def _checked_columns(names: Iterable[str], location: str) -> list[str]:
    """Return the names of columns, small. Raises UserError where one is missing or comes twice."""
    columns = [name.strip().lower() for name in names]
    groups = [NEEDED, *(group for group in (CORNERS, SIZE) if {*group} & {*columns})]
    missing = [name for group in groups for name in group if name not in columns]
    twice = [name for name in KNOWN if columns.count(name) > 1]
    if missing or twice:
        fault = f"lacks {', '.join(missing)}" if missing else f"has {twice[0]} twice"
        shown = ", ".join(" ".join(name.split()) for name in columns)[: 4 * SHOWN]
        raise UserError(
            f"{location} {fault} among its columns ({shown}); needed: path, label; known besides: "
            "split, x0, y0, x1, y1, width and height. In CSV the first line names them, separated "
            "by commas."
        )
    return columns


def _path(files: SourceFiles, text: str) -> tuple[str, str | None]:
    """Return a path relative to the list's folder where it lies in it, else absolute, or a URI.
    With it comes the reason why it cannot be read."""
    if not text or "\0" in text:
        return "", "path missing: its cell is empty or has a zero byte"
    scheme, separator, _ = text.partition("://")
    if separator and scheme not in SCHEMES:
        return text, f"path not readable: {scheme[:SHOWN]}:// is none of {', '.join(SCHEMES)}"
    try:
        if separator:
            return storage.absolute(text), None
    except ValueError as error:
        return text, f"path not readable: {error}"
    folder = "" if files.remote else str(storage.local_path(storage.parent(files.source)))
    return posixpath.normpath(posixpath.join(folder, text)).removeprefix(f"{folder}/"), None


def _image(line: str, row: Row, problem: str | None) -> dict[str, Any]:
    """Return what a line says of its image, for a ListingBuilder. problem: that of its path."""
    label, split = ((row.get(name) or "").strip() for name in ("label", "split"))
    problem = row.get("problem") or problem
    if problem is None and "split" in row and split.lower() not in SPLITS:
        problem = f"split unknown: {split[:SHOWN]!r} is none of {', '.join(SPLITS)}"
    if problem is None and not label.isprintable():
        problem = f"label unknown: {label[:SHOWN]!r} is no text"
    corners, texts = ([row.get(name) or "" for name in names] for names in (CORNERS, SIZE))
    boxes, note = parse_boxes([corners] if any(corners) else [])
    size = None
    if boxes and any(texts):
        size = parse_size(*texts)
        if size is None:
            boxes, note = (), f"boxes dropped: {' x '.join(texts)[:SHOWN]} is no size"
    return {
        "wnid": label if label.isprintable() and label else None,
        "boxes": boxes,
        "box_size": size,
        "note": f"{line}: {note}" if note else None,
        "problem": problem,
        "extra": (SPLITS.get(split.lower()), line),
    }


def _size(image: Row) -> tuple[int, int] | None:
    return image["box_width"] and (image["box_width"], image["box_height"])


def _merged(location: str, image: Row, other: Row) -> Row:
    """Return an image's row with the boxes of another line. Raises UserError where they differ."""
    facts = {"label": (image["wnid"], other["wnid"]), "split": (image["split"], other["split"])}
    if image["boxes"] and other["boxes"]:
        facts["size"] = _size(image), _size(other)
    for name, (first, second) in facts.items():
        if first != second and (name == "size" or (first and second)):
            raise UserError(
                f"{location}: {image['line']} and {other['line']} give {image['id']!r} the {name} "
                f"{first} and {second}; keep one of them."
            )
    return {name: value or other[name] for name, value in image.items()} | {
        "boxes": image["boxes"] + other["boxes"],
        "note": "; ".join(filter(None, (image["note"], other["note"]))) or None,
    }
