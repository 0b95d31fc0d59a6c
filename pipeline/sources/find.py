"""Finding the layout of a collection, and listing its images, labels and boxes."""

from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import UserError
from pipeline.sources.archives import is_archive, is_packed
from pipeline.sources.files import SourceFiles, is_list
from pipeline.sources.ilsvrc import IMAGES, list_ilsvrc
from pipeline.sources.labels import WNID
from pipeline.sources.layouts import (
    class_folders,
    cub_root,
    list_cub,
    list_folders,
    list_tiny_imagenet,
)
from pipeline.sources.listing import is_image, stem, with_labels
from pipeline.sources.lists import list_rows
from pipeline.sources.webdatasets import list_webdataset, shard_names

LAYOUTS = {
    "ilsvrc": list_ilsvrc,
    "tiny-imagenet": list_tiny_imagenet,
    "cub": list_cub,
    "webdataset": list_webdataset,
    "folders": list_folders,
    "list": list_rows,
}
LAYOUT_HELP = (
    "ilsvrc: ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar, or train/<wnid>/*.JPEG and "
    "val/*.JPEG or val/<wnid>/*.JPEG, or Kaggle's ILSVRC/Data/CLS-LOC; XML boxes anywhere below; "
    "tiny-imagenet: wnids.txt, train/<wnid>/images, val/images, val/val_annotations.txt; "
    "cub: images.txt, image_class_labels.txt, classes.txt, images/; "
    "webdataset: train-000000.tar with jpg, png or webp and cls or json; "
    "folders: <class>/* or train/<class>/* and val/<class>/*; "
    "list: one .csv or .parquet file with the columns path and label"
)


@dataclass(frozen=True, kw_only=True)
class Source:
    """A listed collection.

    classes: sorted wnids; the class index is the position in them. class_names: readable, in the
    same order. images: by split, train first, a row of SCHEMA per image in a fixed order.
    """

    layout: str
    classes: tuple[str, ...]
    class_names: tuple[str, ...]
    images: dict[str, pa.Table]


def find_layout(files: SourceFiles) -> str:
    """Return the layout of a collection, a key of LAYOUTS.

    Raises UserError where it is empty or of no known layout.
    """
    if is_list(files.only or ""):
        return "list"
    folders, names = files.entries()
    if not folders and not names:
        raise UserError(
            f"source {files.source} is an empty folder; name the folder with the images."
        )
    if "wnids.txt" in names and "train" in folders:
        return "tiny-imagenet"
    if cub_root(files) is not None:
        return "cub"
    if _is_ilsvrc(files, names):
        return "ilsvrc"
    if shard_names(files):
        return "webdataset"
    if any(class_folders(files, "train")) or any(class_folders(files, "")):
        return "folders"
    for name in filter(is_packed, names):
        raise UserError(
            f"source {files.source} holds {name}, which cannot be read while packed; run `tar xf` "
            "on it and name the folder that this makes."
        )
    raise UserError(f"source {files.source} has no known layout. Known: {LAYOUT_HELP}.")


def _is_ilsvrc(files: SourceFiles, names: list[str]) -> bool:
    kaggle = (files.entries(x)[0] for x in ("Data", "ILSVRC/Data"))
    if {*names} & {*IMAGES} or any("CLS-LOC" in folders for folders in kaggle):
        return True
    (train_folders, train_files), (val_folders, val_files) = map(files.entries, ("train", "val"))
    class_tars = (stem(name) for name in train_files if is_archive(name))
    class_names = (*train_folders, *val_folders, *class_tars)
    return any(map(WNID.fullmatch, class_names)) or any(map(is_image, val_files))


def list_images(files: SourceFiles, layout: str) -> Source:
    """List every image of the collection by `layout`, a key of LAYOUTS.

    An image whose label is unknown, or that the labels name but the folder lacks, is listed with
    its `problem`. Raises UserError for an unknown layout, a collection without images, a damaged
    archive and labels that contradict each other.
    """
    if layout not in LAYOUTS:
        raise UserError(f"layout {layout!r} is unknown; allowed: auto, {', '.join(LAYOUTS)}.")
    listing = LAYOUTS[layout](files)
    images = {split: table for split, table in listing.images.items() if table.num_rows}
    if not images:
        raise UserError(
            f"source {files.source} holds no images in the {layout} layout. Known: {LAYOUT_HELP}."
        )
    first_split = next(iter(images.values()))  # train, or val where there is no train split
    wnids = pc.unique(first_split["wnid"]).drop_null().to_pylist()
    classes = listing.classes or tuple(sorted(wnids))
    return Source(
        layout=layout,
        classes=classes,
        class_names=tuple(listing.names.get(wnid, wnid) for wnid in classes),
        images={split: with_labels(table, classes) for split, table in images.items()},
    )
