"""PPO's estimators without a critic, and the KL controller. The bug this file must catch: a KL term that the group's
spread divides away, so that the coefficient no longer matters."""

import math

import pytest
import torch

from hpsafety.rollout.advantages import adapted, group_relative, leave_one_out, penalties_to_go, whiten
from tests.rollout.test_experience import make

LENGTHS = ((3, 1, 2), (2, 4))


def by_hand(e, kl_coef: float, estimator: str) -> list[float]:
    """The advantages in Python's floats, sample by sample and token by token."""
    scores = e.combined.double().tolist()
    mean = math.fsum(scores) / len(scores)
    std = math.sqrt(math.fsum((x - mean) ** 2 for x in scores) / len(scores))
    scores = [(x - mean) / (std + 1e-8) for x in scores]
    kl = [-kl_coef * float(a - b) for a, b in zip(e.old_logprobs, e.ref_logprobs, strict=True)]
    out, sample, token = [], 0, 0
    for group in e.groups:
        lengths = [len(response) for response in group.responses]
        own, k = scores[sample : sample + len(lengths)], len(lengths)
        starts = [token + sum(lengths[:i]) for i in range(k)]
        m = math.fsum(own) / k
        spread = math.sqrt(math.fsum((x - m) ** 2 for x in own) / k)

        def to_go(i, t, lengths=lengths, starts=starts):
            return math.fsum(kl[starts[i] + t : starts[i] + lengths[i]])

        for i in range(k):
            others = [own[j] for j in range(k) if j != i]
            base = (
                (own[i] - m) / (spread + 1e-8)
                if estimator == "group"
                else own[i] - math.fsum(others) / (k - 1)
            )
            for t in range(lengths[i]):
                rest = math.fsum(to_go(j, t) for j in range(k) if j != i) / (k - 1)
                out.append(base + to_go(i, t) - rest)
        sample, token = sample + k, token + sum(lengths)
    return out


@pytest.mark.parametrize("estimator", ["group", "rloo"])
@pytest.mark.parametrize("kl_coef", [0.0, 0.02, 1.5])
def test_estimators_are_what_the_hand_computes(estimator, kl_coef):
    """fp64 by hand, from whitened scores (PPO-3) and the KL of each token; the op's rows are fp32, so 2^-22 of the
    largest term, which is below 10."""
    e = make(LENGTHS, seed=5)
    rewards, advantages, returns = e.advantages(kl_coef, estimator)
    assert advantages.dtype == torch.float32 and returns is None
    assert torch.equal(rewards, e.advantages(kl_coef)[0])
    assert advantages.tolist() == pytest.approx(by_hand(e, kl_coef, estimator), abs=1e-5)


def test_small_numbers_by_hand():
    """Two groups, 1 3 8 and 5 5: population std of the first is sqrt(26/3), and 5 5 gives exact zeros."""
    scores, sizes = torch.tensor([1.0, 3.0, 8.0, 5.0, 5.0]), (3, 2)
    s = math.sqrt(26 / 3)
    assert group_relative(scores, sizes).tolist() == pytest.approx([-3 / s, -1 / s, 4 / s, 0, 0], abs=1e-6)
    assert leave_one_out(scores, sizes).tolist() == [1 - 5.5, 3 - 4.5, 8 - 2, 0, 0]
    # Samples of 2 tokens and 1: what is left to pay is 3 2 and 5, so 3-5 and 2-0; 5-3 for the other.
    assert penalties_to_go(torch.tensor([1.0, 2.0, 5.0]), [2, 1], [2]).tolist() == [-2.0, 2.0, 2.0]


@pytest.mark.parametrize("k", [2, 3, 7])
@pytest.mark.parametrize("value", [0.1, 1 / 3, -1e6, 1e-30])
def test_equal_rewards_give_exact_zeros(k, value):
    """A group whose samples are judged alike teaches nothing but its KL, which is 0 while the policy is the start."""
    scores = torch.tensor([value] * k + [0.5, 0.7])
    for relative in (group_relative, leave_one_out):
        assert torch.equal(relative(scores, [k, 2])[:k], torch.zeros(k))
    e = make(((3,) * k, (1, 2)), combined=scores)
    e = e.measured(e.ref_logprobs, e.entropy, e.ref_logprobs)
    for estimator in ("group", "rloo"):
        assert torch.equal(e.advantages(0.5, estimator)[1][: 3 * k], torch.zeros(3 * k))


@pytest.mark.parametrize("estimator", ["gae", "group", "rloo"])
def test_the_coefficient_scales_the_kl_alone(estimator):
    """Advantages are linear in the coefficient: twice of it moves them by twice as much from those without KL."""
    e = make(LENGTHS, seed=2)
    free, once, twice = (e.advantages(c, estimator)[1].double() for c in (0.0, 0.5, 1.0))
    assert (once - free).abs().max() > 0.1
    assert torch.allclose(twice - free, 2 * (once - free), atol=1e-5)
    for own in once.sub(free).split([6, 6]):
        assert estimator == "gae" or abs(float(own.mean())) < 1.0  # a group's KL is centred on the group


def test_whitening_is_of_the_batch_before_the_group():
    """Spec PPO-3: rloo keeps the batch's scale, so a group of close scores moves little beside one of distant ones."""
    e = make(((1, 1), (1, 1)), combined=torch.tensor([0.0, 0.1, -4.0, 4.0]))
    e = e.measured(e.ref_logprobs, e.entropy, e.ref_logprobs)
    w = whiten(e.combined).tolist()
    wanted = [w[0] - w[1], w[1] - w[0], w[2] - w[3], w[3] - w[2]]
    assert e.advantages(0.1, "rloo")[1].tolist() == pytest.approx(wanted, abs=1e-6)
    assert e.advantages(0.1, "group")[1].tolist() == pytest.approx([-1.0, 1.0, -1.0, 1.0], abs=1e-5)


def test_controller_by_hand():
    """Ziegler et al. 2019: error kl/target - 1 cut to +-0.2, a tenth of it an iteration."""
    beta, seen = 0.5, []
    for kl in (0.0, 0.1, 0.09, 0.3, -1.0):
        beta = adapted(beta, kl, 0.1)
        seen.append(beta)
    wanted = [
        0.5 * 0.98,
        0.5 * 0.98,
        0.5 * 0.98 * 0.99,
        0.5 * 0.98 * 0.99 * 1.02,
        0.5 * 0.98 * 0.99 * 1.02 * 0.98,
    ]
    assert seen == pytest.approx(wanted, rel=1e-14)
