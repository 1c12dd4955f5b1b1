"""rms_norm. The bug this file must catch: the mean taken over the padded vector width instead of D."""

import itertools

import pytest
import torch

from hpsafety import ops, reference
from tests.ops.forms import PAST_INT32, check_same_bits, lazy_zeros, need_memory
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


@pytest.mark.parametrize("seed", range(24))
def test_random_shapes(seed):
    """KER-2 on drawn shapes, scales and dtypes, with and without a residual."""
    g = torch.Generator().manual_seed(seed)
    t, d = (int(torch.randint(1, high, (), generator=g)) for high in (150, 300))
    dtype, scale = (torch.float32, torch.bfloat16)[seed % 2], 10.0 ** (seed % 5 - 2)
    check_against_oracle("rms_norm", ops.rms_norm, make_inputs(t, d, dtype, seed % 4 < 2, seed, scale))


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_normalises_the_sum_it_returns(dtype):
    """y belongs to the rounded sum, bit for bit: backward sees that sum, and a later layer adds to it."""
    args = make_inputs(30, 100, dtype, residual=True)
    y, summed = ops.rms_norm(**args, impl="cpu")
    assert torch.equal(y, ops.rms_norm(summed, args["weight"], args["eps"], impl="cpu"))


def test_non_contiguous():
    args = make_inputs(40, 66, torch.float32, residual=True)
    views = {"x": args["x"].t()[::2].t(), "weight": args["weight"][::2], "eps": 1e-5}
    views["residual"] = args["residual"][:, :33]
    dense = {k: v.contiguous() if k != "eps" else v for k, v in views.items()}
    for a, b in zip(ops.rms_norm(**views, impl="cpu"), ops.rms_norm(**dense, impl="cpu"), strict=True):
        assert torch.equal(a, b) and a.is_contiguous()
    x = dense["x"].requires_grad_()
    call = lambda: ops.rms_norm(x, dense["weight"], 1e-5, impl="cpu")  # noqa: E731
    strided = torch.autograd.grad(call(), x, torch.ones(()).expand(40, 33))
    assert torch.equal(strided[0], torch.autograd.grad(call(), x, torch.ones(40, 33))[0])


def test_same_bits_again_and_for_any_thread_count(threads):
    check_same_bits(ops.rms_norm, make_inputs(260, 40, torch.float32, residual=True), threads)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_bad_rows_stay_alone(bad):
    args = make_inputs(9, 40, torch.float32)
    clean = ops.rms_norm(**args, impl="cpu")
    args["x"][3, 5] = bad
    out, oracle = ops.rms_norm(**args, impl="cpu"), reference.rms_norm(**args)
    rest = torch.arange(9) != 3
    assert torch.equal(out[rest], clean[rest]) and torch.equal(out[3].isnan(), oracle[3].isnan())
    assert out[3, 5].isnan() and torch.equal(out[3].nan_to_num(), oracle[3].nan_to_num())


@pytest.mark.slow
def test_offsets_past_32_bits():
    """The last row's offset passes 2^31 elements; the output alone takes 4 GB."""
    need_memory(6)
    rows = PAST_INT32 // 2**16 + 2
    x = lazy_zeros(rows * 2**16, torch.bfloat16).view(rows, 2**16)
    last = make_inputs(1, 2**16, torch.bfloat16)
    x[-1] = last["x"][0]
    assert torch.equal(ops.rms_norm(**last | {"x": x}, impl="cpu")[-1:], ops.rms_norm(**last, impl="cpu"))


def test_reference_gradcheck():
    args = [
        torch.randn(3, 5, dtype=torch.float64, requires_grad=True),
        torch.rand(5, dtype=torch.float64) + 0.5,
    ]
    assert torch.autograd.gradcheck(lambda x, w: reference.rms_norm(x, w, 1e-3, 2 * x), args)


def test_opcheck():
    args = make_inputs(9, 24, torch.float32, residual=True)
    x, w, eps, r = (v.requires_grad_() if isinstance(v, torch.Tensor) else v for v in args.values())
    torch.library.opcheck(torch.ops.hpsafety.rms_norm.default, (x, w, eps, r, "cpu"))
    eager, summed = ops.rms_norm(x, w, eps, r)
    through_dispatcher = torch.ops.hpsafety.rms_norm(x, w, eps, r, "cpu")
    assert torch.equal(through_dispatcher[0], eager) and torch.equal(through_dispatcher[1], summed)


@pytest.mark.slow
def test_compile():
    args = make_inputs(9, 24, torch.float32, residual=True)
    compiled = torch.compile(lambda **kw: ops.rms_norm(**kw, impl="cpu"), fullgraph=True)
    ours, plain = run_with_grads(compiled, args), run_with_grads(ops.rms_norm, args, impl="cpu")
    assert ours.keys() == plain.keys() and all(torch.equal(ours[k], plain[k]) for k in plain)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.zeros(3)}, "x must be"),
        ({"weight": torch.zeros(7)}, r"weight must be \(8,\)"),
        ({"weight": torch.zeros(8, dtype=torch.bfloat16)}, "weight must be"),
        ({"weight": torch.zeros(8, device="meta")}, "weight must be .* on cpu, got .* on meta"),
        ({"residual": torch.zeros(2, 8)}, "residual must be like x"),
        ({"residual": torch.zeros(3, 8, device="meta")}, "residual must be like x .* on cpu, got .* on meta"),
        ({"x": torch.zeros(3, 8).half(), "weight": torch.zeros(8).half()}, "x must be float32 or bfloat16"),
    ],
)
def test_bad_arguments(change, message):
    args = {"x": torch.zeros(3, 8), "weight": torch.zeros(8), "eps": 1e-5} | change
    with pytest.raises(ValueError, match=message):
        ops.rms_norm(**args, impl="cpu")
