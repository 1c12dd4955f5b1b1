"""Wilson intervals against published values and by their definition."""

import math

import pytest

from hpsafety.safety.intervals import Z95, wilson


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
