"""Collections in folders: Tiny ImageNet, CUB-200-2011, and plain folders of classes."""

import math
from collections.abc import Iterator

from pipeline.errors import SHOWN, UserError
from pipeline.sources import labels
from pipeline.sources.annotations import Box, parse_box
from pipeline.sources.files import SourceFiles, path_in
from pipeline.sources.labels import MAPPING
from pipeline.sources.listing import Listing, ListingBuilder, is_image, stem

CUB_FOLDER = "CUB_200_2011"  # the name in its archive
CUB_FILES = (
    "images.txt",
    "image_class_labels.txt",
    "classes.txt",
    "train_test_split.txt",
    "bounding_boxes.txt",
)


def list_tiny_imagenet(files: SourceFiles) -> Listing:
    """List the images by split, each with its box, and readable names by wnid."""
    train, val = ListingBuilder(), ListingBuilder()
    wnids = files.entries("train")[0]
    boxes = files.ahead(lambda x: _tab_rows(files, f"train/{x}/{x}_boxes.txt"), wnids)
    images = files.ahead(lambda x: _images(files, f"train/{x}/images"), wnids)
    for wnid, box_of, names in zip(wnids, boxes, images, strict=True):
        for name in sorted({*names, *box_of}):
            path = f"train/{wnid}/images/{name}"
            _add_tiny(train, path, wnid, box_of.get(name, []), name in names)
    annotations = _tab_rows(files, "val/val_annotations.txt")
    val_images = _images(files, "val/images")
    for name in sorted({*val_images, *annotations}):
        wnid, *box = annotations.get(name) or [""]
        _add_tiny(val, f"val/images/{name}", wnid, box, name in val_images)
    class_names = labels.read_names(files.read_optional("words.txt"), "words.txt", "\t")
    return Listing({"train": train.table(), "val": val.table()}, class_names)


def _add_tiny(builder: ListingBuilder, path: str, wnid: str, box: list[str], exists: bool) -> None:
    problem = None
    if not exists:
        problem = "file missing: the annotations name it"
    elif not wnid:
        problem = "label unknown: val_annotations.txt does not name it"
    parsed, note = parse_box(box) if box else (None, None)
    builder.add(
        id=stem(path),
        path=path,
        wnid=wnid or None,
        boxes=(parsed,) if parsed else (),
        note=f"box dropped: {note}" if note else None,
        problem=problem,
    )


def cub_root(files: SourceFiles) -> str | None:
    """Return the folder of the source with the lists of CUB-200-2011, None where it has none."""
    for folder in ("", CUB_FOLDER):
        if {*CUB_FILES[:3]} <= {*files.entries(folder)[1]}:
            return folder
    return None


def list_cub(files: SourceFiles) -> Listing:
    """List the images by split, test images as val, each with its box, and readable names."""
    root = cub_root(files)
    if root is None:
        raise UserError(f"{files.location()} lacks one of {', '.join(CUB_FILES)}; unpack them all.")
    names, class_numbers, classes, splits, boxes = (
        _numbered(files, path_in(root, name)) for name in CUB_FILES
    )
    image_root = path_in(root, "images")
    present = class_folders(files, image_root)
    existing = {f"{folder}/{name}" for folder, contents in present for name in contents}
    builders = {"train": ListingBuilder(), "val": ListingBuilder()}
    for number, name in names.items():
        box, note = _cub_box(boxes.get(number, ""))
        problem = None
        if name not in existing:
            problem = "file missing: images.txt names it"
        elif splits.get(number) not in ("0", "1"):
            problem = "split unknown: train_test_split.txt does not name it"
        elif class_numbers.get(number) not in classes:
            problem = "label unknown: image_class_labels.txt does not name it"
        builders["val" if splits.get(number) == "0" else "train"].add(
            id=name,
            path=f"{image_root}/{name}",
            wnid=classes.get(class_numbers.get(number, "")),
            boxes=(box,) if box else (),
            note=note,
            problem=problem,
        )
    for name in sorted(existing - {*names.values()}):
        problem = "label unknown: images.txt does not name it"
        builders["train"].add(id=name, path=f"{image_root}/{name}", wnid=None, problem=problem)
    tables = {split: builder.table("id") for split, builder in builders.items()}
    readable = {x: x.split(".", 1)[-1].replace("_", " ") for x in classes.values()}
    return Listing(tables, readable)


def _cub_box(text: str) -> tuple[Box | None, str | None]:
    """Return `x y width height`, which may be fractions, as pixels, or the reason why not.

    A pixel that the box touches belongs to it.
    """
    if not text:
        return None, None
    try:
        x, y, width, height = map(float, text.split())
        box = math.floor(x), math.floor(y), math.ceil(x + width) - 1, math.ceil(y + height) - 1
        if max(map(abs, box)) < 2**31:
            return box, None
    except (ValueError, OverflowError):
        pass
    return None, f"box dropped: not four numbers ({text[:SHOWN]})"


def list_folders(files: SourceFiles) -> Listing:
    """List the images of class folders by split: those of train/ and val/, else all as train."""
    below_train = any(class_folders(files, "train"))
    splits = {"train": "train", "val": "val"} if below_train else {"train": ""}
    images = {}
    for split, root in splits.items():
        builder = ListingBuilder()
        for wnid, names in class_folders(files, root):
            for id in (f"{wnid}/{name}" for name in names):
                builder.add(id=id, path=path_in(root, id), wnid=wnid)
        images[split] = builder.table()
    words = labels.read_names(files.read_optional("words.txt"), "words.txt", "\t")
    mapping = labels.read_names(files.read_optional(MAPPING), MAPPING)
    return Listing(images, words or mapping)


def class_folders(files: SourceFiles, root: str) -> Iterator[tuple[str, list[str]]]:
    """Yield the folders within `root` that hold images, with the sorted names of the images."""
    folders = files.entries(root)[0]
    images = files.ahead(lambda x: sorted(_images(files, path_in(root, x))), folders)
    return ((folder, names) for folder, names in zip(folders, images, strict=True) if names)


def _images(files: SourceFiles, folder: str) -> set[str]:
    return {name for name in files.entries(folder)[1] if is_image(name)}


def _tab_rows(files: SourceFiles, path: str) -> dict[str, list[str]]:
    """Return the cells of each line of a tab-separated file after the first, by the first.

    Raises UserError where two lines with the same first cell differ.
    """
    rows: dict[str, list[str]] = {}
    for line in filter(None, labels.lines(files.read_optional(path))):
        name, *cells = (cell.strip() for cell in line.split("\t"))
        if rows.setdefault(name, cells) != cells:
            raise UserError(f"{files.location(path)} has two lines of {name}; keep one of them.")
    return rows


def _numbered(files: SourceFiles, path: str) -> dict[str, str]:
    """Return the texts of lines `number text` by number."""
    return labels.read_names(files.read_optional(path), path)
