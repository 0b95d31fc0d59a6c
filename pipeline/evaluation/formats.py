"""Results of other methods and programs, read and written: boxes, classes and score maps.

`docs/formats.md` describes the formats. Rows are matched to the images of a ground truth by id, or
by file name where that is unique; each image has to come exactly once.
"""

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.errors import UserError
from pipeline.evaluation.rows import (
    SHOWN,
    at,
    brief,
    check_boxes,
    check_once,
    class_indices,
    find_rows,
    parquet_columns,
    read_csv,
    read_prediction_strings,
    slots,
    stem,
)
from pipeline.evaluation.truth import GroundTruth
from pipeline.sources.labels import WNID
from pipeline.storage import write_atomically

TOP = 5  # guesses or classes per image
MAP_SIZE = 224  # side of a written score map, in pixels
GUESS_SUFFIXES = (".csv", ".parquet")
NUMBER = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?([eE][-+]?[0-9]+)?")
INDEX = re.compile(r"[0-9]{1,9}")
LARGEST = 2**31  # no corner and no class index is beyond it
UNTOLD = -(2**31)  # a label that is null; out of range


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
    """The guesses in a file, by its suffix.

    .csv: Kaggle's `ImageId,PredictionString`, up to five `wnid x0 y0 x1 y1` a row. .parquet:
    columns `id`, `boxes` (list of lists of four numbers) and `labels` (list of class indices; may
    be missing), best first.

    Raises UserError, naming file and line, for unknown, missing or double images, classes out of
    range, malformed numbers, and boxes turned round or outside their image.
    """
    match path.suffix:
        case ".csv":
            numbers, names, words = read_prediction_strings(path)
            rows = find_rows(path, numbers, names, truth.ids)
            counts, tokens, boxes = _split_words(path, numbers, words)
            lines = np.repeat(numbers, counts).tolist()
            labels = class_indices(path, lines, tokens, truth.classes)
        case ".parquet":
            numbers, rows, counts, labels, boxes = _read_parquet(path, truth)
        case _:
            raise _suffix_error(path)
    return _guesses(path, truth, numbers, rows, counts, labels, boxes)


def write_guesses(path: Path, truth: GroundTruth, guesses: Guesses) -> None:
    """Write guesses in the format of the path's suffix (see `read_guesses`), atomically.

    CSV names images as Kaggle does, without folder and suffix, where that is unique. Raises
    UserError where the format cannot tell a guess: CSV needs classes by wnid.
    """
    found = (guesses.boxes != -1).any(axis=2)
    match path.suffix:
        case ".csv":
            names = _wnids(path, truth, guesses, found)
            content = _csv_bytes(truth.ids, _quintuples(names, guesses.boxes, found))
        case ".parquet":
            content = _parquet_bytes(truth.ids, guesses, found)
        case _:
            raise _suffix_error(path)
    write_atomically(path, content)


def read_top_classes(path: Path, truth: GroundTruth) -> np.ndarray:
    """A classifier's best classes of every image, best first: int64 [N, 5], -1 after the last.

    .csv: `id,class1,...`, one to five classes a row, with or without a header; .parquet: columns
    `id` and `classes` (a list). A class is its name in the ground truth, else its index, counted
    from 0 in the sorted wnids. Raises UserError, naming file and line.
    """
    if path.suffix == ".csv":
        table = read_csv(path)
        numbers, names = [number for number, _ in table], [row[0] for _, row in table]
        listed = [_without_blanks(row[1:]) for _, row in table]
    elif path.suffix == ".parquet":
        columns = parquet_columns(path, {"id": pa.string(), "classes": pa.list_(pa.string())})
        names, listed = columns["id"].to_pylist(), columns["classes"].to_pylist()
        numbers = list(range(1, len(names) + 1))
        listed = [row or [] for row in listed]
    else:
        raise UserError(f"{path} has suffix {path.suffix!r}; classes come as .csv or .parquet.")
    rows = find_rows(path, numbers, names, truth.ids)
    check_once(path, numbers, rows, truth.ids)
    for number, row in zip(numbers, listed, strict=True):
        if not 1 <= len(row) <= TOP:
            raise UserError(
                f"{at(path, number)} has {len(row)} classes; expected 1 to {TOP}, best first."
            )
    counts = np.array([len(row) for row in listed])
    lines = np.repeat(numbers, counts).tolist()
    flat = _names_or_indices(path, lines, [cell for row in listed for cell in row], truth.classes)
    top = np.full((len(truth.ids), TOP), -1)
    top[np.repeat(rows, counts), slots(counts)] = flat
    return top


def score_map_path(root: Path, image_id: str) -> Path:
    """Where an image's score map lies: `<root>/<image_id>.npy`, the id with its folders and suffix.

    Raises UserError for an id that leads out of `root`.
    """
    relative = PurePosixPath(image_id)
    if relative.is_absolute() or ".." in relative.parts or "\0" in image_id:
        raise UserError(
            f"id {image_id!r} leads out of the folder of score maps {root}; rename the image."
        )
    return root / f"{image_id}.npy"


def read_score_map(path: Path, size: tuple[int, int] | None) -> np.ndarray:
    """A score map: float32 or float64 [H, W] in [0, 1].

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


def _check_values(where: str, values: np.ndarray) -> None:
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= 1):
        fault = "NaNs" if np.isnan(low) else f"values from {low:g} to {high:g}"
        raise UserError(
            f"{where} has {fault}; expected values in [0, 1]: thresholds would mean nothing. "
            "Normalize the map before it is saved."
        )


def _suffix_error(path: Path) -> UserError:
    return UserError(
        f"{path} has suffix {path.suffix!r}; guesses come as {', '.join(GUESS_SUFFIXES)}: Kaggle, "
        "or columns id, labels, boxes."
    )


def _split_words(
    path: Path, numbers: Sequence[int], words: Sequence[Sequence[str]]
) -> tuple[np.ndarray, list[str], np.ndarray]:
    """Guesses per row, int64 [R]; of each guess its first word, and corners float64 [K, 4]."""
    counts = np.array([len(row) // 5 for row in words], np.int64)
    for number, row in zip(numbers, words, strict=True):
        for i, word in enumerate(row):
            if i % 5 and not NUMBER.fullmatch(word):
                raise UserError(
                    f"{at(path, number)} has {word[:SHOWN]!r} for a corner; expected a class and "
                    "four numbers, x0 y0 x1 y1. Mend the line."
                )
    corners = [float(word) for row in words for i, word in enumerate(row) if i % 5]
    return counts, [word for row in words for word in row[::5]], np.reshape(corners, (-1, 4))


def _read_parquet(
    path: Path, truth: GroundTruth
) -> tuple[list[int], np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Row numbers, rows of the truth, guesses per row, and labels and boxes of the guesses."""
    columns = parquet_columns(
        path,
        {
            "id": pa.string(),
            "boxes": pa.list_(pa.list_(pa.float64())),
            "labels": pa.list_(pa.int64()),
        },
    )
    names = columns["id"].to_pylist()
    numbers = list(range(1, len(names) + 1))
    rows = find_rows(path, numbers, names, truth.ids)
    counts = _lengths(columns["boxes"])
    lines = np.repeat(numbers, counts)
    boxes = columns["boxes"].flatten()
    wrong = _lengths(boxes) != 4
    if wrong.any():
        raise UserError(
            f"{at(path, lines[np.argmax(wrong)])} has a box of other than four numbers; expected "
            "x0 y0 x1 y1."
        )
    corners = boxes.flatten().to_numpy(zero_copy_only=False).reshape(-1, 4)
    if "labels" not in columns:
        return numbers, rows, counts, np.full(len(corners), -1), corners
    uneven = _lengths(columns["labels"]) != counts
    labels = columns["labels"].flatten().fill_null(UNTOLD).to_numpy(zero_copy_only=False)
    if uneven.any():
        raise UserError(
            f"{at(path, numbers[np.argmax(uneven)])} has other than one label a box; expected a "
            "class index for each box, -1 where it names no class."
        )
    return numbers, rows, counts, labels, corners


def _lengths(lists: pa.ListArray) -> np.ndarray:
    """Elements of each list, 0 for null: int64."""
    return pc.fill_null(pc.list_value_length(lists), 0).to_numpy().astype(np.int64)


def _guesses(
    path: Path,
    truth: GroundTruth,
    numbers: Sequence[int],
    rows: np.ndarray,
    counts: np.ndarray,
    labels: np.ndarray,
    boxes: np.ndarray,
) -> Guesses:
    """The guesses of R rows, checked and laid out by image.

    rows, counts: int64 [R], the image of each row and its guesses; labels: int64 [K]; boxes:
    float64 [K, 4].
    """
    if (counts > TOP).any():
        row = int(np.argmax(counts > TOP))
        raise UserError(
            f"{at(path, numbers[row])} has {counts[row]} guesses; the rule allows {TOP} an image. "
            "Leave out the worst."
        )
    check_once(path, numbers, rows, truth.ids)
    owners, lines = np.repeat(rows, counts), np.repeat(numbers, counts).tolist()
    malformed = ~(np.abs(boxes) < LARGEST).all(axis=1)
    if malformed.any():
        raise UserError(
            f"{at(path, lines[np.argmax(malformed)])} has a corner that is missing, NaN or beyond "
            "all images; expected four numbers, x0 y0 x1 y1."
        )
    check_boxes(path, lines, boxes, None if truth.sizes is None else truth.sizes[owners])
    limit = len(truth.classes) if truth.classes is not None else LARGEST
    astray = (labels < -1) | (labels >= limit)
    if astray.any():
        first = int(np.argmax(astray))
        raise UserError(
            f"{at(path, lines[first])} has label {labels[first]}; expected a class index from 0 to "
            f"{limit - 1}, the position in the sorted wnids, or -1 for no class."
        )
    places = (owners, slots(counts))
    all_labels = np.full((len(truth.ids), TOP), -1)
    all_labels[places] = labels
    whole = (boxes == np.floor(boxes)).all()
    all_boxes = np.full((len(truth.ids), TOP, 4), -1, np.int64 if whole else np.float64)
    all_boxes[places] = boxes
    return Guesses(labels=all_labels, boxes=all_boxes)


def _without_blanks(cells: list[str]) -> list[str]:
    """The cells up to the last that is filled."""
    filled = [i for i, cell in enumerate(cells, 1) if cell]
    return cells[: filled[-1]] if filled else []


def _names_or_indices(
    path: Path, lines: Sequence[int], cells: Sequence[str], classes: Sequence[str] | None
) -> np.ndarray:
    """The class index of each cell, a name among `classes` or else an index: int64 [K]."""
    limit = len(classes) if classes is not None else LARGEST
    index = {name: i for i, name in enumerate(classes or ())}
    for line, cell in zip(lines, cells, strict=True):
        if cell in index:
            continue
        if cell is not None and WNID.fullmatch(cell):
            class_indices(path, [line], [cell], classes)
        if cell is None or not INDEX.fullmatch(cell) or int(cell) >= limit:
            raise UserError(
                f"{at(path, line)} has class {cell!r:.{SHOWN}}; expected a wnid, or an index from "
                f"0 to {limit - 1}, the position in the sorted wnids. Mend the line."
            )
    return np.array([index[x] if x in index else int(x) for x in cells], np.int64)


def _wnids(path: Path, truth: GroundTruth, guesses: Guesses, found: np.ndarray) -> list[list[str]]:
    """The class name of each guess, image by image."""
    if truth.classes is None:
        raise UserError(
            f"{path} names classes by wnid, and the ground truth has only their numbers; give "
            "--classes FILE, or write .parquet."
        )
    if (guesses.labels[found] < 0).any():
        raise UserError(
            f"{path} cannot tell of a box without a class; give the classes, or write .parquet."
        )
    blank = [name for name in truth.classes if len(name.split()) != 1]
    if blank:
        raise UserError(
            f"{path} separates by blanks, and class {blank[0]!r} holds one; write .parquet."
        )
    rows = zip(guesses.labels.tolist(), found.tolist(), strict=True)
    return [
        [truth.classes[label] for label, there in zip(labels, present, strict=True) if there]
        for labels, present in rows
    ]


def _quintuples(names: list[list[str]], boxes: np.ndarray, found: np.ndarray) -> list[str]:
    """`name x0 y0 x1 y1 ...` of each image."""
    listed = [
        [box for box, there in zip(five, present, strict=True) if there]
        for five, present in zip(boxes.tolist(), found.tolist(), strict=True)
    ]
    return [
        " ".join(
            f"{name} {x0} {y0} {x1} {y1}" for name, (x0, y0, x1, y1) in zip(row, five, strict=True)
        )
        for row, five in zip(names, listed, strict=True)
    ]


def _csv_bytes(ids: Sequence[str], strings: Sequence[str]) -> bytes:
    stems = [stem(name) for name in ids]
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["ImageId", "PredictionString"])
    writer.writerows(zip(stems if len(set(stems)) == len(ids) else ids, strings, strict=True))
    return text.getvalue().encode()


def _parquet_bytes(ids: Sequence[str], guesses: Guesses, found: np.ndarray) -> bytes:
    starts = pa.array(np.concatenate([[0], np.cumsum(found.sum(axis=1))]), pa.int32())
    boxes = guesses.boxes[found]
    corners = pa.array(np.arange(len(boxes) + 1) * 4, pa.int32())
    table = pa.table(
        {
            "id": pa.array(ids, pa.string()),
            "labels": pa.ListArray.from_arrays(starts, pa.array(guesses.labels[found])),
            "boxes": pa.ListArray.from_arrays(
                starts, pa.ListArray.from_arrays(corners, pa.array(boxes.ravel()))
            ),
        }
    )
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return sink.getvalue().to_pybytes()
