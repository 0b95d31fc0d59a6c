"""Results of other programs, read and written: boxes, classes and score maps.

`docs/formats.md` describes the formats. Rows are matched to the images of a ground truth by id, or
by file name where that is unique; each image has to come exactly once.
"""

import csv
import io
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.errors import SHOWN, UserError
from pipeline.evaluation.lines import (
    Lines,
    brief,
    check_boxes,
    check_once,
    find_classes,
    find_images,
    index_in,
    list_lengths,
    read_csv,
    read_parquet,
    slots,
    stems,
)
from pipeline.evaluation.protocols import TOP
from pipeline.evaluation.truth import GroundTruth
from pipeline.sources.labels import WNID
from pipeline.storage import write_atomically

MAP_SIZE = 224  # side of a written score map, in pixels
NUMBER = r"^[-+]?[0-9]+(\.[0-9]*)?([eE][-+]?[0-9]+)?$"
INDEX = "^[0-9]{1,9}$"
LARGEST = 2**31  # no corner and no class index is beyond it
UNKNOWN = -(2**31)  # a label that is null; out of range


@dataclass(frozen=True, kw_only=True)
class Guesses:
    """Up to five guesses per image, best first, in the rows of a GroundTruth.

    labels: int64 [N, 5], class indices; -1 where there is no guess or it names no class.
    boxes: [N, 5, 4], inclusive original pixels x0 y0 x1 y1, int64, or float64 where the file has
    fractions; -1s where there is no guess. An image's guesses come before its -1s.
    """

    labels: np.ndarray
    boxes: np.ndarray


def read_guesses(path: Path, truth: GroundTruth) -> Guesses:
    """Read the guesses in a file, by its suffix.

    .csv: Kaggle's `ImageId,PredictionString`, up to five `wnid x0 y0 x1 y1` a row. .parquet:
    columns `id`, `boxes` (list of lists of four numbers) and `labels` (list of class indices; may
    be missing), best first.

    Raises UserError, naming file and line, for unknown, missing or double images, classes out of
    range, malformed numbers, and boxes turned round or outside their image.
    """
    match path.suffix:
        case ".csv":
            rows = _read_csv_rows(path, truth.classes)
        case ".parquet":
            rows = _read_parquet_rows(path)
        case _:
            raise _suffix_error(path)
    ids = pa.array(truth.ids, pa.string())
    images = find_images(rows.lines.at, rows.ids, ids)
    if (rows.counts > TOP).any():
        first = int(np.argmax(rows.counts > TOP))
        raise UserError(
            f"{rows.lines.at(first)} has {rows.counts[first]} guesses; the rule allows {TOP} an "
            "image. Leave out the worst."
        )
    check_once(rows.lines, images, ids)
    owners = np.repeat(images, rows.counts)
    _check_guesses(rows, truth, owners)
    slot = slots(rows.counts)
    labels = np.full((len(ids), TOP), -1)
    labels[owners, slot] = rows.labels
    whole = (rows.boxes == np.floor(rows.boxes)).all()
    boxes = np.full((len(ids), TOP, 4), -1, np.int64 if whole else np.float64)
    boxes[owners, slot] = rows.boxes
    return Guesses(labels=labels, boxes=boxes)


def write_guesses(path: Path, truth: GroundTruth, guesses: Guesses) -> None:
    """Write guesses in the format of the path's suffix (see `read_guesses`), atomically.

    CSV names images as Kaggle does, without folder and suffix, where that is unique. Raises
    UserError where the format cannot express a guess: CSV needs classes by wnid.
    """
    present = (guesses.boxes != -1).any(axis=2)
    match path.suffix:
        case ".csv":
            content = _csv_bytes(truth.ids, _prediction_strings(path, truth, guesses, present))
        case ".parquet":
            content = _parquet_bytes(truth.ids, guesses, present)
        case _:
            raise _suffix_error(path)
    write_atomically(path, content)


def read_top_classes(path: Path, truth: GroundTruth) -> np.ndarray:
    """Read a classifier's best classes of every image: int64 [N, 5], best first, -1 after the last.

    .csv: `id,class1,...`, one to five classes a row, with or without a header; .parquet: columns
    `id` and `classes` (a list). A class is its name in the ground truth, else its index, counted
    from 0 in the sorted wnids. Raises UserError, naming file and line.
    """
    if path.suffix == ".csv":
        lines, rows = read_csv(path)
        names = pa.array([row[0] for row in rows], pa.string())
        cells = pa.array([_without_blanks(row[1:]) for row in rows], pa.list_(pa.string()))
    elif path.suffix == ".parquet":
        types = {"id": pa.string(), "classes": pa.list_(pa.string())}
        lines, columns = read_parquet(path, types)
        names, cells = columns["id"], columns["classes"]
    else:
        raise UserError(f"{path} has suffix {path.suffix!r}; classes come as .csv or .parquet.")
    ids = pa.array(truth.ids, pa.string())
    images = find_images(lines.at, names, ids)
    check_once(lines, images, ids)
    counts = list_lengths(cells)
    wrong = (counts < 1) | (counts > TOP)
    if wrong.any():
        first = int(np.argmax(wrong))
        raise UserError(
            f"{lines.at(first)} has {counts[first]} classes; expected 1 to {TOP}, best first."
        )
    top = np.full((len(ids), TOP), -1)
    top[np.repeat(images, counts), slots(counts)] = _names_or_indices(
        lines.repeat(counts), cells.flatten(), truth.classes
    )
    return top


def score_map_path(root: Path, image_id: str) -> Path:
    """Return an image's score map file: `<root>/<image_id>.npy`, the id with folders and suffix.

    Raises UserError for an id that leads out of `root`.
    """
    relative = PurePosixPath(image_id)
    if relative.is_absolute() or ".." in relative.parts or "\0" in image_id:
        raise UserError(
            f"id {image_id!r} leads out of the folder of score maps {root}; rename the image."
        )
    return root / f"{image_id}.npy"


def read_score_map(path: Path, size: tuple[int, int] | None) -> np.ndarray:
    """Read a score map: float32 or float64 [H, W] in [0, 1].

    size: the (height, width) it has to have, None for any. Raises UserError for a file that is
    missing or no plain float array of that size, NaNs and values outside [0, 1].
    """
    if not path.is_file():
        raise UserError(
            f"{path} is missing; expected a score map for every image, named by its id and .npy."
        )
    try:
        with path.open("rb") as file:
            stored = np.lib.format.read_array(file, allow_pickle=False)
    except Exception as error:  # damaged headers fail in whatever way numpy's parser does
        raise UserError(
            f"{path} cannot be read ({brief(error)}); expected an array of floats as "
            "np.save writes it, without pickled objects."
        ) from error
    if stored.ndim != 2 or stored.dtype.kind != "f" or stored.size == 0:
        raise UserError(
            f"{path} holds {stored.dtype} of shape {stored.shape}; expected floats in [0, 1] of "
            "shape (height, width). Write the map again."
        )
    if size is not None and stored.shape != size:
        raise UserError(
            f"{path} has shape {stored.shape}; expected {size}, the first map's size or, under "
            "int224, 224 x 224; its boxes would not be the image's. Write all maps at that size."
        )
    values = np.array(stored, np.float64 if stored.dtype.itemsize >= 8 else np.float32)
    _check_values(str(path), values)
    return values


def write_score_map(root: Path, image_id: str, values: np.ndarray) -> None:
    """Write a map [H, W] in [0, 1] as wsolevaluation reads it: float32 [224, 224], atomically.

    Resized bilinearly, pixel centres aligned. Raises UserError for other values.
    """
    _check_values(f"the map of {image_id}", values)
    resized = cv2.resize(
        values.astype(np.float32), (MAP_SIZE, MAP_SIZE), interpolation=cv2.INTER_LINEAR
    )
    buffer = io.BytesIO()
    np.save(buffer, np.clip(resized, 0, 1))  # interpolation rounds
    path = score_map_path(root, image_id)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, buffer.getvalue())


def _check_values(name: str, values: np.ndarray) -> None:
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= 1):
        fault = "NaNs" if np.isnan(low) else f"values from {low:g} to {high:g}"
        raise UserError(
            f"{name} has {fault}; expected values in [0, 1]: thresholds would mean nothing. "
            "Normalize the map before it is saved."
        )


def _suffix_error(path: Path) -> UserError:
    return UserError(
        f"{path} has suffix {path.suffix!r}; guesses come as .csv (Kaggle) or .parquet "
        "(columns id, labels, boxes)."
    )


class _Rows(NamedTuple):
    """The R rows of a file of guesses, in its order, with K guesses.

    ids: strings [R]; counts: int64 [R], guesses of each row; labels: int64 [K], class indices;
    boxes: float64 [K, 4].
    """

    lines: Lines
    ids: pa.Array
    counts: np.ndarray
    labels: np.ndarray
    boxes: np.ndarray


def _read_csv_rows(path: Path, classes: Sequence[str] | None) -> _Rows:
    lines, rows = read_csv(path)
    # None: splitting an empty string would give one empty word.
    cells = pa.array([row[1] or None if len(row) == 2 else "x" for row in rows], pa.string())
    split = pc.ascii_split_whitespace(cells)
    words = list_lengths(split)
    if (words % 5).any():
        first = int(np.argmax(words % 5 > 0))
        raise UserError(
            f"{lines.at(first)} is {','.join(rows[first])[:SHOWN]!r}; expected an id, a comma and "
            "groups of five words, `wnid x0 y0 x1 y1`."
        )
    counts = words // 5
    guesses = lines.repeat(counts)
    flat = split.flatten()
    is_corner = np.arange(len(flat)) % 5 > 0
    corners = flat.filter(pa.array(is_corner))
    numeric = np.asarray(pc.match_substring_regex(corners, NUMBER), bool)
    if not numeric.all():
        first = int(np.argmin(numeric))
        raise UserError(
            f"{guesses.at(first // 4)} has {corners[first].as_py()[:SHOWN]!r} for a corner; "
            "expected a class and four numbers, x0 y0 x1 y1. Repair the line."
        )
    return _Rows(
        lines=lines,
        ids=pa.array([row[0] for row in rows], pa.string()),
        counts=counts,
        labels=find_classes(guesses.at, flat.filter(pa.array(~is_corner)), classes),
        boxes=corners.cast(pa.float64()).to_numpy().reshape(-1, 4),
    )


def _read_parquet_rows(path: Path) -> _Rows:
    types = {
        "id": pa.string(),
        "boxes": pa.list_(pa.list_(pa.float64())),
        "labels": pa.list_(pa.int64()),
    }
    lines, columns = read_parquet(path, types)
    counts = list_lengths(columns["boxes"])
    boxes = columns["boxes"].flatten()
    wrong = list_lengths(boxes) != 4
    if wrong.any():
        raise UserError(
            f"{lines.repeat(counts).at(int(np.argmax(wrong)))} has a box of other than four "
            "numbers; expected x0 y0 x1 y1."
        )
    corners = boxes.flatten().to_numpy(zero_copy_only=False).reshape(-1, 4)
    labels = np.full(len(corners), -1)
    if "labels" in columns:
        uneven = list_lengths(columns["labels"]) != counts
        if uneven.any():
            raise UserError(
                f"{lines.at(int(np.argmax(uneven)))} has other than one label a box; expected a "
                "class index for each box, -1 where it names no class."
            )
        labels = columns["labels"].flatten().fill_null(UNKNOWN).to_numpy(zero_copy_only=False)
    return _Rows(lines=lines, ids=columns["id"], counts=counts, labels=labels, boxes=corners)


def _check_guesses(rows: _Rows, truth: GroundTruth, owners: np.ndarray) -> None:
    """Raise UserError for a malformed box or label; owners: int64 [K], the image of each guess."""
    at = rows.lines.repeat(rows.counts).at
    malformed = ~(np.abs(rows.boxes) < LARGEST).all(axis=1)
    if malformed.any():
        raise UserError(
            f"{at(int(np.argmax(malformed)))} has a corner that is missing, NaN or beyond all "
            "images; expected four numbers, x0 y0 x1 y1."
        )
    check_boxes(at, rows.boxes, None if truth.sizes is None else truth.sizes[owners])
    limit = len(truth.classes) if truth.classes is not None else LARGEST
    astray = (rows.labels < -1) | (rows.labels >= limit)
    if astray.any():
        first = int(np.argmax(astray))
        raise UserError(
            f"{at(first)} has label {rows.labels[first]}; expected a class index from 0 to "
            f"{limit - 1}, the position in the sorted wnids, or -1 for no class."
        )


def _without_blanks(cells: list[str]) -> list[str]:
    """Return the cells up to the last that is filled."""
    filled = [i for i, cell in enumerate(cells, 1) if cell]
    return cells[: filled[-1]] if filled else []


def _names_or_indices(lines: Lines, cells: pa.Array, classes: Sequence[str] | None) -> np.ndarray:
    """Return the class index of each cell, a name among `classes` or else an index: int64 [K]."""
    limit = len(classes) if classes is not None else LARGEST
    named = index_in(cells, pa.array(classes or (), pa.string()))
    digits = pc.if_else(pc.match_substring_regex(cells, INDEX), cells, pa.scalar(None, pa.string()))
    indices = digits.cast(pa.int64()).fill_null(limit).to_numpy()
    wrong = (named < 0) & (indices >= limit)
    if wrong.any():
        first = int(np.argmax(wrong))
        cell = cells[first].as_py()
        if cell is not None and WNID.fullmatch(cell):
            find_classes(lambda _: lines.at(first), cells[first : first + 1], classes)
        raise UserError(
            f"{lines.at(first)} has class {cell!r:.{SHOWN}}; expected a wnid, or an index from "
            f"0 to {limit - 1}, the position in the sorted wnids. Repair the line."
        )
    return np.where(named < 0, indices, named)


def _prediction_strings(
    path: Path, truth: GroundTruth, guesses: Guesses, present: np.ndarray
) -> list[str]:
    """Return `wnid x0 y0 x1 y1 ...` of each image; present: bool [N, 5], which guesses exist."""
    if truth.classes is None:
        raise UserError(
            f"{path} names classes by wnid, and the ground truth has only their numbers; a list "
            "of the classes is needed, or write .parquet."
        )
    if (guesses.labels[present] < 0).any():
        raise UserError(
            f"{path} cannot hold a box without a class; give the classes, or write .parquet."
        )
    blank = [name for name in truth.classes if len(name.split()) != 1]
    if blank:
        raise UserError(
            f"{path} separates by blanks, and class {blank[0]!r} holds one; write .parquet."
        )
    words = [
        f"{truth.classes[label]} {x0} {y0} {x1} {y1}"
        for label, (x0, y0, x1, y1) in zip(
            guesses.labels[present].tolist(), guesses.boxes[present].tolist(), strict=True
        )
    ]
    ends = np.cumsum(present.sum(axis=1)).tolist()
    return [" ".join(words[a:b]) for a, b in itertools.pairwise([0, *ends])]


def _csv_bytes(ids: Sequence[str], strings: Sequence[str]) -> bytes:
    short = stems(pa.array(ids, pa.string())).to_pylist()
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["ImageId", "PredictionString"])
    writer.writerows(zip(short if len(set(short)) == len(ids) else ids, strings, strict=True))
    return text.getvalue().encode()


def _parquet_bytes(ids: Sequence[str], guesses: Guesses, present: np.ndarray) -> bytes:
    starts = pa.array(np.concatenate([[0], np.cumsum(present.sum(axis=1))]), pa.int32())
    boxes = guesses.boxes[present]
    corners = pa.array(np.arange(len(boxes) + 1) * 4, pa.int32())
    table = pa.table(
        {
            "id": pa.array(ids, pa.string()),
            "labels": pa.ListArray.from_arrays(starts, pa.array(guesses.labels[present])),
            "boxes": pa.ListArray.from_arrays(
                starts, pa.ListArray.from_arrays(corners, pa.array(boxes.ravel()))
            ),
        }
    )
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return sink.getvalue().to_pybytes()
