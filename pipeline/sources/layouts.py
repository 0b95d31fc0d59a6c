"""Collections in folders: Tiny ImageNet, CUB-200-2011, and plain folders of classes."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator

from pipeline.errors import SHOWN, UserError
from pipeline.sources import labels
from pipeline.sources.annotations import Box, parse_boxes
from pipeline.sources.files import SourceFiles, path_in
from pipeline.sources.labels import MAPPING, WNID
from pipeline.sources.listing import Listing, ListingBuilder, is_image, stem
from pipeline.sources.webdatasets import SPLITS

SPLIT_NAME = re.compile(rf"({'|'.join(SPLITS)})\d*", re.IGNORECASE)
MISSING = "file missing: the annotations name it"
CUB_FOLDER = "CUB_200_2011"  # the name in its archive
CUB_FILES = (
    "images.txt",
    "image_class_labels.txt",
    "classes.txt",
    "train_test_split.txt",
    "bounding_boxes.txt",
)


def is_tiny_imagenet(files: SourceFiles) -> bool:
    """Return whether train/ is Tiny ImageNet's, by its folders or by wnids.txt beside it."""
    wnids = [name for name in files.entries("train")[0] if WNID.fullmatch(name)]
    has_list = "wnids.txt" in files.entries()[1] and bool(files.entries("train")[0])
    return has_list or any(_images(files, f"train/{wnid}/images") for wnid in wnids[:1])


def list_tiny_imagenet(files: SourceFiles) -> Listing:
    """List the images by split, each with its box, and readable names by wnid. Images may also lie
    beside a folder `images`, and those of val in folders of classes."""
    train, val = ListingBuilder(), ListingBuilder()
    wnids = files.entries("train")[0]
    boxes = files.ahead(lambda x: _tab_rows(files, f"train/{x}/{x}_boxes.txt"), wnids)
    images = files.ahead(lambda x: _tiny_paths(files, f"train/{x}"), wnids)
    for wnid, box_of, paths in zip(wnids, boxes, images, strict=True):
        for name, path in sorted(_with_missing(paths, box_of, f"train/{wnid}/images")):
            problem = None if path in paths else MISSING
            _add_tiny(train, path, wnid, box_of.get(name, []), problem)
    annotations = _tab_rows(files, "val/val_annotations.txt")
    folders = [name for name in files.entries("val")[0] if name != "images"]
    in_folders = files.ahead(lambda x: _tiny_paths(files, f"val/{x}"), folders)
    folder_of = {x: folder for folder, y in zip(folders, in_folders, strict=True) for x in y}
    folder_of |= dict.fromkeys(_tiny_paths(files, "val"), "")
    for name, path in sorted(_with_missing(folder_of, annotations, "val/images")):
        wnid, *box = annotations.get(name) or [""]
        folder = folder_of.get(path) or wnid
        problem = None if path in folder_of else MISSING
        if not problem and wnid not in ("", folder):
            problem = "label unknown: its folder and val_annotations.txt differ"
        elif not problem and not folder:
            problem = "label unknown: val_annotations.txt does not name it"
        _add_tiny(val, path, folder or None, box, problem)
    class_names = labels.read_names(files.read_optional("words.txt"), "words.txt", "\t")
    return Listing({"train": train.table(), "val": val.table()}, class_names)


def _tiny_paths(files: SourceFiles, folder: str) -> set[str]:
    """Return the paths of the images in a folder and in its folder `images`."""
    folders = folder, f"{folder}/images"
    return {path_in(x, name) for x in folders for name in _images(files, x)}


def _with_missing(
    paths: Iterable[str], names: Iterable[str], folder: str
) -> Iterator[tuple[str, str]]:
    """Yield name and path of each image, and of the names that no path has, as in `folder`."""
    known = {path.rpartition("/")[2]: path for path in paths}
    yield from ((path.rpartition("/")[2], path) for path in paths)
    yield from ((name, f"{folder}/{name}") for name in names if name not in known)


def _add_tiny(
    builder: ListingBuilder, path: str, wnid: str | None, box: list[str], problem: str | None
) -> None:
    boxes, note = parse_boxes([box] if box else [])
    builder.add(id=stem(path), path=path, wnid=wnid, boxes=boxes, note=note, problem=problem)


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
    if twice := [name for name, count in Counter(names.values()).items() if count > 1]:
        location = files.location(path_in(root, CUB_FILES[0]))
        raise UserError(f"{location} names {twice[0]} twice; keep one line.")
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
    """Return `x y width height`, perhaps fractions, as the pixels touched, or why not."""
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


def class_roots(files: SourceFiles) -> dict[str, str]:
    """Return the folder of the class folders by split; none where there are no class folders.
    Without a train folder the source itself is the root, where a folder named as a split, which has
    images without classes, is none of them."""
    roots: dict[str, str] = {}
    for name in files.entries()[0]:
        split = SPLITS.get(name.lower())
        if split in ("train", "val") and any(class_folders(files, name)):
            roots.setdefault(split, name)
    if "train" in roots:
        return {split: roots[split] for split in ("train", "val") if split in roots}
    return {"train": ""} if any(_classes(files, "")) else {}


def list_folders(files: SourceFiles) -> Listing:
    """List the images of class folders by split: those of train/ and val/, else all as train."""
    images = {}
    for split, root in class_roots(files).items():
        builder, classes = ListingBuilder(), dict(_classes(files, root))
        files.refuse_links([path_in(root, wnid) for wnid in classes])
        for wnid, names in classes.items():
            for id in (f"{wnid}/{name}" for name in names):
                builder.add(id=id, path=path_in(root, id), wnid=wnid)
        images[split] = builder.table()
    words = labels.read_names(files.read_optional("words.txt"), "words.txt", "\t")
    mapping = labels.read_names(files.read_optional(MAPPING), MAPPING)
    return Listing(images, words or mapping)


def _classes(files: SourceFiles, root: str) -> Iterator[tuple[str, list[str]]]:
    folders = class_folders(files, root)
    if root:
        return folders
    if all(SPLIT_NAME.fullmatch(folder) for folder, _ in folders):
        return iter(())
    # "train" beside other classes is one of vehicles.
    return (
        (folder, names)
        for folder, names in class_folders(files, root)
        if folder.lower().startswith("train") or not SPLIT_NAME.fullmatch(folder)
    )


def class_folders(files: SourceFiles, root: str) -> Iterator[tuple[str, list[str]]]:
    """Yield the folders within `root` that hold images, with the sorted names of the images."""
    folders = files.entries(root)[0]
    images = files.ahead(lambda x: sorted(_images(files, path_in(root, x))), folders)
    return ((folder, names) for folder, names in zip(folders, images, strict=True) if names)


def _images(files: SourceFiles, folder: str) -> set[str]:
    return {name for name in files.entries(folder)[1] if is_image(name)}


def _tab_rows(files: SourceFiles, path: str) -> dict[str, list[str]]:
    """Return the cells of each line of a tab-separated file after the first, by the first. Raises
    UserError where two lines with the same first cell differ."""
    rows: dict[str, list[str]] = {}
    for line in filter(None, labels.lines(files.read_optional(path))):
        name, *cells = (cell.strip() for cell in line.split("\t"))
        if rows.setdefault(name, cells) != cells:
            raise UserError(f"{files.location(path)} has two lines of {name}; keep one of them.")
    return rows


def _numbered(files: SourceFiles, path: str) -> dict[str, str]:
    """Return the texts of lines `number text` by number."""
    return labels.read_names(files.read_optional(path), path)
