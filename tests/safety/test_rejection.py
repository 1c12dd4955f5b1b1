"""Rejection sampling's arithmetic. The bug this file must catch: a tie, or an old sample, that goes to the newest."""

import numpy as np
import pytest

from hpsafety.safety.rejection import Winner, best_of_prefixes, choose_temperature, select


def test_the_pool_s_best_wins_and_ties_go_to_the_earliest():
    """RS-2: argmax over the pool; ties to the earliest iteration, then the lowest k."""
    assert select({1: [0.1, 0.9], 2: [0.3, 0.95]}) == Winner(2, 1, 0.95)
    assert select({2: [0.9, 0.9], 1: [0.2, 0.9, 0.9]}) == Winner(1, 1, 0.9)
    assert select({7: [0.5]}) == Winner(7, 0, 0.5)


def test_select_is_the_argmax_of_the_flat_pool():
    rng = np.random.default_rng(0)
    for _ in range(200):
        pool = {v: rng.integers(0, 6, rng.integers(1, 5)).tolist() for v in range(1, rng.integers(2, 6))}
        flat = [(-s, v, k) for v, scores in pool.items() for k, s in enumerate(scores)]
        score, iteration, index = min(flat)
        assert select(pool) == Winner(iteration, index, -score)


def test_no_pool_and_no_number():
    with pytest.raises(ValueError, match="pool is empty"):
        select({1: []})
    with pytest.raises(ValueError, match="sample 1 of iteration 2 is not a number"):
        select({1: [0.1], 2: [0.2, float("nan")]})


def test_curves_over_nested_prefixes():
    """RS-5: the mean of the max never falls with N; max and median agree with plain loops."""
    scores = np.random.default_rng(1).random((40, 9))
    largest, median = best_of_prefixes(scores)
    assert all(b >= a for a, b in zip(largest, largest[1:], strict=False))
    for n in range(1, 10):
        assert largest[n - 1] == pytest.approx(np.mean([max(row[:n]) for row in scores]))
        assert median[n - 1] == pytest.approx(np.mean([np.median(row[:n]) for row in scores]))


def test_temperature_is_the_one_with_the_best_mean_of_maxima():
    """RS-4: argmax over the grid of the mean over prompts of the best of K; not of the mean score."""
    steady, wild = [[0.6, 0.6], [0.6, 0.6]], [[0.0, 0.8], [0.7, 0.1]]
    best, means = choose_temperature({0.7: steady, 1.3: wild})
    assert best == 1.3 and means == {0.7: pytest.approx(0.6), 1.3: pytest.approx(0.75)}
    assert choose_temperature({1.2: steady, 0.4: steady})[0] == 0.4
