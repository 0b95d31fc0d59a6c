"""The order of an epoch: which samples each step and rank gets, as pure functions.

A place is a position in the split, shards in order; an epoch's order is a permutation of the
places, cut into steps and the steps into ranks. So a position is two integers and nothing has to
be saved to resume.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.errors import UserError

AHEAD = 2  # batches that each rank's loader makes before they are asked for


@dataclass(frozen=True, kw_only=True)
class Position:
    """The next batch: `step` of `epoch`, both from 0."""

    epoch: int = 0
    step: int = 0


def steps_per_epoch(samples: int, batch_size: int, ranks: int) -> int:
    """Global batches in an epoch: as many as needed for none to exceed `batch_size`.

    Raises UserError where some rank would get an empty batch and hang the others.
    """
    steps = -(-samples // max(1, batch_size))
    if steps == 0 or samples // steps < ranks:
        raise UserError(
            f"{samples} images in batches of {batch_size} cannot give each of {ranks} workers an "
            "image in every step; use fewer workers, or a larger batch size or set."
        )
    return steps


def step_range(samples: int, steps: int, step: int) -> tuple[int, int]:
    """First and past-last index into the epoch's order of global batch `step`.

    Batches differ by one image at most and together hold every place exactly once, so there is
    neither a remainder nor padding.
    """
    return samples * step // steps, samples * (step + 1) // steps


def rank_range(first: int, stop: int, rank: int, ranks: int) -> tuple[int, int]:
    """The part of first..stop-1 that falls to `rank`, even to one image."""
    size = stop - first
    return first + size * rank // ranks, first + size * (rank + 1) // ranks


@dataclass(frozen=True, kw_only=True)
class Order:
    """An epoch's order.

    places: int64 [samples], a permutation of the split's places.
    windows: shard numbers, int64 [w] each, in the order in which they are needed.
    bounds: where each window's part of `places` ends, int64 [windows].
    """

    places: np.ndarray
    windows: tuple[np.ndarray, ...]
    bounds: np.ndarray


def epoch_order(images: Sequence[int], seed: int, epoch: int, window: int | None) -> Order:
    """The order of all samples in one epoch, from (seed, epoch) and the window alone.

    images: number of images in each shard. window: how many shards are shuffled together; None
    makes a uniformly random order of the whole split, for which every shard must be at hand all
    the time. With a window the shards are put in a random order, cut into windows of that many,
    and the samples of each window shuffled: only one window's shards (two, where they meet) are
    needed at once, and a batch draws from that window's shards alone.
    """
    starts = np.concatenate([[0], np.cumsum(np.asarray(images, np.int64))])
    random = np.random.default_rng([seed, epoch])
    if window is None or window >= len(images):
        order = random.permutation(starts[-1])
        return Order(
            places=order, windows=(np.arange(len(images)),), bounds=starts[-1:].astype(np.int64)
        )
    shards = random.permutation(len(images))
    windows = tuple(shards[first : first + window] for first in range(0, len(shards), window))
    parts = [
        random.permutation(np.concatenate([np.arange(starts[n], starts[n + 1]) for n in numbers]))
        for numbers in windows
    ]
    return Order(
        places=np.concatenate(parts),
        windows=windows,
        bounds=np.cumsum([len(part) for part in parts]),
    )


def shards_at_once(images: Sequence[int], window: int, batch_size: int) -> int:
    """How many shards a batch needs at once, at most, in any epoch's order.

    images: number of images in each shard. It may lie across two windows, and across more where
    whole ones fit between those.
    """
    within = np.searchsorted(np.cumsum(np.sort(images)), batch_size - 2, side="right")
    return min(len(images), 2 * window + int(within) // window * window)


def shuffle_window(sizes: Sequence[int], limit: int) -> int | None:
    """The largest window of shards of these sizes that a cache of `limit` allows, at least 1.

    None, that is the whole split, where all fit. Otherwise any two windows fit, since batches lie
    across two of them (or more, see `shards_at_once`) and one is brought while the other is used.
    """
    if sum(sizes) <= limit:
        return None
    largest = np.cumsum(sorted(sizes, reverse=True))
    return max(1, int(np.searchsorted(largest, limit, side="right")) // 2)
