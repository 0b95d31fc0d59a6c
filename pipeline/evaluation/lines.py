"""Lines of others' files: read, matched to images and classes, and checked column by column."""

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
SPLIT = r"(?is)^(?:.*/)?(?P<split>train|val|test)(?:id|idation|ing)?/"  # the last folder of one
IMAGE_SUFFIX = rf"(?i)\.({'|'.join(suffix[1:] for suffix in IMAGE_SUFFIXES)})$"


class MissingClassesError(UserError):
    """Classes are named, and the ground truth has only their numbers."""


@dataclass(frozen=True, kw_only=True)
class Lines:
    """The elements that were read from a file. at: names file and line of one, by its index."""

    path: Path
    at: Callable[[int], str]

    def parts(self, counts: np.ndarray, name: str) -> "Lines":
        """Return the parts of each element, `name` 1, 2 ... of it; counts: int64 [K]."""
        owners, numbers = np.repeat(np.arange(len(counts)), counts), slots(counts) + 1
        return Lines(path=self.path, at=lambda i: f"{self.at(owners[i])} {name} {numbers[i]}")

    def refuse(self, wrong: np.ndarray, fault: str | Callable[[int], str], remedy: str) -> None:
        """Raise UserError with the fault of the first that is wrong (bool [K]), if any is."""
        if wrong.any():
            first = int(np.argmax(wrong))
            text = fault if isinstance(fault, str) else fault(first)
            raise UserError(f"{self.at(first)} {text}; {remedy}.")


def _numbered(path: Path, numbers: np.ndarray, unit: str = "line") -> Lines:
    """Name elements by their numbers in the file, int64 [K], counted from 1."""
    return Lines(path=path, at=lambda i: f"{path} {unit} {numbers[i]}")


def read_text(path: Path) -> str:
    """Read a UTF-8 file, unpacked where its name ends in .gz. Raises UserError where it is missing,
    damaged or not UTF-8."""
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
    """Read the lines that are not blank, stripped: strings [K]. Raises UserError as `read_text`,
    and where no line is left."""
    text = pc.utf8_trim_whitespace(pa.array(read_text(path).split("\n"), pa.string()))
    filled = np.flatnonzero(pc.not_equal(text, ""))
    if not len(filled):
        raise UserError(f"{path} is empty; it was cut off or never filled. Make it again.")
    return _numbered(path, filled + 1), text.take(pa.array(filled))


def read_csv(path: Path) -> tuple[Lines, list[list[str]]]:
    """Read the rows of a CSV file that are not blank, cells stripped, without a header, which is a
    first row that starts with `id` or `ImageId`. Raises UserError."""
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
            f"{path} line {reader.line_num} is not CSV ({error}); repair its quotes."
        ) from error
    header = bool(rows) and rows[0][0].lower().replace("_", "") in CSV_IDS
    if len(rows) == header:
        raise UserError(f"{path} has no rows but a header; it was cut off. Make it again.")
    return _numbered(path, np.array(numbers[header:])), rows[header:]


def read_parquet(path: Path, types: dict[str, pa.DataType]) -> tuple[Lines, dict[str, pa.Array]]:
    """Read the named columns of a Parquet file, cast; `labels` may be missing. Raises UserError for
    another file, one without rows, and a row without an id."""
    if not path.is_file():
        raise UserError(f"{path} does not exist; check the name.")
    try:
        table = pq.read_table(path, partitioning=None)
        table.validate(full=True)  # texts that are not UTF-8 would fail later, with no line
        wanted = [name for name in types if name != "labels" or name in table.column_names]
        columns = {name: table[name].combine_chunks().cast(types[name]) for name in wanted}
    except (pa.ArrowException, KeyError, OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path} cannot be read ({brief(error)}); expected a Parquet file with columns "
            + ", ".join(f"{name} ({kind})" for name, kind in types.items())
        ) from error
    if not table.num_rows:
        raise UserError(f"{path} has no rows; expected one per image. Make it again.")
    lines = _numbered(path, np.arange(table.num_rows) + 1, "row")
    nameless = np.asarray(pc.is_null(columns["id"]))
    lines.refuse(nameless, "has no id", "expected that of an image")
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
    """Return for each name the index of the same id, else of the only id with its stem, else -1. Of
    one stem, images in folders of different splits (train, val, test) are not the same."""
    indices = index_in(names, ids)
    if (indices < 0).any():
        ids_stems = stems(ids)
        codes = ids_stems.dictionary_encode().indices.to_numpy()
        by_stem = index_in(stems(names), ids_stems)
        splits = pc.not_equal(_splits(names), _splits(ids).take(pa.array(by_stem.clip(0))))
        alone = (np.bincount(codes)[codes] == 1)[by_stem] & ~np.asarray(splits.fill_null(False))
        indices = np.where((indices < 0) & alone, by_stem, indices)
    return indices


def _splits(names: pa.Array) -> pa.Array:
    """Return the split that a folder of each name is called by, null where none is."""
    return pc.utf8_lower(pc.struct_field(pc.extract_regex(names, SPLIT), "split"))


def find_images(lines: Lines, names: pa.Array, ids: pa.Array) -> np.ndarray:
    """Return the index in `ids` of the image that each name means: int64. Raises UserError for a
    name that no image has or that several share."""
    indices = match_ids(names, ids)
    lines.refuse(
        indices < 0,
        lambda i: f"names image {names[i].as_py()!r:.{SHOWN}}, no id and no name of only one file",
        f"use the ids of the ground truth, such as {ids[0].as_py()!r}",
    )
    return indices


def find_each(lines: Lines, names: pa.Array, ids: pa.Array) -> np.ndarray:
    """Return `find_images`. Raises UserError unless every image is named once."""
    images = find_images(lines, names, ids)
    named, firsts = np.unique(images, return_index=True)
    again = np.bincount(firsts, minlength=len(images)) == 0

    def earlier(i: int) -> str:
        first = lines.at(int(np.argmax(images == images[i])))
        return f"names image {ids[images[i]].as_py()!r} again, after {first}"

    lines.refuse(again, earlier, "keep one of them")
    missing = np.setdiff1d(np.arange(len(ids)), named).tolist()
    if missing:
        shown = ", ".join(ids[image].as_py() for image in missing[:NAMED])
        more = f" and {len(missing) - NAMED} more" if len(missing) > NAMED else ""
        raise UserError(
            f"{lines.path} lacks {len(missing)} of {len(ids)} images: {shown}{more}; figures over "
            "the rest would not compare. Add a line for each, or use the ground truth of those."
        )
    return images


def check_boxes(lines: Lines, boxes: np.ndarray, sizes: np.ndarray | None) -> None:
    """Raise UserError for boxes [K, 4] turned round, outside their image (sizes [K, 2] or None) or
    in shares of it. x1 == width and y1 == height pass: tools that count from 1 write them."""
    if boxes.size and boxes.min() >= 0 and boxes.max() < 2 and (sizes is None or sizes.max() > 2):
        raise UserError(
            f"{lines.path} has corners from {boxes.min():g} to {boxes.max():g} only, which are no "
            "pixels of whole images; multiply shares of an image by its width and height."
        )
    turned, outside = _box_faults(boxes, sizes)

    def fault(i: int) -> str:
        corners = " ".join(f"{value:g}" for value in boxes[i])
        if turned[i]:
            return f"has corners {corners}: its minimum is above its maximum"
        size = "" if sizes is None else " of {1} x {0} pixels".format(*sizes[i])
        return f"has corners {corners}: it is outside its image{size}"

    expected = "expected x0 y0 x1 y1, inclusive pixels of the original image"
    if sizes is not None and (turned | outside).any():
        ends = boxes[:, :2] + boxes[:, 2:] - 1
        others = {
            "x y width height": np.concatenate([boxes[:, :2], ends], axis=1),
            "y0 x0 y1 x1, or with width and height exchanged": boxes[:, [1, 0, 3, 2]],
        }
        fits = [name for name, read in others.items() if not np.any(_box_faults(read, sizes))]
        expected += f"; all boxes of the file fit as {fits[0]}" if fits else ""
    lines.refuse(turned | outside, fault, expected)


def _box_faults(boxes: np.ndarray, sizes: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Return which boxes are turned round and which are outside their image, bool [K] each."""
    outside = np.any(boxes < 0, axis=1)
    if sizes is not None:
        limits = sizes[:, ::-1]
        outside |= ((boxes[:, :2] >= limits) | (boxes[:, 2:] > limits)).any(axis=1)
    return np.any(boxes[:, :2] > boxes[:, 2:], axis=1), outside


def find_classes(lines: Lines, names: pa.Array, classes: Sequence[str] | None) -> np.ndarray:
    """Return the index of each class name: int64. Raises UserError for an unknown name;
    MissingClassesError where `classes` is None."""
    if classes is None:
        refuse_names(lines, np.ones(len(names), bool))
        return np.zeros(0, np.int64)
    indices = index_in(names, pa.array(classes, pa.string()))
    lines.refuse(
        indices < 0,
        lambda i: (
            f"names class {names[i].as_py()!r:.{SHOWN}}, which is none of the {len(classes)} known"
        ),
        "repair the line, or list all classes",
    )
    return indices


def refuse_names(lines: Lines, named: np.ndarray) -> None:
    """Raise MissingClassesError if any element names a class: bool [K]."""
    if named.any():
        location = lines.at(int(np.argmax(named)))
        raise MissingClassesError(
            f"{location} names classes by wnid, and the ground truth has only their numbers"
        )


def refuse_numbers(lines: Lines, numbered: np.ndarray, unsorted: str | None) -> None:
    """Raise UserError if any element numbers a class (bool [K]) and `unsorted` is the location in a
    list of classes at which its order is not the sorted one that numbers count."""
    if unsorted is not None:
        lines.refuse(
            numbered,
            f"gives a class by number, and {unsorted} is out of order, so that numbers could count "
            "its lines or the sorted wnids",
            "sort the list, and let numbers be positions in it, from 0",
        )
