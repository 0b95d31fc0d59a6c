"""Results of other programs: boxes, classes and score maps (docs/formats.md).
Rows are matched to the images of a ground truth by id, or by file name where that is unique; each
image has to come exactly once."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import SHOWN, UserError
from pipeline.evaluation.lines import (
    Lines,
    brief,
    check_boxes,
    find_classes,
    find_each,
    index_in,
    list_lengths,
    read_csv,
    read_parquet,
    refuse_names,
    refuse_numbers,
    slots,
)
from pipeline.evaluation.protocols import TOP
from pipeline.evaluation.truth import GroundTruth
from pipeline.sources.labels import WNID

ROUNDING = 1e-5  # by which values of a score map may leave [0, 1]
NUMBER = r"^[-+]?[0-9]+(\.[0-9]*)?([eE][-+]?[0-9]+)?$"
INDEX = "^[0-9]{1,9}$"
GUESS_COLUMNS = "id, labels, boxes"
LARGEST = 2**31  # no corner and no class index is beyond it
UNKNOWN = -(2**31)  # a label that is null; out of range


@dataclass(frozen=True, kw_only=True)
class Guesses:
    """Up to five guesses per image, best first, then -1s. labels: int64 [N, 5], -1 where it names
    no class. boxes: [N, 5, 4], inclusive original pixels x0 y0 x1 y1, int64, or float64 where the
    file has fractions."""

    labels: np.ndarray
    boxes: np.ndarray


def read_guesses(path: Path, truth: GroundTruth) -> Guesses:
    """Read the guesses in a file, by its suffix. .csv: Kaggle's `ImageId,PredictionString`, up to
    five `wnid x0 y0 x1 y1` a row. .parquet: columns `id`, `boxes` (lists of four numbers) and
    `labels` (class indices; may be missing), best first. Raises UserError, naming file and line."""
    is_csv = _is_csv(path, GUESS_COLUMNS)
    rows = _read_csv_rows(path, truth.classes) if is_csv else _read_parquet_rows(path)
    rows.lines.refuse(
        rows.counts > TOP,
        lambda i: f"has {rows.counts[i]} guesses",
        f"the rule allows {TOP} an image: leave out the worst",
    )
    images = find_each(rows.lines, rows.ids, pa.array(truth.ids, pa.string()))
    owners, slot = np.repeat(images, rows.counts), slots(rows.counts)
    each = rows.lines.parts(rows.counts, "guess")
    each.refuse(
        ~(np.abs(rows.boxes) < LARGEST).all(axis=1),
        "has a corner that is missing, NaN or beyond all images",
        "expected four numbers, x0 y0 x1 y1",
    )
    check_boxes(each, rows.boxes, None if truth.sizes is None else truth.sizes[owners])
    limit = LARGEST if truth.classes is None else len(truth.classes)
    each.refuse(
        (rows.labels < -1) | (rows.labels >= limit),
        lambda i: f"has label {'null' if rows.labels[i] == UNKNOWN else rows.labels[i]}",
        f"expected -1 for no class, or 0 to {limit - 1}, the position in the sorted wnids",
    )
    if not is_csv:
        refuse_numbers(each, rows.labels >= 0, truth.unsorted)
    labels = np.full((len(images), TOP), -1)
    labels[owners, slot] = rows.labels
    whole = (rows.boxes == np.floor(rows.boxes)).all()
    boxes = np.full((len(images), TOP, 4), -1, np.int64 if whole else np.float64)
    boxes[owners, slot] = rows.boxes
    return Guesses(labels=labels, boxes=boxes)


def read_top_classes(path: Path, truth: GroundTruth) -> np.ndarray:
    """Read a classifier's best classes of every image: int64 [N, 5], best first, then -1s. .csv:
    `id,class1,...`, with or without a header; .parquet: columns `id` and `classes` (a list). A
    class is its name in the ground truth, else its index. Raises UserError, naming file and
    line."""
    if _is_csv(path, "id, classes"):
        lines, rows = read_csv(path)
        names = pa.array([row[0] for row in rows], pa.string())
        cells = pa.array([_without_blanks(row[1:]) for row in rows], pa.list_(pa.string()))
    else:
        types = {"id": pa.string(), "classes": pa.list_(pa.string())}
        lines, columns = read_parquet(path, types)
        names, cells = columns["id"], columns["classes"]
    images = find_each(lines, names, pa.array(truth.ids, pa.string()))
    counts = list_lengths(cells)
    lines.refuse(
        (counts < 1) | (counts > TOP),
        lambda i: f"has {counts[i]} classes",
        f"expected 1 to {TOP}, best first",
    )
    top = np.full((len(images), TOP), -1)
    top[np.repeat(images, counts), slots(counts)] = _names_or_indices(
        lines.parts(counts, "class"), cells.flatten().fill_null(""), truth
    )
    return top


def score_map_path(root: Path, image_id: str) -> Path:
    """Return an image's score map file: `<root>/<image_id>.npy`, the id with folders and suffix.
    Raises UserError for an id that leads out of `root`."""
    relative = PurePosixPath(image_id)
    if relative.is_absolute() or ".." in relative.parts or "\0" in image_id:
        raise UserError(
            f"id {image_id!r} leads out of the folder of score maps {root}; rename the image."
        )
    return root / f"{image_id}.npy"


def read_score_map(path: Path, size: tuple[int, int] | None) -> np.ndarray:
    """Read a score map: float32 or float64 [H, W] in [0, 1]. size: the (height, width) it must
    have, None for any. Raises UserError, naming the file."""
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
    return _within_0_and_1(str(path), values)


def _within_0_and_1(name: str, values: np.ndarray) -> np.ndarray:
    """Return the values clipped to [0, 1]. Raises UserError for others than rounding leaves."""
    low, high = values.min(), values.max()
    if not (low >= -ROUNDING and high <= 1 + ROUNDING):
        fault = "NaNs" if np.isnan(low) else f"values from {low:g} to {high:g}"
        raise UserError(
            f"{name} has {fault}; expected values in [0, 1]: thresholds would mean nothing. "
            "Normalize the map before it is saved."
        )
    return values.clip(0, 1)


def _is_csv(path: Path, columns: str) -> bool:
    if path.suffix not in (".csv", ".parquet"):
        raise UserError(
            f"{path} has suffix {path.suffix!r}; expected .csv, or .parquet with columns {columns}."
        )
    return path.suffix == ".csv"


class _Rows(NamedTuple):
    """R rows of a file with K guesses. ids: strings [R]; counts: int64 [R]; labels: int64 [K];
    boxes: float64 [K, 4]."""

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
    lines.refuse(
        words % 5 > 0,
        lambda i: f"is {','.join(rows[i])[:SHOWN]!r}",
        "expected an id, a comma and groups of five words, `wnid x0 y0 x1 y1`",
    )
    guesses, flat = lines.parts(words // 5, "guess"), split.flatten()
    corners = flat.filter(pa.array(np.arange(len(flat)) % 5 > 0))
    guesses.parts(np.full(len(flat) // 5, 4), "corner").refuse(
        ~np.asarray(pc.match_substring_regex(corners, NUMBER), bool),
        lambda i: f"is {corners[i].as_py()[:SHOWN]!r}",
        "expected a class and four numbers, x0 y0 x1 y1",
    )
    return _Rows(
        lines=lines,
        ids=pa.array([row[0] for row in rows], pa.string()),
        counts=words // 5,
        labels=find_classes(guesses, flat[::5], classes),
        boxes=corners.cast(pa.float64()).to_numpy().reshape(-1, 4),
    )


def _read_parquet_rows(path: Path) -> _Rows:
    types = {
        "id": pa.string(),
        "boxes": pa.list_(pa.list_(pa.float64())),
        "labels": pa.list_(pa.int64()),
    }
    lines, columns = read_parquet(path, types)
    counts, boxes = list_lengths(columns["boxes"]), columns["boxes"].flatten()
    lines.parts(counts, "guess").refuse(
        list_lengths(boxes) != 4,
        "has a box of other than four numbers",
        "expected x0 y0 x1 y1",
    )
    corners = boxes.flatten().to_numpy(zero_copy_only=False).reshape(-1, 4)
    labels = np.full(len(corners), -1)
    if "labels" in columns:
        lines.refuse(
            list_lengths(columns["labels"]) != counts,
            "has other than one label a box",
            "expected a class index for each box, -1 where it names no class",
        )
        labels = columns["labels"].flatten().fill_null(UNKNOWN).to_numpy(zero_copy_only=False)
    return _Rows(lines=lines, ids=columns["id"], counts=counts, labels=labels, boxes=corners)


def _without_blanks(cells: list[str]) -> list[str]:
    """Return the cells up to the last that is filled."""
    filled = [i for i, cell in enumerate(cells, 1) if cell]
    return cells[: filled[-1]] if filled else []


def _names_or_indices(lines: Lines, cells: pa.Array, truth: GroundTruth) -> np.ndarray:
    """Return the class index of each cell, a name among the classes or else an index: int64 [K]."""
    classes = truth.classes
    if classes is None:
        refuse_names(lines, np.asarray(pc.match_substring_regex(cells, f"^{WNID.pattern}$"), bool))
    limit = LARGEST if classes is None else len(classes)
    named = index_in(cells, pa.array(classes or (), pa.string()))
    digits = pc.if_else(pc.match_substring_regex(cells, INDEX), cells, pa.scalar(None, pa.string()))
    indices = np.where(named < 0, digits.cast(pa.int64()).fill_null(limit).to_numpy(), named)
    lines.refuse(
        indices >= limit,
        lambda i: f"is {cells[i].as_py()!r:.{SHOWN}}",
        f"expected one of the wnids, or 0 to {limit - 1}, the position in the sorted wnids",
    )
    refuse_numbers(lines, named < 0, truth.unsorted)
    return indices
