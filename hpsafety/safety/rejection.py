"""Rejection sampling's arithmetic: the pool, its winner, the temperature search and the curves over N (spec section 4).

Scores are R_c of the combination in (0, 1), unwhitened. A candidate is (iteration, sample index, score).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Winner:
    """The best response to one prompt: which iteration and sample made it, and its score."""

    iteration: int
    sample_index: int
    score: float


def select(pool: Mapping[int, Sequence[float]]) -> Winner:
    """The pool's best sample; ties go to the earliest iteration, then to the lowest sample index (RS-2).

    pool  iteration -> scores of its samples for one prompt, all by the same reward models (RS-3)
    Raises ValueError for an empty pool and for a score that is not a number.
    """
    best: Winner | None = None
    for iteration in sorted(pool):
        for index, score in enumerate(pool[iteration]):
            if score != score:
                raise ValueError(f"the score of sample {index} of iteration {iteration} is not a number")
            if best is None or score > best.score:
                best = Winner(iteration, index, float(score))
    if best is None:
        raise ValueError("the pool is empty")
    return best


def best_of_prefixes(scores: Sequence[Sequence[float]]) -> tuple[list[float], list[float]]:
    """(max, median) over the first N samples, averaged over prompts, for N = 1..K (RS-5: the max never falls).

    scores  (prompts, K)
    """
    table = np.asarray(scores, dtype=np.float64)
    largest = np.maximum.accumulate(table, axis=1).mean(axis=0)
    medians = [float(np.median(table[:, :n], axis=1).mean()) for n in range(1, table.shape[1] + 1)]
    return largest.tolist(), medians


def choose_temperature(table: Mapping[float, Sequence[Sequence[float]]]) -> tuple[float, dict[float, float]]:
    """(the temperature with the highest mean over prompts of the best of K, that mean per temperature) (RS-4).

    table  temperature -> scores (validation prompts, K); of equals the lowest temperature is taken
    """
    means = {t: float(np.max(np.asarray(scores), axis=1).mean()) for t, scores in sorted(table.items())}
    return max(means, key=lambda t: (means[t], -t)), means
