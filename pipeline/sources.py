"""Which images, labels and boxes a collection holds, in every folder layout there is."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.annotations import Annotation, parse_box, read_annotation
from pipeline.listing import Rows, with_labels
from pipeline.storage import DataError

LAYOUTS = ("ilsvrc", "tiny-imagenet", "folders")
LAYOUT_HELP = (
    "ilsvrc: train/<wnid>/*.JPEG and val/*.JPEG or val/<wnid>/*.JPEG, XML boxes anywhere below; "
    "tiny-imagenet: wnids.txt, train/<wnid>/images, val/images, val/val_annotations.txt; "
    "folders: <class>/* or train/<class>/* and val/<class>/*"
)
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".gif", ".tif", ".tiff")
WNID = re.compile(r"n\d{8}")


@dataclass(frozen=True, kw_only=True)
class Source:
    """A listed collection. classes: sorted wnids; the class index is the position in them.

    class_names: readable, in the same order. images: by split, train first, a row per image in a
    fixed order, see pipeline/listing.py.
    """

    layout: str
    classes: tuple[str, ...]
    class_names: tuple[str, ...]
    images: dict[str, pa.Table]


def find_layout(source: Path) -> str:
    """The layout of the collection in folder `source`, one of LAYOUTS.

    Raises DataError where the folder is missing, empty or of no known layout.
    """
    if not source.exists():
        raise DataError(f"source {source} does not exist; name the folder that holds the images.")
    if not source.is_dir():
        raise DataError(f"source {source} is a file; unpack it and name the folder.")
    if not any(source.iterdir()):
        raise DataError(f"source {source} is an empty folder; name the folder with the images.")
    if (source / "wnids.txt").is_file() and (source / "train").is_dir():
        return "tiny-imagenet"
    train, val = _folders(source / "train"), _folders(source / "val")
    if any(WNID.fullmatch(name) for name in train + val) or _files(source / "val"):
        return "ilsvrc"
    if any(_files(source / name) for name in _folders(source)) or any(
        _files(source / "train" / name) for name in train
    ):
        return "folders"
    raise DataError(f"source {source} has no known layout. Known: {LAYOUT_HELP}.")


def list_images(source: Path, layout: str) -> Source:
    """Every image of the collection in folder `source`, read by `layout` (one of LAYOUTS).

    An image whose label is unknown, or that the labels name but the folder lacks, is listed with
    its `problem`. Raises DataError for an unknown layout and a collection without images.
    """
    match layout:
        case "ilsvrc":
            images = _list_ilsvrc(source)
        case "tiny-imagenet":
            images = _list_tiny_imagenet(source)
        case "folders":
            images = _list_folders(source)
        case _:
            raise DataError(f"layout {layout!r} is unknown; allowed: auto, {', '.join(LAYOUTS)}.")
    images = {split: table for split, table in images.items() if table.num_rows}
    if not images:
        raise DataError(
            f"source {source} holds no images in the {layout} layout. Known: {LAYOUT_HELP}."
        )
    # Of the train images, or of val where there is no train split.
    classes = tuple(sorted(pc.unique(next(iter(images.values()))["wnid"]).drop_null().to_pylist()))
    names = _class_names(source)
    return Source(
        layout=layout,
        classes=classes,
        class_names=tuple(names.get(wnid, wnid) for wnid in classes),
        images={split: with_labels(table, classes) for split, table in images.items()},
    )


def _list_ilsvrc(source: Path) -> dict[str, pa.Table]:
    annotations = _find_annotations(source)
    train, val = Rows(), Rows()
    for wnid in _folders(source / "train"):
        for name in _files(source / "train" / wnid):
            _add_annotated(train, annotations, wnid, f"train/{wnid}/{name}")
    for wnid in _folders(source / "val"):
        for name in _files(source / "val" / wnid):
            _add_annotated(val, annotations, wnid, f"val/{wnid}/{name}")
    for name in _files(source / "val"):
        _add_annotated(val, annotations, None, f"val/{name}")
    return {"train": train.table("wnid", "id", "path"), "val": val.table("id", "path")}


def _add_annotated(rows: Rows, annotations: dict[str, Path], wnid: str | None, path: str) -> None:
    stem = Path(path).stem
    found = annotations.get(stem)
    annotation = read_annotation(found.read_bytes()) if found else Annotation()
    if wnid is None and annotation.wnid is None:
        problem = "label unknown: neither a class folder nor the objects of an XML file name it"
    else:
        problem = None
    rows.add(
        id=stem,
        path=path,
        wnid=wnid or annotation.wnid,
        boxes=annotation.boxes,
        box_size=annotation.box_size,
        note=annotation.note,
        problem=problem,
    )


def _list_tiny_imagenet(source: Path) -> dict[str, pa.Table]:
    train, val = Rows(), Rows()
    for wnid in _folders(source / "train"):
        folder = source / "train" / wnid
        boxes = {row[0]: row[1:] for row in _tab_rows(folder / f"{wnid}_boxes.txt")}
        present = set(_files(folder / "images"))
        for name in sorted({*present, *boxes}):
            path = f"train/{wnid}/images/{name}"
            _add_tiny_image(train, path, wnid, boxes.get(name), name in present)
    labels = {row[0]: row[1:] for row in _tab_rows(source / "val" / "val_annotations.txt")}
    present = set(_files(source / "val" / "images"))
    for name in sorted({*present, *labels}):
        row = labels.get(name, [])
        path = f"val/images/{name}"
        _add_tiny_image(val, path, row[0] if row else None, row[1:], name in present)
    return {"train": train.table(), "val": val.table()}


def _add_tiny_image(
    rows: Rows, path: str, wnid: str | None, box: list[str] | None, present: bool
) -> None:
    problem = None
    if not present:
        problem = "file missing: the annotations name it"
    elif wnid is None:
        problem = "label unknown: val_annotations.txt does not name it"
    parsed, note = parse_box(box) if box else (None, None)
    rows.add(
        id=Path(path).stem,
        path=path,
        wnid=wnid,
        boxes=(parsed,) if parsed else (),
        note=f"box dropped: {note}" if note else None,
        problem=problem,
    )


def _list_folders(source: Path) -> dict[str, pa.Table]:
    if any(_files(source / "train" / name) for name in _folders(source / "train")):
        roots = {"train": "train/", "val": "val/"}
    else:
        roots = {"train": ""}
    tables = {}
    for split, root in roots.items():
        rows = Rows()
        for name in _folders(source / root):
            for file in _files(source / root / name):
                rows.add(id=f"{name}/{file}", path=f"{root}{name}/{file}", wnid=name)
        tables[split] = rows.table()
    return tables


def _class_names(source: Path) -> dict[str, str]:
    for name, separator in (("words.txt", "\t"), ("LOC_synset_mapping.txt", " ")):
        if (source / name).is_file():
            lines = (source / name).read_text(encoding="utf-8", errors="replace").splitlines()
            pairs = (line.split(separator, 1) for line in lines if separator in line)
            return {wnid: text.strip() for wnid, text in pairs}
    return {}


def _find_annotations(source: Path) -> dict[str, Path]:
    """Every XML file below `source` by its stem (the <filename> within is not to be trusted)."""
    found: dict[str, Path] = {}
    visited = set()
    for folder, folders, files in os.walk(source, followlinks=True):
        real = Path(folder).resolve()
        if real in visited:  # a link back to a folder above
            folders.clear()
            continue
        visited.add(real)
        folders.sort()
        for name in sorted(files):
            if name.endswith(".xml"):
                path = Path(folder) / name
                other = found.setdefault(path.stem, path)
                if other != path and other.read_bytes() != path.read_bytes():
                    raise DataError(
                        f"{other} and {path} describe the same image differently; keep one of them."
                    )
    return found


def _folders(path: Path) -> list[str]:
    if not path.is_dir():
        return []
    return sorted(x.name for x in _entries(path) if x.is_dir())


def _files(path: Path) -> list[str]:
    if not path.is_dir():
        return []
    return sorted(
        x.name
        for x in _entries(path)
        if Path(x.name).suffix.lower() in IMAGE_SUFFIXES and not x.is_dir()
    )


def _entries(path: Path) -> Iterator["os.DirEntry[str]"]:
    with os.scandir(path) as entries:
        yield from (entry for entry in entries if not entry.name.startswith("."))


def _tab_rows(path: Path) -> Iterator[list[str]]:
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.strip():
                yield [field.strip() for field in line.split("\t")]
