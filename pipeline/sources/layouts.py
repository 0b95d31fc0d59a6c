"""Collections in folders: Tiny ImageNet, CUB-200-2011, and plain folders of classes."""

import math
from collections.abc import Iterator

from pipeline.errors import UserError
from pipeline.sources import labels
from pipeline.sources.annotations import Box, parse_box
from pipeline.sources.files import SourceFiles, joined
from pipeline.sources.listing import Listed, Rows, is_image, stem

CUB_FOLDER = "CUB_200_2011"  # what its archive unpacks to
CUB_FILES = (
    "images.txt",
    "image_class_labels.txt",
    "classes.txt",
    "train_test_split.txt",
    "bounding_boxes.txt",
)


def list_tiny_imagenet(files: SourceFiles) -> Listed:
    """The images by split, each with its box, and readable names by wnid."""
    train, val = Rows(), Rows()
    folders = [f"train/{wnid}" for wnid in files.entries("train")[0]]
    for folder, listed in zip(
        folders, files.ahead(lambda x: _tiny_class(files, x), folders), strict=True
    ):
        boxes, present = listed
        for name in sorted({*present, *boxes}):
            path = f"{folder}/images/{name}"
            _add_tiny(train, path, folder.split("/")[1], boxes.get(name), name in present)
    told = {row[0]: row[1:] for row in _tab_rows(files, "val/val_annotations.txt")}
    present = _images(files, "val/images")
    for name in sorted({*present, *told}):
        row = told.get(name, [])
        _add_tiny(val, f"val/images/{name}", row[0] if row else None, row[1:], name in present)
    names = labels.read_names(_read(files, "words.txt"), "\t")
    return Listed({"train": train.table(), "val": val.table()}, names)


def _tiny_class(files: SourceFiles, folder: str) -> tuple[dict[str, list[str]], set[str]]:
    rows = _tab_rows(files, f"{folder}/{folder.split('/')[1]}_boxes.txt")
    return {row[0]: row[1:] for row in rows}, _images(files, f"{folder}/images")


def _add_tiny(
    rows: Rows, path: str, wnid: str | None, box: list[str] | None, present: bool
) -> None:
    problem = None
    if not present:
        problem = "file missing: the annotations name it"
    elif not wnid:
        problem = "label unknown: val_annotations.txt does not name it"
    parsed, note = parse_box(box) if box else (None, None)
    rows.add(
        id=stem(path),
        path=path,
        wnid=wnid,
        boxes=(parsed,) if parsed else (),
        note=f"box dropped: {note}" if note else None,
        problem=problem,
    )


def cub_root(files: SourceFiles) -> str | None:
    """The folder of the source that CUB-200-2011's lists lie in, None where there is none."""
    for folder in ("", CUB_FOLDER):
        if {*CUB_FILES[:3]} <= {*files.entries(folder)[1]}:
            return folder
    return None


def list_cub(files: SourceFiles) -> Listed:
    """The images by split, its test images as val, each with its box; readable class names."""
    root = cub_root(files)
    if root is None:
        raise UserError(f"{files.place('')} lacks one of {', '.join(CUB_FILES)}; unpack them all.")
    listed, numbers, classes, split, boxes = (
        _numbered(files, joined(root, name)) for name in CUB_FILES
    )
    folders = [joined(root, f"images/{x}") for x in files.entries(joined(root, "images"))[0]]
    found = zip(folders, files.ahead(lambda x: _images(files, x), folders), strict=True)
    present = {f"{folder.split('/')[-1]}/{name}" for folder, names in found for name in names}
    images = {"train": Rows(), "val": Rows()}
    for number, name in listed.items():
        box, note = _cub_box(boxes.get(number, ""))
        problem = None
        if name not in present:
            problem = "file missing: images.txt names it"
        elif split.get(number) not in ("0", "1"):
            problem = "split unknown: train_test_split.txt does not name it"
        elif numbers.get(number) not in classes:
            problem = "label unknown: image_class_labels.txt does not name it"
        images["val" if split.get(number) == "0" else "train"].add(
            id=name,
            path=joined(root, f"images/{name}"),
            wnid=classes.get(numbers.get(number, "")),
            boxes=(box,) if box else (),
            note=note,
            problem=problem,
        )
    for name in sorted(present - {*listed.values()}):
        problem = "label unknown: images.txt does not name it"
        images["train"].add(
            id=name, path=joined(root, f"images/{name}"), wnid=None, problem=problem
        )
    tables = {split: rows.table("id") for split, rows in images.items()}
    names = {x: x.split(".", 1)[-1].replace("_", " ") for x in classes.values()}
    return Listed(tables, names)


def _cub_box(text: str) -> tuple[Box | None, str | None]:
    """`x y width height`, which may be fractions, as the pixels that it touches."""
    if not text:
        return None, None
    try:
        x, y, width, height = map(float, text.split())
        box = math.floor(x), math.floor(y), math.ceil(x + width) - 1, math.ceil(y + height) - 1
        if max(map(abs, box)) < 2**31:
            return box, None
    except (ValueError, OverflowError):
        pass
    return None, f"box dropped: not four numbers ({text[: labels.SHOWN]})"


def list_folders(files: SourceFiles) -> Listed:
    """The images of class folders by split: of train/ and val/ where they are, else all train."""
    below_train = any(class_folders(files, "train"))
    splits = {"train": "train", "val": "val"} if below_train else {"train": ""}
    images = {}
    for split, root in splits.items():
        rows = Rows()
        for name, found in class_folders(files, root):
            folder = joined(root, name)
            rows.add_many([f"{name}/{x}" for x in found], [f"{folder}/{x}" for x in found], name)
        images[split] = rows.table()
    names = labels.read_names(_read(files, "words.txt"), "\t")
    names = names or labels.read_names(_read(files, "LOC_synset_mapping.txt"), " ")
    return Listed(images, names)


def class_folders(files: SourceFiles, root: str) -> Iterator[tuple[str, list[str]]]:
    """The folders within `root` that hold images, with the names of those."""
    names = files.entries(root)[0]
    listed = files.ahead(lambda x: sorted(_images(files, joined(root, x))), names)
    return ((name, found) for name, found in zip(names, listed, strict=True) if found)


def _images(files: SourceFiles, folder: str) -> set[str]:
    return {name for name in files.entries(folder)[1] if is_image(name)}


def _read(files: SourceFiles, path: str) -> bytes:
    """A file that need not be there."""
    folder, _, name = path.rpartition("/")
    return files.read(path) if name in files.entries(folder)[1] else b""


def _tab_rows(files: SourceFiles, path: str) -> list[list[str]]:
    lines = labels.text(_read(files, path)).splitlines()
    return [[cell.strip() for cell in line.split("\t")] for line in lines if line.strip()]


def _numbered(files: SourceFiles, path: str) -> dict[str, str]:
    """Lines `number text`, as text by number."""
    lines = labels.text(_read(files, path)).splitlines()
    pairs = (line.strip().split(" ", 1) for line in lines if " " in line.strip())
    return {number: rest.strip() for number, rest in pairs}
