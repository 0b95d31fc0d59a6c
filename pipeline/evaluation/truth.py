"""Ground truth of any origin: ids, labels, sizes and boxes of the images that are scored.

It comes from the ledger of a set of shards, from the four metadata files of wsolevaluation, from
ILSVRC's XML files or from a Kaggle solution; `docs/formats.md` describes them. What does not hold
together is an error that names file and line: an image silently left out would change every figure.
"""

import glob
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import SHOWN, UserError
from pipeline.evaluation.lines import (
    Lines,
    check_boxes,
    check_once,
    find_classes,
    find_images,
    match_ids,
    read_csv,
    read_lines,
    read_text,
    slots,
)
from pipeline.sources.annotations import Annotation, fit_boxes, read_annotation
from pipeline.sources.labels import WNID, class_lines, parse_prediction
from pipeline.storage import write_atomically

NUMBER = "[0-9]{1,9}"
METADATA = {  # wsolevaluation's files: a line as a pattern, and in words
    "image_ids.txt": ("[^,]+", "id"),
    "class_labels.txt": (f"[^,]+,{NUMBER}", "id,label"),
    "image_sizes.txt": (f"[^,]+(,{NUMBER}){{2}}", "id,width,height"),
    "localization.txt": (f"[^,]+(,-?{NUMBER}){{4}}", "id,x0,y0,x1,y1"),
}

Classes = tuple[tuple[str, ...], tuple[str, ...]]  # sorted wnids, and their readable names


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
    """Read the ground truth in `path`, by the kind of its files.

    A folder with class_labels.txt is wsolevaluation's metadata (each file also as .gz; ids in the
    order of image_ids.txt, or of class_labels.txt without it); any other folder is searched for
    XML files at any depth, whose stems are the ids; a .csv file is a Kaggle solution. Images of
    the last two are in file-name order.

    image_sizes: a file of lines `id,width,height` for sizes that the ground truth itself does not
    have; where an XML file has another size, its boxes are scaled from that. classes: a file
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
        return _from_annotations(_read_solution(path), image_sizes, known)
    if _metadata_file(path, "class_labels.txt") is not None:
        return _read_metadata(path, image_sizes, known)
    # Unlike Path.rglob, this follows links to folders and passes over hidden files.
    names = glob.glob("**/*.xml", root_dir=path, recursive=True)  # noqa: PTH207
    if not names:
        raise UserError(
            f"ground truth {path} has neither class_labels.txt nor XML files; give a folder of "
            "wsolevaluation metadata, a folder of XML files, or a Kaggle LOC_*_solution.csv."
        )
    return _from_annotations(_read_xml_files(path, sorted(names)), image_sizes, known)


def ground_truth_of(
    ledger: pa.Table, classes: tuple[str, ...], class_names: tuple[str, ...]
) -> GroundTruth:
    """Take the ground truth from a ledger (columns key, id, label, width, height, boxes).

    The ids are the ledger's, or its keys where two images share an id, as equal file names in
    two class folders do.
    """
    ids = ledger["id"].to_pylist()
    if len(set(ids)) < len(ids):
        ids = ledger["key"].to_pylist()
    boxes = [boxes or [] for boxes in ledger["boxes"].to_pylist()]
    return GroundTruth(
        ids=tuple(ids),
        labels=ledger["label"].to_numpy().astype(np.int64),
        sizes=np.stack([ledger["height"], ledger["width"]], axis=1).astype(np.int64),
        boxes=_flat(boxes),
        starts=np.cumsum([0, *map(len, boxes)]),
        classes=classes,
        class_names=class_names,
    )


def write_metadata(folder: Path, truth: GroundTruth) -> None:
    """Write wsolevaluation's four files, localization.txt last, each atomically.

    An image without boxes is in every file but the last. Raises UserError where sizes are
    unknown or an id holds what the format cannot.
    """
    if truth.sizes is None:
        raise UserError("image_sizes.txt cannot be written: the sizes of the images are unknown.")
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


def read_classes(path: Path) -> Classes:
    """Read a list of classes: the sorted wnids, and their readable names in the same order.

    A line is a wnid, alone or followed by a blank or tab and its name (LOC_synset_mapping.txt,
    words.txt); a wnid alone is its own name. Raises UserError for other or double lines.
    """
    names: dict[str, str] = {}
    for number, wnid, name in class_lines(read_text(path)):
        if not WNID.fullmatch(wnid):
            raise UserError(
                f"{path} line {number} begins with {wnid[:SHOWN]!r}; expected a wnid such as "
                "n01440764, with or without its name after it, as in LOC_synset_mapping.txt."
            )
        if wnid in names:
            raise UserError(
                f"{path} line {number} names {wnid} a second time; keep one line of it."
            )
        names[wnid] = name or wnid
    if not names:
        raise UserError(f"{path} is empty; it was cut off or never filled. Make it again.")
    wnids = tuple(sorted(names))
    return wnids, tuple(names[wnid] for wnid in wnids)


def _metadata_file(folder: Path, name: str) -> Path | None:
    candidates = (folder / name, folder / f"{name}.gz")
    return next((path for path in candidates if path.is_file()), None)


def _read_table(path: Path, name: str) -> tuple[Lines, pa.Array, np.ndarray]:
    """Read a file of METADATA: its lines, ids [K], and numbers int64 [K, ...]."""
    pattern, words = METADATA[name]
    lines, content = read_lines(path)
    fits = np.asarray(pc.match_substring_regex(content, f"^{pattern}$"))
    if not fits.all():
        first = int(np.argmin(fits))
        raise UserError(
            f"{lines.at(first)} is {content[first].as_py()[:SHOWN]!r}; expected `{words}`, whole "
            "numbers without blanks. Repair the line."
        )
    fields = pc.split_pattern(content, ",")
    columns = [pc.list_element(fields, i) for i in range(1 + words.count(","))]
    numbers = [column.cast(pa.int64()).to_numpy() for column in columns[1:]]
    return lines, columns[0], np.array(numbers, np.int64).T


def _read_metadata(folder: Path, image_sizes: Path | None, known: Classes | None) -> GroundTruth:
    labels_path = _metadata_file(folder, "class_labels.txt")
    boxes_path = _metadata_file(folder, "localization.txt")
    ids_path = _metadata_file(folder, "image_ids.txt")
    assert labels_path is not None
    if boxes_path is None:
        raise UserError(
            f"{folder} has class_labels.txt and no localization.txt, so no boxes to score with; "
            "add the file, or name the folder of a split that has it."
        )
    lines, labelled, labels = _read_table(labels_path, "class_labels.txt")
    ids = labelled
    if ids_path is not None:
        id_lines, ids, _ = _read_table(ids_path, "image_ids.txt")
        check_once(id_lines, find_images(id_lines.at, ids, ids), ids)
    images = find_images(lines.at, labelled, ids)
    check_once(lines, images, ids)
    if known is not None and labels.max() >= len(known[0]):
        first = int(np.argmax(labels >= len(known[0])))
        raise UserError(
            f"{lines.at(first)} has label {labels[first, 0]}, and there are {len(known[0])} "
            "classes; list all of them."
        )
    sizes_path = image_sizes or _metadata_file(folder, "image_sizes.txt")
    sizes = _read_sizes(sizes_path, ids) if sizes_path else None
    box_lines, owner_ids, boxes = _read_table(boxes_path, "localization.txt")
    owners = find_images(box_lines.at, owner_ids, ids)
    check_boxes(box_lines.at, boxes, None if sizes is None else sizes[owners])
    return GroundTruth(
        ids=tuple(ids.to_pylist()),
        labels=labels[np.argsort(images), 0],
        sizes=sizes,
        boxes=boxes[np.argsort(owners, kind="stable")],
        starts=np.cumsum([0, *np.bincount(owners, minlength=len(ids))]),
        classes=known[0] if known else None,
        class_names=known[1] if known else None,
    )


def _read_sizes(path: Path, ids: pa.Array) -> np.ndarray:
    """Read (height, width) of each image from a file that may have others: int64 [N, 2]."""
    lines, sized, sizes = _read_table(path, "image_sizes.txt")
    if not sizes.all():
        first = int(np.argmin(sizes.all(axis=1)))
        raise UserError(
            f"{lines.at(first)} has a width or height of 0; expected at least 1. Repair the line."
        )
    check_once(lines, find_images(lines.at, sized, sized), sized)
    rows = match_ids(ids, sized)
    if (rows < 0).any():
        raise UserError(
            f"{path} lacks the size of {ids[int(np.argmin(rows))].as_py()!r}, or has several by "
            "file name; expected a line `id,width,height` for every image. Add it."
        )
    return sizes[rows, ::-1]


class _Entry(NamedTuple):
    """The annotation of one image in a file; line: its number in a CSV file, else None."""

    id: str
    annotation: Annotation
    file: Path
    line: int | None = None

    @property
    def location(self) -> str:
        return f"{self.file}" if self.line is None else f"{self.file} line {self.line}"


def _read_solution(path: Path) -> list[_Entry]:
    lines, rows = read_csv(path)
    for i, row in enumerate(rows):
        if len(row) != 2:
            raise UserError(
                f"{lines.at(i)} is {','.join(row)[:SHOWN]!r}; expected an id, a comma and groups "
                "of five words, `wnid x0 y0 x1 y1`."
            )
    ids = pa.array([row[0] for row in rows], pa.string())
    check_once(lines, find_images(lines.at, ids, ids), ids)
    numbers = lines.numbers.tolist()
    return [
        _Entry(id, parse_prediction(text), path, number)
        for number, (id, text) in zip(numbers, rows, strict=True)
    ]


def _read_xml_files(folder: Path, names: Sequence[str]) -> list[_Entry]:
    by_id: dict[str, Path] = {}
    for path in (folder / name for name in names):
        other = by_id.setdefault(path.stem, path)
        if other != path and other.resolve() != path.resolve():
            raise UserError(f"{other} and {path} are of one image by name; keep one of them.")
    return [_Entry(id, read_annotation(path.read_bytes()), path) for id, path in by_id.items()]


def _from_annotations(
    entries: list[_Entry], image_sizes: Path | None, known: Classes | None
) -> GroundTruth:
    """Check the annotations of unique images, and put them in file-name order."""
    entries = sorted(entries, key=lambda entry: (entry.id.rpartition("/")[2], entry.id))
    for entry in entries:
        fault = entry.annotation.note
        if fault is None and not entry.annotation.wnid:
            fault = "it names no class, or several; expected objects of one wnid"
        elif (
            fault is None and entry.line is None and not (entry.annotation.box_size or image_sizes)
        ):
            fault = "it has no size, and no file of image sizes is given"
        if fault is not None:
            raise UserError(f"{entry.location}: {fault}; repair it, or remove it with its image.")
    wnids = pa.array([entry.annotation.wnid for entry in entries], pa.string())
    if known is None:
        occurring = tuple(sorted(pc.unique(wnids).to_pylist()))
        known = occurring, occurring
    labels = find_classes(lambda i: entries[i].location, wnids, known[0])
    ids = [entry.id for entry in entries]
    given = _read_sizes(image_sizes, pa.array(ids, pa.string())) if image_sizes else None
    sizes, boxes = _sizes_and_boxes(entries, given)
    return GroundTruth(
        ids=tuple(ids),
        labels=labels,
        sizes=sizes,
        boxes=_flat(boxes),
        starts=np.cumsum([0, *map(len, boxes)]),
        classes=known[0],
        class_names=known[1],
    )


def _sizes_and_boxes(
    entries: list[_Entry], given: np.ndarray | None
) -> tuple[np.ndarray | None, list[Sequence[Sequence[int]]]]:
    """Return (height, width) int64 [N, 2], None where unknown, and the boxes in these pixels.

    given: int64 [N, 2], sizes from elsewhere. Boxes that were annotated at another size are
    checked within that, and scaled.
    """
    annotated = np.zeros((len(entries), 2), np.int64) if given is None else given.copy()
    for i, entry in enumerate(entries):
        if entry.annotation.box_size is not None:
            annotated[i] = entry.annotation.box_size[::-1]
    sizes = annotated if given is None else given
    boxes: list[Sequence[Sequence[int]]] = [entry.annotation.boxes for entry in entries]
    counts = np.array([len(x) for x in boxes])
    owners = np.repeat(np.arange(len(entries)), counts)
    numbers = slots(counts) + 1

    def at(i: int) -> str:
        return f"{entries[owners[i]].location} box {numbers[i]}"

    check_boxes(at, _flat(boxes), annotated[owners] if sizes.all() else None)
    for i in np.flatnonzero((annotated != sizes).any(axis=1)).tolist():
        height, width = sizes[i].tolist()
        boxes[i], _ = fit_boxes(boxes[i], entries[i].annotation.box_size, width, height)
    return (sizes if sizes.all() else None), boxes


def _flat(boxes: Sequence[Sequence[Sequence[int]]]) -> np.ndarray:
    return np.array([box for own in boxes for box in own], np.int64).reshape(-1, 4)
