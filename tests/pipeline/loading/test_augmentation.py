"""Augmentation against references that share no code with it: float64 NumPy, one axis at a time."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.loading.augmentation import (
    Augmentation,
    Draw,
    _augment_in_numba,
    _augment_in_torch,
    _axis,
    augment,
    draw,
)
from pipeline.loading.order import Position

MEAN = (120.2, 60.7, 30.0)
FILL = (120, 61, 30)
PLAIN = Augmentation(min_area=1.0, max_aspect=1.0, flip=False)
AUGMENTATIONS = st.builds(
    Augmentation,
    min_area=st.floats(0.05, 1),
    max_aspect=st.floats(1, 3),
    flip=st.booleans(),
    translation=st.sampled_from([0.0, 0.1, 0.9]),
)


def made_batch(count: int, size: tuple[int, int], dtype: str, seed: int) -> tuple[Tensor, Tensor]:
    """Noise, the hardest image to interpolate, and superpixels of any label the type holds."""
    random = np.random.default_rng(seed)
    images = random.integers(0, 256, (count, *size, 3), np.uint8)
    segments = random.integers(0, np.iinfo(dtype).max + 1, (count, *size)).astype(dtype)
    return torch.from_numpy(images), torch.from_numpy(segments)


def centres(start: float, end: float, size: int) -> np.ndarray:
    """Where each output pixel's centre lies in the stored image, in pixels."""
    return start + (np.arange(size) + 0.5) * (end - start) / size


def reference_labels(segments: np.ndarray, start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """The label of the stored pixel nearest to each output pixel's centre."""
    for axis, size in enumerate(segments.shape):
        distance = np.abs(centres(start[axis], end[axis], size)[:, None] - np.arange(size) - 0.5)
        segments = segments.take(distance.argmin(axis=1), axis)
    return segments


def reference_image(image: np.ndarray, drawn: Draw, n: int) -> np.ndarray:
    """Linear interpolation between pixel centres, and the fill beyond the edge."""
    result = image.astype(np.float64)
    inside = np.ones(image.shape[:2], bool)
    for axis, size in enumerate(image.shape[:2]):
        centre = centres(drawn.start[n, axis], drawn.end[n, axis], size)
        hats = np.maximum(1 - np.abs(centre[:, None] - 0.5 - np.arange(-1, size + 1)), 0)
        hats[:, 1] += hats[:, 0]  # the edge's pixel stands for its neighbour beyond it
        hats[:, size] += hats[:, size + 1]
        result = np.moveaxis(np.tensordot(hats[:, 1:-1], result, (1, axis)), 0, axis)
        shape = (-1, 1) if axis == 0 else (1, -1)
        inside &= ((centre >= 0) & (centre < size)).reshape(shape)
    return np.where(inside[..., None], result, drawn.fill)


@given(
    size=st.tuples(st.integers(1, 23), st.integers(1, 23)),
    dtype=st.sampled_from(["uint8", "uint16"]),
    augmentation=AUGMENTATIONS,
    seed=st.integers(0, 2**40),
    step=st.integers(0, 3),
    count=st.integers(0, 5),
)
@settings(max_examples=200)
def test_images_and_superpixels_are_the_references_and_the_same_bits_by_torch_and_numba(
    size: tuple[int, int], dtype: str, augmentation: Augmentation, seed: int, step: int, count: int
) -> None:
    """Labels exactly, images within a grey level. What a GPU runs is run on CPU tensors here: it is
    integers throughout."""
    images, segments = made_batch(count, size, dtype, seed)
    drawn = draw(count, seed, Position(epoch=1, step=step), size, MEAN, augmentation)
    pixels, labels = augment(images, segments, drawn)
    assert (pixels.dtype, labels.dtype) == (torch.uint8, torch.int64)
    for n in range(count):
        expected = reference_labels(segments[n].numpy(), drawn.start[n], drawn.end[n])
        assert np.array_equal(labels[n].numpy(), expected)
        difference = pixels[n].numpy() - reference_image(images[n].numpy(), drawn, n)
        assert np.abs(difference).max() <= 1
    rows, columns = (_axis(drawn.start[:, i], drawn.end[:, i], size[i]) for i in (0, 1))
    for other in (_augment_in_torch, _augment_in_numba):
        found = other(images, segments, rows, columns, drawn)
        assert (found[0].dtype, found[1].dtype) == (torch.uint8, torch.int64)
        assert torch.equal(found[0], pixels)
        assert torch.equal(found[1], labels)


def test_torch_and_numba_agree_where_integers_are_largest() -> None:
    """White and black checks: no overflow, no wrap."""
    checks = torch.tensor([[0, 255], [255, 0]], dtype=torch.uint8).repeat(6, 6)
    images = checks[None, :, :, None].repeat(8, 1, 1, 3)
    images[4:, ..., 1:] = 0  # pure red
    segments = torch.zeros((8, 12, 12), dtype=torch.uint8)
    augmentation = Augmentation(translation=0.5)
    for step in range(50):
        drawn = draw(8, 0, Position(step=step), (12, 12), (255.0, 255.0, 255.0), augmentation)
        rows = _axis(drawn.start[:, 0], drawn.end[:, 0], 12)
        columns = _axis(drawn.start[:, 1], drawn.end[:, 1], 12)
        found = _augment_in_torch(images, segments, rows, columns, drawn)[0]
        assert torch.equal(found, _augment_in_numba(images, segments, rows, columns, drawn)[0])
        for n in range(8):
            difference = found[n].numpy() - reference_image(images[n].numpy(), drawn, n)
            assert np.abs(difference).max() <= 1


def test_a_shift_and_a_flip_by_hand() -> None:
    """A crop that lies half a pixel to the left of the image, and its mirror image."""
    row = torch.tensor([[[0, 0, 0], [100, 100, 100], [200, 200, 200], [40, 40, 40]]])
    images = row[None].to(torch.uint8).repeat(2, 1, 1, 1)
    segments = torch.tensor([[[5, 6, 7, 8]]], dtype=torch.uint8).repeat(2, 1, 1)
    drawn = Draw(
        start=np.array([[0.0, -1.0], [0.0, 3.0]]),
        end=np.array([[1.0, 3.0], [1.0, -1.0]]),
        fill=np.array(FILL, np.uint8),
    )
    pixels, labels = augment(images, segments, drawn)
    assert pixels[0, 0].tolist() == [[*FILL], [0] * 3, [100] * 3, [200] * 3]
    assert pixels[1, 0].tolist() == [[200] * 3, [100] * 3, [0] * 3, [*FILL]]
    assert labels[0, 0].tolist() == [5, 5, 6, 7]
    assert labels[1, 0].tolist() == [7, 6, 5, 5]


def test_nothing_drawn_changes_nothing_and_inputs_stay_as_they_are() -> None:
    images, segments = made_batch(3, (13, 10), "uint16", 0)
    kept = images.clone(), segments.clone()
    drawn = draw(3, 0, Position(), (13, 10), MEAN, PLAIN)
    pixels, labels = augment(images, segments, drawn)
    assert torch.equal(pixels, images)
    assert torch.equal(labels, segments.long())
    everything = draw(3, 0, Position(), (13, 10), MEAN, Augmentation())
    assert not torch.equal(augment(images, segments, everything)[0], images)
    assert torch.equal(images, kept[0])
    assert torch.equal(segments, kept[1])


def corners(size: tuple[int, int], **changes: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The lower and upper corners of 5000 crops as shares of the image, and which are mirrored."""
    drawn = draw(5000, 0, Position(epoch=3, step=2), size, MEAN, Augmentation(**changes))
    low, high = np.minimum(drawn.start, drawn.end), np.maximum(drawn.start, drawn.end)
    assert (drawn.start[:, 0] <= drawn.end[:, 0]).all()  # never upside down
    return low / size, high / size, drawn.start[:, 1] > drawn.end[:, 1]


@pytest.mark.parametrize(
    ("min_area", "max_aspect"), [(0.7, 1.16), (0.3, 1.5), (1.0, 1.0), (1.0, 2.0), (0.5, 4.0)]
)
def test_crops_stay_inside_and_keep_the_stated_area_and_aspect(
    min_area: float, max_aspect: float
) -> None:
    low, high, _ = corners((48, 64), min_area=min_area, max_aspect=max_aspect)
    assert low.min() >= -1e-9
    assert high.max() <= 1 + 1e-9
    areas = (high - low).prod(axis=1)
    aspects = (high - low)[:, 1] / (high - low)[:, 0]
    assert areas.min() >= min_area - 1e-9
    assert areas.mean() == pytest.approx((1 + min_area) / 2, abs=0.01)  # uniform
    assert np.abs(np.log(aspects)).max() <= np.log(max_aspect) + 1e-9
    if 1 < max_aspect <= 1 / min_area:  # the whole range is used, evenly to both sides
        assert aspects.max() == pytest.approx(max_aspect, rel=0.01)
        assert aspects.min() == pytest.approx(1 / max_aspect, rel=0.01)
        assert np.log(aspects).mean() == pytest.approx(0, abs=0.02)
    room = 1 - (high - low)
    if min_area < 1:  # anywhere in the image, evenly
        assert (low[room > 0.05] / room[room > 0.05]).mean() == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("translation", [0.1, 0.6])
def test_translated_crops_reach_over_each_edge_by_the_stated_share_at_most(
    translation: float,
) -> None:
    low, high, _ = corners((48, 64), translation=translation)
    for beyond in (-low[:, 0], -low[:, 1], high[:, 0] - 1, high[:, 1] - 1):
        assert translation * 0.95 < beyond.max() <= translation + 1e-9


def test_half_of_the_crops_are_mirrored_or_none() -> None:
    assert corners((48, 64))[2].mean() == pytest.approx(0.5, abs=0.03)
    assert not corners((48, 64), flip=False)[2].any()


def test_draws_depend_on_seed_epoch_and_step_alone_and_parts_are_theirs() -> None:
    def drawn(seed: int = 1, epoch: int = 2, step: int = 3) -> Draw:
        position = Position(epoch=epoch, step=step)
        return draw(9, seed, position, (8, 8), MEAN, Augmentation())

    one = drawn()
    for other in (drawn(seed=2), drawn(epoch=3), drawn(step=4), drawn(seed=3, step=1)):
        assert not np.isclose(one.start, other.start).any()
    for low, high in ((0, 4), (4, 9), (3, 3)):
        part = drawn().part(low, high)
        assert np.array_equal(part.start, one.start[low:high])
        assert np.array_equal(part.end, one.end[low:high])
    assert one.fill.tolist() == [*FILL]


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("min_area", (0.0, -0.1, 1.1, float("nan"))),
        ("max_aspect", (0.99, 0.0, float("inf"), float("nan"))),
        ("translation", (-0.1, 1.0, float("nan"))),
    ],
)
def test_settings_out_of_range_are_refused_by_name(name: str, values: tuple[float, ...]) -> None:
    for value in values:
        with pytest.raises(ValueError, match=f"{name} {value}"):
            Augmentation(**{name: value})  # type: ignore[arg-type]
