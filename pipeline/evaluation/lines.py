"""Lines of others' files: read, matched to images and classes, checked.

Such files have thousands of lines, so columns are checked as a whole, and every error names file
and line.
"""

import csv
import gzip
import io
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.errors import NAMED, SHOWN, UserError
from pipeline.sources.listing import IMAGE_SUFFIXES

CSV_IDS = {"id", "imageid"}  # the first cell of a header, without case and underscores
IMAGE_SUFFIX = rf"(?i)\.({'|'.join(suffix[1:] for suffix in IMAGE_SUFFIXES)})$"

At = Callable[[int], str]  # names the file and the line of an element by its index


@dataclass(frozen=True, kw_only=True)
class Lines:
    """The lines of a file (rows if it is Parquet) that were read.

    numbers: int64 [K], each one's number in the file, counted from 1.
    """

    path: Path
    numbers: np.ndarray

    def at(self, index: int) -> str:
        """Name the file and the line of an element, for an error."""
        unit = "row" if self.path.suffix == ".parquet" else "line"
        return f"{self.path} {unit} {self.numbers[index]}"

    def repeat(self, counts: np.ndarray) -> "Lines":
        """Return the line of each of several elements per line; counts: int64 [K]."""
        return Lines(path=self.path, numbers=np.repeat(self.numbers, counts))


def read_text(path: Path) -> str:
    """Read a UTF-8 file, unpacked where its name ends in .gz.

    Raises UserError where it is missing, damaged or not UTF-8.
    """
    try:
        data = path.read_bytes()
        return (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8-sig")
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; check the name.") from error
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(
            f"{path} cannot be read ({error}); expected UTF-8 text, whole; fetch it again."
        ) from error


def read_lines(path: Path) -> tuple[Lines, pa.Array]:
    """Read the lines that are not blank, stripped: strings [K].

    Raises UserError as `read_text`, and where no line is left.
    """
    text = pc.utf8_trim_whitespace(pa.array(read_text(path).split("\n"), pa.string()))
    filled = np.flatnonzero(pc.not_equal(text, ""))
    if not len(filled):
        raise UserError(f"{path} is empty; it was cut off or never filled. Make it again.")
    return Lines(path=path, numbers=filled + 1), text.take(pa.array(filled))


def read_csv(path: Path) -> tuple[Lines, list[list[str]]]:
    """Read the rows of a CSV file that are not blank, cells stripped, without the header.

    A header is a first row that starts with `id` or `ImageId`. Raises UserError as `read_text`,
    for broken quotes, and where no row is left.
    """
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    numbers, rows = [], []
    try:
        for row in reader:
            cells = [cell.strip() for cell in row]
            if any(cells):
                numbers.append(reader.line_num)
                rows.append(cells)
    except csv.Error as error:
        raise UserError(
            f"{path} line {reader.line_num} is not CSV ({error}); repair its quotes and line "
            "breaks."
        ) from error
    header = bool(rows) and rows[0][0].lower().replace("_", "") in CSV_IDS
    if len(rows) == header:
        raise UserError(f"{path} has no rows but a header; it was cut off. Make it again.")
    return Lines(path=path, numbers=np.array(numbers[header:])), rows[header:]


def read_parquet(path: Path, types: dict[str, pa.DataType]) -> tuple[Lines, dict[str, pa.Array]]:
    """Read the named columns of a Parquet file, cast; `labels` may be missing.

    Raises UserError for another file, one without rows, and a row without an id.
    """
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
    lines = Lines(path=path, numbers=np.arange(table.num_rows) + 1)
    if not table.num_rows:
        raise UserError(f"{path} has no rows; expected one per image. Make it again.")
    nameless = np.flatnonzero(pc.is_null(columns["id"]))
    if len(nameless):
        raise UserError(f"{lines.at(nameless[0])} has no id; expected that of an image.")
    return lines, columns


def brief(error: Exception) -> str:
    """Return a library's error as at most SHOWN characters of one line."""
    return " ".join(str(error).split())[:SHOWN]


def list_lengths(lists: pa.Array) -> np.ndarray:
    """Return the elements of each list, 0 for null: int64."""
    return pc.fill_null(pc.list_value_length(lists), 0).to_numpy().astype(np.int64)


def slots(counts: np.ndarray) -> np.ndarray:
    """Count 0, 1, ... within each group; counts: int64 [G], the elements of each group."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)


def stems(ids: pa.Array) -> pa.Array:
    """Return ids without folders and without an image file's suffix."""
    names = pc.replace_substring_regex(ids, "(?s)^.*/", "")
    return pc.replace_substring_regex(names, IMAGE_SUFFIX, "")


def index_in(names: pa.Array, values: pa.Array) -> np.ndarray:
    """Return the index of each name among values, -1 where it is none: int64."""
    return pc.index_in(names, value_set=values).fill_null(-1).to_numpy().astype(np.int64)


def match_ids(names: pa.Array, ids: pa.Array) -> np.ndarray:
    """Return for each name the index of the same id, else of the only id with its stem, else -1."""
    indices = index_in(names, ids)
    if (indices < 0).any():
        ids_stems = stems(ids)
        codes = ids_stems.dictionary_encode().indices.to_numpy()
        alone = np.bincount(codes)[codes] == 1
        by_stem = index_in(stems(names), ids_stems)
        indices = np.where((indices < 0) & alone[by_stem], by_stem, indices)
    return indices


def find_images(at: At, names: pa.Array, ids: pa.Array) -> np.ndarray:
    """Return the index in `ids` of the image that each name means: int64.

    Raises UserError, naming the line, for a name that no image has or that several share.
    """
    indices = match_ids(names, ids)
    if (indices < 0).any():
        first = int(np.argmin(indices))
        raise UserError(
            f"{at(first)} names image {names[first].as_py()!r}, which the ground truth does not "
            f"have, or has more than once by file name; its ids are such as {ids[0].as_py()!r}. "
            "Use these, and the file that belongs to this ground truth."
        )
    return indices


def check_once(lines: Lines, images: np.ndarray, ids: pa.Array) -> None:
    """Raise UserError unless the lines name every image once; images: int64 [K], of each line."""
    named, firsts = np.unique(images, return_index=True)
    if len(named) < len(images):
        second = int(np.setdiff1d(np.arange(len(images)), firsts)[0])
        first = int(np.argmax(images == images[second]))
        raise UserError(
            f"{lines.at(second)} names image {ids[images[second]].as_py()!r} again, after "
            f"{lines.numbers[first]}; it would count twice. Keep one of them."
        )
    missing = np.setdiff1d(np.arange(len(ids)), named).tolist()
    if missing:
        shown = ", ".join(ids[image].as_py() for image in missing[:NAMED])
        more = f" and {len(missing) - NAMED} more" if len(missing) > NAMED else ""
        raise UserError(
            f"{lines.path} lacks {len(missing)} of {len(ids)} images: {shown}{more}; figures over "
            "the rest would not compare. Add a line for each, or use the ground truth of those."
        )


def check_boxes(at: At, boxes: np.ndarray, sizes: np.ndarray | None) -> None:
    """Raise UserError, naming the line, for a box turned round or outside its image.

    boxes: [K, 4]; sizes: (height, width) of each box's image [K, 2], or None. x1 == width and
    y1 == height pass, since tools that count pixels from 1 write them.
    """
    turned = (boxes[:, 0] > boxes[:, 2]) | (boxes[:, 1] > boxes[:, 3])
    outside = np.any(boxes < 0, axis=1)
    if sizes is not None:
        limits = sizes[:, ::-1]
        outside |= ((boxes[:, :2] >= limits) | (boxes[:, 2:] > limits)).any(axis=1)
    if not (turned | outside).any():
        return
    first = int(np.argmax(turned | outside))
    if turned[first]:
        fault = "its minimum is above its maximum"
    elif sizes is None:
        fault = "it is outside its image"
    else:
        fault = "it is outside its image of {1} x {0} pixels".format(*sizes[first])
    corners = " ".join(f"{value:g}" for value in boxes[first])
    raise UserError(
        f"{at(first)} has corners {corners}: {fault}; expected x0 y0 x1 y1, inclusive pixels of "
        "the original image. Repair it, or leave it out."
    )


def find_classes(at: At, names: pa.Array, classes: Sequence[str] | None) -> np.ndarray:
    """Return the index of each class name: int64.

    Raises UserError, naming the line, for an unknown name, and where `classes` is None: the
    ground truth has only numbers.
    """
    if classes is None and len(names):
        raise UserError(
            f"{at(0)} names classes by wnid, and the ground truth has only their numbers; a list "
            "of the classes is needed, such as LOC_synset_mapping.txt."
        )
    indices = index_in(names, pa.array(classes or (), pa.string()))
    if (indices < 0).any():
        first = int(np.argmin(indices))
        raise UserError(
            f"{at(first)} names class {names[first].as_py()!r}, which is none of the "
            f"{len(classes or ())} known. Repair the line, or list all classes."
        )
    return indices
