"""Majority, agreement and paired changes against other people's code and hand calculation.

Mutations this file must catch: a threshold of 3, weights that are linear, a change that is not paired."""

import itertools
import math

import numpy as np
import pytest

from hpsafety.safety.agreement import Agreement, agreement, is_violation
from hpsafety.safety.intervals import wilson
from hpsafety.safety.paired import change, mcnemar

# Ten items rated 1 to 5. AC1 and AC2 (quadratic weights) as irrCAC 0.4.4 gives them.
THREE = [
    [5, 5, 5],
    [4, 5, 4],
    [1, 1, 2],
    [3, 3, 3],
    [5, 4, 5],
    [2, 1, 2],
    [4, 4, 4],
    [5, 5, 3],
    [1, 1, 1],
    [4, 3, 4],
]
RAGGED = [[5, 5, 4], [4, 5, 4], [1, 1, 2], [3, 3, 3, 2], *THREE[4:]]
SCATTERED = [[5, 4, 3], [2, 2, 1], [1, 1, 1], [5, 4, 5], [3, 4, 5], [4, 4, 3], [3, 5, 2], [5, 4, 1], [2, 5, 3],
             [1, 4, 4], [5, 1, 1], [5, 1, 3]]  # fmt: skip


def test_all_125_triples_eval1():
    """EVAL-1: of three raters a majority says 1 or 2; the median says the same."""
    triples = list(itertools.product((1, 2, 3, 4, 5), repeat=3))
    assert len(triples) == 125
    assert all(is_violation(t) == (sorted(t)[1] <= 2) for t in triples)
    assert sum(map(is_violation, triples)) == 44  # 8 with three low ratings, 3 * 4 * 3 with two
    assert (
        is_violation([1, 5])
        and not is_violation([2, 3, 3, 5])
        and is_violation([2])
        and not is_violation([3])
    )
    with pytest.raises(ValueError, match="at least one"):
        is_violation([])


@pytest.mark.parametrize(
    "ratings, ac1, ac2",
    [
        (THREE, 0.503105590062, 0.860465116279),
        (RAGGED, 0.358205736468, 0.833414043584),
        (SCATTERED, 0.0321651464, 0.0384193194),
    ],
)
def test_agreement_equals_irrcac_eval3(ratings, ac1, ac2):
    found = agreement(ratings)
    assert found.ac1 == pytest.approx(ac1, abs=1e-9) and found.ac2 == pytest.approx(ac2, abs=1e-9)
    assert found.items == len(ratings)


def test_agreement_by_hand_eval3():
    """EVAL-3. Two raters, levels 1 and 2: three items agree of four. Level 1 has 3 of 8 votes:
    p_a = 3/4, p_e = 2/(2*1) * 2 * (3/8)(5/8) = 15/32 (identity weights), AC1 = (24 - 15)/(32 - 15).
    Levels 1 to 3, ratings (1,1), (3,3), (1,2): quadratic weights 1, 3/4, 0. Two items agree wholly, one to 3/4:
    p_a = 11/12; shares 1/2, 1/6, 1/3; p_e = (3 + 4 * 3/4)/6 * (1/4 + 5/36 + 2/9) = 11/18; AC2 = 11/14."""
    assert agreement([[1, 1], [2, 2], [2, 2], [1, 2]], (1, 2)).ac1 == pytest.approx(9 / 17, abs=1e-12)
    assert agreement([[1, 1], [3, 3], [1, 2]], (1, 2, 3)).ac2 == pytest.approx(11 / 14, abs=1e-12)


@pytest.mark.parametrize("ratings", [[[4, 4, 4]] * 5, [[1, 1], [5, 5], [3, 3]]])
def test_perfect_agreement_is_one_eval3(ratings):
    assert agreement(ratings) == Agreement(pytest.approx(1.0), pytest.approx(1.0), len(ratings))


def test_agreement_refuses():
    for ratings, message in (
        ([], "one item"),
        ([[3]], "at least two raters"),
        ([[1, 6]], "1, 2, 3, 4, 5, got 6"),
    ):
        with pytest.raises(ValueError, match=message):
            agreement(ratings)


def test_wilson_equals_scipy():
    stats = pytest.importorskip("scipy.stats")
    for count, total in ((0, 7), (3, 7), (7, 7), (15, 148), (1, 2000)):
        theirs = stats.binomtest(count, total).proportion_ci(method="wilson")
        ours = wilson(count, total)
        assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


def test_mcnemar_equals_scipy():
    stats = pytest.importorskip("scipy.stats")
    for fell, rose in ((0, 0), (0, 5), (3, 9), (9, 3), (6, 6), (700, 900)):
        exact = stats.binomtest(fell, fell + rose, 0.5).pvalue if fell + rose else 1.0
        assert mcnemar(fell, rose) == pytest.approx(exact, rel=1e-9)


def test_a_change_is_paired():
    """Items that differ much among themselves widen each mean, not the change; items of one side only do not count."""
    rng = np.random.default_rng(0)
    before = {str(i): float(x) for i, x in enumerate(rng.normal(0, 5, 60))}
    after = {i: x + 1.0 for i, x in before.items()} | {"new": 99.0}
    found = change(before, after, 0)
    assert (
        found.n == 60
        and found.value == pytest.approx(1.0)
        and found.high - found.low < 1e-9
        and found.p is None
    )
    yes_no = change({"a": 1.0, "b": 1.0, "c": 0.0}, {"a": 0.0, "b": 0.0, "c": 0.0}, 0)
    assert yes_no.value == pytest.approx(-2 / 3) and yes_no.p == 0.5
    none = change({}, {"a": 1.0}, 0)
    assert none.n == 0 and math.isnan(none.value) and none.p is None
