"""Random crops, flips and translations of whole batches, on the device that trains. Draws are a
pure function of (seed, epoch, step). Coordinates are computed in float64 on the host, pixels in
integers, so a CPU (numba) and a GPU (torch) give the same bits."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.compiled import njit
from pipeline.loading.order import Position

WEIGHT_BITS = 11  # of an interpolation weight: two of them and a byte fill 30 bits
SHIFT = 2 * WEIGHT_BITS  # of a sum of pixels by two weights
ROUNDING = (1 << (SHIFT - 1)) + (1 << (SHIFT - 7))  # half a grey level, and half of a 64th
STREAM = 1  # sets these draws apart from the order's: a seed [a, b] is the same as [a, b, 0]
WORD_BITS = 21  # of a channel among three in a word of 64: a byte times a weight takes 19


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Random crop, translation and flip, the same for an image and its superpixels. min_area:
    smallest share of the image that a crop keeps, in (0, 1]. max_aspect: largest factor of its
    aspect, which gives way where a crop would not fit. flip: mirror half of the images.
    translation: largest share of the side, in [0, 1), by which a crop reaches over the edge, where
    the image is `fill` and the superpixel the nearest one."""

    min_area: float = 0.7
    max_aspect: float = 1.16
    flip: bool = True
    translation: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.min_area <= 1 or not 1 <= self.max_aspect < float("inf"):
            raise ValueError(
                f"min_area {self.min_area} must lie in (0, 1], "
                f"max_aspect {self.max_aspect} be at least 1"
            )
        if not 0 <= self.translation < 1:
            raise ValueError(f"translation {self.translation} must lie in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class Draw:
    """The random choices for each image of a batch. start, end: float64 [B, 2], corners (y, x) in
    stored pixels; start x > end x means mirrored. fill: uint8 [3], the colour beyond the edge."""

    start: np.ndarray
    end: np.ndarray
    fill: np.ndarray

    def part(self, first: int, stop: int) -> "Draw":
        """Return the choices for images `first` to `stop`, exclusive."""
        return Draw(start=self.start[first:stop], end=self.end[first:stop], fill=self.fill)


def draw(
    total: int,
    seed: int,
    position: Position,
    size: tuple[int, int],
    mean: tuple[float, float, float],
    augmentation: Augmentation,
) -> Draw:
    """Draw the crops and flips of the `total` images of the global batch at `position`. size:
    height and width in pixels. mean: of the set's pixels, 0..255: the fill colour."""
    random = np.random.default_rng([seed, position.epoch, position.step, STREAM])
    area, aspect, y, x, mirror = random.random((5, total))
    area = augmentation.min_area + (1 - augmentation.min_area) * area
    stretch = np.exp(np.log(augmentation.max_aspect) * (2 * aspect - 1)).clip(area, 1 / area)
    shares = np.minimum(np.sqrt([area / stretch, area * stretch]), 1).T  # 1 but for rounding
    corner = np.stack([y, x], axis=1)  # 0: at the top or left edge, 1: at the other one
    start = (1 - shares) * corner + augmentation.translation * (2 * corner - 1)
    start, end = start * np.array(size), (start + shares) * np.array(size)
    mirrored = (mirror < 0.5) & augmentation.flip
    start[mirrored, 1], end[mirrored, 1] = end[mirrored, 1], start[mirrored, 1]
    return Draw(start=start, end=end, fill=np.rint(mean).astype(np.uint8))


class _Axis(NamedTuple):
    """The stored pixels that outputs along one axis are computed from, int32 [B, n] each. nearest:
    to the output's centre. low: below the centre, from -1 on; the edge's pixel stands for those
    beyond it. weight: of low + 1, in units of 2**-WEIGHT_BITS. inside: 1 where the centre is in the
    image."""

    nearest: np.ndarray
    low: np.ndarray
    weight: np.ndarray
    inside: np.ndarray


def _axis(start: np.ndarray, end: np.ndarray, size: int) -> _Axis:
    centre = start[:, None] + (np.arange(size) + 0.5) * ((end - start) / size)[:, None]
    pixel = np.floor(centre)
    low = np.floor(centre - 0.5)
    return _Axis(
        nearest=np.clip(pixel, 0, size - 1).astype(np.int32),
        low=np.clip(low, -1, size - 1).astype(np.int32),
        weight=np.rint((centre - 0.5 - low) * 2**WEIGHT_BITS).astype(np.int32),
        inside=((pixel >= 0) & (pixel < size)).astype(np.int32),
    )


def augment(
    images: Tensor, segments: Tensor, drawn: Draw, out: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Crop and flip images, uint8 [B, H, W, 3], linearly, and segments, uint8 or uint16 [B, H, W],
    by the nearest pixel, which become int64. out: on a CPU, tensors for the result."""
    height, width = segments.shape[1:]
    rows = _axis(drawn.start[:, 0], drawn.end[:, 0], height)
    columns = _axis(drawn.start[:, 1], drawn.end[:, 1], width)
    if images.is_cuda:
        return _augment_in_torch(images, segments, rows, columns, drawn)
    return _augment_in_numba(images, segments, rows, columns, drawn, out)


def _augment_in_torch(
    images: Tensor, segments: Tensor, rows: _Axis, columns: _Axis, drawn: Draw
) -> tuple[Tensor, Tensor]:
    device, (height, width) = images.device, segments.shape[1:]

    def sent(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(device, non_blocking=True)

    def neighbours(axis: _Axis, size: int) -> tuple[Tensor, Tensor]:
        low = sent(axis.low).long()
        return low.clamp(min=0), (low + 1).clamp(max=size - 1)

    batch = torch.arange(len(images), device=device)[:, None, None]
    upper, lower = (x[:, :, None] for x in neighbours(rows, height))
    left, right = (x[:, None, :] for x in neighbours(columns, width))
    across = sent(columns.weight)[:, None, :, None]
    down = sent(rows.weight)[:, :, None, None]
    unit = 2**WEIGHT_BITS

    def between(row: Tensor) -> Tensor:
        ends = images[batch, row, left].int(), images[batch, row, right].int()
        return ends[0] * (unit - across) + ends[1] * across

    values = between(upper) * (unit - down) + between(lower) * down
    pixels = ((values + ROUNDING) >> SHIFT).to(torch.uint8)
    inside = sent(rows.inside)[:, :, None] * sent(columns.inside)[:, None, :]
    pixels = torch.where(inside[..., None] > 0, pixels, sent(drawn.fill))
    nearest = sent(rows.nearest).long()[:, :, None], sent(columns.nearest).long()[:, None, :]
    return pixels, segments.int()[batch, *nearest].long()


def _augment_in_numba(
    images: Tensor,
    segments: Tensor,
    rows: _Axis,
    columns: _Axis,
    drawn: Draw,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    pixels, labels = out or (
        torch.empty_like(images),
        torch.empty_like(segments, dtype=torch.int64),
    )
    _augment_batch(
        images.numpy(),
        segments.numpy(),
        rows,
        columns,
        drawn.fill,
        bool(columns.inside.all()),
        pixels.numpy(),
        labels.numpy(),
    )
    return pixels, labels


@njit(nogil=True, cache=True, error_model="numpy")
def _augment_batch(  # type: ignore[no-untyped-def]
    images, segments, rows, columns, fill, whole_rows, pixels, labels
):
    """Fill `pixels` and `labels`. rows, columns: an `_Axis` each. A crop is no smaller than what it
    looks at, so neighbouring outputs share stored rows: each is interpolated along itself once, and
    outputs mix two. The sums are exact, so the order of directions does not matter."""
    nearest_y, low_y, weight_y, inside_y = rows
    nearest_x, low_x, weight_x, inside_x = columns
    count, height, width = segments.shape
    values = 3 * width
    words, blended = np.empty(width + 2, np.uint64), np.empty(width, np.uint64)
    left, weight = np.empty(width, np.int32), np.empty(width, np.uint64)
    upper, lower = np.empty(values, np.int32), np.empty(values, np.int32)
    unit = np.int32(1 << WEIGHT_BITS)
    rounding, shift = np.int32(ROUNDING), np.int32(SHIFT)
    for b in range(count):
        image = images[b].reshape(height, values)
        for x in range(width):
            left[x], weight[x] = low_x[b, x] + 1, weight_x[b, x]
        in_upper = in_lower = -1  # the stored rows in them
        for y in range(height):
            source, target = segments[b, nearest_y[b, y]], labels[b, y]
            for x in range(width):
                target[x] = source[np.uint32(nearest_x[b, x])]
            out = pixels[b, y].reshape(values)
            if inside_y[b, y] == 0:
                for i in range(values):
                    out[i] = fill[i % 3]
                continue
            above, below = max(low_y[b, y], 0), min(low_y[b, y] + 1, height - 1)
            if above == in_lower:
                upper, lower, in_upper, in_lower = lower, upper, in_lower, in_upper
            if above != in_upper:
                _blend_row(image[above], left, weight, words, blended, upper)
                in_upper = above
            if below != in_lower:
                _blend_row(image[below], left, weight, words, blended, lower)
                in_lower = below
            down = np.int32(weight_y[b, y])
            up = np.int32(unit - down)
            for i in range(values):
                value = np.int32(upper[i] * up) + np.int32(lower[i] * down)
                out[i] = np.int32(value + rounding) >> shift
            if not whole_rows:
                for x in range(width):
                    if inside_x[b, x] == 0:
                        for i in range(3):
                            out[3 * x + i] = fill[i]


@njit(nogil=True, cache=True, error_model="numpy")
def _blend_row(source, left, weight, words, blended, out):  # type: ignore[no-untyped-def]
    """Interpolate a stored row of RGB triples along itself, in units of 2**-WEIGHT_BITS: int32 [3
    W]. Three channels lie in a 64-bit word, so that one multiplication interpolates all: each has
    WORD_BITS = 21 bits and needs 19. left, weight: int32 and uint64 [W], the left neighbour,
    counted with a pixel put before the row, and its neighbour's weight. words, blended: uint64 to
    work in."""
    width = len(left)
    green, blue = np.uint64(WORD_BITS), np.uint64(2 * WORD_BITS)
    channel = np.uint64((1 << WORD_BITS) - 1)
    for x in range(width):
        first = np.uint32(3 * x)
        words[x + 1] = (
            np.uint64(source[first])
            | (np.uint64(source[first + np.uint32(1)]) << green)
            | (np.uint64(source[first + np.uint32(2)]) << blue)
        )
    words[0], words[width + 1] = words[1], words[width]
    for x in range(width):
        near = words[np.uint32(left[x])]
        far = words[np.uint32(left[x]) + np.uint32(1)]
        blended[x] = (near << np.uint64(WEIGHT_BITS)) + (far - near) * weight[x]
    for x in range(width):
        word, first = blended[x], np.uint32(3 * x)
        out[first] = np.int32(word & channel)
        out[first + np.uint32(1)] = np.int32((word >> green) & channel)
        out[first + np.uint32(2)] = np.int32(word >> blue)
