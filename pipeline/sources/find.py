"""Finding the layout of a collection, and listing its images, labels and boxes."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain, islice

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import UserError
from pipeline.sources.archives import is_archive, members
from pipeline.sources.files import SourceFiles, is_list
from pipeline.sources.ilsvrc import IMAGE_NAME, IMAGES, SPLIT_FOLDER, list_ilsvrc
from pipeline.sources.labels import WNID
from pipeline.sources.layouts import (
    class_folders,
    class_roots,
    cub_root,
    is_tiny_imagenet,
    list_cub,
    list_folders,
    list_tiny_imagenet,
)
from pipeline.sources.listing import Unread, is_image, stem, with_labels
from pipeline.sources.lists import list_rows
from pipeline.sources.unread import count_unread, summary_of
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
    """A listed collection. classes: sorted wnids; the class index is the position in them.
    class_names: readable, in the same order. images: by split, train first, a row of SCHEMA per
    image in a fixed order. unread: the other files of the source, by reason."""

    layout: str
    classes: tuple[str, ...]
    class_names: tuple[str, ...]
    images: dict[str, pa.Table]
    unread: dict[str, Unread]


def find_layout(files: SourceFiles) -> str:
    """Return a collection's layout, a key of LAYOUTS. Raises UserError for none that is known."""
    if is_list(files.only or ""):
        return "list"
    if is_tiny_imagenet(files):
        return "tiny-imagenet"
    if cub_root(files) is not None:
        return "cub"
    if _is_ilsvrc(files):
        return "ilsvrc"
    has_classes, shards = bool(class_roots(files)), shard_names(files)
    if shards and has_classes and _has_labels(files, chain(*shards.values())):
        raise UserError(
            f"source {files.source} has labelled tars ({next(iter(shards.values()))[0]}) and class "
            "folders; say which to read: layout webdataset or folders."
        )
    if has_classes:
        return "folders"
    if shards:
        return "webdataset"
    contents = summary_of(files)
    if not contents:
        raise UserError(f"source {files.source} is an empty folder; name that of the images.")
    raise UserError(f"source {files.source} has no known layout: {contents}. Known: {LAYOUT_HELP}.")


def _is_ilsvrc(files: SourceFiles) -> bool:
    kaggle = (files.entries(x)[0] for x in ("Data", "ILSVRC/Data"))
    if {*files.entries()[1]} & {*IMAGES} or any("CLS-LOC" in folders for folders in kaggle):
        return True
    folders = [*files.entries()[0], *(f"data/{name}" for name in files.entries("data")[0])]
    for folder in filter(SPLIT_FOLDER.fullmatch, folders):
        children, names = files.entries(folder)
        class_tars = (stem(name) for name in names if is_archive(name))
        if any(map(WNID.fullmatch, (*children, *class_tars))):
            return True
        if any(IMAGE_NAME.fullmatch(stem(name)) for name in names):
            return True
    if any(x[3] for x in map(IMAGE_NAME.fullmatch, map(stem, files.entries()[1])) if x):
        return True
    return not any(class_folders(files, "val")) and any(map(is_image, files.entries("val")[1]))


def _has_labels(files: SourceFiles, paths: Iterable[str]) -> bool:
    """Return whether one of these tars has labels among its first members."""
    for path in paths:
        try:
            if any(x.name.endswith((".cls", ".json")) for x in islice(members(files, path), 20)):
                return True
        except UserError:  # damaged: the class folders beside it can still be read
            continue
    return False


def list_images(files: SourceFiles, layout: str) -> Source:
    """List every image of the collection by `layout`, a key of LAYOUTS. An image whose label is
    unknown, or that the labels name but the folder lacks, is listed with its `problem`. Raises
    UserError for an unknown layout, a collection without images, a damaged archive and labels that
    contradict each other."""
    if layout not in LAYOUTS:
        raise UserError(f"layout {layout!r} is unknown; allowed: auto, {', '.join(LAYOUTS)}.")
    del files.used[:]  # by find_layout, which looks into files that this layout may not read
    listing = LAYOUTS[layout](files)
    images = {split: table for split, table in listing.images.items() if table.num_rows}
    if not images:
        raise UserError(
            f"source {files.source} holds no images in the {layout} layout"
            f"{_better(files, layout)}: {summary_of(files)}. Known: {LAYOUT_HELP}."
        )
    first_split = next(iter(images.values()))  # train, or val where there is no train split
    wnids = pc.unique(first_split["wnid"]).drop_null().to_pylist()
    classes = listing.classes or tuple(sorted(wnids))
    return Source(
        layout=layout,
        classes=classes,
        class_names=tuple(listing.names.get(wnid, wnid) for wnid in classes),
        images={split: with_labels(table, classes) for split, table in images.items()},
        unread=count_unread(files, images.values(), listing.unread),
    )


def _better(files: SourceFiles, layout: str) -> str:
    """Return the layout that a source has instead, as the end of a clause."""
    try:
        other = find_layout(files)
    except UserError:
        return ""
    return f", but in that of {other}" if other != layout else ""
