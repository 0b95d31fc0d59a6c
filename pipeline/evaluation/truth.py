"""Ground truth of any origin: ids, labels, sizes and boxes of the images that are scored. It comes
from a ledger, from wsolevaluation's metadata, from ILSVRC's XML files or from a Kaggle solution
(docs/formats.md). Whatever does not hold together is an error that names file and line."""

import glob
import itertools
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
    find_classes,
    find_each,
    find_images,
    match_ids,
    read_csv,
    read_lines,
    read_text,
    refuse_numbers,
    stems,
)
from pipeline.sources.annotations import Annotation, fit_boxes, read_annotation
from pipeline.sources.labels import WNID, class_lines, parse_prediction

NUMBER = "[0-9]{1,9}"
METADATA = {  # wsolevaluation's files: a line as a pattern, and in words
    "image_ids.txt": ("[^,]+", "id"),
    "class_labels.txt": (f"[^,]+,{NUMBER}", "id,label"),
    "image_sizes.txt": (f"[^,]+(,{NUMBER}){{2}}", "id,width,height"),
    "localization.txt": (f"[^,]+(,-?{NUMBER}){{4}}", "id,x0,y0,x1,y1"),
}
KINDS = (
    "give a folder of wsolevaluation metadata, a folder of XML files, or a Kaggle "
    "LOC_*_solution.csv"
)

DEVKIT_IMAGE, DEVKIT_LABELS = "ILSVRC2012_val_00000001", (489, 490)  # from 0, from 1


class Classes(NamedTuple):
    """Sorted wnids, their readable names, and the location at which their file is not sorted."""

    wnids: tuple[str, ...]
    names: tuple[str, ...]
    unsorted: str | None = None


@dataclass(frozen=True, kw_only=True)
class GroundTruth:
    """N images that are scored, with M boxes. ids: unique. labels: int64 [N], class indices. sizes:
    int64 [N, 2], (height, width) of the originals, or None. boxes: int64 [M, 4], inclusive original
    pixels x0 y0 x1 y1; image i has boxes[starts[i]:starts[i + 1]]. classes: wnids in index order,
    None where only numbers are known. unsorted: see `lines.refuse_numbers`."""

    ids: tuple[str, ...]
    labels: np.ndarray
    sizes: np.ndarray | None
    boxes: np.ndarray
    starts: np.ndarray
    classes: tuple[str, ...] | None
    class_names: tuple[str, ...] | None
    unsorted: str | None = None


def read_ground_truth(
    path: Path, *, image_sizes: Path | None = None, classes: Path | None = None
) -> GroundTruth:
    """Read the ground truth in `path`: a folder with class_labels.txt is wsolevaluation's metadata
    (also .gz), any other is searched for XML files, a .csv file is a Kaggle solution. image_sizes:
    a file of lines `id,width,height`; XML boxes of another size are scaled. classes: a file for
    `read_classes`; without it the classes are the wnids that occur, or numbers. Raises UserError,
    naming file and line."""
    known = None if classes is None else read_classes(classes)
    if not path.exists():
        raise UserError(f"ground truth {path} does not exist; {KINDS}.")
    if path.is_file():
        if path.suffix != ".csv":
            raise UserError(f"ground truth {path} is neither a folder nor a .csv file; {KINDS}.")
        return _from_annotations(path, _read_solution(path), image_sizes, known)
    files: dict[str, Path] = {}
    for name in METADATA:
        for file in filter(Path.is_file, (path / name, path / f"{name}.gz")):
            if files.setdefault(name, file) != file:
                raise UserError(f"{path} holds {name} and {name}.gz; keep one of them.")
    if "class_labels.txt" in files:
        if "localization.txt" not in files:
            raise UserError(
                f"ground truth {path} has class_labels.txt and no localization.txt, so no boxes "
                "to score with; add the file, or name the folder of a split that has it."
            )
        return _read_metadata(files, image_sizes, known)
    # Unlike Path.rglob, this follows links to folders and passes over hidden files.
    names = sorted(glob.glob("**/*.[xX][mM][lL]", root_dir=path, recursive=True))  # noqa: PTH207
    if not names:
        raise UserError(f"ground truth {path} has neither class_labels.txt nor XML files; {KINDS}.")
    entries = _read_xml_files(path, names, sized=image_sizes is not None)
    return _from_annotations(path, entries, image_sizes, known)


def ground_truth_of(
    ledger: pa.Table, classes: tuple[str, ...], class_names: tuple[str, ...]
) -> GroundTruth:
    """Take the ground truth from a ledger (columns key, id, label, width, height, boxes). Where two
    images share an id, the ids are the ledger's keys."""
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


def read_classes(path: Path) -> Classes:
    """Read a list of classes: a wnid a line, alone or followed by its name. Raises UserError for
    other or double lines."""
    names: dict[str, str] = {}
    unsorted, last = None, ""
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
        if wnid < last and unsorted is None:
            unsorted = f"{path} line {number}"
        last = wnid
    if not names:
        raise UserError(f"{path} is empty; it was cut off or never filled. Make it again.")
    wnids = tuple(sorted(names))
    return Classes(wnids, tuple(names[wnid] for wnid in wnids), unsorted)


def _read_table(path: Path, name: str) -> tuple[Lines, pa.Array, np.ndarray]:
    """Read a file of METADATA: its lines, ids [K], and numbers int64 [K, ...]."""
    pattern, words = METADATA[name]
    lines, content = read_lines(path)
    lines.refuse(
        ~np.asarray(pc.match_substring_regex(content, f"^{pattern}$")),
        lambda i: f"is {content[i].as_py()[:SHOWN]!r}",
        f"expected `{words}`, whole numbers without blanks",
    )
    fields = pc.split_pattern(content, ",")
    ids, *columns = (pc.list_element(fields, i) for i in range(1 + words.count(",")))
    numbers = [column.cast(pa.int64()).to_numpy() for column in columns]
    return lines, ids, np.array(numbers, np.int64).T


def _read_metadata(
    files: dict[str, Path], image_sizes: Path | None, known: Classes | None
) -> GroundTruth:
    """Read the files of METADATA that there are."""
    lines, labelled, labels = _read_table(files["class_labels.txt"], "class_labels.txt")
    ids = labelled
    if "image_ids.txt" in files:
        id_lines, ids, _ = _read_table(files["image_ids.txt"], "image_ids.txt")
        find_each(id_lines, ids, ids)
    images = find_each(lines, labelled, ids)
    lines.refuse(
        np.asarray(pc.equal(stems(labelled), DEVKIT_IMAGE)) & np.isin(labels[:, 0], DEVKIT_LABELS),
        lambda i: f"has label {labels[i, 0]}, the development kit's ILSVRC2012_ID",
        "expected positions in the sorted wnids, of this image 65",
    )
    if known is not None:
        refuse_numbers(lines, np.ones(len(labels), bool), known.unsorted)
        lines.refuse(
            labels[:, 0] >= len(known.wnids),
            lambda i: f"has label {labels[i, 0]}, and there are {len(known.wnids)} classes",
            "list all of them",
        )
    sizes_path = image_sizes or files.get("image_sizes.txt")
    sizes = _read_sizes(sizes_path, ids) if sizes_path else None
    box_lines, owner_ids, boxes = _read_table(files["localization.txt"], "localization.txt")
    owners = find_images(box_lines, owner_ids, ids)
    check_boxes(box_lines, boxes, None if sizes is None else sizes[owners])
    return GroundTruth(
        ids=tuple(ids.to_pylist()),
        labels=labels[np.argsort(images), 0],
        sizes=sizes,
        boxes=boxes[np.argsort(owners, kind="stable")],
        starts=np.cumsum([0, *np.bincount(owners, minlength=len(ids))]),
        classes=None if known is None else known.wnids,
        class_names=None if known is None else known.names,
    )


def _read_sizes(path: Path, ids: pa.Array) -> np.ndarray:
    """Read (height, width) of each image from a file that may have others: int64 [N, 2]."""
    lines, sized, sizes = _read_table(path, "image_sizes.txt")
    empty = np.any(sizes == 0, axis=1)
    lines.refuse(empty, "has a width or height of 0", "expected at least 1")
    find_each(lines, sized, sized)
    rows = match_ids(ids, sized)
    if (rows < 0).any():
        raise UserError(
            f"{path} lacks the size of {ids[int(np.argmin(rows))].as_py()!r}, or has several by "
            "file name; add a line `id,width,height`."
        )
    return sizes[rows, ::-1]


class _Entry(NamedTuple):
    """The annotation of one image; location: its file, and its line in a CSV file."""

    id: str
    location: str
    annotation: Annotation


def _read_solution(path: Path) -> list[_Entry]:
    lines, rows = read_csv(path)
    lines.refuse(
        np.array([len(row) != 2 for row in rows]),
        lambda i: f"is {','.join(rows[i])[:SHOWN]!r}",
        "expected an id, a comma and groups of five words, `wnid x0 y0 x1 y1`",
    )
    ids = pa.array([row[0] for row in rows], pa.string())
    find_each(lines, ids, ids)
    return [_Entry(id, lines.at(i), parse_prediction(text)) for i, (id, text) in enumerate(rows)]


def _read_xml_files(folder: Path, names: Sequence[str], *, sized: bool) -> list[_Entry]:
    """Read each image's annotation. sized: whether sizes come from elsewhere."""
    by_id: dict[str, Path] = {}
    for path in (folder / name for name in names):
        other = by_id.setdefault(path.stem, path)
        if other != path and other.resolve() != path.resolve():
            raise UserError(f"{other} and {path} are of one image by name; keep one of them.")
    entries = []
    for id, path in by_id.items():
        annotation = read_annotation(path.read_bytes())
        if not (sized or annotation.box_size or annotation.note):
            raise UserError(f"{path}: it has no size, and no file of image sizes is given.")
        entries.append(_Entry(id, str(path), annotation))
    return entries


def _from_annotations(
    path: Path, entries: list[_Entry], image_sizes: Path | None, known: Classes | None
) -> GroundTruth:
    """Check the annotations of unique images, put them in file-name order, and scale boxes
    annotated at another size."""
    entries = sorted(entries, key=lambda entry: (entry.id.rpartition("/")[2], entry.id))
    annotations = [entry.annotation for entry in entries]
    for entry in entries:
        fault = entry.annotation.note
        if fault is None and not entry.annotation.wnid:
            fault = "it names no class, or several; expected objects of one wnid"
        if fault is not None:
            raise UserError(f"{entry.location}: {fault}; repair it, or remove it with its image.")
    lines = Lines(path=path, at=lambda i: entries[i].location)
    wnids = [annotation.wnid for annotation in annotations]
    occurring = tuple(sorted({wnid for wnid in wnids if wnid}))
    classes = known or Classes(occurring, occurring)
    labels = find_classes(lines, pa.array(wnids, pa.string()), classes.wnids)
    ids = tuple(entry.id for entry in entries)
    own_sizes = np.array([x.box_size or (0, 0) for x in annotations], np.int64)[:, ::-1]
    sizes = own_sizes
    if image_sizes is not None:
        sizes = _read_sizes(image_sizes, pa.array(ids, pa.string()))
        oblong = (own_sizes[:, 0] != own_sizes[:, 1]) & (sizes[:, 0] != sizes[:, 1])
        if oblong.any() and (own_sizes == sizes[:, ::-1])[oblong].all():
            raise UserError(
                f"{image_sizes} has the width of each image where its annotation has the height; "
                "expected lines `id,width,height`."
            )
    annotated = np.where(own_sizes > 0, own_sizes, sizes)
    boxes: list[Sequence[Sequence[int]]] = [annotation.boxes for annotation in annotations]
    counts = np.array([len(own) for own in boxes])
    limits = np.repeat(annotated, counts, axis=0) if sizes.all() else None
    check_boxes(lines.parts(counts, "box"), _flat(boxes), limits)
    for i in np.flatnonzero((annotated != sizes).any(axis=1)).tolist():
        height, width = sizes[i].tolist()
        boxes[i], _ = fit_boxes(boxes[i], annotations[i].box_size, width, height)
    return GroundTruth(
        ids=ids,
        labels=labels,
        sizes=sizes if sizes.all() else None,
        boxes=_flat(boxes),
        starts=np.cumsum([0, *map(len, boxes)]),
        classes=classes.wnids,
        class_names=classes.names,
        unsorted=classes.unsorted,
    )


def _flat(boxes: Sequence[Sequence[Sequence[int]]]) -> np.ndarray:
    return np.array([*itertools.chain(*boxes)], np.int64).reshape(-1, 4)
