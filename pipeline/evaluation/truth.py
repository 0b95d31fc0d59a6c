"""Ground truth of any origin: ids, labels, sizes and boxes of the images that are scored.

It comes from the ledger of a set of shards, from the four metadata files of wsolevaluation, from
ILSVRC's XML files or from a Kaggle solution; `docs/formats.md` describes them. What does not hold
together is an error that names file and line: an image silently left out would change every figure.
"""

import glob
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline.errors import UserError
from pipeline.evaluation.rows import (
    SHOWN,
    WHOLE_NUMBER,
    at,
    check_boxes,
    check_once,
    class_indices,
    file_name_order,
    find_rows,
    match_ids,
    read_lines,
    read_prediction_strings,
)
from pipeline.shards.format import Manifest
from pipeline.sources.annotations import fit_boxes, read_annotation
from pipeline.sources.labels import WNID
from pipeline.storage import write_atomically

METADATA_FORMS = {
    "image_ids.txt": (re.compile(r"([^,]+)"), "id"),
    "class_labels.txt": (re.compile(r"([^,]+),([0-9]{1,9})"), "id,label"),
    "image_sizes.txt": (re.compile(r"([^,]+),([0-9]{1,9}),([0-9]{1,9})"), "id,width,height"),
    "localization.txt": (re.compile(r"([^,]+)" + r",(-?[0-9]{1,9})" * 4), "id,x0,y0,x1,y1"),
}

Known = tuple[tuple[str, ...], tuple[str, ...]] | None  # classes and class_names, if given


@dataclass(frozen=True, kw_only=True)
class GroundTruth:
    """The images that are scored, N of them with M boxes.

    ids: unique, in row order. labels: int64 [N], class indices (positions in the sorted wnids).
    sizes: int64 [N, 2], (height, width) of the originals; None where unknown.
    boxes: int64 [M, 4], inclusive original pixels x0 y0 x1 y1, image by image.
    starts: int64 [N + 1]; image i has boxes[starts[i]:starts[i + 1]], possibly none.
    classes: wnids in index order, None where only numbers are known; class_names: readable.
    """

    ids: tuple[str, ...]
    labels: np.ndarray
    sizes: np.ndarray | None
    boxes: np.ndarray
    starts: np.ndarray
    classes: tuple[str, ...] | None
    class_names: tuple[str, ...] | None


def read_ground_truth(
    path: Path, *, image_sizes: Path | None = None, classes: Path | None = None
) -> GroundTruth:
    """The ground truth in `path`, by what lies there.

    A folder with class_labels.txt is wsolevaluation's metadata (each file also as .gz; ids in the
    order of image_ids.txt, or of class_labels.txt without it); any other folder is searched for
    XML files at any depth, whose stems are the ids; a .csv file is a Kaggle solution. Rows of the
    last two are in file-name order.

    image_sizes: a file of lines `id,width,height` for sizes that the ground truth itself does not
    tell; where an XML file tells another size, its boxes are scaled from that. classes: a file
    for `read_classes`; without it the classes of XML and CSV are the wnids that occur, and those
    of metadata stay numbers. Raises UserError, naming file and line, for whatever is wrong.
    """
    known = read_classes(classes) if classes is not None else None
    if not path.exists():
        raise UserError(f"ground truth {path} does not exist; name a folder or a .csv file.")
    if path.is_file():
        if path.suffix != ".csv":
            raise UserError(
                f"ground truth {path} is neither a folder nor a .csv file; give a folder of "
                "metadata or XML files (unpacked), or a Kaggle LOC_*_solution.csv."
            )
        return _read_solution(path, image_sizes, known)
    if _metadata_file(path, "class_labels.txt") is not None:
        return _read_metadata(path, image_sizes, known)
    # Unlike Path.rglob, this follows links to folders and passes over hidden files.
    annotations = glob.glob("**/*.xml", root_dir=path, recursive=True)  # noqa: PTH207
    if not annotations:
        raise UserError(
            f"ground truth {path} holds neither class_labels.txt nor XML files; give a folder of "
            "wsolevaluation metadata, a folder of XML files, or a Kaggle LOC_*_solution.csv; "
            "shards are given by --data."
        )
    return _read_annotations([path / x for x in sorted(annotations)], image_sizes, known)


def ground_truth_of(ledger: pa.Table, manifest: Manifest) -> GroundTruth:
    """The ground truth in the ledger's rows (columns key, id, label, width, height, boxes).

    The ids are the ledger's, or its keys where two images share an id, as equal file names in
    two class folders do.
    """
    ids = ledger["id"].to_pylist()
    if len(set(ids)) < len(ids):
        ids = ledger["key"].to_pylist()
    listed = [boxes or [] for boxes in ledger["boxes"].to_pylist()]
    flat = [box for boxes in listed for box in boxes]
    return GroundTruth(
        ids=tuple(ids),
        labels=ledger["label"].to_numpy().astype(np.int64),
        sizes=np.stack([ledger["height"], ledger["width"]], axis=1).astype(np.int64),
        boxes=np.array(flat, np.int64).reshape(-1, 4),
        starts=np.cumsum([0, *map(len, listed)]),
        classes=manifest.classes,
        class_names=manifest.class_names,
    )


def write_metadata(folder: Path, truth: GroundTruth) -> None:
    """Write wsolevaluation's four files, localization.txt last, each atomically.

    An image without boxes is in every file but the last. Raises UserError where sizes are
    unknown or an id holds what the format cannot.
    """
    if truth.sizes is None:
        raise UserError(
            "image_sizes.txt cannot be written: the sizes are unknown; give --image-sizes FILE."
        )
    for name in truth.ids:
        if "," in name or name != name.strip() or len(name.splitlines()) != 1:
            raise UserError(
                f"id {name!r} holds a comma, a line break or outer blanks, which metadata files "
                "have no way to tell; rename the image."
            )
    labels, sizes = truth.labels.tolist(), truth.sizes.tolist()
    owners = np.repeat(np.arange(len(truth.ids)), np.diff(truth.starts)).tolist()
    lines = {
        "image_ids.txt": truth.ids,
        "class_labels.txt": [f"{a},{b}" for a, b in zip(truth.ids, labels, strict=True)],
        "image_sizes.txt": [f"{a},{w},{h}" for a, (h, w) in zip(truth.ids, sizes, strict=True)],
        "localization.txt": [
            f"{truth.ids[owner]},{x0},{y0},{x1},{y1}"
            for owner, (x0, y0, x1, y1) in zip(owners, truth.boxes.tolist(), strict=True)
        ],
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in lines.items():
        write_atomically(folder / name, "".join(f"{line}\n" for line in content).encode())


def read_classes(path: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Sorted wnids, and their readable names in the same order.

    A line is a wnid, alone or followed by a blank or tab and its name (LOC_synset_mapping.txt,
    words.txt); a wnid alone is its own name. Raises UserError for other or double lines.
    """
    names: dict[str, str] = {}
    for number, line in read_lines(path):
        wnid, *rest = line.split(maxsplit=1)
        if not WNID.fullmatch(wnid):
            raise UserError(
                f"{at(path, number)} is {line[:SHOWN]!r}; expected a wnid such as n01440764, with "
                "or without its name after it, as in LOC_synset_mapping.txt."
            )
        if wnid in names:
            raise UserError(f"{at(path, number)} names {wnid} a second time; keep one line of it.")
        names[wnid] = rest[0] if rest else wnid
    wnids = tuple(sorted(names))
    return wnids, tuple(names[wnid] for wnid in wnids)


def _metadata_file(folder: Path, name: str) -> Path | None:
    found = (path for path in (folder / name, folder / f"{name}.gz") if path.is_file())
    return next(found, None)


def _read_rows(path: Path, form: str) -> tuple[list[int], list[str], np.ndarray]:
    """Line numbers, ids and numbers int64 [K, ...] of a metadata file; form: its kind's name."""
    pattern, words = METADATA_FORMS[form]
    numbers, ids, values = [], [], []
    for number, line in read_lines(path):
        match = pattern.fullmatch(line)
        if match is None:
            raise UserError(
                f"{at(path, number)} is {line[:SHOWN]!r}; expected `{words}`, whole numbers "
                "without blanks. Mend the line."
            )
        numbers.append(number)
        ids.append(match[1])
        values.append(match.groups()[1:])
    return numbers, ids, np.array(values, np.int64)


def _read_metadata(folder: Path, image_sizes: Path | None, known: Known) -> GroundTruth:
    labels_path = _metadata_file(folder, "class_labels.txt")
    boxes_path = _metadata_file(folder, "localization.txt")
    ids_path = _metadata_file(folder, "image_ids.txt")
    assert labels_path is not None
    if boxes_path is None:
        raise UserError(
            f"{folder} has class_labels.txt and no localization.txt, so no boxes to score with; "
            "add the file, or name the folder of a split that has it."
        )
    label_lines, labelled, labels = _read_rows(labels_path, "class_labels.txt")
    ids = tuple(labelled)
    if ids_path is not None:
        id_lines, listed, _ = _read_rows(ids_path, "image_ids.txt")
        ids = tuple(listed)
        check_once(ids_path, id_lines, find_rows(ids_path, id_lines, ids, ids), ids)
    rows = find_rows(labels_path, label_lines, labelled, ids)
    check_once(labels_path, label_lines, rows, ids)
    if known is not None and labels.max() >= len(known[0]):
        first = int(np.argmax(labels >= len(known[0])))
        raise UserError(
            f"{at(labels_path, label_lines[first])} has label {labels[first, 0]}, and there are "
            f"{len(known[0])} classes; give --classes FILE with all of them."
        )
    sizes_path = image_sizes or _metadata_file(folder, "image_sizes.txt")
    sizes = _read_sizes(sizes_path, ids) if sizes_path else None
    box_lines, owners, boxes = _read_rows(boxes_path, "localization.txt")
    box_rows = find_rows(boxes_path, box_lines, owners, ids)
    check_boxes(boxes_path, box_lines, boxes, None if sizes is None else sizes[box_rows])
    return _ground_truth(ids, labels[np.argsort(rows), 0], sizes, box_rows, boxes, known)


def _read_sizes(path: Path, ids: Sequence[str]) -> np.ndarray:
    """(height, width) of each image by a file that may tell of more: int64 [N, 2]."""
    numbers, listed, sizes = _read_rows(path, "image_sizes.txt")
    if not sizes.all():
        first = int(np.argmin(sizes.all(axis=1)))
        raise UserError(
            f"{at(path, numbers[first])} tells a width or height of 0; expected at least 1. "
            "Mend the line."
        )
    check_once(path, numbers, find_rows(path, numbers, listed, listed), listed)
    rows = match_ids(ids, listed)
    if (rows < 0).any():
        raise UserError(
            f"{path} lacks the size of {ids[int(np.argmax(rows < 0))]!r}, or has several by file "
            "name; expected a line `id,width,height` for every image. Add it."
        )
    return sizes[rows, ::-1]


def _ground_truth(
    ids: Sequence[str],
    labels: np.ndarray,
    sizes: np.ndarray | None,
    box_rows: np.ndarray,
    boxes: np.ndarray,
    known: Known,
) -> GroundTruth:
    """From boxes in any order; box_rows: int64 [M], the image of each."""
    counts = np.bincount(box_rows, minlength=len(ids))
    return GroundTruth(
        ids=tuple(ids),
        labels=labels,
        sizes=sizes,
        boxes=boxes.reshape(-1, 4)[np.argsort(box_rows, kind="stable")],
        starts=np.concatenate([[0], np.cumsum(counts)]),
        classes=known[0] if known else None,
        class_names=known[1] if known else None,
    )


def _read_solution(path: Path, image_sizes: Path | None, known: Known) -> GroundTruth:
    numbers, listed, words = read_prediction_strings(path)
    wnids: list[str] = []
    lines: list[int] = []
    corners: list[str] = []
    for number, quintuples in zip(numbers, words, strict=True):
        if len({*quintuples[::5]}) != 1:
            raise UserError(
                f"{at(path, number)} names {len({*quintuples[::5]})} classes; an image of the "
                "ground truth has one. Mend the line, or leave the image out."
            )
        wnids.append(quintuples[0])
        lines += [number] * (len(quintuples) // 5)
        corners += [word for i, word in enumerate(quintuples) if i % 5]
    for i, word in enumerate(corners):
        if not WHOLE_NUMBER.fullmatch(word):
            raise UserError(
                f"{at(path, lines[i // 4])} has {word[:SHOWN]!r} for a corner; expected whole "
                "numbers, `wnid x0 y0 x1 y1`. Mend the line."
            )
    order = file_name_order(listed)
    ids = [listed[row] for row in order]
    rows = find_rows(path, numbers, listed, ids)
    check_once(path, numbers, rows, ids)
    known = known or _occurring(wnids)
    labels = class_indices(path, numbers, wnids, known[0])
    sizes = _read_sizes(image_sizes, ids) if image_sizes else None
    boxes = np.array(corners, np.int64).reshape(-1, 4)
    box_rows = np.repeat(rows, [len(quintuples) // 5 for quintuples in words])
    check_boxes(path, lines, boxes, None if sizes is None else sizes[box_rows])
    return _ground_truth(ids, labels[order], sizes, box_rows, boxes, known)


def _occurring(wnids: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    classes = tuple(sorted(set(wnids)))
    return classes, classes


def _read_annotations(paths: Sequence[Path], image_sizes: Path | None, known: Known) -> GroundTruth:
    by_id: dict[str, Path] = {}
    for path in paths:
        other = by_id.setdefault(path.stem, path)
        if other != path and other.resolve() != path.resolve():
            raise UserError(f"{other} and {path} are of one image by name; keep one of them.")
    ids = sorted(by_id)
    given = _read_sizes(image_sizes, ids).tolist() if image_sizes else [None] * len(ids)
    wnids, sizes, listed = [], [], []
    for name, size in zip(ids, given, strict=True):
        wnid, size, boxes = _read_annotation(by_id[name], size)
        wnids.append(wnid)
        sizes.append(size)
        listed.append(boxes)
    known = known or _occurring(wnids)
    index = {wnid: i for i, wnid in enumerate(known[0])}
    for name, wnid in zip(ids, wnids, strict=True):
        if wnid not in index:
            raise UserError(
                f"{by_id[name]} names class {wnid!r}, which is none of the {len(index)} known; "
                "give --classes FILE with all of them."
            )
    return _ground_truth(
        ids,
        np.array([index[wnid] for wnid in wnids], np.int64),
        np.array(sizes, np.int64),
        np.repeat(np.arange(len(ids)), [len(boxes) for boxes in listed]),
        np.array([box for boxes in listed for box in boxes], np.int64),
        known,
    )


def _read_annotation(path: Path, size: list[int] | None) -> tuple[str, list[int], list[list[int]]]:
    """Wnid, (height, width) and boxes of one XML file; size: by another file, (height, width)."""
    annotation = read_annotation(path.read_bytes())
    if annotation.note is not None:
        raise UserError(
            f"{path}: {annotation.note}; mend the file, or remove it to leave the image out."
        )
    if not annotation.wnid:
        raise UserError(
            f"{path} names no class, or several; expected objects of one wnid. Mend the file, or "
            "remove it to leave the image out."
        )
    scale = annotation.box_size
    if scale is None and size is None:
        raise UserError(f"{path} tells no size; mend it, or give --image-sizes FILE.")
    if scale is None:
        assert size is not None
        scale = (size[1], size[0])
    boxes = np.array(annotation.boxes, np.int64).reshape(-1, 4)
    check_boxes(path, range(1, len(boxes) + 1), boxes, np.full((len(boxes), 2), scale[::-1]))
    if size is None or scale == (size[1], size[0]):
        return annotation.wnid, [scale[1], scale[0]], boxes.tolist()
    fitted, _ = fit_boxes(annotation.boxes, annotation.box_size, size[1], size[0])
    return annotation.wnid, size, fitted
