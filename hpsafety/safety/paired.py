"""Two checkpoints on the same items: the difference of their means, its interval, and McNemar's test for yes and no."""

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass

import numpy as np

from hpsafety.safety.intervals import bootstrap


@dataclass(frozen=True)
class Change:
    """Mean of (after - before) over n shared items with a 95 % bootstrap interval; p of McNemar's exact test where all
    values are 0 or 1, else None. nan where there is no shared item."""

    value: float
    n: int
    low: float
    high: float
    p: float | None


def change(before: Mapping[Hashable, float], after: Mapping[Hashable, float], seed: int) -> Change:
    """The paired change over the items that both have; each is a mapping from item to value."""
    shared = [item for item in after if item in before]
    pairs = [(before[item], after[item]) for item in shared]
    found = bootstrap([b - a for a, b in pairs], lambda x: x.mean(axis=-1), seed)
    p = None
    if pairs and all(value in (0, 1) for pair in pairs for value in pair):
        p = mcnemar(sum(a > b for a, b in pairs), sum(a < b for a, b in pairs))
    return Change(found.value, found.n, found.low, found.high, p)


def mcnemar(fell: int, rose: int) -> float:
    """Two-sided exact p-value: that of `fell` or fewer heads, or as rare, in fell + rose tosses of a fair coin."""
    n, k = fell + rose, min(fell, rose)
    # In logarithms: 2^n is no float beyond n = 1023.
    logs = [
        math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) - n * math.log(2)
        for i in range(k + 1)
    ]
    return min(1.0, 2.0 * float(np.exp(logs).sum()))
