"""ILSVRC 2012: the published archives, unpacked folders, Kaggle's layout, or a mixture of them."""

import re
from collections import ChainMap
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import UserError
from pipeline.sources import labels
from pipeline.sources.annotations import Annotation, read_annotation
from pipeline.sources.archives import is_archive, is_packed, members, packed_files
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
SOLUTION = re.compile(r"LOC_.*_solution\.csv")
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

    def names(self, list_name: str, separator: str) -> dict[str, str]:
        """Return the readable names by wnid of the first list of this name; empty without one."""
        matching = (data for path, data in self.lists.items() if _last(path) == list_name)
        return labels.read_names(next(matching, b""), separator)


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
    mapping = contents.names(MAPPING, " ")
    synsets: list[dict[str, str]] = list(contents.synsets.values())
    train_wnids = pc.unique(train["wnid"]).drop_null().to_pylist()
    all_wnids = sorted(mapping or (synsets[0] if synsets else train_wnids))
    labels_by_source = {
        "the class folder": _wnid_by_id(val, val),
        "the XML": _wnid_by_id(boxes, val),
        "LOC_val_solution.csv": _wnid_by_id(solutions, val),
    } | _listed_labels(contents, all_wnids)
    val = with_columns(val, wnid=merge_labels(val["id"].to_pylist(), labels_by_source))
    images = {
        "train": _annotated(train, boxes, solutions),
        "val": _annotated(val, boxes, solutions),
    }
    names = contents.names(WORDS, "\t") or mapping or {**ChainMap(*synsets)}
    return Listing(images, names)


def _read_contents(files: SourceFiles) -> _Contents:
    contents = _Contents()
    for folder, names in files.walk():
        paths = [path_in(folder, name) for name in names]
        if match := SPLIT_FOLDER.fullmatch(folder):
            split, wnid = match.groups()
            if split == "val" or wnid:
                for path in filter(is_image, paths):
                    contents.images[split].add(id=stem(path), path=path, wnid=wnid)
            else:  # train, where the outer tar was unpacked and the inner ones were not
                for path in filter(is_archive, paths):
                    _add_archive(contents.images[split], files, path)
        if not TEST_FOLDER.fullmatch(folder):
            xml = [path for path in paths if path.endswith(".xml")]
            for path, data in zip(xml, files.ahead(files.read, xml), strict=True):
                _add_annotation(contents.annotations, path, path, read_annotation(data))
        for path in paths:
            _read_file(contents, files, path)
    return contents


def _read_file(contents: _Contents, files: SourceFiles, path: str) -> None:
    """Read a file that gives labels, boxes or names; note the path of an archive of images."""
    name = _last(path)
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
            if inner.endswith(".xml"):
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


def _add_list(contents: _Contents, path: str, data: bytes) -> None:
    if _last(path) == META:
        contents.synsets[path.removesuffix(META)] = labels.read_meta(data, path)
    else:
        contents.lists[path] = data


def _last(path: str) -> str:
    return path.rpartition("/")[2]


def _add_archive(builder: ListingBuilder, files: SourceFiles, path: str) -> None:
    """Add the images in a tar, or in the tars within it, whose names are their classes."""
    inner = [x for x in members(files, path) if is_archive(x.name) and not _is_hidden(x.name)]
    spans: list[tuple[str, int, int | None]]
    spans = [(x.name, x.offset, x.offset + x.size) for x in inner] or [(path, 0, None)]
    listings = files.ahead(lambda span: list(members(files, path, *span[1:])), spans)
    for (name, _, _), listing in zip(spans, listings, strict=True):
        wnid = stem(name) if WNID.fullmatch(stem(name)) else None
        for x in listing:
            if not is_image(x.name) or _is_hidden(x.name):
                continue
            if x.link is None:
                builder.add(id=stem(x.name), path=path, wnid=wnid, offset=x.offset, size=x.size)
            else:
                problem = f"archive link: it has no content and points to {x.link}"
                builder.add(id=stem(x.name), path=path, wnid=wnid, problem=problem)


def _is_hidden(path: str) -> bool:
    return _last(path).startswith(".")


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
        if first | {"path": ""} != second | {"path": ""}:
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
        **{name: column(name) for name in ("box_width", "box_height", "note")},
    )


def _wnid_by_id(rows: pa.Table, images: pa.Table) -> Labels:
    """Return the known wnids among the rows of these images."""
    in_images = pc.is_in(rows["id"], images["id"].combine_chunks())
    known = rows.filter(pc.and_(in_images, pc.is_valid(rows["wnid"])))
    return dict(zip(known["id"].to_pylist(), known["wnid"].to_pylist(), strict=True))


def _listed_labels(contents: _Contents, wnids: list[str]) -> dict[str, Labels]:
    """Return the labels of val images in each list, by its path. wnids: all, sorted."""
    labels_by_path = {}
    for path, data in contents.lists.items():
        name = _last(path)
        if name == SYNSET_LABELS:
            labels_by_path[path] = labels.read_synset_labels(data, path)
        elif name == CAFFE_LABELS:
            labels_by_path[path] = labels.read_caffe_labels(data, path, wnids)
        elif name == DEVKIT_LABELS:
            any_synsets = next(iter(contents.synsets.values()), None)
            synsets = contents.synsets.get(path.removesuffix(name), any_synsets)
            if synsets is None:
                raise UserError(
                    f"{path} numbers the classes in the devkit's order; put the devkit's meta.mat "
                    "beside it, or remove it where other labels exist."
                )
            labels_by_path[path] = labels.read_devkit_labels(data, path, list(synsets))
    return labels_by_path
