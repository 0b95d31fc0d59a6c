"""Figures by hand, against plain loops, and their invariances."""

from typing import Any

import numpy as np
import pytest

from pipeline.evaluation.metrics import (
    ERRORS,
    Outcomes,
    Sweep,
    curves,
    error_kinds,
    figures,
    intervals,
    largest_shares,
    subset_masks,
    sweep_figures,
    top_k,
    with_classes,
)
from pipeline.evaluation.protocols import IOU_GRID, best_iou, thresholds


def outcomes(ious: Any, top1: Any = None, **more: Any) -> Outcomes:
    ious = np.asarray(ious, float)
    right = None if top1 is None else np.asarray(top1, bool)
    return Outcomes(ious=ious, errors=np.zeros(len(ious), int), top1=right, **more)


def test_figures_by_hand() -> None:
    # IoU .5 is right, just below is not; the fourth image has no known box but counts as class.
    one = outcomes(
        [0.5, 0.4999, 0.75, np.nan],
        [True, True, False, True],
        top5=np.array([True, True, True, True]),
        top5_right=np.array([True, False, True, False]),
        auc=np.array([0.9, 0.5, 0.7, np.nan]),
        auc_other=np.array([0.6, 0.5, np.nan, np.nan]),
    )
    assert figures(one) == {
        "gt_known": 2 / 3,
        "top1_loc": 1 / 3,
        "top5_loc": 2 / 3,
        "top1_cls": 3 / 4,
        "top5_cls": 1.0,
        "mean_iou": pytest.approx((0.5 + 0.4999 + 0.75) / 3, abs=1e-15),
        "auc": pytest.approx(0.7, abs=1e-15),
        "auc_other": 0.55,
        "auc_gap": pytest.approx(0.15, abs=1e-15),  # of the two images that have both
        "n": 3,
        "counts": {
            "images": 4,
            "with_boxes": 3,
            "gt_known": 2,
            "top1_loc": 1,
            "top5_loc": 2,
            "top1_cls": 3,
            "top5_cls": 4,
        },
        "errors": dict.fromkeys(ERRORS, 0) | {"right": 3},
    }


def test_what_a_method_does_not_know_is_none_and_not_zero() -> None:
    found = figures(outcomes([0.9, 0.1]))
    assert found["gt_known"] == 0.5
    for name in ("top1_loc", "top5_loc", "top1_cls", "top5_cls", "auc", "auc_other", "auc_gap"):
        assert found[name] is None
    assert "top1_loc" not in found["counts"]


def test_no_images_and_no_boxes_give_no_share() -> None:
    unknown = figures(outcomes([np.nan], [True]))
    assert (unknown["gt_known"], unknown["mean_iou"], unknown["top1_cls"]) == (None, None, 1.0)
    assert figures(outcomes([], []))["top1_cls"] is None


def test_figures_do_not_depend_on_the_order_of_the_images() -> None:
    rng = np.random.default_rng(1)
    ious, right, auc = rng.random(999) ** 7, rng.random(999) < 0.5, rng.random(999)
    order = rng.permutation(999)
    first = figures(outcomes(ious, right, auc=auc, auc_other=auc[::-1]))
    again = outcomes(ious[order], right[order], auc=auc[order], auc_other=auc[::-1][order])
    assert first == figures(again)


def test_figures_of_a_part_are_those_of_its_images_alone() -> None:
    rng = np.random.default_rng(2)
    part = rng.random(300) < 0.3
    one = outcomes(rng.random(300), rng.random(300) < 0.5)
    assert one.top1 is not None
    assert figures(one, part) == figures(outcomes(one.ious[part], one.top1[part]))
    assert figures(one, np.zeros(300, bool))["gt_known"] is None


def boxes_and_starts(truths: list[list[list[int]]]) -> tuple[np.ndarray, np.ndarray]:
    flat = np.array([box for boxes in truths for box in boxes], np.int64).reshape(-1, 4)
    return flat, np.cumsum([0] + [len(boxes) for boxes in truths])


def test_hard_subsets_by_hand() -> None:
    sizes = np.array([[100, 100]] * 5)
    truths = [
        [[0, 0, 99, 49]],  # exactly half the image, centred at y .25: not small, off centre
        [[30, 30, 69, 69]],  # .16 of it, in the middle: small
        [[0, 0, 9, 9], [30, 30, 69, 69]],  # one of two boxes is central: small, not off centre
        [[25, 0, 99, 99]],  # centre x (25 + 100) / 2 = 62.5: exactly an eighth off is not more
        [],  # no box: in no subset
    ]
    boxes, starts = boxes_and_starts(truths)
    masks = subset_masks(boxes, starts, sizes)
    assert masks["small_boxes"].tolist() == [False, True, True, False, False]
    assert masks["off_centre"].tolist() == [True, False, False, False, False]
    shares = largest_shares(boxes, starts, sizes)
    np.testing.assert_allclose(shares, [0.5, 0.16, 0.16, 0.75, 0])


@pytest.mark.parametrize(
    ("kind", "box", "truths"),
    [
        ("right", [0, 0, 9, 9], [[0, 0, 9, 9]]),
        ("several_instances", [0, 0, 29, 9], [[0, 0, 9, 9], [20, 0, 29, 9]]),
        ("too_small", [2, 2, 4, 4], [[0, 0, 9, 9]]),
        ("too_large", [0, 0, 29, 29], [[5, 5, 9, 9]]),
        ("elsewhere", [20, 20, 29, 29], [[0, 0, 9, 9]]),
        # half in, half out: 50 of 100 pixels shared, IoU 1/3, neither mostly inside nor covering
        ("elsewhere", [5, 0, 14, 9], [[0, 0, 9, 9]]),
    ],
)
def test_error_kinds_by_hand(kind: str, box: list[int], truths: list[list[int]]) -> None:
    boxes, starts = boxes_and_starts([truths])
    right = np.array([kind == "right"])
    kinds = error_kinds(np.array([box]), np.array([True]), right, boxes, starts)
    assert ERRORS[kinds[0]] == kind
    lost = error_kinds(np.array([box]), np.array([False]), right, boxes, starts)
    assert ERRORS[lost[0]] == ("right" if kind == "right" else "nothing_found")
    assert with_classes(kinds, np.array([True])) == kinds
    wrong = with_classes(kinds, np.array([False]))
    assert ERRORS[wrong[0]] == ("class_wrong" if kind == "right" else kind)


def test_error_counts_split_the_images_with_boxes_as_the_figures_do() -> None:
    rng = np.random.default_rng(3)
    corners = np.sort(rng.integers(0, 30, (400, 2, 2)), axis=1).reshape(-1, 4)
    truths = np.sort(rng.integers(0, 30, (400, 2, 2)), axis=1).reshape(-1, 4)
    truths[:150] = corners[:150]  # a share that is right
    starts = np.minimum(np.arange(401), 390)  # the last ten have no box
    ious = best_iou(corners, truths[:390], starts)
    top1 = rng.random(400) < 0.5
    right = np.nan_to_num(ious) >= 0.5
    kinds = error_kinds(corners, rng.random(400) < 0.9, right, truths[:390], starts)
    one = Outcomes(ious=ious, errors=with_classes(kinds, top1), top1=top1)
    all_figures = figures(one)
    counts = all_figures["errors"]
    assert sum(counts.values()) == all_figures["n"] == 390
    assert counts["right"] == all_figures["counts"]["top1_loc"]
    assert counts["right"] + counts["class_wrong"] == all_figures["counts"]["gt_known"]
    assert min(counts.values()) > 0 or counts["several_instances"] == 0  # one box an image


def made_sweep(largest: np.ndarray) -> Sweep:
    """Of the IoU of each image at each threshold [N, T]."""
    counts = np.zeros((len(thresholds()), len(IOU_GRID) + 1), np.int64)
    for row in largest:
        for threshold, value in enumerate(row):
            counts[threshold, (value >= IOU_GRID).sum()] += 1
    return Sweep(largest=counts, contours=counts)


def test_max_box_acc_takes_one_threshold_for_all_images_and_v2_one_per_iou() -> None:
    ious = np.zeros((4, len(thresholds())))
    ious[0, 100:200] = 0.6  # right at .1 to .2
    ious[1, 150:300] = 0.5
    ious[2, 150:160] = 0.35
    ious[3, 700:] = 0.95
    one = outcomes(np.full(4, 0.1), sweep=made_sweep(ious))
    found = sweep_figures(one)
    assert found["max_box_acc"] == 0.5  # images 0 and 1 between .15 and .2
    assert found["max_box_acc_threshold"] == pytest.approx(0.15)
    # IoU .3: three images at .15; .5: two; .7: one
    assert found["max_box_acc_v2"] == pytest.approx((0.75 + 0.5 + 0.25) / 3, abs=1e-15)


def test_a_method_without_maps_has_one_box_at_every_threshold() -> None:
    found = sweep_figures(outcomes([0.3, 0.5, 0.7, 0.2, np.nan]))
    assert found["max_box_acc"] == 0.5
    assert found["max_box_acc_threshold"] is None
    assert found["max_box_acc_v2"] == pytest.approx((3 / 4 + 2 / 4 + 1 / 4) / 3, abs=1e-15)
    unknown = sweep_figures(outcomes([np.nan, np.nan]))
    assert unknown["max_box_acc"] is None


def test_curves_by_hand() -> None:
    drawn = curves(outcomes([0.8, 0.5, 0.02, np.nan]))
    assert drawn["gt_known"][0] == 2 / 3  # IoU .05
    assert drawn["gt_known"][drawn["iou"].index(0.55)] == 1 / 3


def test_intervals_hold_every_figure_and_skip_what_is_unknown() -> None:
    rng = np.random.default_rng(6)
    ious = rng.random(50)
    ious[:5] = np.nan
    both = [
        outcomes(ious, rng.random(50) < 0.7, auc=rng.random(50), auc_other=rng.random(50)),
        outcomes(np.full(50, np.nan), np.ones(50)),
    ]
    rows = [figures(one) | sweep_figures(one) for one in both]
    known, unknown = intervals(both, rows, seed=0)
    for figure, interval in known.items():
        if rows[0][figure] is None:
            assert interval is None
        else:
            assert interval is not None
            assert interval[0] <= rows[0][figure] <= interval[1]
            assert interval[0] < interval[1]
    assert {"gt_known", "top1_loc", "top1_cls", "mean_iou", "auc_gap", "max_box_acc"} <= set(known)
    assert (unknown["gt_known"], unknown["mean_iou"]) == (None, None)
    assert unknown["top1_cls"] == [1.0, 1.0]


def test_top_k_by_hand() -> None:
    predicted = np.array([[2, 0, 1], [1, 2, 0], [0, 1, 2]])
    labels = np.array([2, 2, 2])
    assert top_k(predicted, labels, 1).tolist() == [True, False, False]
    assert top_k(predicted, labels, 2).tolist() == [True, True, False]
    assert top_k(predicted, labels, 5).all()
