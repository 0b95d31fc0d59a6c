"""RGB -> superpixel labels. fast_slic is imported here alone, once labels are made."""

import functools
from typing import Any

import numpy as np

MIN_PIXELS = 4  # per superpixel; below 1 fast-slic ends the process with SIGFPE
MAX_COUNT = 65533  # fast-slic refuses more; labels are uint16
# Ten iterations and a quarter are fast-slic's own. With a tenth, more pieces that lie apart stay
# superpixels instead of joining a neighbour of another colour, and the count comes nearer to what
# was asked for: so fewer iterations explain no less variance.
ITERATIONS = 6
MIN_SIZE = 0.1  # of a superpixel's mean size, below which a piece joins its neighbour


def check_superpixels(height: int, width: int, count: int) -> None:
    """Raise ValueError where an image of this size cannot be cut into `count` superpixels."""
    if not 1 <= count <= MAX_COUNT:
        raise ValueError(f"superpixels {count} is out of range; allowed: 1 to {MAX_COUNT}.")
    if height * width < MIN_PIXELS * count:
        raise ValueError(
            f"{count} superpixels do not fit into {height}x{width} pixels, which hold at most "
            f"{height * width // MIN_PIXELS}; ask for fewer superpixels or larger images."
        )


def label_dtype(count: int) -> np.dtype:
    """Return uint8 where the labels of `count` superpixels fit, else uint16."""
    return np.dtype(np.uint8 if count <= 256 else np.uint16)


def superpixels(image: np.ndarray, count: int, compactness: float = 10.0) -> np.ndarray:
    """Cut `image` (uint8 [H, W, 3]) into at most `count` superpixels (SLIC), each in one piece:
    labels [H, W], contiguous from 0, uint8 where `count` is at most 256, else uint16. A larger
    `compactness` makes them squarer. Raises ValueError."""
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"image has {image.dtype} {image.shape}; give it as uint8 [H, W, 3].")
    check_superpixels(image.shape[0], image.shape[1], count)
    # A fresh object each time: a used one starts from the clusters of the image before. More than
    # one thread spins on a busy machine.
    slic = _fastest_slic()(
        num_components=count, compactness=compactness, min_size_factor=MIN_SIZE, num_threads=1
    )
    labels = slic.iterate(np.ascontiguousarray(image), ITERATIONS)
    return labels.view(np.uint16).astype(label_dtype(count))  # fast-slic wraps them in int16


@functools.cache
def _fastest_slic() -> Any:
    """Return SlicAvx2 where fast-slic has it, else the plain class: the same labels."""
    try:
        from fast_slic.avx2 import SlicAvx2
    except ImportError:
        from fast_slic import Slic

        return Slic
    return SlicAvx2
