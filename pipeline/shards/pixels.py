"""Loops over the pixels of an image, compiled: area averaging in integers (what OpenCV's INTER_AREA
computes, at a fifth of its time) and sums for the set's mean and deviation. A driver, which makes
no image, does not load this."""

from functools import lru_cache

import cv2
import numpy as np

from pipeline.compiled import njit

WEIGHT_BITS = 15  # of a source pixel's share in an output pixel
KEPT_BITS = 7  # of fractions of a grey level between the two passes: 15 + 15 bits fit an int32


def shrink(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Shrink uint8 [h, w, 3] to [height, width, 3], no larger, by averaging areas. Rows come first,
    then, transposed, columns: so both passes run along memory."""
    h, w = pixels.shape[:2]
    rows = np.empty((height, w, 3), np.uint16)
    drop = WEIGHT_BITS - KEPT_BITS
    _average(pixels.reshape(h, -1), *_shares(h, height), drop, rows.reshape(height, -1))
    columns = cv2.transpose(rows)
    turned = np.empty((width, height, 3), np.uint8)
    drop = WEIGHT_BITS + KEPT_BITS
    _average(columns.reshape(w, -1), *_shares(w, width), drop, turned.reshape(width, -1))
    return cv2.transpose(turned)


def moments(pixels: np.ndarray) -> np.ndarray:
    """Return the sums of an image's levels and of their squares, by channel: int64 [2, 3]. pixels:
    uint8 [H, W, 3], of up to 33,000 rows, whose squares an int32 can add up."""
    return _moments(pixels.reshape(len(pixels), -1))


@lru_cache(256)
def _shares(size: int, wanted: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the pixels that each of `wanted` outputs covers along an axis of `size` pixels, int32
    each: the first, how many, and their shares in units of 2**-WEIGHT_BITS, which add up to one."""
    edges = np.arange(wanted + 1, dtype=np.int64) * size  # in units of 1 / wanted of a pixel
    first, last = edges[:-1] // wanted, -(-edges[1:] // wanted)
    pixel = first[:, None] + np.arange((last - first).max())
    ends = np.clip((pixel + 1) * wanted, edges[:-1, None], edges[1:, None]) - edges[:-1, None]
    # The shares are differences of rounded sums, so that rounding cannot change their sum.
    sums = (2 * ends * 2**WEIGHT_BITS + size) // (2 * size)
    shares = np.diff(sums, axis=1, prepend=0)
    return first.astype(np.int32), (last - first).astype(np.int32), shares.astype(np.int32)


@njit(nogil=True, cache=True, error_model="numpy")
def _average(source, first, count, shares, drop, out):  # type: ignore[no-untyped-def]
    """Put into row j of `out` the weighted sum of `count[j]` rows of `source` from `first[j]` on.
    It is rounded to `drop` bits less; int32 throughout, which vectorizes."""
    values = source.shape[1]
    total = np.empty(values, np.int32)
    shift, half = np.int32(drop), np.int32(1 << (drop - 1))
    for j in range(out.shape[0]):
        row, share = source[first[j]], np.int32(shares[j, 0])
        for i in range(values):
            total[i] = np.int32(share * np.int32(row[i])) + half
        for k in range(1, count[j]):
            row, share = source[first[j] + k], np.int32(shares[j, k])
            for i in range(values):
                total[i] += np.int32(share * np.int32(row[i]))
        target = out[j]
        for i in range(values):
            target[i] = total[i] >> shift


@njit(nogil=True, cache=True, error_model="numpy")
def _moments(rows):  # type: ignore[no-untyped-def]
    """Add rows up value by value, which vectorizes, and channels in the end."""
    sums, squares = np.zeros(rows.shape[1], np.int32), np.zeros(rows.shape[1], np.int32)
    for row in rows:
        for i in range(len(row)):
            value = np.int32(row[i])
            sums[i] += value
            squares[i] += np.int32(value * value)
    total = np.zeros((2, 3), np.int64)
    for i in range(len(sums)):
        total[0, i % 3] += sums[i]
        total[1, i % 3] += squares[i]
    return total
