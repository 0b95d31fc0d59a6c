from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import UserError
from pipeline.loading.order import (
    epoch_order,
    rank_range,
    shards_at_once,
    shuffle_window,
    step_range,
    steps_per_epoch,
)

COUNTS = st.lists(st.integers(0, 40), min_size=1, max_size=12)
SEEDS = st.integers(0, 2**40)


@given(samples=st.integers(0, 3000), batch_size=st.integers(1, 400), ranks=st.integers(1, 9))
@settings(max_examples=300)
def test_every_place_falls_to_one_rank_in_one_step_and_all_ranks_make_every_step(
    samples: int, batch_size: int, ranks: int
) -> None:
    steps = -(-samples // batch_size)
    if steps == 0 or samples // steps < ranks:
        with pytest.raises(UserError, match=f"{samples} images .* {ranks} workers .*fewer workers"):
            steps_per_epoch(samples, batch_size, ranks)
        return
    assert steps_per_epoch(samples, batch_size, ranks) == steps
    edges = [0]
    for step in range(steps):
        first, stop = step_range(samples, steps, step)
        assert samples // steps <= stop - first <= batch_size
        for rank in range(ranks):
            low, high = rank_range(first, stop, rank, ranks)
            assert low == edges[-1]  # shares touch: no place is left out or comes twice
            assert 0 <= high - low - (stop - first) // ranks <= 1
            assert high > low
            edges.append(high)
        assert edges[-1] == stop
    assert edges[-1] == samples


@given(images=COUNTS, seed=SEEDS, epoch=st.integers(0, 9), window=st.none() | st.integers(1, 13))
@settings(max_examples=200)
def test_an_epoch_has_every_sample_once_and_each_window_those_of_its_shards(
    images: list[int], seed: int, epoch: int, window: int | None
) -> None:
    order = epoch_order(images, seed, epoch, window)
    assert sorted(order.indices.tolist()) == list(range(sum(images)))
    assert sorted(np.concatenate(order.windows).tolist()) == list(range(len(images)))
    assert len(order.windows) == len(order.bounds)
    assert {len(shards) for shards in order.windows[:-1]} <= {window}
    shard_of_index = np.repeat(np.arange(len(images)), images)
    for shards, (low, high) in zip(order.windows, pairwise([0, *order.bounds]), strict=True):
        held = shard_of_index[order.indices[low:high]]
        assert len(held) == sum(images[n] for n in shards)
        assert set(held.tolist()) <= set(shards.tolist())


@pytest.mark.parametrize("window", [None, 3])
def test_an_order_changes_with_epoch_and_seed_alone(window: int | None) -> None:
    images = [2] * 1000
    order = epoch_order(images, 5, 2, window)
    assert np.array_equal(order.indices, epoch_order(images, 5, 2, window).indices)
    for seed, epoch in ((5, 3), (6, 2)):
        other = epoch_order(images, seed, epoch, window)
        assert (order.indices == other.indices).mean() < 0.01
        # a uniform shuffle moves a sample by a third of the length on average
        moved = np.abs(np.argsort(order.indices) - np.argsort(other.indices))
        assert moved.mean() == pytest.approx(2000 / 3, rel=0.1)


def distinct_classes(labels: np.ndarray, batch_size: int) -> float:
    batches = labels[: len(labels) // batch_size * batch_size].reshape(-1, batch_size)
    return float(np.mean([len(set(batch.tolist())) for batch in batches]))


def test_batches_mix_the_classes_of_a_sorted_set_as_random_draws_do() -> None:
    """Shards of one class each, the worst case: all together give the mix of random draws, and a
    window that of its own classes."""
    images, batch_size = [100] * 40, 32
    labels = np.repeat(np.arange(40), 100)

    def drawn(classes: int) -> float:
        return classes * (1 - (1 - 1 / classes) ** batch_size)

    def found(window: int | None) -> float:
        orders = [epoch_order(images, 0, epoch, window).indices for epoch in range(4)]
        return float(np.mean([distinct_classes(labels[indices], batch_size) for indices in orders]))

    assert distinct_classes(labels, batch_size) < 2
    assert found(None) == pytest.approx(drawn(40), rel=0.02)
    assert found(10) == pytest.approx(drawn(10), rel=0.03)


@given(
    images=st.lists(st.integers(0, 30), min_size=2, max_size=8).filter(any),
    window=st.integers(1, 3),
    batch_size=st.integers(1, 60),
)
@settings(max_examples=40)
def test_no_batch_of_any_epoch_needs_more_shards_than_stated(
    images: list[int], window: int, batch_size: int
) -> None:
    steps = steps_per_epoch(sum(images), batch_size, 1)
    for epoch in range(8):
        order = epoch_order(images, 0, epoch, window)
        for step in range(steps):
            first, stop = step_range(sum(images), steps, step)
            low, high = np.searchsorted(order.bounds, [first, stop - 1], side="right")
            needed = sum(len(shards) for shards in order.windows[low : high + 1])
            assert needed <= shards_at_once(images, window, batch_size)


@pytest.mark.parametrize(
    ("images", "window", "batch_size", "expected"),
    [
        ([20, 20, 20, 4], 1, 16, 3),  # the end of one, the small one, the beginning of another
        ([20, 20, 20, 4], 1, 5, 2),
        ([20, 20, 20, 4], 2, 16, 4),
        ([100] * 10, 1, 101, 2),
        ([100] * 10, 1, 102, 3),
        ([100] * 10, 1, 302, 5),
        ([100] * 10, 2, 202, 6),
        ([100] * 10, 1, 5000, 10),
    ],
)
def test_shards_that_a_batch_needs_at_once_by_hand(
    images: list[int], window: int, batch_size: int, expected: int
) -> None:
    assert shards_at_once(images, window, batch_size) == expected


@pytest.mark.parametrize(
    ("limit", "window"), [(100, None), (61, None), (60, 2), (50, 2), (49, 1), (30, 1), (1, 1)]
)
def test_two_windows_of_the_largest_shards_fit_the_limit(limit: int, window: int | None) -> None:
    assert shuffle_window([1, 10, 10, 10, 15, 15], limit) == window
