import subprocess
import sys

import cv2
import numpy as np
import pytest
from fast_slic import Slic
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline.superpixels import MIN_PIXELS, check_superpixels, superpixels


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_NEAREST)


@settings(max_examples=60, deadline=None)
@example(height=1, width=64, count=16, seed=0)
@example(height=8, width=8, count=16, seed=0)
@given(
    height=st.integers(1, 96),
    width=st.integers(1, 96),
    count=st.integers(1, 1500),
    seed=st.integers(0, 3),
)
def test_any_image_gives_contiguous_labels_in_one_piece_each_or_a_clear_error(
    height: int, width: int, count: int, seed: int
) -> None:
    image = noise(height, width, seed)
    if height * width < MIN_PIXELS * count:
        with pytest.raises(ValueError, match="ask for fewer superpixels or larger images"):
            superpixels(image, count)
        return
    labels = superpixels(image, count)
    assert labels.shape == (height, width)
    assert labels.dtype == (np.uint8 if count <= 256 else np.uint16)
    present = np.unique(labels)
    assert np.array_equal(present, np.arange(len(present)))
    assert len(present) <= count
    for label in present[:20]:
        pieces, _ = cv2.connectedComponents((labels == label).astype(np.uint8), connectivity=4)
        assert pieces == 2, f"superpixel {label} has {pieces - 1} pieces"


def test_colours_are_kept_apart() -> None:
    image = np.zeros((64, 64, 3), np.uint8)
    image[:, 29:] = 255
    labels = superpixels(image, 64)
    assert not set(np.unique(labels[:, :29])) & set(np.unique(labels[:, 29:]))


def test_an_image_gives_the_same_labels_after_another_one() -> None:
    first = superpixels(noise(64, 64, 1), 100)
    superpixels(noise(64, 64, 2), 100)
    assert np.array_equal(superpixels(noise(64, 64, 1), 100), first)


def test_the_fastest_class_gives_the_labels_of_the_plain_one() -> None:
    image = noise(64, 64)
    plain = Slic(num_components=100, compactness=10.0, num_threads=1).iterate(image, 10)
    assert np.array_equal(superpixels(image, 100), plain)


def test_views_are_accepted() -> None:
    image = noise(64, 64)
    turned = image[::-1, ::-1]
    assert np.array_equal(superpixels(turned, 100), superpixels(turned.copy(), 100))


@pytest.mark.parametrize(
    "image",
    [np.zeros((64, 64), np.uint8), np.zeros((64, 64, 4), np.uint8), np.zeros((64, 64, 3), float)],
)
def test_another_shape_or_dtype_is_refused(image: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"uint8 \[H, W, 3\]"):
        superpixels(image, 16)


@pytest.mark.parametrize("count", [0, -1, 32768])
def test_a_count_out_of_range_is_refused(count: int) -> None:
    with pytest.raises(ValueError, match="allowed: 1 to 32767"):
        check_superpixels(512, 512, count)


def test_checking_a_size_does_not_load_fast_slic() -> None:
    code = (
        "import sys; from pipeline.preprocess import PreprocessConfig; "
        "PreprocessConfig(source='a', output='b'); "
        "assert not any('fast_slic' in name for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
