"""ILSVRC 2012: the published archives, unpacked folders, Kaggle's layout, or a mixture of them."""

import re
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import UserError
from pipeline.sources import labels
from pipeline.sources.annotations import Annotation, read_annotation
from pipeline.sources.archives import Member, is_archive, is_packed, members, packed_files
from pipeline.sources.files import SourceFiles, path_in
from pipeline.sources.labels import WNID, Labels, merge_labels
from pipeline.sources.listing import Listing, ListingBuilder, is_image, stem, with_columns

SPLIT_FOLDER = re.compile(r"(?:(?:ILSVRC/)?Data/CLS-LOC/)?(train|val)(?:/([^/]+))?")
TEST_FOLDER = re.compile(r"(?:(?:ILSVRC/)?Data/CLS-LOC/)?test(?:/.*)?")  # without labels
IMAGES = {"ILSVRC2012_img_train.tar": "train", "ILSVRC2012_img_val.tar": "val"}
BOXES = re.compile(r"ILSVRC201\d_bbox_.*")
DEVKIT = re.compile(r"ILSVRC201\d_devkit_.*")
DEVKIT_LABELS, META = "ILSVRC2012_validation_ground_truth.txt", "meta.mat"
SYNSET_LABELS = "imagenet_2012_validation_synset_labels.txt"
VAL_SOLUTION, SOLUTION = "LOC_val_solution.csv", re.compile(r"LOC_.*_solution\.csv")
MAPPING, WORDS, CAFFE_LABELS = "LOC_synset_mapping.txt", "words.txt", "val.txt"
LISTS = (DEVKIT_LABELS, META, SYNSET_LABELS, MAPPING, WORDS, CAFFE_LABELS)


def _builders() -> dict[str, ListingBuilder]:
    return {"train": ListingBuilder(), "val": ListingBuilder()}


@dataclass(kw_only=True)
class _Contents:
    """The content of a source as a walk over it collects it.

    images: by split, those in folders. archives: path of the tar of images, by split. lists:
    content of the files of labels and names, by path. synsets: names by wnid of each meta.mat, by
    its folder. annotations, solutions: a row per image, of the XML and of Kaggle's solutions.
    """

    images: dict[str, ListingBuilder] = field(default_factory=_builders)
    archives: dict[str, str] = field(default_factory=dict)
    lists: dict[str, bytes] = field(default_factory=dict)
    synsets: dict[str, dict[str, str]] = field(default_factory=dict)
    annotations: ListingBuilder = field(default_factory=ListingBuilder)
    solutions: ListingBuilder = field(default_factory=ListingBuilder)
    val_solution: Labels = field(default_factory=dict)


def list_ilsvrc(files: SourceFiles) -> Listing:
    """List the images by split, and readable names by wnid.

    Images come from `ILSVRC2012_img_<split>.tar` where it exists, else from the folders. Boxes
    come from the XML, else from Kaggle's solutions. Raises UserError for a damaged archive, and
    for labels or boxes that contradict each other.
    """
    contents = _read_contents(files)
    for split, path in contents.archives.items():
        contents.images[split] = ListingBuilder()
        _add_archive(contents.images[split], files, path)
    train = contents.images["train"].table("wnid", "id", "path")
    val = contents.images["val"].table("id", "path")
    boxes = _without_repetitions(contents.annotations.table("id", "path"), "XML files")
    solutions = _without_repetitions(contents.solutions.table("id", "path"), "solutions")
    labels_by_source = _labels_by_source(val, boxes, contents, _all_wnids(train, contents))
    val = with_columns(val, wnid=merge_labels(val["id"].to_pylist(), labels_by_source))
    images = {"train": train, "val": val}
    annotated = {split: _annotated(x, boxes, solutions) for split, x in images.items()}
    return Listing(annotated, _class_names(contents))


def _read_contents(files: SourceFiles) -> _Contents:
    contents = _Contents()
    for folder, names in files.walk():
        split = SPLIT_FOLDER.fullmatch(folder)
        if split and split[2] and split[1] == "train":
            _add_images(contents.images["train"], folder, names, split[2])
        elif split and split[1] == "val":
            _add_images(contents.images["val"], folder, names, split[2])
        elif split:  # train, where the outer tar was unpacked and the inner ones were not
            for name in filter(is_archive, names):
                _add_archive(contents.images["train"], files, path_in(folder, name))
        if not TEST_FOLDER.fullmatch(folder):
            paths = [path_in(folder, name) for name in names if _is_xml(name)]
            for path, data in zip(paths, files.ahead(files.read, paths), strict=True):
                _add_annotation(contents.annotations, path, path, read_annotation(data))
        for name in names:
            _read_file(contents, files, path_in(folder, name), name)
    return contents


def _read_file(contents: _Contents, files: SourceFiles, path: str, name: str) -> None:
    """Read a file that gives labels, boxes or names; note the path of an archive of images."""
    is_tar = is_packed(name) or is_archive(name)
    if name in IMAGES:
        first = contents.archives.setdefault(IMAGES[name], path)
        if first != path:
            raise UserError(
                f"{files.location(first)} and {files.location(path)} hold the same images; "
                "keep one of them."
            )
    elif is_tar and BOXES.fullmatch(name):
        for inner, data in packed_files(files, path):
            if _is_xml(inner):
                annotation = read_annotation(data)
                _add_annotation(contents.annotations, inner, f"{path}/{inner}", annotation)
    elif is_tar and DEVKIT.fullmatch(name):
        for inner, data in packed_files(files, path):
            if _last(inner) in (DEVKIT_LABELS, META):
                _add_list(contents, f"{path}/{inner}", data)
    elif name in LISTS:
        _add_list(contents, path, files.read(path))
    elif SOLUTION.fullmatch(name):
        for id, annotation in labels.read_solution(files.read(path)):
            _add_annotation(contents.solutions, id, path, annotation)
            if name == VAL_SOLUTION and annotation.wnid:
                contents.val_solution[id] = annotation.wnid


def _add_list(contents: _Contents, path: str, data: bytes) -> None:
    if _last(path) == META:
        contents.synsets[path.removesuffix(META)] = labels.read_meta(data, path)
    else:
        contents.lists[path] = data


def _last(path: str) -> str:
    return path.rpartition("/")[2]


def _is_xml(name: str) -> bool:
    return name.endswith(".xml")


def _is_hidden(path: str) -> bool:
    return _last(path).startswith(".")


def _add_images(builder: ListingBuilder, folder: str, names: list[str], wnid: str | None) -> None:
    for name in filter(is_image, names):
        builder.add(id=stem(name), path=path_in(folder, name), wnid=wnid)


def _add_archive(builder: ListingBuilder, files: SourceFiles, path: str) -> None:
    """Add the images in a tar, or in the tars within it, whose names are their classes."""

    def images(span: tuple[int, int | None]) -> list[Member]:
        inside = members(files, path, *span)
        return [x for x in inside if is_image(x.name) and not _is_hidden(x.name)]

    inner = [x for x in members(files, path) if is_archive(x.name) and not _is_hidden(x.name)]
    names = [stem(x.name) for x in inner]
    spans: list[tuple[int, int | None]] = [(x.offset, x.offset + x.size) for x in inner]
    if not inner:
        names, spans = [stem(path)], [(0, None)]
    for name, listed in zip(names, files.ahead(images, spans), strict=True):
        wnid = name if WNID.fullmatch(name) else None
        for x in listed:
            if x.link is None:
                builder.add(id=stem(x.name), path=path, wnid=wnid, offset=x.offset, size=x.size)
            else:
                problem = f"archive link: it has no content and points to {x.link}"
                builder.add(id=stem(x.name), path=path, wnid=wnid, problem=problem)


def _add_annotation(builder: ListingBuilder, id: str, path: str, annotation: Annotation) -> None:
    builder.add(
        id=stem(id),  # the <filename> within is not to be trusted
        path=path,
        wnid=annotation.wnid,
        boxes=annotation.boxes,
        box_size=annotation.box_size,
        note=annotation.note,
    )


def _without_repetitions(rows: pa.Table, kind: str) -> pa.Table:
    """Return rows sorted by id, one for each id. Raises UserError where two contradict."""
    if rows.num_rows < 2:
        return rows
    ids = rows["id"].combine_chunks()
    repeats = pc.equal(ids[1:], ids[:-1])
    for index in pc.indices_nonzero(repeats).to_pylist():
        first, second = rows.slice(index, 2).to_pylist()
        if any(first[name] != second[name] for name in rows.column_names if name != "path"):
            raise UserError(
                f"{kind} {first['path']} and {second['path']} describe the image {first['id']} "
                "differently; keep one of them."
            )
    return rows.filter(pc.invert(pa.concat_arrays([pa.array([False]), repeats])))


def _annotated(images: pa.Table, boxes: pa.Table, solutions: pa.Table) -> pa.Table:
    """Return the images with the boxes and notes of their XML, else of a solution.

    Both also give the class where the image has none.
    """
    in_boxes = pc.index_in(images["id"], boxes["id"])
    in_solutions = pc.index_in(images["id"], solutions["id"])
    from_solution = pc.and_(pc.is_null(in_boxes), pc.is_valid(in_solutions))

    def column(name: str) -> pa.ChunkedArray:
        solved = solutions[name].take(in_solutions)
        return pc.if_else(from_solution, solved, boxes[name].take(in_boxes))

    no_boxes = pa.scalar([], images.schema.field("boxes").type)
    return with_columns(
        images,
        wnid=pc.coalesce(images["wnid"], column("wnid")),
        boxes=pc.coalesce(column("boxes"), no_boxes),
        box_width=column("box_width"),
        box_height=column("box_height"),
        note=column("note"),
    )


def _labels_by_source(
    val: pa.Table, boxes: pa.Table, contents: _Contents, wnids: tuple[str, ...]
) -> dict[str, Labels]:
    """Return the labels of val images by their source, as messages name it."""
    in_val = pc.is_in(boxes["id"], val["id"].combine_chunks())
    labels_by_source = {
        "the class folder": _wnid_by_id(val),
        "the XML": _wnid_by_id(boxes.filter(in_val)),
        VAL_SOLUTION: contents.val_solution,
    }
    for path, data in contents.lists.items():
        name = _last(path)
        if name == SYNSET_LABELS:
            labels_by_source[path] = labels.read_synset_labels(data, path)
        elif name == CAFFE_LABELS:
            labels_by_source[path] = labels.read_caffe_labels(data, path, wnids)
        elif name == DEVKIT_LABELS:
            any_synsets = next(iter(contents.synsets.values()), None)
            synsets = contents.synsets.get(path.removesuffix(name), any_synsets)
            if synsets is None:
                raise UserError(
                    f"{path} numbers the classes in the devkit's order; put the devkit's meta.mat "
                    "beside it, or remove it where other labels exist."
                )
            labels_by_source[path] = labels.read_devkit_labels(data, path, list(synsets))
    return labels_by_source


def _wnid_by_id(rows: pa.Table) -> Labels:
    known = rows.filter(pc.is_valid(rows["wnid"]))
    return dict(zip(known["id"].to_pylist(), known["wnid"].to_pylist(), strict=True))


def _all_wnids(train: pa.Table, contents: _Contents) -> tuple[str, ...]:
    """Return all wnids, sorted: of the mapping or the devkit, else of the train images."""
    for path, data in contents.lists.items():
        if _last(path) == MAPPING:
            return tuple(sorted(labels.read_names(data, " ")))
    for synsets in contents.synsets.values():
        return tuple(sorted(synsets))
    return tuple(sorted(pc.unique(train["wnid"]).drop_null().to_pylist()))


def _class_names(contents: _Contents) -> dict[str, str]:
    """Return readable names by wnid, of the first list that has them; empty where none has."""
    for list_name, separator in ((WORDS, "\t"), (MAPPING, " ")):
        for path, data in contents.lists.items():
            if _last(path) == list_name:
                return labels.read_names(data, separator)
    return {wnid: name for x in contents.synsets.values() for wnid, name in x.items()}
