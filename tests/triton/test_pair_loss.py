"""pair_loss in Triton. The bug this file must catch: the gradient of the auxiliary loss at the wrong response."""

import math

import pytest
import torch

from hpsafety import ops
from hpsafety.triton_kernels import launch
from hpsafety.triton_kernels import pair_loss as kernels
from tests.ops.forms import PAST_INT32, reserved
from tests.ops.oracle import run_with_grads
from tests.ops.test_pair_loss import GRADS, make_inputs
from tests.triton.audit import audit
from tests.triton.device import DEVICE, check_triton, place
from tests.triton.last_program import needs_interpreter

DTYPES = [torch.float32, torch.bfloat16]
BLOCK = 64


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(kernels, "BLOCK", BLOCK)


def run(args, grads=GRADS, **kwargs):
    return run_with_grads(ops.pair_loss, place(args), grads=grads, impl="triton", **kwargs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bins", [False, True])
@pytest.mark.parametrize("p", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 7])
def test_matches_oracle(dtype, bins, p):
    """KER-2: value and gradients against fp64 around a block."""
    args = make_inputs(p, dtype, bins=bins)
    out = check_triton("pair_loss", ops.pair_loss, args, aux_weight=float(bins))
    assert out["out0"].dtype == torch.float32 and out["out0"].dim() == 0


def check_drawn(seed):
    g = torch.Generator().manual_seed(100 + seed)
    p = int(torch.randint(0, 300, (), generator=g))
    args = make_inputs(p, DTYPES[seed % 3 == 0], seed, scale=float(10 ** (seed % 4 - 1)))
    if seed % 4 == 0:
        args["margin"] = 1 / 3
    if seed % 5 == 0:
        del args["safe_rejected"]
    if seed % 5 == 1:
        del args["safe_chosen"]
    count = (None, 2 * p + 1, torch.tensor(3 * p + 1))[seed % 3]
    weight = float(torch.rand((), generator=g))
    check_triton("pair_loss", ops.pair_loss, args, aux_weight=weight, num_pairs=count)


@pytest.mark.parametrize("seed", range(6))
def test_margins_bins_and_counts(seed):
    check_drawn(seed)


@pytest.mark.sweep
@pytest.mark.parametrize("seed", range(6, 66))
def test_drawn_settings(seed):
    check_drawn(seed)


@pytest.mark.parametrize("gap", [-500.0, -80.0, -3.0, -0.1, 0.0, 0.7, 4.0, 20.0, 80.0, 500.0])
def test_ranking_loss(gap):
    """RM-1: against float64 with all its digits, also where the loss is small; finite at any gap."""
    zero = torch.zeros(1, device=DEVICE)
    chosen, rejected = (zero + gap).requires_grad_(), zero.clone().requires_grad_()
    loss = ops.pair_loss(chosen, rejected, 0.0, impl="triton")
    loss.backward()
    exact = math.log1p(math.exp(-gap)) if gap > 0 else math.log1p(math.exp(gap)) - gap
    digits = 5e-7 if abs(gap) <= 20 else 2e-5  # far out, a GPU's exp loses digits of its argument
    assert abs(float(loss) - exact) <= digits * exact + 1e-38
    sigmoid = 1 / (1 + math.exp(gap))
    assert abs(float(chosen.grad) + sigmoid) <= 1e-6 and float(rejected.grad) == -float(chosen.grad)


def test_without_weight_the_bins_change_no_bit():
    """RM-3: aux_weight = 0 equals the pure ranking run, and so does any weight where no pair has a bin."""
    args = make_inputs(100)
    pure = {k: args[k] for k in ("chosen", "rejected", "margin")}
    none = torch.full((100,), -1, dtype=torch.int8)
    plain, unweighted = run(pure), run(args, aux_weight=0.0)
    unbinned = run(pure | {"safe_chosen": none, "safe_rejected": none}, aux_weight=1.0)
    for key in plain:
        assert torch.equal(plain[key], unweighted[key]) and torch.equal(plain[key], unbinned[key])


def test_micro_batches_add_up():
    """RM-8: accumulation with a global num_pairs equals one big batch."""
    args = make_inputs(200)
    whole = run(args, aux_weight=0.5)
    parts = [
        run({k: v[a:b] for k, v in args.items()}, aux_weight=0.5, num_pairs=200)
        for a, b in ((0, 1), (1, 1), (1, 200))
    ]
    torch.testing.assert_close(sum(p["out0"] for p in parts), whole["out0"], rtol=1e-6, atol=0)
    for name in GRADS:
        joined = torch.cat([p[f"grad_{name}"] for p in parts])
        torch.testing.assert_close(joined, whole[f"grad_{name}"], rtol=1e-6, atol=0)


def test_no_pairs():
    args = make_inputs(4)
    zero = torch.tensor(0, device=DEVICE)
    for some, count in [({k: v[:0] for k, v in args.items()}, None), (args, 0), (args, zero)]:
        assert all(not v.any() for v in run(some, aux_weight=1.0, num_pairs=count).values())


def test_not_finite():
    """NaN propagates; a gap of +inf costs nothing, -inf without bound; a score without a bin may not be read."""
    inf, nan = float("inf"), float("nan")
    for gap, loss, slope in [(inf, 0.0, 0.0), (-inf, inf, -1.0), (nan, nan, nan)]:
        out = run({"chosen": torch.tensor([gap]), "rejected": torch.zeros(1)}, margin=0.0)
        torch.testing.assert_close(out["out0"].cpu(), torch.tensor(loss), equal_nan=True)
        weight = torch.randn((), generator=torch.Generator().manual_seed(0), dtype=torch.float64)  # of out0
        found = out["grad_chosen"].cpu() / weight.float()
        torch.testing.assert_close(found, torch.tensor([slope]), equal_nan=True)
    args = make_inputs(3) | {"safe_chosen": torch.tensor([-1, 1, 1]).to(torch.int8)}
    args["chosen"][0] = nan
    assert run(args, aux_weight=1.0)["grad_rejected"].isnan().tolist() == [True, False, False]


def test_non_contiguous():
    args = make_inputs(70)
    a = run(args, aux_weight=1.0)
    b = run({k: torch.stack((v, v), 1)[:, 0] for k, v in args.items()}, aux_weight=1.0)
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("dtype", DTYPES)
@needs_interpreter
def test_memory_and_traffic(dtype):
    """One launch; each row is read once, both gradients are written once."""
    p = 2 * BLOCK + 5
    args = make_inputs(p, dtype)
    with audit(**args) as seen:
        loss, per_pair, grads = kernels.pair_loss(
            args["chosen"], args["rejected"], args["margin"], 0.0, args["safe_chosen"], args["safe_rejected"], 0.5,
            None, None,
        )  # fmt: skip
    seen.check()
    assert seen.launches == 1
    for name, row in args.items():
        assert seen.traffic[name].load_bytes == seen.traffic[name].load_unique == row.nbytes
    assert seen.traffic["new2"].store_bytes == seen.traffic["new2"].store_unique == grads.nbytes


@needs_interpreter
def test_offsets_past_32_bits(monkeypatch):
    """The last block of 2^31 pairs, run alone; the second row of gradients stands behind twice that."""
    row, grads = reserved(PAST_INT32), reserved(2, PAST_INT32)
    row[-64:] = torch.randn(64)
    near = row[-64:].clone()
    loss, _, expected = kernels.pair_loss(near, near * 0.5, None, 0.5, None, None, 0.0, 1.0, None)
    blocks = range(0, PAST_INT32, BLOCK)
    monkeypatch.setitem(kernels.pair_rows.fn.__globals__, "range", lambda *bounds: blocks[-1:])
    other = reserved(PAST_INT32)
    other[-64:] = near * 0.5
    out = torch.empty(2)
    flags = {"HAS_MARGIN": False, "HAS_CHOSEN": False, "HAS_REJECTED": False, "HAS_TENSOR": False}
    launch.launch(
        kernels.pair_rows, 1, row, other, None, None, None, None, out[:1], out[1:], grads, PAST_INT32, 0.5, 0.0, 1.0,
        **flags, HAS_NUMBER=True, BLOCK=BLOCK,
    )  # fmt: skip
    assert torch.equal(grads[:, -64:], expected) and torch.equal(out[0], loss)
