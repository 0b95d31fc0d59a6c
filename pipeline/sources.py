"""Which images, labels and boxes a collection holds, in every folder layout there is."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from xml.etree import ElementTree

from pipeline.shards import DataError

LAYOUTS = ("ilsvrc", "tiny-imagenet", "folders")
LAYOUT_HELP = (
    "ilsvrc: train/<wnid>/*.JPEG and val/*.JPEG or val/<wnid>/*.JPEG, XML boxes anywhere below; "
    "tiny-imagenet: wnids.txt, train/<wnid>/images, val/images, val/val_annotations.txt; "
    "folders: <class>/* or train/<class>/* and val/<class>/*"
)
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".gif", ".tif", ".tiff")
WNID = re.compile(r"n\d{8}")

Box = tuple[int, int, int, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceImage:
    """One image of a collection, as its files tell of it before the image itself is opened.

    path: relative to the source, with forward slashes. wnid: its class, None where unknown.
    boxes: inclusive [x0, y0, x1, y1] in pixels of an image of size `box_size` (width, height),
    or of the file's own size where that is None; neither sorted nor clipped yet.
    note: what is odd about the labels but leaves the image usable.
    problem: why it cannot be used, None where it can.
    """

    split: str
    id: str
    path: str
    wnid: str | None
    boxes: tuple[Box, ...] = ()
    box_size: tuple[int, int] | None = None
    note: str | None = None
    problem: str | None = None


@dataclass(frozen=True, kw_only=True)
class Source:
    """A listed collection. classes: sorted wnids; the class index is the position in them.

    class_names: readable, in the same order. images: by split, train first, each in a fixed order.
    """

    layout: str
    classes: tuple[str, ...]
    class_names: tuple[str, ...]
    images: dict[str, tuple[SourceImage, ...]]


@dataclass(frozen=True, kw_only=True)
class Annotation:
    """What one XML file says: the image's wnid (None where its objects disagree or there are
    none), boxes, the (width, height) they refer to, and what could not be read."""

    wnid: str | None = None
    boxes: tuple[Box, ...] = ()
    box_size: tuple[int, int] | None = None
    note: str | None = None


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
    if not any(images.values()):
        raise DataError(
            f"source {source} holds no images in the {layout} layout. Known: {LAYOUT_HELP}."
        )
    classes = _classes(images)
    known = set(classes)
    names = _class_names(source)
    return Source(
        layout=layout,
        classes=classes,
        class_names=tuple(names.get(wnid, wnid) for wnid in classes),
        images={
            split: tuple(_checked(image, known) for image in listed)
            for split, listed in images.items()
            if listed
        },
    )


def read_annotation(data: bytes) -> Annotation:
    """The content of one PASCAL-style XML file. Never raises: `note` says what was wrong.

    A document type declaration is refused, so no entity, external or nested, is ever expanded.
    """
    try:
        root = ElementTree.fromstring(data, ElementTree.XMLParser(target=_PlainTreeBuilder()))
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        return Annotation(note=f"annotation does not parse: {error}")
    boxes, notes = [], []
    for number, element in enumerate(root.iterfind("object/bndbox")):
        texts = [element.findtext(tag, "") for tag in ("xmin", "ymin", "xmax", "ymax")]
        box, note = _parse_box(texts)
        if box is not None:
            boxes.append(box)
        if note is not None:
            notes.append(f"box {number} dropped: {note}")
    wnids = {name.strip() for name in (x.findtext("name", "") for x in root.iterfind("object"))}
    width, height = (_integer(root.findtext(f"size/{tag}", "")) for tag in ("width", "height"))
    return Annotation(
        wnid=wnids.pop() if len(wnids) == 1 else None,
        boxes=tuple(boxes),
        box_size=(width, height) if width and height and min(width, height) > 0 else None,
        note="; ".join(notes) or None,
    )


def fit_boxes(image: SourceImage, width: int, height: int) -> tuple[list[list[int]], str | None]:
    """The image's boxes as inclusive pixels of the file of `width` x `height`, and a note.

    Boxes annotated at another size are scaled; what reaches over the edge is clipped; a box with
    its minimum above its maximum, or wholly outside, is dropped. The note tells of each.
    """
    boxes, notes = [], [image.note] if image.note else []
    scale_x, scale_y = 1.0, 1.0
    if image.box_size not in (None, (width, height)):
        annotated_width, annotated_height = image.box_size or (width, height)
        scale_x, scale_y = width / annotated_width, height / annotated_height
        if image.boxes:
            notes.append(
                f"boxes scaled from the annotated {annotated_width}x{annotated_height} "
                f"to the file's {width}x{height}"
            )
    for number, (x0, y0, x1, y1) in enumerate(image.boxes):
        if x0 > x1 or y0 > y1:
            notes.append(f"box {number} dropped: minimum above maximum ({x0}, {y0}, {x1}, {y1})")
            continue
        # A pixel spans [x, x + 1): edges scale, so an inclusive maximum moves by its far edge.
        scaled = [
            int(x0 * scale_x),
            int(y0 * scale_y),
            max(int(x0 * scale_x), round((x1 + 1) * scale_x) - 1),
            max(int(y0 * scale_y), round((y1 + 1) * scale_y) - 1),
        ]
        if scaled[0] >= width or scaled[1] >= height or scaled[2] < 0 or scaled[3] < 0:
            notes.append(f"box {number} dropped: outside the image ({x0}, {y0}, {x1}, {y1})")
            continue
        limits = (width - 1, height - 1) * 2
        clipped = [min(max(v, 0), limit) for v, limit in zip(scaled, limits, strict=True)]
        if clipped != scaled:
            notes.append(f"box {number} clipped to the image: was ({x0}, {y0}, {x1}, {y1})")
        boxes.append(clipped)
    return boxes, "; ".join(notes) or None


class _PlainTreeBuilder(ElementTree.TreeBuilder):
    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:  # noqa: ARG002
        raise ValueError("it declares a document type, which annotations have no use for")


def _list_ilsvrc(source: Path) -> dict[str, list[SourceImage]]:
    annotations = _find_annotations(source)
    train = [
        _annotated(annotations, "train", wnid, f"train/{wnid}/{name}")
        for wnid in _folders(source / "train")
        for name in _files(source / "train" / wnid)
    ]
    val = [
        _annotated(annotations, "val", wnid, f"val/{wnid}/{name}")
        for wnid in _folders(source / "val")
        for name in _files(source / "val" / wnid)
    ]
    val += [_annotated(annotations, "val", None, f"val/{name}") for name in _files(source / "val")]
    return {"train": train, "val": sorted(val, key=lambda image: image.id)}


def _annotated(
    annotations: dict[str, Path], split: str, wnid: str | None, path: str
) -> SourceImage:
    stem = Path(path).stem
    found = annotations.get(stem)
    annotation = read_annotation(found.read_bytes()) if found else Annotation()
    if wnid is None and annotation.wnid is None:
        problem = "label unknown: neither a class folder nor the objects of an XML file name it"
    else:
        problem = None
    return SourceImage(
        split=split,
        id=stem,
        path=path,
        wnid=wnid or annotation.wnid,
        boxes=annotation.boxes,
        box_size=annotation.box_size,
        note=annotation.note,
        problem=problem,
    )


def _list_tiny_imagenet(source: Path) -> dict[str, list[SourceImage]]:
    train: list[SourceImage] = []
    for wnid in _folders(source / "train"):
        folder = source / "train" / wnid
        boxes = {row[0]: row[1:] for row in _tab_rows(folder / f"{wnid}_boxes.txt")}
        present = _files(folder / "images")
        for name in sorted({*present, *boxes}):
            path = f"train/{wnid}/images/{name}"
            train.append(_tiny_image("train", path, wnid, boxes.get(name), name in present))
    rows = {row[0]: row[1:] for row in _tab_rows(source / "val" / "val_annotations.txt")}
    present = _files(source / "val" / "images")
    val = []
    for name in sorted({*present, *rows}):
        row = rows.get(name, [])
        path = f"val/images/{name}"
        val.append(_tiny_image("val", path, row[0] if row else None, row[1:], name in present))
    return {"train": train, "val": val}


def _tiny_image(
    split: str, path: str, wnid: str | None, box: list[str] | None, present: bool
) -> SourceImage:
    problem = None
    if not present:
        problem = "file missing: the annotations name it"
    elif wnid is None:
        problem = "label unknown: val_annotations.txt does not name it"
    parsed, note = _parse_box(box) if box else (None, None)
    return SourceImage(
        split=split,
        id=Path(path).stem,
        path=path,
        wnid=wnid,
        boxes=(parsed,) if parsed else (),
        note=f"box dropped: {note}" if note else None,
        problem=problem,
    )


def _list_folders(source: Path) -> dict[str, list[SourceImage]]:
    if any(_files(source / "train" / name) for name in _folders(source / "train")):
        roots = {"train": "train/", "val": "val/"}
    else:
        roots = {"train": ""}
    return {
        split: [
            SourceImage(split=split, id=f"{name}/{file}", path=f"{root}{name}/{file}", wnid=name)
            for name in _folders(source / root)
            for file in _files(source / root / name)
        ]
        for split, root in roots.items()
    }


def _classes(images: dict[str, list[SourceImage]]) -> tuple[str, ...]:
    """Sorted wnids of the train images, or of val where there is no train split."""
    listed = images["train"] or images["val"]
    wnids = {image.wnid for image in listed if image.wnid is not None}
    return tuple(sorted(wnid for wnid in wnids if _is_utf8(wnid)))


def _checked(image: SourceImage, classes: set[str]) -> SourceImage:
    """The image with a problem where its class has no index or its name is not UTF-8 text."""
    if not all(_is_utf8(name) for name in (image.id, image.path, image.wnid or "")):
        return replace(
            image,
            id=_escaped(image.id),
            path=_escaped(image.path),
            wnid=image.wnid and _escaped(image.wnid),
            problem="file name is not UTF-8: rename it",
        )
    if image.problem is None and image.wnid not in classes:
        return replace(image, problem=f"label unknown: no train image has class {image.wnid}")
    return image


def _is_utf8(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _escaped(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


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


def _integer(text: str) -> int | None:
    try:
        value = float(text)  # some annotation tools write 12.0
        return int(value) if abs(value) < 2**31 else None
    except ValueError:
        return None


def _parse_box(texts: list[str]) -> tuple[Box | None, str | None]:
    numbers = [_integer(text) for text in texts]
    if len(numbers) != 4 or None in numbers:
        return None, f"not four whole numbers ({' '.join(texts)})"
    x0, y0, x1, y1 = (number or 0 for number in numbers)
    return (x0, y0, x1, y1), None
