import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from fast_slic import Slic
from hypothesis import example, given
from hypothesis import strategies as st
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from pipeline.shards.images import read_image
from pipeline.shards.superpixels import (
    ITERATIONS,
    MAX_COUNT,
    MIN_PIXELS,
    MIN_SIZE,
    check_superpixels,
    superpixels,
)


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_NEAREST)


def pieces(labels: np.ndarray) -> int:
    """How many regions of equal labels there are, joined across edges."""
    places = np.arange(labels.size).reshape(labels.shape)
    across = labels[:, 1:] == labels[:, :-1]
    down = labels[1:] == labels[:-1]
    starts = np.concatenate([places[:, :-1][across], places[:-1][down]])
    ends = np.concatenate([places[:, 1:][across], places[1:][down]])
    edges = coo_array((np.ones(len(starts)), (starts, ends)), (labels.size, labels.size))
    return int(connected_components(edges, directed=False)[0])


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
    assert pieces(labels) == len(present)


EXTREMES = """
import sys
import numpy as np
from pipeline.shards.superpixels import MAX_COUNT, MIN_PIXELS, superpixels
rng = np.random.default_rng(int(sys.argv[1]))
for number in range(250):
    height, width = (int(x) for x in rng.integers(1, 200, 2))
    if number % 5 == 0:
        height = int(rng.integers(1, 4))
    most = min(height * width // MIN_PIXELS, MAX_COUNT)
    if most == 0:
        continue
    count = [most, 1, max(1, most - 1), int(rng.integers(1, most + 1))][number % 4]
    kind = number % 7
    image = rng.integers(0, 256, (height, width, 3), np.uint8)
    image = [image, image * 0, image * 0 + 255, image // 255 * 255, np.sort(image, 0),
             np.sort(image, 1), image & 1][kind]
    compactness = [1e-6, 0.1, 10.0, 1000.0][int(rng.integers(4))]
    print(height, width, count, kind, compactness, flush=True)
    labels = superpixels(image, count, compactness)
    assert labels.shape == (height, width)
    assert labels.max() < count and len(np.unique(labels)) == int(labels.max()) + 1
print("survived")
"""


@pytest.mark.parametrize("seed", [0, 1])
def test_no_image_that_is_accepted_ends_the_process(seed: int) -> None:
    """At the edge of what the check allows: the most superpixels, slivers, flat images, noise,
    every compactness. In a process of its own, which fast-slic could take down with SIGFPE."""
    result = subprocess.run(
        [sys.executable, "-c", EXTREMES, str(seed)], capture_output=True, text=True, timeout=120
    )
    last = result.stdout.splitlines()[-1]
    assert (result.returncode, last) == (0, "survived"), f"{last}: {result.stderr}"


@pytest.mark.parametrize("count", [32_767, 32_768, 40_000, MAX_COUNT])
def test_labels_above_what_fast_slic_returns_in_int16_are_whole(count: int) -> None:
    image = np.random.default_rng(0).integers(0, 256, (512, 512, 3), np.uint8)
    labels = superpixels(image, count)
    assert labels.dtype == np.uint16
    found = int(labels.max()) + 1
    assert 0.6 * count < found <= count
    assert np.array_equal(np.unique(labels), np.arange(found))
    assert pieces(labels) == found


def explained(image: np.ndarray, labels: np.ndarray) -> float:
    """Share of the colours' variance that lies between superpixels."""
    colours = image.reshape(-1, 3).astype(np.float64)
    counts = np.bincount(labels.ravel())
    sums = np.stack([np.bincount(labels.ravel(), colours[:, c]) for c in range(3)], axis=1)
    between = (sums**2 / counts[:, None]).sum() - len(colours) * (colours.mean(axis=0) ** 2).sum()
    return float(between / ((colours - colours.mean(axis=0)) ** 2).sum())


@pytest.mark.parametrize(("side", "count"), [(64, 100), (64, 196), (224, 400)])
def test_fewer_iterations_explain_no_less_than_fast_slics_own_settings(
    imagenet_samples: Path, side: int, count: int
) -> None:
    assert (ITERATIONS, MIN_SIZE) == (6, 0.1)
    ours, theirs = [], []
    for path in sorted(imagenet_samples.glob("*.JPEG"))[:60]:
        image = read_image(path.read_bytes(), side, side).pixels
        ours.append(explained(image, superpixels(image, count)))
        slic = Slic(num_components=count, compactness=10.0, min_size_factor=0.25, num_threads=1)
        theirs.append(explained(image, slic.iterate(image, 10)))
    assert np.mean(ours) >= np.mean(theirs)


def test_colours_are_kept_apart() -> None:
    image = np.zeros((64, 64, 3), np.uint8)
    image[:, 29:] = 255
    labels = superpixels(image, 64)
    assert not set(np.unique(labels[:, :29])) & set(np.unique(labels[:, 29:]))


def test_the_fastest_class_gives_the_labels_of_the_plain_one() -> None:
    image = noise(64, 64)
    plain = Slic(num_components=100, compactness=10.0, min_size_factor=MIN_SIZE, num_threads=1)
    assert np.array_equal(superpixels(image, 100), plain.iterate(image, ITERATIONS))


@pytest.mark.parametrize(
    "image",
    [np.zeros((64, 64), np.uint8), np.zeros((64, 64, 4), np.uint8), np.zeros((64, 64, 3), float)],
)
def test_another_shape_or_dtype_is_refused(image: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"uint8 \[H, W, 3\]"):
        superpixels(image, 16)


@pytest.mark.parametrize("count", [0, -1, 65534])
def test_a_count_out_of_range_is_refused(count: int) -> None:
    with pytest.raises(ValueError, match="allowed: 1 to 65533"):
        check_superpixels(512, 512, count)
