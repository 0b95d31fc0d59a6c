"""95 % intervals of means and shares over images, by the percentile bootstrap."""

import math

import numpy as np

REPLICATES = 1000
TAIL = (1 - 0.95) / 2  # outside the intervals, on either side
_STEP = 2.0**-30  # resampled fractions are multiples of this: their sums are exact in any order
_DEVIATIONS = 40  # around a binomial's mean, outside which no probability is above 1e-300


def bootstrap_intervals(values: np.ndarray, seed: int) -> np.ndarray:
    """Return 95 % percentile bootstrap intervals, float64 [F, 2], of the column means of `values`,
    float64 [N, F] in [-1, 1]. Columns are resampled together; NaN where N is 0. The same rows,
    order and seed give the same digits."""
    n, columns = values.shape
    if n == 0:
        return np.full((columns, 2), np.nan)
    exact = np.round(values / _STEP)
    rng = np.random.default_rng(seed)
    means = np.empty((REPLICATES, columns))
    for mean in means:
        weights = np.bincount(rng.integers(0, n, n), minlength=n)
        mean[:] = weights.astype(np.float64) @ exact / n * _STEP
    return np.quantile(means, [TAIL, 1 - TAIL], axis=0).T


def share_interval(count: int, n: int) -> list[float]:
    """Return the 95 % percentile bootstrap interval of the share count / n, [low, high]. A
    resampled count is binomial, so this is what infinitely many replicates give. Probabilities come
    from their ratios, from the mean outwards, so that none overflows."""
    if count in (0, n):
        return [count / n, count / n]
    share = count / n
    reach = math.ceil(_DEVIATIONS * math.sqrt(count * (1 - share))) + _DEVIATIONS
    first, last = max(0, count - reach), min(n, count + reach)
    up, down = np.arange(count, last), np.arange(count, first, -1)
    above = np.cumprod((n - up) / (up + 1) * (share / (1 - share)))
    below = np.cumprod(down / (n - down + 1) * ((1 - share) / share))
    probability = np.cumsum(np.concatenate([below[::-1], [1.0], above]))
    bounds = np.searchsorted(probability, np.array([TAIL, 1 - TAIL]) * probability[-1]) + first
    return (bounds / n).tolist()
