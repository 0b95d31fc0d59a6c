"""The sweep against OpenCV's contours drawn level by level, and its figures by hand."""

from collections.abc import Iterator

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pipeline.evaluation.metrics import max_box_acc, max_box_acc_v2
from pipeline.evaluation.protocols import IOU_GRID, thresholds
from pipeline.evaluation.sweep import (
    add_counts,
    level_boxes,
    level_ious,
    pixel_auc,
    pixel_auc_boxes,
    quantize,
    stretch,
    threshold_levels,
)

Box = tuple[int, int, int, int]


def contour_boxes(levels: np.ndarray, t: int) -> tuple[Box | None, set[Box]]:
    """The definition: the contours that OpenCV draws above level t."""
    drawn = np.where(levels > t, 255, 0).astype(np.uint8)
    contours = cv2.findContours(drawn, cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE)[0]

    def box(contour: np.ndarray) -> Box:
        x, y, width, height = cv2.boundingRect(contour)
        return x, y, x + width - 1, y + height - 1

    if not contours:
        return None, set()
    return box(max(contours, key=cv2.contourArea)), {box(contour) for contour in contours}


def assert_as_drawn(levels: np.ndarray) -> None:
    found = level_boxes(levels)
    assert found.maximum == levels.max()
    for t in range(256):
        largest, every = contour_boxes(levels, t) if t <= levels.max() else (None, set())
        here = (found.first <= t) & (t <= found.last)
        assert {tuple(box) for box in found.boxes[here].tolist()} == every, t
        row = int(found.largest[t])
        assert (tuple(found.boxes[row].tolist()) if row >= 0 else None) == largest, t


@pytest.mark.parametrize(
    ("height", "width"),
    [(1, 1), (1, 7), (7, 1), (3, 3), pytest.param(3, 4, marks=pytest.mark.slow)],
)
def test_every_small_binary_map_is_as_drawn(height: int, width: int) -> None:
    for bits in range(1 << height * width):
        drawn = np.array([bits >> i & 1 for i in range(height * width)], np.uint8)
        assert_as_drawn(drawn.reshape(height, width))


@given(st.integers(0, 2**32 - 1), st.integers(5, 40), st.integers(5, 40), st.floats(0.05, 0.95))
def test_random_maps_with_ties_are_as_drawn(
    seed: int, height: int, width: int, share: float
) -> None:
    rng = np.random.default_rng(seed)
    kept = rng.random((height, width)) < share
    assert_as_drawn((kept * rng.integers(1, 6, (height, width))).astype(np.uint8))


def structured_maps() -> Iterator[tuple[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:60, :61]
    radius = np.maximum(abs(y - 30), abs(x - 30))
    yield "rings in rings", np.where(radius % 4 < 2, 200 - 3 * radius, radius).astype(np.uint8)
    yield "checkerboard", ((y + x) % 2 * 255).astype(np.uint8)
    yield "checkerboard of slopes", ((y + x) % 2 * (y + 3 * x)).astype(np.uint8)
    yield "diagonals", (((y - x) % 9 == 0) * (100 + y)).astype(np.uint8)
    yield "single pixels", ((y % 3 == 0) & (x % 4 == 0)).astype(np.uint8) * 7
    yield "at the border", (((y < 5) | (x > 55)) * (255 - y - x)).astype(np.uint8)
    yield (
        "diamond with a tail",
        ((abs(y - 9) + abs(x - 9) == 3) | ((y == 9) & (x > 12))) * np.uint8(9),
    )
    yield "flat", np.full((60, 61), 255, np.uint8)
    yield "zero", np.zeros((60, 61), np.uint8)
    yield "one pixel", np.full((1, 1), 3, np.uint8)
    yield "one row", rng.integers(0, 9, (1, 50)).astype(np.uint8)
    yield "wider than 256", rng.integers(0, 3, (4, 300)).astype(np.uint8)
    yield "noise", rng.integers(0, 256, (50, 50)).astype(np.uint8)


@pytest.mark.parametrize(("name", "levels"), list(structured_maps()))
def test_structured_maps_are_as_drawn(name: str, levels: np.ndarray) -> None:
    assert_as_drawn(levels)


def large_maps(kind: str, count: int, rng: np.random.Generator) -> np.ndarray:
    """Score maps of 224 x 224 like those of nets: upsampled, of superpixels, or noisy."""
    maps = []
    for _ in range(count):
        if kind == "superpixels":
            ys, xs = rng.random((2, 120, 1, 1), np.float32) * 224
            grid = np.arange(224, dtype=np.float32)
            nearest = ((grid[:, None] - ys) ** 2 + (grid - xs) ** 2).argmin(axis=0)
            maps.append(rng.random(120)[nearest])
        else:
            cells = 7 if kind == "smooth" else 56
            coarse = rng.random((cells, cells), np.float32)
            maps.append(cv2.resize(coarse, (224, 224), interpolation=cv2.INTER_CUBIC))
    return stretch(np.stack(maps))


@pytest.mark.parametrize("kind", ["smooth", "superpixels", "rough"])
def test_large_maps_are_as_drawn(kind: str) -> None:
    for scores in large_maps(kind, 2, np.random.default_rng(1)):
        assert_as_drawn(quantize(scores))


def test_levels_are_255_times_the_float64_score_truncated() -> None:
    # In float32 this score times 255 rounds up to 51; as float64 it stays just below.
    below = np.nextafter(np.float32(0.2), np.float32(0))
    assert np.float32(below) * np.float32(255) < 51 or float(below) * 255 < 51
    np.testing.assert_array_equal(quantize(np.array([[0, 0.5, 1, below]])), [[0, 127, 255, 50]])


@pytest.mark.parametrize("bad", [-0.001, 1.001, np.nan, np.inf])
def test_scores_outside_0_to_1_are_refused(bad: float) -> None:
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
        quantize(np.array([[0.5, bad]]))


def test_stretch_takes_each_map_to_0_and_1_and_a_flat_one_to_zeros() -> None:
    maps = np.array([[[2.0, 4.0], [3.0, 2.0]], [[7.0, 7.0], [7.0, 7.0]]])
    expected = [[[0, 1], [0.5, 0]], [[0, 0], [0, 0]]]
    np.testing.assert_array_equal(stretch(maps), expected)
    with pytest.raises(ValueError, match=r"maps \[1\]"):
        stretch(np.array([[[0.0, 1.0]], [[0.0, np.nan]]]))


def test_there_are_1000_thresholds_and_levels_stay_below_the_maximum() -> None:
    assert len(thresholds()) == 1000
    for maximum in (0, 1, 200, 255):
        expected = [int(t * maximum) for t in np.arange(0, 1, 0.001)]
        np.testing.assert_array_equal(threshold_levels(maximum), expected)


def test_ious_by_level_by_hand() -> None:
    # Level 3 within a 4 x 2 block of level 2, and one pixel of level 1 far away.
    levels = np.zeros((6, 10), np.uint8)
    levels[1:3, 1:5] = 2
    levels[1, 1:3] = 3
    levels[5, 9] = 1
    found = level_boxes(levels)
    empty = np.array([0, 0, 0, 0])
    truth = np.array([[1, 1, 4, 2], [9, 5, 9, 5]])
    one, _ = level_ious(found, found.boxes, truth[:1], 1, empty)
    np.testing.assert_array_equal(one[:4], [1, 1, 0.25, 0])
    single, best = level_ious(found, found.boxes, truth[1:], 1, empty)
    np.testing.assert_array_equal(single[:3], [0, 0, 0])
    np.testing.assert_array_equal(best[:3], [1, 0, 0])
    exclusive, _ = level_ious(found, found.boxes, np.array([[1, 1, 4, 3]]), 0, empty)
    np.testing.assert_array_equal(exclusive[:2], [3 / 6, 3 / 6])
    nothing, both = level_ious(found, found.boxes, np.array([[0, 0, 1, 0]]), 1, empty)
    assert nothing[3] == both[3] == 0.5  # the empty box is one pixel of two


def test_grid_holds_the_decimal_floats() -> None:
    assert [float(f"{k / 20:.2f}") for k in range(1, 20)] == IOU_GRID.tolist()


def test_figures_by_hand() -> None:
    # Two images; level i is reached by the thresholds of a map whose maximum is 2: 0 or 1.
    counts = np.zeros((1000, 20), np.int64)
    levels = threshold_levels(2)
    first, second = np.zeros(256), np.zeros(256)
    first[:2] = 0.5, 0.29
    second[:2] = 0.3, 0.75
    add_counts(counts, first, levels)
    add_counts(counts, second, levels)
    assert max_box_acc(counts, 2) == (0.5, 0.0)  # one of two at either level: the smallest
    # IoU .3: both at level 0; .5: one; .7: one.
    assert max_box_acc_v2(counts, 2) == pytest.approx((1 + 0.5 + 0.5) / 3, abs=1e-15)
    add_counts(counts, second, levels)
    share, threshold = max_box_acc(counts, 3)
    assert (share, threshold) == (2 / 3, 0.5)


def test_pixel_auc_by_hand() -> None:
    levels = np.array([[1, 2, 3, 2]], np.uint8)
    inside = np.array([[False, False, True, True]])
    # Pairs: 3>1, 3>2, 2>1, 2=2: three and a half of four.
    assert pixel_auc(levels, inside) == 3.5 / 4
    assert pixel_auc_boxes(levels, np.array([[2, 0, 2, 0], [2, 0, 3, 0]])) == 3.5 / 4
    assert np.isnan(pixel_auc(levels, np.ones((1, 4), bool)))
    assert np.isnan(pixel_auc(levels, np.zeros((1, 4), bool)))


@settings(max_examples=50)
@given(hnp.arrays(np.uint8, (4, 5)), hnp.arrays(bool, (4, 5)))
def test_pixel_auc_counts_pairs(levels: np.ndarray, inside: np.ndarray) -> None:
    if not 0 < inside.sum() < inside.size:
        return
    ours, others = levels[inside].astype(int)[:, None], levels[~inside].astype(int)
    expected = ((ours > others).sum() + 0.5 * (ours == others).sum()) / (ours > others).size
    assert pixel_auc(levels, inside) == expected
