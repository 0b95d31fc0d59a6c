"""Collections in folders: Tiny ImageNet, CUB-200-2011, and plain folders of classes."""

import math
from collections.abc import Iterator

from pipeline.errors import SHOWN, UserError
from pipeline.sources import labels
from pipeline.sources.annotations import Box, parse_box
from pipeline.sources.files import SourceFiles, path_in
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
    folders = [f"train/{wnid}" for wnid in files.entries("train")[0]]
    contents = files.ahead(lambda folder: _tiny_class(files, folder), folders)
    for folder, (boxes, images) in zip(folders, contents, strict=True):
        wnid = folder.split("/")[1]
        for name in sorted({*images, *boxes}):
            path = f"{folder}/images/{name}"
            _add_tiny(train, path, wnid, boxes.get(name, []), name in images)
    annotations = _tab_rows(files, "val/val_annotations.txt")
    images = _images(files, "val/images")
    for name in sorted({*images, *annotations}):
        wnid, *box = annotations.get(name) or [""]
        _add_tiny(val, f"val/images/{name}", wnid, box, name in images)
    names = labels.read_names(_read(files, "words.txt"), "\t")
    return Listing({"train": train.table(), "val": val.table()}, names)


def _tiny_class(files: SourceFiles, folder: str) -> tuple[dict[str, list[str]], set[str]]:
    """Return the texts of the boxes by file name, and the file names, in a class's folder."""
    boxes = _tab_rows(files, f"{folder}/{folder.split('/')[1]}_boxes.txt")
    return boxes, _images(files, f"{folder}/images")


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
    folders = [path_in(root, f"images/{x}") for x in files.entries(path_in(root, "images"))[0]]
    contents = zip(folders, files.ahead(lambda x: _images(files, x), folders), strict=True)
    existing = {f"{folder.split('/')[-1]}/{name}" for folder, images in contents for name in images}
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
            path=path_in(root, f"images/{name}"),
            wnid=classes.get(class_numbers.get(number, "")),
            boxes=(box,) if box else (),
            note=note,
            problem=problem,
        )
    for name in sorted(existing - {*names.values()}):
        problem = "label unknown: images.txt does not name it"
        builders["train"].add(
            id=name, path=path_in(root, f"images/{name}"), wnid=None, problem=problem
        )
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
    readable = labels.read_names(_read(files, "words.txt"), "\t")
    mapping = labels.read_names(_read(files, "LOC_synset_mapping.txt"), " ")
    return Listing(images, readable or mapping)


def class_folders(files: SourceFiles, root: str) -> Iterator[tuple[str, list[str]]]:
    """Yield the folders within `root` that hold images, with the sorted names of the images."""
    folders = files.entries(root)[0]
    images = files.ahead(lambda x: sorted(_images(files, path_in(root, x))), folders)
    return ((folder, names) for folder, names in zip(folders, images, strict=True) if names)


def _images(files: SourceFiles, folder: str) -> set[str]:
    return {name for name in files.entries(folder)[1] if is_image(name)}


def _read(files: SourceFiles, path: str) -> bytes:
    """Read a file; empty where it does not exist."""
    folder, _, name = path.rpartition("/")
    return files.read(path) if name in files.entries(folder)[1] else b""


def _tab_rows(files: SourceFiles, path: str) -> dict[str, list[str]]:
    """Return the cells of each line of a tab-separated file after the first, by the first."""
    lines = labels.text(_read(files, path)).splitlines()
    rows = ([cell.strip() for cell in line.split("\t")] for line in lines if line.strip())
    return {row[0]: row[1:] for row in rows}


def _numbered(files: SourceFiles, path: str) -> dict[str, str]:
    """Return the texts of lines `number text` by number."""
    lines = labels.text(_read(files, path)).splitlines()
    pairs = (line.strip().split(" ", 1) for line in lines if " " in line.strip())
    return {number: rest.strip() for number, rest in pairs}
