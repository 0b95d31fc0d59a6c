"""Figures by hand, against plain loops, and their invariances."""

import math

import numpy as np
import pytest

from model.metrics import (
    best_iou,
    bootstrap_intervals,
    class_figures,
    figures,
    intervals,
    iou,
    top_k,
)


def random_boxes(rng: np.random.Generator, count: int, side: int = 12) -> np.ndarray:
    corners = np.sort(rng.integers(0, side, (count, 2, 2)), axis=1)
    return corners.reshape(count, 4)


def reference_iou(a: np.ndarray, b: np.ndarray) -> float:
    """By counting pixels."""
    canvas = np.zeros((2, 20, 20), bool)
    for layer, (x0, y0, x1, y1) in zip(canvas, (a, b), strict=True):
        layer[y0 : y1 + 1, x0 : x1 + 1] = True
    return float((canvas[0] & canvas[1]).sum() / (canvas[0] | canvas[1]).sum())


def test_iou_by_hand() -> None:
    # 2x2 and 3x3 pixels that share one: 1 / (4 + 9 - 1)
    assert iou(np.array([0, 0, 1, 1]), np.array([1, 1, 3, 3])) == 1 / 12
    assert iou(np.array([2, 3, 2, 3]), np.array([2, 3, 2, 3])) == 1  # one pixel with itself
    assert iou(np.array([0, 0, 1, 1]), np.array([2, 0, 3, 1])) == 0  # neighbours share nothing
    # the ILSVRC val image 1 (500x375, box 111 108 441 193): 331 * 86 / (500 * 375)
    whole = np.array([0, 0, 499, 374])
    assert iou(whole, np.array([111, 108, 441, 193])) == 331 * 86 / (500 * 375)


def test_iou_equals_counting_pixels() -> None:
    rng = np.random.default_rng(0)
    a, b = random_boxes(rng, 200), random_boxes(rng, 200)
    expected = [reference_iou(x, y) for x, y in zip(a, b, strict=True)]
    np.testing.assert_array_equal(iou(a, b), expected)


def test_the_best_of_several_true_boxes_counts_and_none_gives_nan() -> None:
    boxes = np.array([[0, 0, 9, 9], [0, 0, 9, 9], [5, 5, 6, 6]])
    truths = [[[0, 0, 4, 9], [0, 0, 7, 9], [20, 20, 30, 30]], [], [[0, 0, 1, 1]]]
    best = best_iou(boxes, truths)
    assert best[0] == 0.8
    assert math.isnan(best[1])
    assert best[2] == 0


def test_figures_by_hand() -> None:
    # IoU .5 is right, just below is not; the fourth image has no known box but counts as class.
    ious = np.array([0.5, 0.4999, 0.75, np.nan])
    right = np.array([True, True, False, True])
    assert figures(ious, right) == {
        "gt_known": 2 / 3,
        "top1_loc": 1 / 3,
        "top1_cls": 3 / 4,
        "mean_iou": pytest.approx((0.5 + 0.4999 + 0.75) / 3, abs=1e-15),
        "n": 3,
        "counts": {"images": 4, "with_boxes": 3, "gt_known": 2, "top1_loc": 1, "top1_cls": 3},
    }


def test_exactly_half_of_the_union_is_right() -> None:
    # 3 x 7 pixels inside 6 x 7: 21 / 42
    best = best_iou(np.array([[0, 0, 2, 6]]), [[[0, 0, 5, 6]]])
    assert figures(best, np.array([True]))["gt_known"] == 1


def test_no_images_and_no_boxes_give_no_share() -> None:
    unknown = figures(np.array([np.nan]), np.array([True]))
    assert (unknown["gt_known"], unknown["mean_iou"], unknown["top1_cls"]) == (None, None, 1.0)
    assert figures(np.zeros(0), np.zeros(0, bool))["top1_cls"] is None


def test_figures_do_not_depend_on_the_order_of_the_images() -> None:
    rng = np.random.default_rng(1)
    ious, right = rng.random(999) ** 7, rng.random(999) < 0.5
    order = rng.permutation(999)
    assert figures(ious, right) == figures(ious[order], right[order])


def test_class_counts_add_up_to_the_whole() -> None:
    rng = np.random.default_rng(2)
    labels = rng.integers(0, 5, 300)
    labels[labels == 3] = 4  # a class without images
    ious, right = rng.random(300), rng.random(300) < 0.5
    parts = class_figures(ious, right, labels, 5)
    assert [part["n"] for part in parts] == np.bincount(labels, minlength=5).tolist()
    assert parts[3]["gt_known"] is None
    whole = figures(ious, right)["counts"]
    for name, count in whole.items():
        assert sum(part["counts"][name] for part in parts) == count
    second = labels == 2
    assert parts[2] == figures(ious[second], right[second])


def test_bootstrap_interval_of_a_share_is_the_binomials() -> None:
    # The bootstrap of a share of n is Binomial(n, share) / n; its 95 % limits are near
    # share -+ 1.96 sqrt(share (1 - share) / n) = .3 -+ .0284.
    values = np.zeros((1000, 1))
    values[:300] = 1
    low, high = bootstrap_intervals(values, seed=0)[0]
    assert low == pytest.approx(0.3 - 0.0284, abs=0.004)
    assert high == pytest.approx(0.3 + 0.0284, abs=0.004)


def test_bootstrap_is_paired_repeatable_and_seeded() -> None:
    rng = np.random.default_rng(3)
    column = rng.random((400, 1))
    twice = bootstrap_intervals(np.hstack([column, column]), seed=5)
    np.testing.assert_array_equal(twice[0], twice[1])
    np.testing.assert_array_equal(bootstrap_intervals(column, seed=5)[0], twice[0])
    assert (bootstrap_intervals(column, seed=6)[0] != twice[0]).any()
    assert twice[0, 0] < column.mean() < twice[0, 1]


def test_bootstrap_equals_a_plain_loop_over_the_same_draws() -> None:
    values = np.random.default_rng(4).random((50, 2))
    drawn = np.random.default_rng(9).integers(0, 50, (1000, 50))
    means = np.array([values[rows].mean(axis=0) for rows in drawn])
    expected = np.quantile(means, [0.025, 0.975], axis=0).T
    np.testing.assert_allclose(bootstrap_intervals(values, seed=9), expected, atol=1e-8)


def test_intervals_name_every_figure_and_skip_what_is_unknown() -> None:
    ious, right = np.array([0.9, 0.1, np.nan, 0.6]), np.array([True, False, True, False])
    found = intervals({"aln": (ious, right), "none": (ious, ~right)}, seed=0)
    assert set(found["aln"]) == {"gt_known", "top1_loc", "top1_cls", "mean_iou"}
    for name, method in (("aln", right), ("none", ~right)):
        point = figures(ious, method)
        for figure, interval in found[name].items():
            assert interval is not None
            assert interval[0] <= point[figure] <= interval[1]
    assert found["aln"]["gt_known"] == found["none"]["gt_known"]
    unknown = intervals({"aln": (np.full(3, np.nan), np.ones(3, bool))}, seed=0)["aln"]
    assert unknown["gt_known"] is None
    assert unknown["top1_cls"] == [1.0, 1.0]


def test_top_k_by_hand() -> None:
    predicted = np.array([[2, 0, 1], [1, 2, 0], [0, 1, 2]])
    labels = np.array([2, 2, 2])
    assert top_k(predicted, labels, 1) == 1 / 3
    assert top_k(predicted, labels, 2) == 2 / 3
    assert top_k(predicted, labels, 5) == 1
    assert top_k(predicted[:0], labels[:0], 1) is None
