"""swiglu in Triton. The bug this file must catch: a tile at the end of a row that runs into the next one."""

import pytest
import torch

from hpsafety import ops, reference
from hpsafety.triton_kernels import swiglu as kernels
from tests.ops.forms import PAST_INT32, lazy_zeros
from tests.ops.oracle import run_with_grads
from tests.ops.test_swiglu import make_inputs
from tests.triton.audit import audit
from tests.triton.device import DEVICE, check_triton, place
from tests.triton.last_program import last_program, needs_interpreter

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(kernels, "TILE", 32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("t, f", [(0, 8), (1, 1), (3, 0), (1, 7), (5, 1023), (3, 1025), (33, 40)])
def test_matches_oracle(dtype, t, f):
    """KER-2: odd sizes, several rows in a tile and several tiles in a row."""
    check_triton("swiglu", ops.swiglu, make_inputs(t, f, dtype))


@pytest.mark.parametrize("t, f", [(3, 31), (2, 32), (2, 33), (9, 4), (7, 5), (1, 64)])
def test_borders_of_tiles(small_tiles, t, f):
    check_triton("swiglu", ops.swiglu, make_inputs(t, f))


@pytest.mark.sweep
@pytest.mark.parametrize("seed", range(60))
def test_drawn_shapes(seed):
    g = torch.Generator().manual_seed(seed)
    t, f = (int(torch.randint(1, high, (), generator=g)) for high in (60, 1500))
    args = make_inputs(t, f, DTYPES[seed % 2], 10.0 ** (seed % 4 - 1), seed)
    check_triton("swiglu", ops.swiglu, args)


def test_extreme_gates():
    """Where exp(-gate) overflows or vanishes, value and gradients stay finite and right."""
    gate = torch.tensor([-1e4, -100.0, -88.8, -20.0, -0.0, 0.0, 20.0, 88.8, 100.0, 1e4])
    ours = check_triton("swiglu", ops.swiglu, {"gate_up": torch.cat((gate, torch.ones(10)))[None]})
    assert all(x.isfinite().all() for x in ours.values())


def test_bad_values_stay_in_their_column():
    nan, inf = float("nan"), float("inf")
    args = place({"gate_up": torch.tensor([[nan, 1.0, 1.0, 1.0, nan, 1.0], [1.0] * 6])})
    ours = run_with_grads(ops.swiglu, args, impl="triton")
    assert ours["out0"].isnan().tolist() == [[True, True, False], [False] * 3]
    assert ours["grad_gate_up"][0].isnan().tolist() == [True, True, False, True, False, False]
    pairs = torch.cartesian_prod(*[torch.tensor([-inf, -1.0, 0.0, 2.0, inf])] * 2).T.flatten()[None]
    found = ops.swiglu(pairs.to(DEVICE), impl="triton").cpu()
    torch.testing.assert_close(found, reference.swiglu(pairs), equal_nan=True)


def test_strided_input_and_gradient():
    wide = torch.randn(6, 40, device=DEVICE)
    expected = ops.swiglu(wide[:, ::2].contiguous(), impl="triton")
    assert torch.equal(ops.swiglu(wide[:, ::2], impl="triton"), expected)
    grad, gate_up = torch.ones(1, 1, device=DEVICE).expand(6, 20), wide
    for a, b in zip(*(kernels.swiglu_backward(g, gate_up) for g in (grad, grad.clone())), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("t, f", [(5, 70), (17, 3)])
@needs_interpreter
def test_memory_and_traffic(small_tiles, dtype, t, f):
    """Every byte is read once and written once, in any order of the programs; y has the forward's bits."""
    gate_up = make_inputs(t, f, dtype)["gate_up"]
    dy = torch.randn(t, f).to(dtype)
    found = []
    for seed in (None, 1):
        with audit(seed, gate_up=gate_up, dy=dy) as seen:
            y = kernels.swiglu(gate_up)
        seen.check()
        read = seen.traffic["gate_up"]
        assert read.load_bytes == read.load_unique == gate_up.nbytes
        assert seen.traffic["new0"].store_bytes == y.nbytes
        with audit(seed, gate_up=gate_up, dy=dy) as seen:
            grad, again = kernels.swiglu_backward(dy, gate_up)
        seen.check()
        assert sum(x.load_bytes for x in seen.traffic.values()) == gate_up.nbytes + dy.nbytes
        assert sum(x.store_bytes for x in seen.traffic.values()) == grad.nbytes + again.nbytes
        found.append((y, grad))
        assert torch.equal(again, y)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@needs_interpreter
def test_offsets_past_32_bits(monkeypatch):
    """The last row of 2^31 elements, in memory of which nothing else is touched."""
    f = 2**15
    rows = PAST_INT32 // (2 * f) + 2
    gate_up = lazy_zeros(rows * 2 * f, torch.bfloat16).view(rows, 2 * f)
    gate_up[-1] = make_inputs(1, f, torch.bfloat16)["gate_up"][0]
    monkeypatch.setattr(kernels, "TILE", f)  # one program a row
    monkeypatch.setattr(kernels, "launch", last_program)
    y = kernels.swiglu(gate_up)
    torch.testing.assert_close(
        y[-1:], reference.swiglu(gate_up[-1:].float()).bfloat16(), rtol=2**-7, atol=1e-6
    )
