"""Tests of ppo_loss that every GPU backend has alike; `impl`, a fixture of who imports them, names the backend."""

import pytest
import torch

from hpsafety import ops
from tests.device import DEVICE, place
from tests.ops.oracle import run_with_grads
from tests.ops.test_ppo_loss import GRADS, make_inputs

__all__ = [
    "test_policy_kink",
    "test_value_kink",
    "test_first_step_has_ratio_one",
    "test_small_kl_keeps_its_digits",
    "test_nothing_to_train_on",
    "test_overflowing_ratio",
]


def run(args, impl, grads=GRADS, **kwargs):
    grads = tuple(k for k in grads if k in args)
    return run_with_grads(ops.ppo_loss, place(args), grads=grads, impl=impl, **kwargs)


@pytest.mark.parametrize("advantage, side", [(1.0, 1), (-1.0, -1), (0.0, 1), (2.0, 0)])
def test_policy_kink(impl, advantage, side):
    """rho exactly on the border (or inside, or A = 0): both branches are equal, the unclipped one has the gradient."""
    logprob = torch.tensor([0.25 * side], device=DEVICE, requires_grad=True)
    zeros, mask = torch.zeros(1, device=DEVICE), torch.ones(1, dtype=torch.bool, device=DEVICE)
    args = (logprob, zeros, zeros + advantage, zeros, zeros, zeros, mask)
    ratio = float(ops.ppo_loss(*args, impl=impl).ratio_max)
    out = ops.ppo_loss(*args, clip_ratio=abs(ratio - 1), impl=impl)
    out.loss.backward()
    assert float(logprob.grad) == -ratio * advantage and float(out.clip_fraction) == 0


@pytest.mark.parametrize(
    "value, old, expected",
    [(0.5, 0.5, -0.5), (1.25, 0.5, 0.25), (1.0, 0.5, 0.0), (1.5, 0.5, 0.5), (0.75, 0.5, -0.25)],
)
def test_value_kink(impl, value, old, expected):
    """value_clip 0.25 to a target of 1; gradient v - R where the unclipped error is chosen, or both are equal."""
    v = torch.tensor([value], device=DEVICE, requires_grad=True)
    zeros, mask = torch.zeros(1, device=DEVICE), torch.ones(1, dtype=torch.bool, device=DEVICE)
    args = (zeros, zeros, zeros, v, zeros + old, zeros + 1, mask)
    ops.ppo_loss(*args, value_clip=0.25, value_coef=1.0, impl=impl).loss.backward()
    assert float(v.grad) == expected


def test_first_step_has_ratio_one(impl):
    """PPO-4: logprobs is old_logprobs: rho = 1 to the bit at every token, KL 0, nothing clipped."""
    args = place(make_inputs(130))
    args["old_logprobs"] = args["logprobs"]
    out = ops.ppo_loss(**args, clip_ratio=0.0, impl=impl)
    assert float(out.ratio_max) == 1 and float(out.approx_kl) == 0 and float(out.clip_fraction) == 0


@pytest.mark.parametrize("d", [1e-6, -1e-4, 0.03, -0.4999, 0.51, -2.0])
def test_small_kl_keeps_its_digits(impl, d):
    """exp(d) - 1 - d is d^2 / 2 for small d: right where the plain difference has no digits."""
    zeros, d = torch.zeros(1, device=DEVICE), torch.tensor([d])
    out = ops.ppo_loss(d.to(DEVICE), *(zeros,) * 5, zeros == 0, impl=impl)
    exact = float(torch.expm1(d.double()) - d.double())
    assert abs(float(out.approx_kl) - exact) <= 3e-6 * exact


@pytest.mark.parametrize("num_tokens", [None, 0, torch.tensor(0), 10])
def test_nothing_to_train_on(impl, num_tokens):
    """All masked, or a count of 0: zeros and zero gradients, never NaN."""
    args = make_inputs(50)
    args["mask"] = torch.zeros(50, dtype=torch.bool)
    count = num_tokens.to(DEVICE) if isinstance(num_tokens, torch.Tensor) else num_tokens
    for some in (args, {k: v[:0] for k, v in args.items()}):
        assert all(not v.any() for v in run(some, impl, entropy_coef=0.1, num_tokens=count).values())


def test_overflowing_ratio(impl):
    """rho = inf: clipped with gradient 0 where A > 0, 0 where A = 0, infinite where A < 0."""
    zeros = torch.zeros(1, device=DEVICE)
    for advantage, loss, gradient in [(1.0, -1.2, 0.0), (0.0, 0.0, 0.0), (-1.0, torch.inf, torch.inf)]:
        logprob = torch.full((1,), 200.0, device=DEVICE, requires_grad=True)
        out = ops.ppo_loss(logprob, zeros, zeros + advantage, zeros, zeros, zeros, zeros == 0, impl=impl)
        out.loss.backward()
        assert out.loss.item() == pytest.approx(loss) and float(logprob.grad) == gradient
        assert float(out.ratio_max) == torch.inf
