"""Labels of ILSVRC's val images, in each form in which they are handed around."""

import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from pipeline.errors import UserError
from pipeline.sources.annotations import Annotation, parse_box

WNID = re.compile(r"n\d{8}")
VAL_ID = "ILSVRC2012_val_{:08d}"
CAFFE_LINE = re.compile(r"(?:.*/)?(ILSVRC2012_val_\d{8})\.JPEG\s+(\d{1,4})")
# The one image that tells the orders of the classes apart: its class is number 490 of the devkit,
# and 65 of the sorted wnids.
PROBE_ID, PROBE_WNID = VAL_ID.format(1), "n01751748"
VAL_IMAGES, CLASSES = 50_000, 1000
SHOWN = 60  # characters of a faulty line that a message shows

Labels = dict[str, str]  # wnid by image id


class Synset(NamedTuple):
    """A class as the devkit describes it."""

    wnid: str
    words: str


def read_meta(data: bytes, place: str) -> list[Synset]:
    """The classes in a devkit's `meta.mat`, in the order of ILSVRC2012_ID, which counts from 1.

    Its inner nodes, which have children, are left out. Raises UserError where it is no such file.
    """
    import scipy.io  # not at the top: few sources have a devkit, and every driver has its memory

    try:
        synsets = scipy.io.loadmat(io.BytesIO(data), squeeze_me=True)["synsets"]
        leaves = synsets[synsets["num_children"] == 0]
        by_id = {int(x["ILSVRC2012_ID"]): Synset(str(x["WNID"]), str(x["words"])) for x in leaves}
    except Exception as error:  # damaged files fail in whatever way scipy's parser does
        detail = " ".join(str(error).split())[:SHOWN]
        raise UserError(
            f"{place} cannot be read ({detail}); expected the devkit's data/meta.mat."
        ) from error
    if not by_id or sorted(by_id) != list(range(1, len(leaves) + 1)):
        raise UserError(
            f"{place} numbers its {len(leaves)} classes otherwise than from 1 on; expected the "
            "devkit's data/meta.mat."
        )
    return [by_id[i] for i in sorted(by_id)]


def read_devkit_labels(data: bytes, place: str, wnids: Sequence[str]) -> Labels:
    """`ILSVRC2012_validation_ground_truth.txt`: an ILSVRC2012_ID per line; wnids: in their order.

    Raises UserError where no line holds a number, one is no class, or the order is another.
    """

    def wnid(line: str) -> str | None:
        if not re.fullmatch(r"\d{1,9}", line):
            return None
        if not 1 <= int(line) <= len(wnids):
            raise UserError(f"{place} has label {line}; its meta.mat has 1 to {len(wnids)}.")
        return wnids[int(line) - 1]

    return _checked(_numbered(data, wnid), place, "an ILSVRC2012_ID per line")


def read_synset_labels(data: bytes, place: str) -> Labels:
    """`imagenet_2012_validation_synset_labels.txt`: a wnid per line. Raises as above."""
    labels = _numbered(data, lambda line: line if WNID.fullmatch(line) else None)
    return _checked(labels, place, "a wnid per line")


def read_caffe_labels(data: bytes, place: str, wnids: Sequence[str]) -> Labels:
    """caffe's `val.txt`: `ILSVRC2012_val_00000001.JPEG 65`; wnids: sorted, which the number counts
    from 0. Kaggle's `val.txt`, whose number only counts its lines, gives no labels.

    Raises UserError for a number that is no class, and another order of the classes.
    """
    found = [match for line in _lines(data) if (match := CAFFE_LINE.fullmatch(line))]
    needed = max((int(match[2]) + 1 for match in found), default=0)
    if needed > len(wnids) or (len(found) == VAL_IMAGES and len(wnids) != CLASSES):
        raise UserError(
            f"{place} numbers {max(needed, CLASSES * (len(found) == VAL_IMAGES))} classes, and "
            f"{len(wnids)} are known; put LOC_synset_mapping.txt or the devkit beside it."
        )
    labels = {match[1]: wnids[int(match[2])] for match in found}
    return _checked(labels, place, "`name.JPEG number`") if labels else {}


def read_solution(data: bytes) -> Iterator[tuple[str, Annotation]]:
    """Yield image id and annotation of each row of a Kaggle `LOC_*_solution.csv`.

    A row is `ImageId,PredictionString`. What is wrong with it stands in its note. Never raises.
    """
    for line in _lines(data):
        id, _, words = (part.strip(' \t"') for part in line.partition(","))
        if not id or id == "ImageId":
            continue
        annotation = parse_prediction(words)
        if annotation.wnid and not WNID.fullmatch(annotation.wnid):
            annotation = Annotation(note=f"not a row of one wnid's boxes: {words[:SHOWN]!r}")
        yield id, annotation


def parse_prediction(words: str) -> Annotation:
    """Parse a PredictionString of ground truth: `wnid x0 y0 x1 y1`, once per object of one class.

    The note says what is wrong; never raises.
    """
    fields = words.split()
    if not fields or len(fields) % 5 or len({*fields[::5]}) > 1:
        return Annotation(note=f"not a row of one wnid's boxes: {words[:SHOWN]!r}")
    boxes, notes = [], []
    for number, start in enumerate(range(1, len(fields), 5)):
        box, note = parse_box(fields[start : start + 4])
        if box is not None:
            boxes.append(box)
        else:
            notes.append(f"box {number} dropped: {note}")
    return Annotation(wnid=fields[0], boxes=tuple(boxes), note="; ".join(notes) or None)


def class_lines(text: str, separator: str | None = None) -> Iterator[tuple[int, str, str | None]]:
    """Yield of each line that is not blank its number, from 1, its class, and the class's readable
    name: what follows the separator (None: the first blanks), None where nothing does."""
    for number, line in enumerate(text.split("\n"), 1):
        if stripped := line.strip():
            wnid, *rest = stripped.split(separator, 1)
            yield number, wnid, rest[0].strip() if rest else None


def read_names(data: bytes, separator: str) -> dict[str, str]:
    """Read readable names by wnid: `wnid<separator>name` per line, as in Tiny ImageNet's
    `words.txt` (tab) and `LOC_synset_mapping.txt` (blank)."""
    lines = class_lines(text(data), separator)
    return {wnid: name for _, wnid, name in lines if name is not None}


def agreed(ids: Sequence[str], told: Mapping[str, Labels]) -> list[str | None]:
    """The wnid of each image, which all that know it must tell alike; told: labels by who tells
    them. Raises UserError naming the first image on which they disagree."""
    wnids: list[str | None] = []
    differing = 0
    first = ""
    for id in ids:
        said = {place: labels[id] for place, labels in told.items() if id in labels}
        if len({*said.values()}) > 1:
            differing += 1
            first = first or f"{id} is " + ", ".join(f"{w} in {p}" for p, w in said.items())
        wnids.append(next(iter(said.values()), None))
    if differing:
        raise UserError(
            f"labels disagree on {differing} images, the first: {first}; remove the wrong ones."
        )
    return wnids


def text(data: bytes) -> str:
    """UTF-8, with or without a mark; what is not becomes U+FFFD, which no name holds."""
    return data.decode("utf-8-sig", "replace")


def _lines(data: bytes) -> list[str]:
    return [line.strip() for line in text(data).split("\n")]


def _numbered(data: bytes, wnid: Callable[[str], str | None]) -> Labels:
    """Line i is val image i."""
    found = ((VAL_ID.format(i), wnid(line)) for i, line in enumerate(_lines(data), 1))
    return {id: label for id, label in found if label is not None}


def _checked(labels: Labels, place: str, expected: str) -> Labels:
    if not labels:
        raise UserError(f"{place} holds no labels; expected {expected}. Copy it again.")
    if len(labels) == VAL_IMAGES and labels.get(PROBE_ID) != PROBE_WNID:
        raise UserError(
            f"{place} says {labels.get(PROBE_ID)} of val image 1, which is {PROBE_WNID} (490 in "
            "the devkit's order of the classes, 65 in the sorted wnids): its labels or classes are "
            "in another order; copy it again."
        )
    return labels
