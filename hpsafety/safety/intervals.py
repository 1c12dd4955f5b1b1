"""Intervals for rates, means, and any statistic of a sample."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Z95 = 1.959963984540054  # normal quantile of 0.975


@dataclass(frozen=True)
class Rate:
    """count of total with a 95 % Wilson score interval, all shares in [0, 1]; nan where total is 0."""

    count: int
    total: int
    value: float
    low: float
    high: float

    def __str__(self) -> str:
        if not self.total:
            return "not measured"
        return f"{100 * self.value:.0f} % ({self.count}/{self.total}, {100 * self.low:.0f}-{100 * self.high:.0f})"


def wilson(count: int, total: int) -> Rate:
    """Wilson (1927): centre (p + z^2/2n) / (1 + z^2/n), half width z sqrt(p(1-p)/n + z^2/4n^2) / (1 + z^2/n)."""
    if not 0 <= count <= total:
        raise ValueError(f"wilson: need 0 <= count <= total, got {count} of {total}")
    if total == 0:
        return Rate(0, 0, math.nan, math.nan, math.nan)
    p, z2 = count / total, Z95 * Z95 / total
    centre = (p + z2 / 2) / (1 + z2)
    half = Z95 * math.sqrt(p * (1 - p) / total + z2 / (4 * total)) / (1 + z2)
    # Exact at both ends: a rounding error would put p outside of its own interval.
    low = centre - half if count else 0.0
    high = centre + half if count < total else 1.0
    return Rate(count, total, p, low, high)


@dataclass(frozen=True)
class Mean:
    """The mean of n numbers with a 95 % interval of the normal distribution; None where n is too small for it."""

    n: int
    mean: float | None
    low: float | None
    high: float | None


def mean_interval(values: Sequence[float]) -> Mean:
    """mean -+ Z95 s / sqrt(n), s the sample standard deviation (n - 1); too narrow for n below 30 or so."""
    n = len(values)
    if n == 0:
        return Mean(0, None, None, None)
    mean = math.fsum(values) / n
    if n == 1:
        return Mean(1, mean, None, None)
    half = Z95 * math.sqrt(math.fsum((x - mean) ** 2 for x in values) / (n - 1) / n)
    return Mean(n, mean, mean - half, mean + half)


@dataclass(frozen=True)
class Estimate:
    """A statistic of n values with a 95 % bootstrap interval; nan where there are too few values for one."""

    value: float
    n: int
    low: float
    high: float


def bootstrap(values, statistic, seed: int, resamples: int = 2000) -> Estimate:
    """Efron's percentile interval: the 2.5 and 97.5 % points of the statistic over samples drawn with replacement.

    values     (n,) numbers; a paired difference goes in as its n differences
    statistic  function of (m, n) samples along the last axis -> (m,)
    seed       of the draws: the same seed and n draw the same samples
    """
    values = np.asarray(values, dtype=np.float64)
    n = len(values)
    if n == 0:
        return Estimate(math.nan, 0, math.nan, math.nan)
    value = float(statistic(values[None])[0])
    if n == 1:
        return Estimate(value, 1, math.nan, math.nan)
    rng, each = np.random.default_rng(seed), max(1, 1_000_000 // n)
    drawn = [
        statistic(values[rng.integers(0, n, (min(each, resamples - start), n))])
        for start in range(0, resamples, each)
    ]
    low, high = np.quantile(np.concatenate(drawn), [0.025, 0.975])
    return Estimate(value, n, float(low), float(high))
