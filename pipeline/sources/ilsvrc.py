"""ILSVRC 2012: the published archives, unpacked folders, Kaggle's layout, or a mixture of them."""

import re
from collections import ChainMap
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import UserError
from pipeline.sources import labels
from pipeline.sources.annotations import Annotation, read_annotation
from pipeline.sources.archives import Member, is_archive, is_packed, members, packed_files
from pipeline.sources.files import FAULTS_OF_A_FILE, SourceFiles, path_in
from pipeline.sources.labels import MAPPING, WNID, Labels, merge_labels
from pipeline.sources.listing import Listing, ListingBuilder, Unread, is_image, stem, with_columns
from pipeline.sources.unread import add_members

SPLIT_FOLDER = re.compile(  # Hugging Face's archives are data/train_images_0 and the like
    r"(?:(?:ILSVRC/)?Data/CLS-LOC/|data/)?(train|val)(?:_images(?:_\d)?)?(?:/([^/]+))?"
)
# Hugging Face's names end with the class.
IMAGE_NAME = re.compile(r"((n\d{8})_.+?|ILSVRC2012_val_\d{8})(?:_(n\d{8}))?")
TEST_FOLDER = re.compile(r"(?:(?:ILSVRC/)?Data/CLS-LOC/)?test(?:/.*)?")  # without labels
IMAGES = {"ILSVRC2012_img_train.tar": "train", "ILSVRC2012_img_val.tar": "val"}
SPLIT_WORD = re.compile(r"(?:(?<![^/])|(?<=bbox_)|(?<=LOC_))(train|val)(?=/|_v\d|_solution)")
BOXES = re.compile(r"ILSVRC201\d_bbox_.*")
DEVKIT = re.compile(r"ILSVRC201\d_devkit_.*")
DEVKIT_LABELS, META = "ILSVRC2012_validation_ground_truth.txt", "meta.mat"
SYNSET_LABELS = "imagenet_2012_validation_synset_labels.txt"
SOLUTION = re.compile(r"LOC_.*_solution\.csv")
WORDS, CAFFE_LABELS = "words.txt", "val.txt"
KINDS = ("XML files", "solutions")  # of descriptions of images
LISTS = (DEVKIT_LABELS, META, SYNSET_LABELS, MAPPING, WORDS, CAFFE_LABELS)


def _builders() -> dict[str, ListingBuilder]:
    return {"train": ListingBuilder(), "val": ListingBuilder()}


@dataclass(kw_only=True)
class _Contents:
    """The content of a source as a walk over it collects it. images: by split, those in folders.
    archives: path of the tar of images, by split. lists: content of the files of labels and names,
    by path. synsets: names by wnid of each meta.mat, by its folder. annotations, solutions: by
    split, a row per XML file or row of a solution, with id `<class>/<name>` where a class folder is
    named, else `<name>`. unread: members of archives."""

    images: dict[str, ListingBuilder] = field(default_factory=_builders)
    archives: dict[str, str] = field(default_factory=dict)
    lists: dict[str, bytes] = field(default_factory=dict)
    synsets: dict[str, dict[str, str]] = field(default_factory=dict)
    annotations: dict[str, ListingBuilder] = field(default_factory=_builders)
    solutions: dict[str, ListingBuilder] = field(default_factory=_builders)
    unread: dict[str, Unread] = field(default_factory=dict)

    def names(self, list_name: str, separator: str | None = None) -> dict[str, str]:
        """Return the readable names by wnid of the list of this name; empty without one. Raises
        UserError where there are several that differ."""
        paths = [path for path in self.lists if _last(path) == list_name]
        lists = [labels.read_names(self.lists[path], path, separator) for path in paths]
        for path, names in zip(paths, lists, strict=True):
            if names != lists[0]:
                raise UserError(f"{paths[0]} and {path} name other classes; keep one of them.")
        return lists[0] if lists else {}


def list_ilsvrc(files: SourceFiles) -> Listing:
    """List the images by split, and readable names by wnid. Images come from
    `ILSVRC2012_img_<split>.tar` where it exists, else from the folders. Boxes come from the XML,
    else from Kaggle's solutions. Raises UserError for damaged archives, and for contradictions."""
    contents = _read_contents(files)
    for split, path in contents.archives.items():
        contents.images[split] = ListingBuilder()
        _add_archive(contents, split, files, path)
    mapping = contents.names(MAPPING)
    synsets: list[dict[str, str]] = list(contents.synsets.values())
    images: dict[str, pa.Table] = {}
    described, unused = set[str](), set[str]()
    for split, order in (("train", ("wnid", "id", "path")), ("val", ("id", "path"))):
        listed = contents.images[split].table(*order)
        rows = contents.annotations[split].table(), contents.solutions[split].table()
        xml, solved = (_matched(listed, *x) for x in zip(rows, KINDS, strict=True))
        for table, matched in zip(rows, (xml, solved), strict=True):
            unused |= {*pc.unique(table["path"]).to_pylist()}
            described |= {*pc.unique(matched["path"]).to_pylist()}
        if split == "val":
            train_wnids = pc.unique(images["train"]["wnid"]).drop_null().to_pylist()
            wnids = sorted(mapping or (synsets[0] if synsets else train_wnids))
            labels_by_source = {
                "the class folder": listed["wnid"].to_pylist(),
                "the XML": xml["wnid"].to_pylist(),
                "LOC_val_solution.csv": solved["wnid"].to_pylist(),
            } | _listed_labels(contents, wnids, listed)
            wnid = merge_labels(listed["id"].to_pylist(), labels_by_source)
            listed = with_columns(listed, wnid=wnid)
        images[split] = _annotated(listed, xml, solved)
    files.set_aside(unused - described)
    names = {**ChainMap(contents.names(WORDS, "\t"), mapping, *synsets)}
    return Listing(images, names, unread=contents.unread)


def _read_contents(files: SourceFiles) -> _Contents:
    contents, class_tars = _Contents(), set[str]()
    for folder, names in files.walk():
        paths = [path_in(folder, name) for name in names]
        match = SPLIT_FOLDER.fullmatch(folder)
        if f"{folder}.tar" in class_tars and any(map(is_image, names)):
            raise _repeated(files, folder, f"{folder}.tar")
        if match or not folder:
            for path in filter(is_image, paths):
                _add_image(contents, path, match)
        if match and match[1] == "train" and not match[2]:  # only the outer tar was unpacked
            class_tars |= {*filter(is_archive, paths)}
            for path in filter(is_archive, paths):
                _add_archive(contents, "train", files, path)
        if not TEST_FOLDER.fullmatch(folder):
            xml = [path for path in paths if path.lower().endswith(".xml")]
            read = files.ahead(lambda path: _annotation(files, path), xml)
            for path, annotation in zip(xml, read, strict=True):
                _add_annotation(contents.annotations, path[:-4], path, annotation)
        for path in paths:
            _read_file(contents, files, path)
    return contents


def _annotation(files: SourceFiles, path: str) -> Annotation:
    """Read an XML file; the note of one that cannot be read says why."""
    try:
        return read_annotation(files.read(path))
    except OSError as error:
        if error.errno not in FAULTS_OF_A_FILE:
            raise
        return Annotation(note=f"annotation unreadable: {error.strerror}")


def _add_image(contents: _Contents, path: str, folder: re.Match[str] | None) -> None:
    """Add the image in a folder of a split, or None, the source itself, where all is in its name.
    One of train without a class, and one beside the folders, is left out."""
    id, wnid = _id_and_class(path)
    if folder:
        split, wnid = folder[1], folder[2] or wnid
    else:
        split = "train" if WNID.match(id) else "val"
        wnid = wnid if path.rpartition(".")[0] == f"{id}_{wnid}" else None
    if wnid or (folder and split == "val"):
        contents.images[split].add(id=id, path=path, wnid=wnid)


def _id_and_class(path: str) -> tuple[str, str | None]:
    """Return an image's id and its class, of `n01440764_1.JPEG` and `n01440764_1_n01440764.JPEG`.
    The class is None where the name has none."""
    name = stem(path)
    match = IMAGE_NAME.fullmatch(name)
    return (match[1], match[3] or match[2]) if match else (name, None)


def _read_file(contents: _Contents, files: SourceFiles, path: str) -> None:
    """Read a file that gives labels, boxes or names; note the path of an archive of images."""
    name = _last(path)
    is_tar = is_packed(name) or is_archive(name)
    if name in IMAGES:
        first = contents.archives.setdefault(IMAGES[name], path)
        if first != path:
            raise _repeated(files, first, path)
    elif is_tar and BOXES.fullmatch(name):
        for inner, data in packed_files(files, path):
            if inner.lower().endswith(".xml"):
                whole, annotation = f"{path}/{inner}", read_annotation(data)
                _add_annotation(contents.annotations, whole[:-4], whole, annotation)
    elif is_tar and DEVKIT.fullmatch(name):
        for inner, data in packed_files(files, path):
            if _last(inner) in (DEVKIT_LABELS, META):
                _add_list(contents, f"{path}/{inner}", data)
    elif name in LISTS:
        _add_list(contents, path, files.read(path))
    elif SOLUTION.fullmatch(name):
        for id, annotation in labels.read_solution(files.read(path)):
            name = id.rpartition(".")[0] if is_image(id) else id
            _add_annotation(contents.solutions, name, path, annotation)


def _repeated(files: SourceFiles, first: str, second: str) -> UserError:
    paths = f"{files.location(first)} and {files.location(second)}"
    return UserError(f"{paths} hold the same images; keep one of them.")


def _add_list(contents: _Contents, path: str, data: bytes) -> None:
    if _last(path) == META:
        contents.synsets[path.removesuffix(META)] = labels.read_meta(data, path)
    else:
        contents.lists[path] = data


def _last(path: str) -> str:
    return path.rpartition("/")[2]


def _add_archive(contents: _Contents, split: str, files: SourceFiles, path: str) -> None:
    """Add the images in a tar, or in the tars within it, whose names are their classes. Else the
    folder or the name in the tar gives the class."""
    builder = contents.images[split]
    inner, others = list[Member](), list[str]()
    for member in members(files, path):
        if is_archive(member.name) and not _is_hidden(member.name):
            inner.append(member)
        else:
            others.append(member.name)
    add_members(contents.unread, path, others if inner else ())
    spans: list[tuple[str, int, int | None]]
    spans = [(x.name, x.offset, x.offset + x.size) for x in inner] or [(path, 0, None)]
    listings = files.ahead(lambda span: list(members(files, path, *span[1:])), spans)
    for (name, _, _), listing in zip(spans, listings, strict=True):
        for x in listing:
            if not is_image(x.name) or _is_hidden(x.name):
                add_members(contents.unread, path, [x.name])
                continue
            id, wnid = _id_and_class(x.name)
            for folder in (_last(x.name.rpartition("/")[0]), stem(name)):
                wnid = folder if WNID.fullmatch(folder) else wnid
            if x.link is None:
                builder.add(id=id, path=path, wnid=wnid, offset=x.offset, size=x.size)
            else:
                problem = f"archive link: it has no content and points to {x.link}"
                builder.add(id=id, path=path, wnid=wnid, problem=problem)


def _is_hidden(path: str) -> bool:
    return _last(path).startswith(".")


def _add_annotation(
    builders: dict[str, ListingBuilder], name: str, path: str, annotation: Annotation
) -> None:
    """Add what the file at `path` says of an image, whose name may have folders before it. The
    split that the path names is the image's. The <filename> within is not to be trusted."""
    *folders, id = name.rsplit("/", 2)
    if folders and WNID.fullmatch(folders[-1]):
        id = f"{folders[-1]}/{id}"
    splits = SPLIT_WORD.findall(path)[-1:] or [*builders]
    for split in splits:
        builders[split].add(id=id, path=path, **annotation._asdict())


def _matched(images: pa.Table, rows: pa.Table, kind: str) -> pa.Table:
    """Return the row of each image, nulls where it has none. It is the row of its class folder and
    name; where only one of the two has a class folder, it is that of its name. Raises UserError
    where two rows of an image differ, and where several images share a row."""
    names, folders = images["id"], images["wnid"]
    last = pc.replace_substring_regex(rows["id"], "^.*/", "")
    rows = rows.append_column("name", last).combine_chunks()  # quicker to sort and to take from
    rows = rows.sort_by([(x, "ascending") for x in ("name", "id", "path")])
    bare = rows["id"].filter(pc.equal(rows["id"], rows["name"]))
    flat = pc.is_null(folders)
    loose = pa.chunked_array([*bare.chunks, *names.filter(flat).chunks], pa.string())
    _refuse_contradictions(rows, loose.combine_chunks(), kind)
    in_folder = pc.index_in(pc.binary_join_element_wise(folders, names, "/"), rows["id"])
    by_name = pc.if_else(flat, pc.index_in(names, rows["name"]), pc.index_in(names, rows["id"]))
    indices = pc.coalesce(in_folder, by_name)
    counts = pc.value_counts(indices.drop_null())
    for shared in counts.filter(pc.greater(counts.field("counts"), 1)).to_pylist():
        row, count = rows.slice(shared["values"], 1).to_pylist()[0], shared["counts"]
        first, second = images.filter(pc.equal(indices, shared["values"]))["path"].to_pylist()[:2]
        raise UserError(
            f"{row['path']} describes {row['id']}, a name that {count} images have, the first of "
            f"them in {first} and {second}; keep one of them, or rename them with their labels and "
            "boxes."
        )
    return rows.take(indices)


def _refuse_contradictions(rows: pa.Table, loose: pa.Array, kind: str) -> None:
    """Raise UserError where two rows of one id differ, or two of one name that is `loose`. rows:
    sorted by name and id. loose: names of rows and images without a class folder."""
    ids, names = rows["id"].combine_chunks(), rows["name"].combine_chunks()
    same_name = pc.equal(names[1:], names[:-1])
    together = pc.or_(pc.is_in(names[1:], loose), pc.equal(ids[1:], ids[:-1]))
    for index in pc.indices_nonzero(pc.and_(same_name, together)).to_pylist():
        first, second = rows.slice(index, 2).to_pylist()
        if first | {"path": "", "id": ""} != second | {"path": "", "id": ""}:
            raise UserError(
                f"{kind} {first['path']} and {second['path']} describe the image {first['name']} "
                "differently; keep one of them."
            )


def _annotated(images: pa.Table, boxes: pa.Table, solutions: pa.Table) -> pa.Table:
    """Return the images with boxes, notes and missing classes of their XML, else of a solution."""
    from_solution = pc.and_(pc.is_null(boxes["path"]), pc.is_valid(solutions["path"]))

    def column(name: str) -> pa.ChunkedArray:
        return pc.if_else(from_solution, solutions[name], boxes[name])

    no_boxes = pa.scalar([], images.schema.field("boxes").type)
    wnid = pc.coalesce(images["wnid"], column("wnid"))
    foreign = pc.if_else(pc.equal(wnid, column("wnid")), None, column("wnid"))
    doubt = pc.binary_join_element_wise("annotation of another class: ", foreign, "")
    return with_columns(
        images,
        wnid=wnid,
        boxes=pc.coalesce(column("boxes"), no_boxes),
        note=pc.coalesce(column("note"), doubt),
        **{name: column(name) for name in ("box_width", "box_height")},
    )


def _listed_labels(
    contents: _Contents, wnids: list[str], images: pa.Table
) -> dict[str, list[str | None]]:
    """Return the labels of the val images in each list, by its path. wnids: all, sorted. Raises
    UserError where two images share a name that a list labels."""
    labels_by_path: dict[str, Labels] = {}
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
    paths: dict[str, str] = {}
    ids = images["id"].to_pylist()
    for id, image in zip(ids, images["path"].to_pylist(), strict=True):
        labelling = [path for path, x in labels_by_path.items() if id in paths and id in x]
        if labelling:
            raise UserError(
                f"{labelling[0]} labels {id}, an image in {paths[id]} and {image}; keep one."
            )
        paths[id] = image
    return {path: [x.get(id) for id in ids] for path, x in labels_by_path.items()}
