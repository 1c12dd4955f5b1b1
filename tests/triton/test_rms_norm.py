"""rms_norm in Triton. The bug this file must catch: a partial of grad_weight that is added twice or never."""

import pytest
import torch

from hpsafety import ops
from hpsafety.triton_kernels import rms_norm as kernels
from tests.ops.forms import PAST_INT32, lazy_zeros
from tests.ops.test_rms_norm import make_inputs
from tests.triton.audit import audit
from tests.triton.device import check_triton, place
from tests.triton.last_program import last_program, needs_interpreter

DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("t, d", [(0, 8), (1, 3), (1, 7), (33, 9), (65, 33), (40, 576), (3, 1500)])
def test_matches_oracle(dtype, t, d, residual):
    """KER-2: odd sizes, rows beside and beyond a program's, a width that is no power of two."""
    check_triton("rms_norm", ops.rms_norm, make_inputs(t, d, dtype, residual))


@pytest.mark.sweep
@pytest.mark.parametrize("seed", range(60))
def test_drawn_shapes(seed):
    g = torch.Generator().manual_seed(seed)
    t, d = (int(torch.randint(1, high, (), generator=g)) for high in (150, 900))
    args = make_inputs(t, d, DTYPES[seed % 2], seed % 4 < 2, seed, 10.0 ** (seed % 5 - 2))
    check_triton("rms_norm", ops.rms_norm, args)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_rows_stay_alone(bad):
    args = place(make_inputs(9, 40, torch.float32))
    clean = ops.rms_norm(**args, impl="triton")
    args["x"][3, 5] = bad
    out = ops.rms_norm(**args, impl="triton")
    rest = torch.arange(9) != 3
    assert torch.equal(out[rest], clean[rest]) and out[3, 5].isnan()


@needs_interpreter
def test_memory_and_traffic():
    """Forward: x, residual, weight read once, y and the sum written once; backward: partials are 4 % more."""
    args = make_inputs(70, 96, torch.bfloat16, residual=True)
    x, weight, residual = args["x"], args["weight"], args["residual"]
    outs = []
    for seed in (None, 1, 2):
        with audit(seed, x=x, weight=weight, residual=residual) as seen:
            y, summed = ops.rms_norm(**args, impl="triton")
        seen.check()
        outs.append(y)
        for name in ("x", "residual"):
            assert seen.traffic[name].load_bytes == seen.traffic[name].load_unique == x.numel() * 2
        written = sum(t.store_bytes for t in seen.traffic.values())
        assert written == 2 * x.numel() * 2 + 70 * 4
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])


@needs_interpreter
def test_memory_of_backward():
    args = make_inputs(70, 96, torch.bfloat16)
    x, weight = args["x"], args["weight"]
    dy, rstd = torch.ones_like(x), x.float().pow(2).mean(1).add(1e-5).rsqrt()
    results = []
    for seed in (None, 3):
        with audit(seed, x=x, weight=weight, dy=dy, rstd=rstd) as seen:
            results.append(kernels.rms_norm_backward(dy, None, x, weight, rstd))
        seen.check()
        assert seen.traffic["x"].load_bytes == seen.traffic["dy"].load_bytes == x.numel() * 2
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@needs_interpreter
def test_offsets_past_32_bits(monkeypatch):
    """The last rows of 2^31 elements, in memory of which nothing else is touched."""
    d = 2**16
    rows = PAST_INT32 // d + 2
    x, weight = lazy_zeros(rows * d, torch.bfloat16).view(rows, d), torch.ones(d, dtype=torch.bfloat16)
    x[-1] = torch.randn(d).bfloat16()
    monkeypatch.setattr(kernels, "launch", last_program)
    near, rstd = x[-1:].clone(), torch.ones(rows)
    y = kernels.rms_norm(x, weight, 1e-5, None)[0]
    assert torch.equal(y[-1:], kernels.rms_norm(near, weight, 1e-5, None)[0])
    grad = kernels.rms_norm_backward(x, None, x, weight, rstd)[0]
    assert torch.equal(grad[-1:], kernels.rms_norm_backward(near, None, near, weight, rstd[:1])[0])
