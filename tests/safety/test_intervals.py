"""Wilson intervals against published values and by their definition; bootstrap intervals against the normal ones."""

import math

import numpy as np
import pytest

from hpsafety.safety.intervals import Z95, Estimate, bootstrap, wilson


def test_known_values():
    """Newcombe (1998), table I: the score method for 81/263, 15/148, 0/20 and 1/29."""
    for count, total, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        rate = wilson(count, total)
        assert rate.low == pytest.approx(low, abs=5e-5) and rate.high == pytest.approx(high, abs=5e-5)


def test_bounds_solve_the_score_equation():
    rate = wilson(7, 31)
    for bound in (rate.low, rate.high):
        assert abs(7 / 31 - bound) == pytest.approx(Z95 * math.sqrt(bound * (1 - bound) / 31), rel=1e-9)


def test_edges():
    assert math.isnan(wilson(0, 0).value) and str(wilson(0, 0)) == "not measured"
    for total in range(1, 60):  # to the bit: figures draw bounds as distances from the value, none below 0
        assert wilson(total, total).high == 1.0 and wilson(0, total).low == 0.0
    with pytest.raises(ValueError, match="count"):
        wilson(3, 2)


def mean(samples):
    return samples.mean(axis=-1)


def test_bootstrap_of_a_mean_is_close_to_the_normal_interval():
    """Half width 1.96 s / sqrt(n); 2,000 resamples know a 2.5 % point to about 5 % of it."""
    values = np.random.default_rng(1).normal(3.0, 2.0, 400)
    found = bootstrap(values, mean, 0)
    half = Z95 * values.std() / 20
    assert found.value == pytest.approx(values.mean()) and found.n == 400
    assert found.high - found.value == pytest.approx(half, rel=0.15)
    assert found.value - found.low == pytest.approx(half, rel=0.15)


def test_bootstrap_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    intervals = [bootstrap(rng.normal(0.0, 1.0, 40), mean, seed, resamples=400) for seed in range(300)]
    covered = sum(i.low <= 0 <= i.high for i in intervals)
    assert 264 <= covered <= 295, (
        covered
    )  # 95 % of 300 is 285; a percentile interval of 40 covers about 93.5 %


def test_bootstrap_is_seeded_and_does_not_depend_on_its_chunks():
    values = np.random.default_rng(1).normal(size=50)
    assert bootstrap(values, mean, 3) == bootstrap(values, mean, 3) != bootstrap(values, mean, 4)
    large = np.random.default_rng(2).normal(size=3000)  # 333 resamples of 3,000 at a time
    assert bootstrap(large, mean, 0).high - bootstrap(large, mean, 0).low == pytest.approx(
        2 * Z95 * large.std() / np.sqrt(3000), rel=0.1
    )


def test_bootstrap_of_few_values():
    assert bootstrap([0.5, 0.5, 0.5], mean, 0) == Estimate(0.5, 3, 0.5, 0.5)
    one, none = bootstrap([0.5], mean, 0), bootstrap([], mean, 0)
    assert (
        (one.value, one.n) == (0.5, 1)
        and np.isnan([one.low, one.high, none.value, none.low]).all()
        and none.n == 0
    )
