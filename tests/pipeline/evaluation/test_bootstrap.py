"""Intervals against scipy, plain loops and formulas."""

import numpy as np
import pytest
from scipy.stats import binom

from pipeline.evaluation.bootstrap import TAIL, bootstrap_intervals, share_interval


@pytest.mark.parametrize("n", [1, 2, 7, 50, 999, 10_000, 50_000, 1_281_167])
def test_interval_of_a_share_is_scipys_to_the_digit(n: int) -> None:
    rng = np.random.default_rng(n)
    counts = {0, 1, n - 1, n, n // 2, *rng.integers(0, n + 1, 200).tolist()}
    for count in counts:
        expected = binom.ppf([TAIL, 1 - TAIL], n, count / n) / n
        assert share_interval(count, n) == expected.tolist(), count


def test_bootstrap_is_paired_repeatable_and_seeded() -> None:
    rng = np.random.default_rng(3)
    column = rng.random((400, 1))
    twice = bootstrap_intervals(np.hstack([column, column]), seed=5)
    np.testing.assert_array_equal(twice[0], twice[1])
    np.testing.assert_array_equal(bootstrap_intervals(column, seed=5)[0], twice[0])
    assert (bootstrap_intervals(column, seed=6)[0] != twice[0]).any()
    assert twice[0, 0] < column.mean() < twice[0, 1]


def test_bootstrap_equals_a_plain_loop_over_the_same_draws() -> None:
    values = np.random.default_rng(4).random((50, 2))
    drawn = np.random.default_rng(9).integers(0, 50, (1000, 50))
    means = np.array([values[rows].mean(axis=0) for rows in drawn])
    expected = np.quantile(means, [0.025, 0.975], axis=0).T
    np.testing.assert_allclose(bootstrap_intervals(values, seed=9), expected, atol=1e-8)
