"""Rows of others' files: read, matched to images and classes, checked.

Every error names file and line, since such files have thousands.
"""

import csv
import gzip
import io
import re
import zlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import UserError
from pipeline.sources.listing import IMAGE_SUFFIXES

NAMED = 5  # images that an error message lists
SHOWN = 60  # characters of a faulty line that an error message shows
UNITS = {".parquet": "row", ".xml": "box"}

WHOLE_NUMBER = re.compile(r"-?[0-9]{1,9}")
CSV_IDS = {"id", "imageid"}  # how the first cell of a header reads, without case and underscores


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, unpacked where its name ends in .gz.

    Raises UserError where it is missing, damaged, not UTF-8 or blank.
    """
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8-sig")
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; check the name.") from error
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(
            f"{path} cannot be read ({error}); expected UTF-8 text, whole; fetch it again."
        ) from error
    if not text.strip():
        raise UserError(f"{path} is empty; it was cut off or never filled. Make it again.")
    return text


def read_lines(path: Path) -> list[tuple[int, str]]:
    """The lines of a file that are not blank, with their 1-based numbers, blanks stripped."""
    stripped = ((i, line.strip()) for i, line in enumerate(read_text(path).split("\n"), 1))
    return [(number, line) for number, line in stripped if line]


def read_csv(path: Path) -> list[tuple[int, list[str]]]:
    """The rows of a CSV file with their 1-based line numbers; neither header nor blank lines.

    A header is a first row that starts with `id` or `ImageId`. Raises UserError for broken quotes.
    """
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    rows = []
    try:
        for row in reader:
            if any(cell.strip() for cell in row):
                rows.append((reader.line_num, [cell.strip() for cell in row]))
    except csv.Error as error:
        raise UserError(
            f"{at(path, reader.line_num)} is no CSV ({error}); mend its quotes and line breaks."
        ) from error
    if rows and rows[0][1][0].lower().replace("_", "") in CSV_IDS:
        del rows[0]
    if not rows:
        raise UserError(f"{path} holds no rows but a header; it was cut off. Make it again.")
    return rows


def read_prediction_strings(path: Path) -> tuple[list[int], list[str], list[list[str]]]:
    """Line numbers, ids and words of a Kaggle file; the words of a row are quintuples
    `wnid x0 y0 x1 y1`, possibly none. Raises UserError for any other row."""
    numbers, ids, words = [], [], []
    for number, row in read_csv(path):
        if len(row) != 2 or len(row[1].split()) % 5:
            raise UserError(
                f"{at(path, number)} is {','.join(row)[:SHOWN]!r}; expected an id, a comma and "
                "groups of five words, `wnid x0 y0 x1 y1`."
            )
        numbers.append(number)
        ids.append(row[0])
        words.append(row[1].split())
    return numbers, ids, words


def at(path: Path, number: int) -> str:
    """The place of a fault: the file and its 1-based line, a Parquet file's row, an XML's box."""
    return f"{path} {UNITS.get(path.suffix, 'line')} {number}"


def brief(error: Exception) -> str:
    """A library's error, at most SHOWN characters of one line."""
    return " ".join(str(error).split())[:SHOWN]


def stem(image_id: str) -> str:
    """An id without folders and without an image file's suffix."""
    name = image_id.rpartition("/")[2]
    root, dot, suffix = name.rpartition(".")
    return root if dot and f".{suffix.lower()}" in IMAGE_SUFFIXES else name


def file_name_order(ids: Sequence[str]) -> np.ndarray:
    """The rows of `ids` sorted by file name, then folder: int64 [N]."""
    keys = [(name.rpartition("/")[2], name) for name in ids]
    return np.array(sorted(range(len(ids)), key=keys.__getitem__), np.int64)


def match_ids(names: Sequence[str], ids: Sequence[str]) -> np.ndarray:
    """For each name the row of the same id, else of the only id with the same stem, else -1."""
    rows = {name: row for row, name in enumerate(ids)}
    stems = [stem(name) for name in ids]
    counts = Counter(stems)
    by_stem = {name: row for row, name in enumerate(stems) if counts[name] == 1}
    return np.array([rows.get(x, by_stem.get(stem(x), -1)) for x in names], np.int64)


def find_rows(
    path: Path, numbers: Sequence[int], names: Sequence[str], ids: Sequence[str]
) -> np.ndarray:
    """The row of `ids` that each name in a file means: int64, as many as names.

    Raises UserError, naming the line, for a name that no image has or that several share.
    """
    rows = match_ids(names, ids)
    if (rows < 0).any():
        first = int(np.argmax(rows < 0))
        raise UserError(
            f"{at(path, numbers[first])} names image {names[first]!r}, which the ground truth "
            f"does not have, or has more than once by file name; its ids are such as {ids[0]!r}. "
            "Use these, and the file that belongs to this ground truth."
        )
    return rows


def check_once(path: Path, numbers: Sequence[int], rows: np.ndarray, ids: Sequence[str]) -> None:
    """Raise UserError unless the rows that a file's lines speak of are all of `ids`, each once."""
    found, firsts = np.unique(rows, return_index=True)
    if len(found) < len(rows):
        second = int(np.setdiff1d(np.arange(len(rows)), firsts)[0])
        first = int(np.argmax(rows == rows[second]))
        raise UserError(
            f"{at(path, numbers[second])} names image {ids[rows[second]]!r} again, after "
            f"{numbers[first]}; it would count twice. Keep one of them."
        )
    missing = np.setdiff1d(np.arange(len(ids)), found).tolist()
    if missing:
        named = ", ".join(ids[row] for row in missing[:NAMED])
        more = f" and {len(missing) - NAMED} more" if len(missing) > NAMED else ""
        raise UserError(
            f"{path} lacks {len(missing)} of {len(ids)} images: {named}{more}; figures over the "
            "rest would not compare. Add a line for each, or use the ground truth of those."
        )


def check_boxes(
    path: Path, numbers: Sequence[int], boxes: np.ndarray, sizes: np.ndarray | None
) -> None:
    """Raise UserError, naming the line, for a box turned round or outside its image.

    numbers: the line of each box; boxes: [K, 4]; sizes: (height, width) [K, 2], or None.
    x1 == width and y1 == height pass, since tools that count pixels from 1 write them.
    """
    turned = (boxes[:, :2] > boxes[:, 2:]).any(axis=1)
    if turned.any():
        first = int(np.argmax(turned))
        raise _box_error(path, numbers[first], boxes[first], "its minimum is above its maximum")
    outside = (boxes < 0).any(axis=1)
    if sizes is not None:
        limits = sizes[:, ::-1]
        outside |= ((boxes[:, :2] >= limits) | (boxes[:, 2:] > limits)).any(axis=1)
    if outside.any():
        first = int(np.argmax(outside))
        size = "" if sizes is None else " of {1} x {0} pixels".format(*sizes[first])
        raise _box_error(path, numbers[first], boxes[first], f"it is outside its image{size}")


def _box_error(path: Path, number: int, box: np.ndarray, fault: str) -> UserError:
    corners = " ".join(f"{value:g}" for value in box)
    return UserError(
        f"{at(path, number)} has corners {corners}: {fault}; expected x0 y0 x1 y1, inclusive "
        "pixels of the original image. Mend it, or leave it out."
    )


def class_indices(
    path: Path, numbers: Sequence[int], names: Sequence[str], classes: Sequence[str] | None
) -> np.ndarray:
    """The index of each class name in a file: int64. numbers: the line of each.

    Raises UserError, naming the line, for an unknown one, and where classes are but numbers.
    """
    if classes is None:
        raise UserError(
            f"{path} names classes by wnid, and the ground truth has only their numbers; give "
            "--classes FILE, a list of the wnids such as LOC_synset_mapping.txt."
        )
    index = {name: i for i, name in enumerate(classes)}
    found = np.array([index.get(name, -1) for name in names], np.int64)
    if (found < 0).any():
        first = int(np.argmax(found < 0))
        raise UserError(
            f"{at(path, numbers[first])} names class {names[first]!r}, which is none of the "
            f"{len(classes)} known, such as {classes[0]}; give --classes FILE with all of them, "
            "or mend the line."
        )
    return found


def slots(counts: np.ndarray) -> np.ndarray:
    """0, 1, ... within each group of so many."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)


def parquet_columns(path: Path, types: dict[str, pa.DataType]) -> dict[str, pa.Array]:
    """The named columns of a Parquet file, cast; `labels` may be missing."""
    if not path.is_file():
        raise UserError(f"{path} does not exist; check the name.")
    try:
        table = pq.read_table(path, partitioning=None)
        wanted = [name for name in types if name != "labels" or name in table.column_names]
        columns = {name: table[name].combine_chunks().cast(types[name]) for name in wanted}
    except (pa.ArrowException, KeyError, OSError) as error:
        raise UserError(
            f"{path} cannot be read ({brief(error)}); expected a Parquet file with columns "
            + ", ".join(f"{name} ({kind})" for name, kind in types.items())
        ) from error
    if not len(columns["id"]):
        raise UserError(f"{path} has no rows; expected one per image. Make it again.")
    if columns["id"].null_count:
        first = columns["id"].is_null().to_pylist().index(True)
        raise UserError(f"{at(path, first + 1)} has no id; expected that of an image. Mend it.")
    return columns
