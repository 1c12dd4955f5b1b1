"""swiglu. The bug this file must catch: gate and up exchanged in the backward."""

import pytest
import torch

from hpsafety import ops, reference
from hpsafety.ops.swiglu import backward_op
from tests.ops.forms import PAST_INT32, check_same_bits, lazy_zeros, need_memory
from tests.ops.oracle import check_against_oracle, run_with_grads


def make_inputs(t, f, dtype=torch.float32, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {"gate_up": torch.randn(t, 2 * f, generator=generator).mul(scale).to(dtype)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "t, f", [(0, 8), (1, 1), (3, 0), (1, 7), (2, 8), (63, 9), (65, 33), (257, 123), (1, 20_001)]
)
def test_matches_oracle(dtype, t, f):
    """KER-2: forward and backward against fp64 over odd sizes, and one row that is cut among threads."""
    check_against_oracle("swiglu", ops.swiglu, make_inputs(t, f, dtype))


@pytest.mark.parametrize("seed", range(24))
def test_random_shapes(seed):
    """KER-2 on drawn shapes, scales and dtypes."""
    g = torch.Generator().manual_seed(seed)
    t, f = (int(torch.randint(1, high, (), generator=g)) for high in (90, 300))
    dtype, scale = (torch.float32, torch.bfloat16)[seed % 2], 10.0 ** (seed % 4 - 1)
    check_against_oracle("swiglu", ops.swiglu, make_inputs(t, f, dtype, scale, seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-20, 30.0, 1e4])
def test_scales(dtype, scale):
    check_against_oracle("swiglu", ops.swiglu, make_inputs(9, 40, dtype, scale=scale))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_gates(dtype):
    """Where exp(-gate) overflows or vanishes, value and gradients stay finite and right."""
    gate = torch.tensor([-1e4, -100.0, -88.8, -87.0, -20.0, -0.0, 0.0, 20.0, 87.0, 88.8, 100.0, 1e4])
    gate_up = torch.stack((gate, torch.full_like(gate, 1.5))).flatten()[None].to(dtype)
    ours = check_against_oracle("swiglu", ops.swiglu, {"gate_up": gate_up})
    assert all(x.isfinite().all() for x in ours.values())
    y, up = ours["out0"][0].float(), 1.5
    assert y[:3].abs().max() < 1e-30, "the gate is shut"
    assert torch.equal(y[-4:], (gate[-4:].to(dtype) * up).to(dtype).float()), "the gate is open"


def test_every_exponent_is_close():
    """Relative error of the vector exponential over its whole range: silu(x) * 1 where silu(x) is a normal number."""
    gate = torch.linspace(-80, 80, 40_001)
    y = ops.swiglu(torch.cat((gate, torch.ones_like(gate)))[None], impl="cpu")[0]
    exact = reference.swiglu(torch.cat((gate, torch.ones_like(gate))).double()[None])[0]
    assert ((y - exact).abs() <= 8 * 2**-23 * exact.abs()).all()


def test_nan_stays_nan():
    """NaN stays in its column; infinite gates and ups give what torch gives."""
    nan, inf = float("nan"), float("inf")
    gate_up = torch.tensor([[nan, 1.0, 1.0, 1.0, nan, 1.0]])
    ours = run_with_grads(ops.swiglu, {"gate_up": gate_up}, impl="cpu")
    assert ours["out0"].isnan().tolist() == [[True, True, False]]
    assert ours["grad_gate_up"].isnan().tolist() == [[True, True, False, True, False, False]]
    pairs = torch.cartesian_prod(*[torch.tensor([-inf, -1.0, 0.0, 2.0, inf])] * 2).T.flatten()[None]
    assert torch.equal(ops.swiglu(pairs, impl="cpu").isnan(), reference.swiglu(pairs).isnan())
    torch.testing.assert_close(ops.swiglu(pairs, impl="cpu"), reference.swiglu(pairs), equal_nan=True)


def test_backward_returns_y_again():
    """The bits of the forward, so that a fused caller need not keep y."""
    for dtype in (torch.float32, torch.bfloat16):
        gate_up = make_inputs(33, 77, dtype)["gate_up"]
        y = ops.swiglu(gate_up, impl="cpu")
        grad, again = backward_op(torch.ones_like(y), gate_up, "cpu")
        assert torch.equal(again, y) and grad.shape == gate_up.shape


def test_non_contiguous():
    wide = torch.randn(12, 80)
    expected = ops.swiglu(wide[:, ::2].contiguous(), impl="cpu")
    assert torch.equal(ops.swiglu(wide[:, ::2], impl="cpu"), expected)
    assert torch.equal(ops.swiglu(wide[:, ::2].t().contiguous().t(), impl="cpu"), expected)
    x = wide.requires_grad_()
    (grad,) = torch.autograd.grad(
        ops.swiglu(x, impl="cpu").sum(), x
    )  # sum() hands over a gradient of stride 0
    torch.testing.assert_close(grad, *torch.autograd.grad(reference.swiglu(x).sum(), x))


def test_same_bits_again_and_for_any_thread_count(threads):
    check_same_bits(ops.swiglu, make_inputs(301, 123), threads)
    check_same_bits(ops.swiglu, make_inputs(1, 40_001), threads, repeats=6)


@pytest.mark.slow
def test_offsets_past_32_bits():
    """The last row's offset passes 2^31 elements; the output alone takes 2 GB."""
    need_memory(4)
    rows = PAST_INT32 // 2**16 + 2
    gate_up = lazy_zeros(rows * 2**16, torch.bfloat16).view(rows, 2**16)
    gate_up[-1] = make_inputs(1, 2**15, torch.bfloat16)["gate_up"][0]
    assert torch.equal(ops.swiglu(gate_up, impl="cpu")[-1:], ops.swiglu(gate_up[-1:].clone(), impl="cpu"))


def test_without_gradient():
    assert not ops.swiglu(torch.ones(2, 4), impl="cpu").requires_grad
    with torch.no_grad():
        assert not ops.swiglu(torch.ones(2, 4, requires_grad=True), impl="cpu").requires_grad


def test_reference_gradcheck():
    x = torch.randn(3, 10, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(reference.swiglu, x)


def test_opcheck():
    x = make_inputs(9, 24)["gate_up"].requires_grad_()
    torch.library.opcheck(torch.ops.hpsafety.swiglu.default, (x, "cpu"))
    assert torch.equal(torch.ops.hpsafety.swiglu(x, "cpu"), ops.swiglu(x, impl="cpu"))


@pytest.mark.slow
def test_compiles_whole():
    x = make_inputs(9, 24)["gate_up"].requires_grad_()
    compiled = torch.compile(ops.swiglu, fullgraph=True)
    (a, b) = (f(x, impl="cpu") for f in (ops.swiglu, compiled))
    assert torch.equal(a, b)
    assert torch.equal(*(torch.autograd.grad((y * y).sum(), x)[0] for y in (a, b)))


@pytest.mark.parametrize(
    "gate_up, message",
    [
        (torch.zeros(3), "gate_up must be"),
        (torch.zeros(3, 7), "gate_up must be"),
        (torch.zeros(3, 8, dtype=torch.float64), "float32 or bfloat16"),
    ],
)
def test_bad_arguments(gate_up, message):
    with pytest.raises(ValueError, match=message):
        ops.swiglu(gate_up, impl="cpu")
