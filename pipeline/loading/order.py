"""The order of an epoch, as pure functions: a permutation of the samples' indices, cut into steps
and the steps into ranks. So a position is two integers, and nothing is saved to resume."""

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


FIRST = Position()


@dataclass(frozen=True, kw_only=True)
class Order:
    """All that the order of training samples depends on. batch_size: images per step over all
    ranks, at most. window: how many shards are shuffled together, None for all (see
    `epoch_order`)."""

    batch_size: int
    seed: int = 0
    window: int | None = None


def steps_per_epoch(samples: int, batch_size: int, ranks: int) -> int:
    """Return the number of global batches in an epoch, none of which exceeds `batch_size`. Raises
    UserError where some rank would get an empty batch and hang the others."""
    steps = -(-samples // max(1, batch_size))
    if steps == 0 or samples // steps < ranks:
        raise UserError(
            f"{samples} images in batches of {batch_size} cannot give each of {ranks} workers an "
            "image in every step; use fewer workers, or a larger batch size or set."
        )
    return steps


def step_range(samples: int, steps: int, step: int) -> tuple[int, int]:
    """Return the range [first, stop) of global batch `step` in the epoch's order. Batches differ by
    one image at most and hold every sample once: no remainder, no padding."""
    return samples * step // steps, samples * (step + 1) // steps


def rank_range(first: int, stop: int, rank: int, ranks: int) -> tuple[int, int]:
    """Return the part of first..stop-1 that falls to `rank`, even to one image."""
    size = stop - first
    return first + size * rank // ranks, first + size * (rank + 1) // ranks


@dataclass(frozen=True, kw_only=True)
class EpochOrder:
    """The order of all samples in one epoch. indices: int64 [samples], a permutation. windows:
    shard numbers, int64 [w] each, as needed. bounds: where each window's part of `indices` ends."""

    indices: np.ndarray
    windows: tuple[np.ndarray, ...]
    bounds: np.ndarray


def epoch_order(images: Sequence[int], seed: int, epoch: int, window: int | None) -> EpochOrder:
    """Return the order of all samples in one epoch, from (seed, epoch) and the window alone.
    images: in each shard. window: None makes a uniformly random order, which needs every shard at
    hand. Else shards are put in a random order, cut into windows of that many, and the samples of
    each window shuffled: only one window's shards (two, where they meet) are needed at once."""
    starts = np.concatenate([[0], np.cumsum(np.asarray(images, np.int64))])
    random = np.random.default_rng([seed, epoch])
    if window is None or window >= len(images):
        order = random.permutation(starts[-1])
        return EpochOrder(
            indices=order, windows=(np.arange(len(images)),), bounds=starts[-1:].astype(np.int64)
        )
    shards = random.permutation(len(images))
    windows = tuple(shards[first : first + window] for first in range(0, len(shards), window))
    parts = [
        random.permutation(np.concatenate([np.arange(starts[n], starts[n + 1]) for n in numbers]))
        for numbers in windows
    ]
    return EpochOrder(
        indices=np.concatenate(parts),
        windows=windows,
        bounds=np.cumsum([len(part) for part in parts]),
    )


def shards_at_once(images: Sequence[int], window: int, batch_size: int) -> int:
    """Return how many shards a batch needs at most, in any epoch's order. images: in each shard. It
    may lie across two windows, and across more where whole ones fit between."""
    within = np.searchsorted(np.cumsum(np.sort(images)), batch_size - 2, side="right")
    return min(len(images), 2 * window + int(within) // window * window)


def shuffle_window(sizes: Sequence[int], limit: int) -> int | None:
    """Return the largest window, at least 1, of which any two fit into a cache of `limit` bytes:
    batches lie across two, and one is fetched while the other is used. None where all shards
    fit."""
    if sum(sizes) <= limit:
        return None
    largest = np.cumsum(sorted(sizes, reverse=True))
    return max(1, int(np.searchsorted(largest, limit, side="right")) // 2)
