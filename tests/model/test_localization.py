"""Maps to boxes: the paper's threshold, components and scaling, by hand and against a reference."""

from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import ndimage

from model.localization import (
    RULES,
    Rule,
    adaptive_threshold,
    localize,
    map_box,
    medoid,
    medoid_thresholds,
    otsu_threshold,
)
from model.masking import mask_map
from pipeline.evaluation.protocols import scale_boxes


def reference_box(values: np.ndarray, threshold: float) -> list[int]:
    """By scipy, without OpenCV."""
    numbers, count = ndimage.label(values > threshold, np.ones((3, 3)))
    components = []
    for number in range(1, count + 1):
        ys, xs = np.nonzero(numbers == number)
        components.append((-len(ys), ys.min(), xs.min(), ys.max(), xs.max()))
    _, y0, x0, y1, x1 = min(components)
    return [x0, y0, x1, y1]


def test_threshold_is_07_mean_plus_03_max() -> None:
    values = np.array([[0.0, 1.0], [0.0, 0.2]], np.float32)  # mean .3, max 1
    assert adaptive_threshold(values) == pytest.approx(0.7 * 0.3 + 0.3 * 1.0, rel=1e-6)


def test_equal_components_give_the_topmost_then_the_leftmost() -> None:
    values = np.zeros((5, 9), np.float32)
    values[3, 0:2] = values[1, 4:6] = values[1, 7:9] = 1
    np.testing.assert_array_equal(map_box(values), [4, 1, 5, 1])


@settings(max_examples=150)
@given(hnp.arrays(np.float32, (7, 9), elements=st.integers(0, 6).map(float)))
def test_boxes_are_those_of_the_largest_component(values: np.ndarray) -> None:
    if np.ptp(values) == 0:
        assert map_box(values) is None
    else:
        threshold = 0.7 * values.mean(dtype=np.float64) + 0.3 * values.max()
        np.testing.assert_array_equal(map_box(values), reference_box(values, threshold))


def reference_iou(a: list[int], b: list[int]) -> Fraction:
    pixels = [
        {(x, y) for x in range(x0, x1 + 1) for y in range(y0, y1 + 1)} for x0, y0, x1, y1 in (a, b)
    ]
    return Fraction(len(pixels[0] & pixels[1]), len(pixels[0] | pixels[1]))


def reference_medoid(boxes: list[list[int]]) -> list[int]:
    agreement = [sum(reference_iou(a, b) for b in boxes) for a in boxes]
    return boxes[agreement.index(max(agreement))]


@given(st.lists(st.lists(st.integers(0, 4), min_size=4, max_size=4), min_size=1, max_size=6))
def test_the_medoid_has_the_largest_mean_iou(corners: list[list[int]]) -> None:
    boxes = [[x, y, x + w, y + h] for x, y, w, h in corners]
    assert medoid(np.array(boxes)).tolist() == reference_medoid(boxes)


@settings(max_examples=50)
@given(hnp.arrays(np.float32, (7, 9), elements=st.integers(0, 9).map(float)))
def test_medoid_boxes_match_boxes_at_each_threshold(values: np.ndarray) -> None:
    low, high = float(values.min()), float(values.max())
    thresholds = [low + share * (high - low) for share in np.linspace(0.3, 0.8, 11)]
    if low < high and min(abs(v - t) for v in range(10) for t in thresholds) > 1e-6:
        boxes = [reference_box(values, threshold) for threshold in thresholds]
        np.testing.assert_array_equal(map_box(values, "medoid"), reference_medoid(boxes))


def reference_otsu(values: np.ndarray) -> np.ndarray:
    """Return the pixels above by exact between-class variances, for integer maps from 0 to 255."""
    flat = values.ravel().astype(int).tolist()
    best, above = Fraction(-1), values
    for cut, _ in pairwise(sorted(set(flat))):
        parts = [v for v in flat if v <= cut], [v for v in flat if v > cut]
        means = [Fraction(sum(part), len(part)) for part in parts]
        variance = len(parts[0]) * len(parts[1]) * (means[0] - means[1]) ** 2
        if variance > best:
            best, above = variance, values > cut
    return above


@given(
    hnp.arrays(np.uint8, (5, 6), elements=st.sampled_from([0, 1, 2, 40, 41, 90, 128, 254])),
    st.sampled_from([(1.0, 0.0), (0.125, -2.0), (1024.0, 3.0)]),
)
def test_otsu_matches_exact_between_class_variances(
    levels: np.ndarray, line: tuple[float, float]
) -> None:
    levels[0, 0], levels[0, 1] = 0, 255  # the 256 levels are the integers
    values = levels * np.float32(line[0]) + np.float32(line[1])
    np.testing.assert_array_equal(values > otsu_threshold(values), reference_otsu(levels))


@given(
    hnp.arrays(np.float32, (6, 6), elements=st.integers(0, 5).map(float)),
    st.sampled_from([0.125, 4.0, 1024.0]),
    st.sampled_from([-2.0, 0.0, 3.0]),
)
def test_scaling_and_shifting_a_map_leaves_its_box(
    values: np.ndarray, scale: float, shift: float
) -> None:
    boxes, found = localize(np.stack([values, values * np.float32(scale) + np.float32(shift)]))
    threshold = adaptive_threshold(values)
    if np.abs(values - threshold).min() > 1e-5 or np.ptp(values) == 0:  # else rounding decides
        np.testing.assert_array_equal(boxes[0], boxes[1])
        assert found[0] == found[1]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("value", [0.0, 0.1, 1.0, -3.0, 1e-44])
def test_a_flat_map_gives_the_whole_map_and_says_that_nothing_was_found(
    value: float, rule: Rule
) -> None:
    flat = np.full((1, 5, 7), value, np.float32)
    flat[0, 2, 2] = np.nextafter(np.float32(value), np.float32(9))  # rounding noise is no object
    boxes, found = localize(flat, rule)
    assert boxes.tolist() == [[0, 0, 6, 4]]
    assert not found[0]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_diverged_map_is_an_error(value: float) -> None:
    values = np.zeros((4, 4), np.float32)
    values[1, 1] = value
    with pytest.raises(ValueError, match="NaN or infinite"):
        map_box(values)


@settings(max_examples=200)
@given(st.data())
def test_scaled_boxes_stay_inside_and_whole_maps_become_whole_images(data: st.DataObject) -> None:
    h, w, height, width = (data.draw(st.integers(1, 300)) for _ in range(4))
    x0, y0 = data.draw(st.integers(0, w - 1)), data.draw(st.integers(0, h - 1))
    x1, y1 = data.draw(st.integers(x0, w - 1)), data.draw(st.integers(y0, h - 1))
    stored = np.array([[x0, y0, x1, y1], [0, 0, w - 1, h - 1]])
    box, whole = scale_boxes(stored, (h, w), np.array([[height, width]] * 2)).tolist()
    assert whole == [0, 0, width - 1, height - 1]
    assert 0 <= box[0] <= box[2] < width
    assert 0 <= box[1] <= box[3] < height
    if (height, width) == (h, w):
        assert box == [x0, y0, x1, y1]


def test_the_mask_map_is_constant_on_each_superpixel_and_keeps_its_mean() -> None:
    logits = torch.randn((1, 4, 4), generator=torch.Generator().manual_seed(0))
    segments = torch.tensor([[[0, 0, 1, 1]] * 2 + [[0, 2, 2, 1]] * 2])

    # A net that returns its input stands for the corruption net: only the averaging is tested.
    values = mask_map(torch.nn.Identity(), logits, segments, 5)
    p = 1 / (1 + np.exp(-logits.numpy().astype(np.float64)))
    for label in range(3):
        inside = segments.numpy() == label
        np.testing.assert_allclose(values.numpy()[inside], p[inside].mean(), rtol=1e-6)


@pytest.mark.parametrize(
    ("rule", "box"),
    [
        ("paper", [1, 1, 1, 1]),
        ("mean", [1, 1, 2, 2]),
        # Variances 15 * (4 - 1.5 / 15)^2 = 228 above 0.5, 4 * 12 * (5.5 / 4)^2 = 91 above 0.
        ("otsu", [1, 1, 1, 1]),
        ("medoid", [1, 1, 1, 1]),  # 0.5 is below 0.3 * 4
    ],
)
def test_each_rule_cuts_at_its_own_threshold(rule: Rule, box: list[int]) -> None:
    values = np.zeros((4, 4))
    values[1:3, 1:3] = 0.5
    values[1, 1] = 4.0  # mean 5.5 / 16 = .34; the paper's threshold .7 * .34 + .3 * 4 = 1.44
    actual = map_box(values, rule)
    assert actual is not None
    assert actual.tolist() == box


def test_otsu_takes_the_lower_of_two_equal_cuts() -> None:
    # Two at 0, two at 0.5, two at 1: cuts below and above 0.5 have the same variance.
    values = np.array([[0.0, 0.5, 0.5, 1.0, 1.0, 0.0]])
    assert otsu_threshold(values) == 0.0
    np.testing.assert_array_equal(map_box(values, "otsu"), [1, 0, 4, 0])


def test_medoid_takes_the_blob_that_most_thresholds_agree_on() -> None:
    # The left blob has seven pixels above 0.3 and 0.35 of the range, at 0.4 and beyond only four;
    # the right one has six up to 0.75. Of eleven thresholds two give [0, 1, 6, 1], eight
    # [8, 0, 10, 1], and the last the two pixels at 0.9 and 1.
    values = np.zeros((3, 12), np.float32)
    values[1, :7] = [0.38, 0.38, 0.9, 1.0, 0.79, 0.79, 0.38]
    values[:2, 8:11] = 0.79
    assert medoid_thresholds(values) == pytest.approx(np.linspace(0.3, 0.8, 11))
    np.testing.assert_array_equal(map_box(values, "medoid"), [8, 0, 10, 1])


def test_medoid_takes_the_lowest_of_boxes_that_agree_equally() -> None:
    boxes = np.array([[0, 0, 3, 3], [0, 0, 1, 1], [6, 6, 7, 7], [6, 6, 9, 9]])
    assert medoid(boxes).tolist() == [0, 0, 3, 3]
    assert medoid(boxes[::-1]).tolist() == [6, 6, 9, 9]
