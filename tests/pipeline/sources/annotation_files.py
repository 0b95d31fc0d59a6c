"""XML annotations as data sets have them."""

from pipeline.synthetic import annotation_xml


def xml(
    wnid: str, *boxes: tuple[int, int, int, int], size: tuple[int, int] | None = (500, 375)
) -> str:
    """Return an annotation whose file name is wrong, as many are; size: (width, height)."""
    return annotation_xml("misleading", wnid, boxes, size)
