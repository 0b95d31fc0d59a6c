from pipeline.sources.annotations import fit_boxes, read_annotation
from tests.pipeline.sources.miniature import xml


def test_objects_of_different_classes_give_no_label_but_keep_their_boxes() -> None:
    text = xml("n1", (1, 2, 3, 4), (5, 6, 7, 8)).replace("<name>n1", "<name>n2", 1)
    annotation = read_annotation(text.encode())
    assert annotation.wnid is None
    assert len(annotation.boxes) == 2


def test_a_box_without_numbers_is_dropped_and_the_others_kept() -> None:
    text = xml("n1", (1, 2, 3, 4), (5, 6, 7, 8)).replace("<ymin>2<", "<ymin>inf<")
    annotation = read_annotation(text.encode())
    assert annotation.boxes == ((5, 6, 7, 8),)
    assert annotation.note == "box 0 dropped: not four whole numbers (1 inf 3 4)"


def test_boxes_in_shares_of_the_image_are_dropped() -> None:
    annotation = read_annotation(xml("n1", (1, 2, 3, 4)).replace(">3<", ">0.7<").encode())
    assert annotation.boxes == ((1, 2, 0, 4),)
    text = xml("n1", (1, 2, 3, 4)).replace(">3<", ">0.7<").replace(">2<", ">0.5<")
    annotation = read_annotation(text.replace(">4<", ">1<").replace(">1<", ">0.25<").encode())
    assert annotation.boxes == ()
    assert "shares of the image, not pixels" in (annotation.note or "")


def test_boxes_inside_the_image_stay_as_they_are_without_a_note() -> None:
    assert fit_boxes([(0, 0, 99, 49), (5, 5, 5, 5)], None, 100, 50) == (
        [[0, 0, 99, 49], [5, 5, 5, 5]],
        None,
    )


def test_bad_boxes_are_clipped_or_dropped_with_a_note() -> None:
    boxes, note = fit_boxes([(9, 2, 3, 4), (-5, 10, 100, 49), (100, 0, 120, 9)], None, 100, 50)
    assert boxes == [[0, 10, 99, 49]]
    assert note == (
        "box 0 dropped: minimum above maximum (9, 2, 3, 4); "
        "box 1 clipped to the image: was (-5, 10, 100, 49); "
        "box 2 dropped: outside the image (100, 0, 120, 9)"
    )


def test_boxes_annotated_at_another_size_are_scaled_by_their_edges() -> None:
    # Pixels 10..19 of 100 cover [0.1, 0.2) of the width: pixels 20..39 of 200, 5..9 of 50.
    boxes, note = fit_boxes([(10, 10, 19, 19), (0, 0, 99, 99)], (100, 100), 200, 50)
    assert boxes == [[20, 5, 39, 9], [0, 0, 199, 49]]
    assert note == "boxes scaled from the annotated 100x100 to the file's 200x50"
