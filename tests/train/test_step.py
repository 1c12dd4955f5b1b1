"""One optimiser step: the micro-batch split is an execution detail."""

import pytest
import torch

from hpsafety.train import step as step_module
from hpsafety.train.distributed import World
from hpsafety.train.optim import AdamW
from hpsafety.train.step import train_step
from tests.tiny import random_groups, tiny_model

ALONE = World(0, 1, torch.device("cpu"))


def count(groups):
    return sum(len(r) for g in groups for r in g.responses)


def one_step(tokens_per_batch, groups, monkeypatch):
    """(result, gradients) of one step; the update itself is left out."""
    model = tiny_model()
    optimizer = AdamW(model)
    monkeypatch.setattr(optimizer, "step", lambda lr, world: torch.zeros(()))
    result = train_step(
        model, groups, lambda m, b, n: m.nll(b, n), count(groups), optimizer, 0.0, tokens_per_batch, ALONE
    )
    return result, {n: p.grad.clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize("k", [1, 3])
def test_split_changes_rounding_only(k, monkeypatch):
    """Global denominators: micro-batches of one group, of a few, of all give one loss and one gradient."""
    groups = random_groups(11, k)
    whole, expected = one_step(10**6, groups, monkeypatch)
    for budget in (1, 60, 150):
        result, grads = one_step(budget, groups, monkeypatch)
        assert result.loss == pytest.approx(whole.loss, rel=1e-6)
        assert (result.tokens, result.tokens_equiv) == (whole.tokens, whole.tokens_equiv)
        for name in expected:
            scale = float(expected[name].abs().max())
            torch.testing.assert_close(grads[name], expected[name], atol=1e-5 * scale, rtol=1e-4, msg=name)


def test_local_denominators_would_differ(monkeypatch):
    """The check above can fail: a mean per micro-batch, the usual mistake, moves the loss well beyond rounding."""
    groups = random_groups(11)
    model = tiny_model()
    optimizer = AdamW(model)
    monkeypatch.setattr(optimizer, "step", lambda lr, world: torch.zeros(()))
    wrong = train_step(
        model, groups, lambda m, b, n: m.nll(b, b.num_trained) / 5, count(groups), optimizer, 0.0, 60, ALONE
    )
    right, _ = one_step(10**6, groups, monkeypatch)
    assert abs(wrong.loss - right.loss) > 1e-3 * right.loss


def test_counts():
    """tokens: a shared prompt once; tokens_equiv: once per response."""
    groups = random_groups(3, k=4)
    model = tiny_model()
    result = train_step(
        model, groups, lambda m, b, n: m.nll(b, n), count(groups), AdamW(model), 1e-3, 100, ALONE
    )
    assert result.tokens == sum(len(g.prompt) + sum(map(len, g.responses)) for g in groups)
    assert result.tokens_equiv == sum(4 * len(g.prompt) + sum(map(len, g.responses)) for g in groups)
    assert result.groups_per_rank == [3] and not result.stop


def test_every_rank_computes_the_same_assignment():
    model, groups = tiny_model(), random_groups(13, k=2)
    worlds = [World(r, 4, torch.device("cpu")) for r in range(4)]
    answers = [step_module.assign(model, groups, w) for w in worlds]
    assert all(a == answers[0] for a in answers)
    assert sorted(map(id, (g for part in answers[0] for g in part))) == sorted(map(id, groups))
