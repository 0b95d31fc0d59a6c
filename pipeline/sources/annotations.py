"""Boxes of images: read from XML files, and fitted to the pixels of the image they belong to."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple
from xml.etree import ElementTree

from pipeline.errors import SHOWN

MAX_WNID = 100  # characters

Box = tuple[int, int, int, int]


class Annotation(NamedTuple):
    """The content of one XML file. wnid: None where objects differ. box_size: (width, height) of
    the image that the boxes refer to, if known. note: what could not be read."""

    wnid: str | None = None
    boxes: tuple[Box, ...] = ()
    box_size: tuple[int, int] | None = None
    note: str | None = None


def read_annotation(data: bytes) -> Annotation:
    """Read one PASCAL-style XML file. Never raises: the note describes faults. A document type
    declaration is refused, so no entity, external or nested, is ever expanded."""
    try:
        root = ElementTree.fromstring(data, ElementTree.XMLParser(target=_PlainTreeBuilder()))
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        return Annotation(note=f"annotation does not parse: {error}")
    tags = ("xmin", "ymin", "xmax", "ymax")
    corners = ([x.findtext(tag, "") for tag in tags] for x in root.iterfind("object/bndbox"))
    boxes, note = parse_boxes(corners)
    wnids = {name.strip() for name in (x.findtext("name", "") for x in root.iterfind("object"))}
    wnid = min(wnids, default="")
    size = (root.findtext(f"size/{tag}", "") for tag in ("width", "height"))
    return Annotation(
        wnid=wnid if len(wnids) == 1 and 0 < len(wnid) <= MAX_WNID else None,
        boxes=boxes,
        box_size=parse_size(*size),
        note=note,
    )


def parse_size(width: str, height: str) -> tuple[int, int] | None:
    """Return two texts as width and height in pixels, None where they are none."""
    sides = _integer(width), _integer(height)
    return (sides[0], sides[1]) if sides[0] and sides[1] and min(sides[0], sides[1]) > 0 else None


def parse_boxes(groups: Iterable[Sequence[str]]) -> tuple[tuple[Box, ...], str | None]:
    """Return the boxes of groups of four numbers, and a note of those that are none."""
    boxes, notes = [], []
    for number, texts in enumerate(groups):
        box, note = parse_box(texts)
        if box is None:
            notes.append(f"box {number} dropped: {note}")
        else:
            boxes.append(box)
    return tuple(boxes), "; ".join(notes) or None


def parse_box(texts: Sequence[str]) -> tuple[Box | None, str | None]:
    """Return four numbers as whole pixels, or the reason why they are none."""
    shown = " ".join(texts)[:SHOWN]
    numbers = [_integer(text) for text in texts]
    if len(numbers) != 4 or None in numbers:
        return None, f"not four whole numbers ({shown})"
    x0, y0, x1, y1 = (number or 0 for number in numbers)
    values = [*map(float, texts)]
    if all(0 <= value <= 1 for value in values) and values != [x0, y0, x1, y1]:
        return None, f"shares of the image, not pixels ({shown})"
    return (x0, y0, x1, y1), None


def fit_boxes(
    boxes: Sequence[Sequence[int]], box_size: tuple[int, int] | None, width: int, height: int
) -> tuple[list[list[int]], str | None]:
    """Return boxes as inclusive pixels of a file of `width` x `height`, and a note. boxes: [x0, y0,
    x1, y1] of an image of `box_size` (width, height), of the file where it is None. Boxes annotated
    at another size are scaled, and clipped to the image; a box with its minimum above its maximum,
    or wholly outside, is dropped. The note lists these changes."""
    fitted, notes = [], []
    scale_x, scale_y = 1.0, 1.0
    if boxes and box_size is not None and box_size != (width, height):
        scale_x, scale_y = width / box_size[0], height / box_size[1]
        notes.append(
            "boxes scaled from the annotated {}x{} ".format(*box_size)
            + f"to the file's {width}x{height}"
        )
    for number, (x0, y0, x1, y1) in enumerate(boxes):
        if x0 > x1 or y0 > y1:
            notes.append(f"box {number} dropped: minimum above maximum ({x0}, {y0}, {x1}, {y1})")
            continue
        # A pixel spans [x, x + 1): edges scale, so an inclusive maximum moves by its far edge.
        scaled = [
            int(x0 * scale_x),
            int(y0 * scale_y),
            max(int(x0 * scale_x), round((x1 + 1) * scale_x) - 1),
            max(int(y0 * scale_y), round((y1 + 1) * scale_y) - 1),
        ]
        if scaled[0] >= width or scaled[1] >= height or scaled[2] < 0 or scaled[3] < 0:
            notes.append(f"box {number} dropped: outside the image ({x0}, {y0}, {x1}, {y1})")
            continue
        limits = (width - 1, height - 1) * 2
        clipped = [min(max(v, 0), limit) for v, limit in zip(scaled, limits, strict=True)]
        if clipped != scaled:
            notes.append(f"box {number} clipped to the image: was ({x0}, {y0}, {x1}, {y1})")
        fitted.append(clipped)
    return fitted, "; ".join(notes) or None


class _PlainTreeBuilder(ElementTree.TreeBuilder):
    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:  # noqa: ARG002
        raise ValueError("it declares a document type, which no annotation needs")


def _integer(text: str) -> int | None:
    try:
        value = float(text)  # some annotation tools write 12.0
        return int(value) if abs(value) < 2**31 else None
    except ValueError:
        return None
