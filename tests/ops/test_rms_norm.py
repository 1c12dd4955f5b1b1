"""rms_norm. The bug this file must catch: the mean taken over the padded vector width instead of D."""

import itertools

import pytest
import torch

from hpsafety import ops, reference
from tests.ops.oracle import check_against_oracle, run_with_grads


def make_inputs(t, d, dtype, residual=False, seed=0, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    args = {
        "x": torch.randn(t, d, generator=g).mul(scale).to(dtype),
        "weight": torch.randn(d, generator=g).to(dtype),
    }
    args["eps"] = 1e-5
    if residual:
        args["residual"] = torch.randn(t, d, generator=g).mul(scale).to(dtype)
    return args


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("t, d", [(0, 8), (1, 3), (1, 7), (63, 8), (64, 9), (65, 33), (257, 123), (130, 576)])
@pytest.mark.parametrize("residual", [False, True])
def test_matches_oracle(dtype, t, d, residual):
    """KER-2: forward and backward against fp64 over odd sizes and block borders."""
    check_against_oracle("rms_norm", ops.rms_norm, make_inputs(t, d, dtype, residual))


@pytest.mark.parametrize("scale", [1e-18, 1e4, 1e18])
def test_extreme_values(scale):
    check_against_oracle("rms_norm", ops.rms_norm, make_inputs(5, 40, torch.float32, True, scale=scale))


def test_each_subset_of_requires_grad():
    args = make_inputs(6, 20, torch.float32, residual=True)
    names = ("x", "weight", "residual")
    whole = run_with_grads(ops.rms_norm, args, impl="cpu", grads=names)
    for size in range(len(names)):
        for subset in itertools.combinations(names, size):
            part = run_with_grads(ops.rms_norm, args, impl="cpu", grads=subset)
            for key, value in part.items():
                assert torch.equal(value, whole[key]), key


def test_one_output_unused():
    x, w = torch.randn(4, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    y, summed = ops.rms_norm(x, w, 1e-5, torch.zeros(4, 8), impl="cpu")
    (grad,) = torch.autograd.grad(summed.sum(), x, retain_graph=True)
    assert torch.equal(grad, torch.ones(4, 8))
    (grad,) = torch.autograd.grad(y.sum(), x)
    expected = torch.autograd.grad(reference.rms_norm(x, w, 1e-5).sum(), x)[0]
    torch.testing.assert_close(grad, expected)


def test_non_contiguous_and_repeatable():
    x, w = torch.randn(40, 66)[:, ::2], torch.randn(33)
    first = ops.rms_norm(x, w, 1e-5, impl="cpu")
    torch.testing.assert_close(first, reference.rms_norm(x, w, 1e-5))
    for _ in range(20):
        assert torch.equal(ops.rms_norm(x, w, 1e-5, impl="cpu"), first)


def test_reference_gradcheck():
    args = [
        torch.randn(3, 5, dtype=torch.float64, requires_grad=True),
        torch.rand(5, dtype=torch.float64) + 0.5,
    ]
    assert torch.autograd.gradcheck(lambda x, w: reference.rms_norm(x, w, 1e-3, 2 * x), args)


def test_opcheck_and_compile():
    args = make_inputs(9, 24, torch.float32, residual=True)
    x, w, eps, r = (v.requires_grad_() if isinstance(v, torch.Tensor) else v for v in args.values())
    torch.library.opcheck(torch.ops.hpsafety.rms_norm.default, (x, w, eps, r, "cpu"))
    eager, summed = ops.rms_norm(x, w, eps, r)
    through_dispatcher = torch.ops.hpsafety.rms_norm(x, w, eps, r, "cpu")
    assert torch.equal(through_dispatcher[0], eager) and torch.equal(through_dispatcher[1], summed)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.zeros(3)}, "x must be"),
        ({"weight": torch.zeros(7)}, r"weight must be \(8,\)"),
        ({"weight": torch.zeros(8, dtype=torch.bfloat16)}, "weight must be"),
        ({"residual": torch.zeros(2, 8)}, "residual must be like x"),
    ],
)
def test_bad_arguments(change, message):
    args = {"x": torch.zeros(3, 8), "weight": torch.zeros(8), "eps": 1e-5} | change
    with pytest.raises(ValueError, match=message):
        ops.rms_norm(**args)


def test_forced_backend_that_is_missing():
    with pytest.raises(ops.BackendUnavailable, match="has no flash_attn backend"):
        ops.rms_norm(torch.zeros(1, 8), torch.zeros(8), 1e-5, impl="flash_attn")
    with pytest.raises(ValueError, match="unknown impl"):
        ops.rms_norm(torch.zeros(1, 8), torch.zeros(8), 1e-5, impl="fast")
