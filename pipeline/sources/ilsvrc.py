"""ILSVRC 2012 as it was published, as it was unpacked, and as Kaggle hands it out, or a mixture."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import UserError
from pipeline.sources import labels
from pipeline.sources.annotations import Annotation, read_annotation
from pipeline.sources.archives import Member, is_archive, is_packed, members, packed_files
from pipeline.sources.files import SourceFiles, joined
from pipeline.sources.labels import WNID, Labels, Synset, agreed
from pipeline.sources.listing import Listed, Rows, is_image, replaced, stem

SPLIT_FOLDER = re.compile(r"(?:(?:ILSVRC/)?Data/CLS-LOC/)?(train|val)(?:/([^/]+))?")
TEST_FOLDER = re.compile(r"(?:(?:ILSVRC/)?Data/CLS-LOC/)?test(?:/.*)?")  # without labels
IMAGES = {"ILSVRC2012_img_train.tar": "train", "ILSVRC2012_img_val.tar": "val"}
BOXES = re.compile(r"ILSVRC201\d_bbox_.*")
DEVKIT = re.compile(r"ILSVRC201\d_devkit_.*")
DEVKIT_LABELS, META = "ILSVRC2012_validation_ground_truth.txt", "meta.mat"
SYNSET_LABELS = "imagenet_2012_validation_synset_labels.txt"
VAL_SOLUTION, SOLUTION = "LOC_val_solution.csv", re.compile(r"LOC_.*_solution\.csv")
MAPPING, WORDS, CAFFE_LABELS = "LOC_synset_mapping.txt", "words.txt", "val.txt"
SMALL_FILES = (DEVKIT_LABELS, META, SYNSET_LABELS, MAPPING, WORDS, CAFFE_LABELS)


@dataclass(kw_only=True)
class _Found:
    """What a walk over the source comes upon. small: content of the files of labels and names, by
    place; annotations, solutions: a row per image that has one."""

    images: dict[str, Rows] = field(default_factory=lambda: {"train": Rows(), "val": Rows()})
    archives: dict[str, str] = field(default_factory=dict)
    small: dict[str, bytes] = field(default_factory=dict)
    annotations: Rows = field(default_factory=Rows)
    solutions: Rows = field(default_factory=Rows)
    val_solution: Labels = field(default_factory=dict)


def list_ilsvrc(files: SourceFiles) -> Listed:
    """The images by split and readable names by wnid.

    Images come from `ILSVRC2012_img_<split>.tar` where it is there, else from the folders. Boxes
    come from the XML, else from Kaggle's solutions. Raises UserError for a damaged archive, and
    for labels or boxes that contradict each other.
    """
    found = _search(files)
    for split, path in found.archives.items():
        found.images[split] = Rows()
        _add_archive(found.images[split], files, path)
    images = {
        "train": found.images["train"].table("wnid", "id", "path"),
        "val": found.images["val"].table("id", "path"),
    }
    boxes = _one_each(found.annotations.table("id", "path"), "XML files")
    solutions = _one_each(found.solutions.table("id", "path"), "solutions")
    val = images["val"]
    told = _told(val, boxes, found, _known(images["train"], found))
    images["val"] = replaced(val, wnid=agreed(val["id"].to_pylist(), told))
    annotated = {x: _annotated(table, boxes, solutions) for x, table in images.items()}
    return Listed(annotated, _names(found))


def _search(files: SourceFiles) -> _Found:
    found = _Found()
    for folder, names in files.walk():
        split = SPLIT_FOLDER.fullmatch(folder)
        if split and split[2] and split[1] == "train":
            _add_images(found.images["train"], folder, names, split[2])
        elif split and split[1] == "val":
            _add_images(found.images["val"], folder, names, split[2])
        elif split:  # train, where the outer tar was unpacked and the inner ones were not
            for name in filter(is_archive, names):
                _add_archive(found.images["train"], files, joined(folder, name))
        if not TEST_FOLDER.fullmatch(folder):
            _add_xml(found.annotations, files, [joined(folder, x) for x in names if _is_xml(x)])
        for name in names:
            _keep(found, files, joined(folder, name), name)
    return found


def _keep(found: _Found, files: SourceFiles, path: str, name: str) -> None:
    """Read a file that tells labels, boxes or names; remember an archive of images."""
    if name in IMAGES:
        other = found.archives.setdefault(IMAGES[name], path)
        if other != path:
            raise UserError(f"{files.place(other)} and {files.place(path)} are one; keep either.")
    elif (is_packed(name) or is_archive(name)) and BOXES.fullmatch(name):
        for inner, data in packed_files(files, path):
            if _is_xml(inner):
                _add_annotation(found.annotations, inner, f"{path}/{inner}", read_annotation(data))
    elif (is_packed(name) or is_archive(name)) and DEVKIT.fullmatch(name):
        for inner, data in packed_files(files, path):
            if inner.split("/")[-1] in (DEVKIT_LABELS, META):
                found.small[f"{path}/{inner}"] = data
    elif name in SMALL_FILES:
        found.small[path] = files.read(path)
    elif SOLUTION.fullmatch(name):
        for id, annotation in labels.read_solution(files.read(path)):
            _add_annotation(found.solutions, id, path, annotation)
            if name == VAL_SOLUTION and annotation.wnid:
                found.val_solution[id] = annotation.wnid


def _is_xml(name: str) -> bool:
    return name.endswith(".xml")


def _add_images(rows: Rows, folder: str, names: list[str], wnid: str | None) -> None:
    images = [name for name in names if is_image(name)]
    rows.add_many([stem(x) for x in images], [joined(folder, x) for x in images], wnid)


def _add_archive(rows: Rows, files: SourceFiles, path: str) -> None:
    """The images in a tar, or in the tars within it, whose names are their classes."""

    def images(span: tuple[int, int | None]) -> list[Member]:
        return [x for x in members(files, path, *span) if _is_shown(x.name) and is_image(x.name)]

    outer = [x for x in members(files, path) if _is_shown(x.name) and is_archive(x.name)]
    if outer:
        spans: list[tuple[int, int | None]] = [(x.offset, x.offset + x.size) for x in outer]
    else:
        spans = [(0, None)]
    names = [stem(x.name) for x in outer] or [stem(path)]
    for name, found in zip(names, files.ahead(images, spans), strict=True):
        wnid = name if WNID.fullmatch(name) else None
        whole = [x for x in found if x.link is None]
        ids = [stem(x.name) for x in whole]
        offsets, sizes = [x.offset for x in whole], [x.size for x in whole]
        rows.add_many(ids, [path] * len(ids), wnid, offsets, sizes)
        for link in (x for x in found if x.link is not None):
            problem = f"archive link: it has no content and points to {link.link}"
            rows.add(id=stem(link.name), path=path, wnid=wnid, problem=problem)


def _is_shown(name: str) -> bool:
    return not name.split("/")[-1].startswith(".")


def _add_xml(rows: Rows, files: SourceFiles, paths: list[str]) -> None:
    for path, data in zip(paths, files.ahead(files.read, paths), strict=True):
        _add_annotation(rows, path, path, read_annotation(data))


def _add_annotation(rows: Rows, id: str, path: str, annotation: Annotation) -> None:
    rows.add(
        id=stem(id),  # the <filename> within is not to be trusted
        path=path,
        wnid=annotation.wnid,
        boxes=annotation.boxes,
        box_size=annotation.box_size,
        note=annotation.note,
    )


def _one_each(rows: pa.Table, kind: str) -> pa.Table:
    """Rows sorted by id, without those that repeat the one before; refuses contradictions."""
    if rows.num_rows < 2:
        return rows
    ids = rows["id"].combine_chunks()
    again = pc.equal(ids[1:], ids[:-1])
    for place in pc.indices_nonzero(again).to_pylist():
        one, other = rows.slice(place, 2).to_pylist()
        if any(one[name] != other[name] for name in rows.column_names if name != "path"):
            raise UserError(
                f"{kind} {one['path']} and {other['path']} describe the image {one['id']} "
                "differently; keep one of them."
            )
    return rows.filter(pc.invert(pa.concat_arrays([pa.array([False]), again])))


def _annotated(images: pa.Table, boxes: pa.Table, solutions: pa.Table) -> pa.Table:
    """The images with boxes and notes of their XML, else of a solution; classes where they lack."""
    at = pc.index_in(images["id"], boxes["id"])
    at_solution = pc.index_in(images["id"], solutions["id"])
    only = pc.and_(pc.is_null(at), pc.is_valid(at_solution))

    def told(name: str) -> pa.ChunkedArray:
        in_xml, in_solution = boxes[name].take(at), solutions[name].take(at_solution)
        return pc.if_else(only, in_solution, in_xml)

    nothing = pa.scalar([], images.schema.field("boxes").type)
    return replaced(
        images,
        wnid=pc.coalesce(images["wnid"], told("wnid")),
        boxes=pc.coalesce(told("boxes"), nothing),
        box_width=told("box_width"),
        box_height=told("box_height"),
        note=told("note"),
    )


def _synsets(found: _Found) -> Iterator[tuple[str, list[Synset]]]:
    """Folder of each meta.mat, and the classes in it."""
    for path, data in found.small.items():
        if path.endswith(META):
            yield path.removesuffix(META), labels.read_meta(data, path)


def _told(
    val: pa.Table, boxes: pa.Table, found: _Found, wnids: tuple[str, ...]
) -> dict[str, Labels]:
    """The labels of val images by who tells them."""
    told: dict[str, Labels] = {}
    named = val.filter(pc.is_valid(val["wnid"]))
    told["the class folder"] = dict(
        zip(*(named[x].to_pylist() for x in ("id", "wnid")), strict=True)
    )
    own = boxes.filter(
        pc.and_(pc.is_valid(boxes["wnid"]), pc.is_in(boxes["id"], val["id"].combine_chunks()))
    )
    told["the XML"] = dict(zip(*(own[x].to_pylist() for x in ("id", "wnid")), strict=True))
    if found.val_solution:
        told[VAL_SOLUTION] = found.val_solution
    metas = dict(_synsets(found))
    for path, data in found.small.items():
        name = path.split("/")[-1]
        if name == SYNSET_LABELS:
            told[path] = labels.read_synset_labels(data, path)
        elif name == CAFFE_LABELS:
            told[path] = labels.read_caffe_labels(data, path, wnids)
        elif name == DEVKIT_LABELS:
            synsets = metas.get(path.removesuffix(name)) or next(iter(metas.values()), None)
            if synsets is None:
                raise UserError(
                    f"{path} numbers the classes in the devkit's order, which its meta.mat tells; "
                    "put that beside it, or take it away where other labels are at hand."
                )
            told[path] = labels.read_devkit_labels(data, path, [x.wnid for x in synsets])
    return told


def _known(train: pa.Table, found: _Found) -> tuple[str, ...]:
    """All wnids, sorted: of the mapping or the devkit, else of the train images."""
    for path, data in found.small.items():
        if path.split("/")[-1] == MAPPING:
            return tuple(sorted(labels.read_names(data, " ")))
    for _, synsets in _synsets(found):
        return tuple(sorted(x.wnid for x in synsets))
    return tuple(sorted(pc.unique(train["wnid"]).drop_null().to_pylist()))


def _names(found: _Found) -> dict[str, str]:
    for wanted, separator in ((WORDS, "\t"), (MAPPING, " ")):
        for path, data in found.small.items():
            if path.split("/")[-1] == wanted:
                return labels.read_names(data, separator)
    return {x.wnid: x.words for _, synsets in _synsets(found) for x in synsets}
