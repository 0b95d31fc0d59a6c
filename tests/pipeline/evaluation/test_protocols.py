"""Coordinates and IoU of each protocol, by hand and by counting pixels."""

import math

import numpy as np
import pytest

from pipeline.evaluation.protocols import best_iou, iou, own_boxes, truth_boxes


def random_boxes(rng: np.random.Generator, count: int, side: int = 12) -> np.ndarray:
    corners = np.sort(rng.integers(0, side, (count, 2, 2)), axis=1)
    return corners.reshape(count, 4)


def counted_iou(a: np.ndarray, b: np.ndarray, plus: int) -> float:
    """By counting pixels; of boxes without + 1, the last row and column do not belong."""
    canvas = np.zeros((2, 20, 20), bool)
    for layer, (x0, y0, x1, y1) in zip(canvas, (a, b), strict=True):
        layer[y0 : y1 + plus, x0 : x1 + plus] = True
    union = (canvas[0] | canvas[1]).sum()
    return float((canvas[0] & canvas[1]).sum() / union) if union else 0.0


def test_iou_by_hand() -> None:
    # 2x2 and 3x3 pixels that share one: 1 / (4 + 9 - 1)
    assert iou(np.array([0, 0, 1, 1]), np.array([1, 1, 3, 3])) == 1 / 12
    # the same numbers as edges: 1x1 and 2x2 that touch in a corner
    assert iou(np.array([0, 0, 1, 1]), np.array([1, 1, 3, 3]), plus=0) == 0
    assert iou(np.array([2, 3, 2, 3]), np.array([2, 3, 2, 3])) == 1  # one pixel with itself
    assert iou(np.array([2, 3, 2, 3]), np.array([2, 3, 2, 3]), plus=0) == 0  # two empty boxes
    assert iou(np.array([0, 0, 1, 1]), np.array([2, 0, 3, 1])) == 0  # neighbours share nothing
    # the ILSVRC val image 1 (500x375, box 111 108 441 193): 331 * 86 / (500 * 375)
    whole = np.array([0, 0, 499, 374])
    assert iou(whole, np.array([111, 108, 441, 193])) == 331 * 86 / (500 * 375)


@pytest.mark.parametrize("plus", [0, 1])
def test_iou_equals_counting_pixels(plus: int) -> None:
    rng = np.random.default_rng(0)
    a, b = random_boxes(rng, 200), random_boxes(rng, 200)
    expected = [counted_iou(x, y, plus) for x, y in zip(a, b, strict=True)]
    np.testing.assert_array_equal(iou(a, b, plus), expected)


def test_the_best_of_several_true_boxes_counts_and_none_gives_nan() -> None:
    boxes = np.array([[0, 0, 9, 9], [0, 0, 9, 9], [5, 5, 6, 6]])
    truths = np.array([[0, 0, 4, 9], [0, 0, 7, 9], [20, 20, 30, 30], [0, 0, 1, 1]])
    best = best_iou(boxes, truths, np.array([0, 3, 3, 4]))
    assert best[0] == 0.8
    assert math.isnan(best[1])
    assert best[2] == 0


@pytest.mark.parametrize(
    ("protocol", "whole", "left_half"),
    [
        ("devkit", [0, 0, 499, 374], [0, 0, 249, 374]),
        ("exclusive", [0, 0, 500, 375], [0, 0, 250, 375]),
        # x + w of the reference evaluator, which clips it to the last pixel
        ("int224", [0, 0, 223, 223], [0, 0, 112, 223]),
    ],
)
def test_our_boxes_in_the_coordinates_of_each_protocol(
    protocol: str, whole: list[int], left_half: list[int]
) -> None:
    boxes = np.array([[0, 0, 63, 63], [0, 0, 31, 63]])
    sizes = np.array([[375, 500]] * 2)
    assert own_boxes(boxes, np.array([64, 64]), sizes, protocol).tolist() == [whole, left_half]


def test_truth_is_truncated_to_pixels_of_224_and_else_left_alone() -> None:
    boxes, sizes = np.array([[111, 108, 441, 193]]), np.array([[375, 500]])
    # 111 * 224 / 500 = 49.7, 108 * 224 / 375 = 64.5, 441 * .448 = 197.6, 193 * .5973 = 115.3
    assert truth_boxes(boxes, sizes, "int224").tolist() == [[49, 64, 197, 115]]
    assert truth_boxes(boxes, sizes, "devkit") is boxes
    assert truth_boxes(boxes, sizes, "exclusive") is boxes
