"""Labels of ILSVRC's val images, in each form in which they are published."""

import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence

from pipeline.errors import SHOWN, UserError
from pipeline.sources.annotations import Annotation, parse_boxes
from pipeline.sources.listing import normalized

MAPPING = "LOC_synset_mapping.txt"
WNID = re.compile(r"n\d{8}")
VAL_ID = "ILSVRC2012_val_{:08d}"
CAFFE_LINE = re.compile(r"(?:.*/)?(ILSVRC2012_val_\d{8})\.JPEG\s+(\d{1,4})")
# The one image that tells the orders of the classes apart: its class is number 490 of the devkit,
# and 65 of the sorted wnids.
PROBE_ID, PROBE_WNID = VAL_ID.format(1), "n01751748"
VAL_IMAGES, CLASSES = 50_000, 1000

Labels = dict[str, str]  # wnid by image id


def read_meta(data: bytes, path: str) -> dict[str, str]:
    """Read readable names by wnid from a devkit's `meta.mat`, in the order of ILSVRC2012_ID. Inner
    nodes, which have children, are left out. Raises UserError where it is no such file."""
    import scipy.io  # here, since few sources have a devkit and scipy takes memory

    try:
        synsets = scipy.io.loadmat(io.BytesIO(data), squeeze_me=True)["synsets"]
        leaves = synsets[synsets["num_children"] == 0]
        by_id = {int(x["ILSVRC2012_ID"]): (str(x["WNID"]), str(x["words"])) for x in leaves}
    except Exception as error:  # scipy's parser raises errors of any kind for damaged files
        detail = " ".join(str(error).split())[:SHOWN]
        raise UserError(f"{path} is not the devkit's data/meta.mat ({detail}).") from error
    names = dict(by_id[number] for number in sorted(by_id))
    if not names or sorted(by_id) != list(range(1, len(leaves) + 1)) or len(names) < len(leaves):
        raise UserError(
            f"{path} numbers its {len(leaves)} classes otherwise than from 1 on; expected the "
            "devkit's data/meta.mat."
        )
    return names


def read_devkit_labels(data: bytes, path: str, wnids: Sequence[str]) -> Labels:
    """Read `ILSVRC2012_validation_ground_truth.txt`, an ILSVRC2012_ID per line. wnids: by that
    number, from 1 on. Raises UserError for a number that is no class, and as `_checked`."""

    def wnid(line: str) -> str | None:
        if not re.fullmatch(r"\d{1,9}", line):
            return None
        if not 1 <= int(line) <= len(wnids):
            raise UserError(f"{path} has label {line}; its meta.mat has 1 to {len(wnids)}.")
        return wnids[int(line) - 1]

    return _checked(_numbered(data, wnid), path, "an ILSVRC2012_ID per line")


def read_synset_labels(data: bytes, path: str) -> Labels:
    """Read `imagenet_2012_validation_synset_labels.txt`, a wnid per line. Raises as `_checked`."""
    labels = _numbered(data, lambda line: line if WNID.fullmatch(line) else None)
    return _checked(labels, path, "a wnid per line")


def read_caffe_labels(data: bytes, path: str, wnids: Sequence[str]) -> Labels:
    """Read caffe's `val.txt`, lines such as `ILSVRC2012_val_00000001.JPEG 65`. wnids: sorted; the
    number counts them from 0. Kaggle's `val.txt`, whose number only counts its lines, gives no
    labels. Raises UserError for a number that is no class, and as `_checked`."""
    matches = list(filter(None, map(CAFFE_LINE.fullmatch, lines(data))))
    needed = max((int(match[2]) + 1 for match in matches), default=0)
    if len(matches) == VAL_IMAGES:
        needed = max(needed, CLASSES)
    if needed > len(wnids) or (len(matches) == VAL_IMAGES and len(wnids) != CLASSES):
        raise UserError(
            f"{path} numbers {needed} classes, and {len(wnids)} are known; put "
            "LOC_synset_mapping.txt or the devkit beside it."
        )
    labels: Labels = {}
    for id, number in (match.groups() for match in matches):
        if labels.setdefault(id, wnids[int(number)]) != wnids[int(number)]:
            raise UserError(f"{path} gives {id} two numbers; keep one of its lines.")
    return _checked(labels, path, "`name.JPEG number`") if labels else {}


def read_solution(data: bytes) -> Iterator[tuple[str, Annotation]]:
    """Yield image id and annotation of each row of a Kaggle `LOC_*_solution.csv`. A row is
    `ImageId,PredictionString`. Never raises: the note of an annotation describes faults."""
    for line in lines(data):
        id, _, words = (part.strip(' \t"') for part in line.partition(","))
        if not id or id == "ImageId":
            continue
        annotation = parse_prediction(words)
        if annotation.wnid and not WNID.fullmatch(annotation.wnid):
            annotation = Annotation(note=f"not a row of one wnid's boxes: {words[:SHOWN]!r}")
        yield id, annotation


def parse_prediction(words: str) -> Annotation:
    """Parse a PredictionString of ground truth: `wnid x0 y0 x1 y1`, once per object of one class.
    Never raises: the note describes faults."""
    fields = words.split()
    if not fields or len(fields) % 5 or len({*fields[::5]}) > 1:
        return Annotation(note=f"not a row of one wnid's boxes: {words[:SHOWN]!r}")
    boxes, note = parse_boxes(fields[start : start + 4] for start in range(1, len(fields), 5))
    return Annotation(wnid=fields[0], boxes=boxes, note=note)


def class_lines(text: str, separator: str | None = None) -> Iterator[tuple[int, str, str | None]]:
    """Yield number (from 1), class and readable name of each line that is not blank. The name
    follows the separator (None: the first blanks) and is None where nothing follows."""
    for number, line in enumerate(text.split("\n"), 1):
        if stripped := line.strip():
            wnid, *rest = stripped.split(separator, 1)
            yield number, wnid, rest[0].strip() if rest else None


def read_names(data: bytes, path: str, separator: str | None = None) -> dict[str, str]:
    """Read readable names by wnid, in the order of the lines, which are as for `class_lines`. Such
    are Tiny ImageNet's `words.txt` (tab) and `LOC_synset_mapping.txt` (blank). A wnid alone is its
    own name. Raises UserError for a wnid that comes twice."""
    names: dict[str, str] = {}
    for number, wnid, name in class_lines(_text(data), separator):
        if wnid in names:
            raise UserError(f"{path} line {number} names {wnid[:SHOWN]} a second time; keep one.")
        names[normalized(wnid)] = name or wnid
    return names


def merge_labels(
    ids: Sequence[str], labels_by_source: Mapping[str, Sequence[str | None]]
) -> list[str | None]:
    """Return the wnid of each image, None where no source has it. labels_by_source: wnids, in the
    order of the ids. Raises UserError, naming the first image, where sources disagree."""
    wnids, conflicts = list[str | None](), list[str]()
    for i, id in enumerate(ids):
        candidates = {x: wnid for x, own in labels_by_source.items() if (wnid := own[i])}
        if len({*candidates.values()}) > 1:
            conflicts.append(f"{id} is " + ", ".join(f"{w} in {x}" for x, w in candidates.items()))
        wnids.append(next(iter(candidates.values()), None))
    if conflicts:
        raise UserError(
            f"labels disagree on {len(conflicts)} images, the first: {conflicts[0]}; remove the "
            "wrong ones."
        )
    return wnids


def lines(data: bytes) -> list[str]:
    """Return the stripped lines of a file in UTF-8; other bytes become U+FFFD."""
    return [line.strip() for line in _text(data).split("\n")]


def _text(data: bytes) -> str:
    return data.decode("utf-8-sig", "replace")


def _numbered(data: bytes, wnid: Callable[[str], str | None]) -> Labels:
    """Return the labels of a file whose line i is of val image i, without those that are None."""
    pairs = ((VAL_ID.format(i), wnid(line)) for i, line in enumerate(lines(data), 1))
    return {id: label for id, label in pairs if label is not None}


def _checked(labels: Labels, path: str, expected: str) -> Labels:
    """Return labels. Raises UserError where there are none or their order is another one."""
    if not labels:
        raise UserError(f"{path} holds no labels; expected {expected}. Copy it again.")
    if len(labels) == VAL_IMAGES and labels.get(PROBE_ID) != PROBE_WNID:
        raise UserError(
            f"{path} gives val image 1 the class {labels.get(PROBE_ID)}, but it is {PROBE_WNID} "
            "(490 in the devkit's order of the classes, 65 in the sorted wnids): its labels or "
            "classes are in another order; copy it again."
        )
    return labels
