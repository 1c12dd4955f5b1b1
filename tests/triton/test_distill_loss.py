"""distill_loss in Triton. The bugs this file must catch: teacher and student exchanged, a split merged without its
rescaling, and digits lost where the two models all but agree."""

import itertools
import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from hpsafety import ops
from hpsafety.triton_kernels import distill_loss as kernels
from hpsafety.triton_kernels import linear_tiles
from tests.ops.forms import lazy_zeros
from tests.ops.oracle import run_with_grads
from tests.ops.test_distill_loss import KINDS, STUDENT, close_pair, make_inputs
from tests.triton.audit import audit
from tests.triton.device import DEVICE, check_triton, place
from tests.triton.linear_forms import (
    SPLIT,
    Allocated,
    M,
    N,
    blocks,
    blocks_by_part,
    new_bytes,
    real_tiles,
    small_tiles,
    traffic_of,
)

__all__ = ["real_tiles", "small_tiles"]  # fixtures
DTYPES = [torch.float32, torch.bfloat16]


def check(args, kind, **kwargs):
    out = check_triton("distill_loss", ops.distill_loss, args, kind=kind, grads=STUDENT, **kwargs)
    assert not (out["out0"] < 0).any()
    if kind == "jsd":
        assert not (out["out0"] > math.log(2) * (1 + 1e-6)).any()
    return out


def run(args, kind, grad, temperature=1.0):
    """(loss, norm, both gradients), by the launch functions."""
    outputs = kernels.distill_loss(*args.values(), kind, temperature)
    return *outputs, *backward(args, kind, grad, outputs, temperature)


def backward(args, kind, grad, outputs, temperature=1.0):
    return kernels.distill_loss_backward(grad, *args.values(), outputs[1], kind, temperature, True, True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "n, d, d2, v, student, teacher",
    [
        (0, 8, 4, 5, 0, 0),
        (1, 64, 32, 33, 1, 1),
        (15, 5, 7, 1, 0, 0),
        (31, 33, 12, 129, 0, 1),
        (33, 32, 40, 127, 1, 0),
        (65, 24, 40, 200, 0, 0),
        (65, 24, 40, 200, 1, 1),
    ],
)
def test_matches_oracle(kind, n, d, d2, v, student, teacher):
    """KER-2: forward and backward around the borders of tiles, splits and parts; widths and dtypes differ."""
    check(make_inputs(n, d, d2, v, DTYPES[student], DTYPES[teacher]), kind)


@pytest.mark.parametrize("kind", KINDS)
def test_real_tiles(kind, real_tiles):
    check(make_inputs(130, 24, 40, 150, torch.bfloat16), kind, temperature=0.5)


@pytest.mark.parametrize("kind, temperature", [("forward_kl", 0.5), ("reverse_kl", 0.5), ("jsd", 3.0)])
def test_temperature_and_large_logits(kind, temperature):
    """KER-2: logits of several hundred: most probabilities underflow on one side or both, nothing is NaN.

    Not jsd at 0.5: all rows are certain there, and its gradient is half an ulp of log 2 minus log 2, on the CPU too.
    """
    out = check(make_inputs(20, 24, 16, 301, scale=100.0), kind, temperature=temperature)
    assert all(torch.isfinite(v).all() for v in out.values())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("distance", [1e-1, 1e-3])
def test_close_distributions(kind, distance):
    """Late in distillation p and q all but agree; loss and gradient stay as good as plain torch, and not negative."""
    check(close_pair(33, 32, 300, distance), kind)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_distributions(kind):
    args = place(close_pair(33, 24, 150, 0.0))
    loss, _, dh, dw = run(args, kind, torch.ones(33, device=DEVICE))
    assert not loss.any() and dh.abs().max() < 1e-6 and dw.abs().max() < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_a_common_offset_costs_no_digit(kind):
    args = make_inputs(20, 16, 16, 150)
    for side, offset in (("student", 4096.0), ("teacher", -2048.0)):
        hidden, weight = args[f"{side}_hidden"], args[f"{side}_weight"]
        args[f"{side}_hidden"] = torch.cat([hidden.mul(64).round().div(64), torch.full((20, 1), offset)], 1)
        args[f"{side}_weight"] = torch.cat([weight.mul(64).round().div(64), torch.ones(150, 1)], 1)
    check(args, kind)


@pytest.mark.sweep
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(25))
def test_drawn_shapes(kind, seed):
    g = torch.Generator().manual_seed(seed)
    draw = lambda low, high: int(torch.randint(low, high, (), generator=g))  # noqa: E731
    d, d2 = (32 * draw(1, 4) if draw(0, 2) else draw(1, 70) for _ in range(2))
    args = make_inputs(
        draw(1, 150), d, d2, draw(1, 600), DTYPES[draw(0, 2)], DTYPES[draw(0, 2)], seed, scale=draw(1, 6)
    )
    # jsd: where the student is certain, the gradient is half an ulp of log 2 minus log 2 (see above)
    check(args, kind, temperature=draw(1, 8) / 4, factor=4.0 if kind == "jsd" else 2.0)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_without_gradient(kind):
    """They may hold anything and get exact zeros; the rest is to the bit as if they had not been there."""
    args = place(make_inputs(70, 16, 24, 130, torch.bfloat16))
    g = torch.Generator().manual_seed(5)
    grad, trained = torch.randn(70, generator=g), torch.rand(70, generator=g) < 0.6
    grad = (grad * trained).to(DEVICE)
    args["student_hidden"][~trained], args["teacher_hidden"][~trained] = float("nan"), float("inf")
    *_, dh, dw = run(args, kind, grad)
    kept = {k: v[trained] if k.endswith("hidden") else v for k, v in args.items()}
    *_, alone_h, alone_w = run(kept, kind, grad[trained])
    assert not dh[~trained].any() and torch.equal(dh[trained], alone_h) and torch.equal(dw, alone_w)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_rows_stay_alone(kind, side, bad):
    args = place(make_inputs(20, 8, 8, 70))
    ones, rest = torch.ones(20, device=DEVICE), torch.arange(20) != 3
    clean = run(args, kind, ones)
    args[f"{side}_hidden"][3, 5] = bad
    loss, _, dh, _ = run(args, kind, ones)
    assert loss[3].isnan() and torch.equal(loss[rest], clean[0][rest])
    assert dh[3].isnan().all() and torch.equal(dh[rest], clean[2][rest])


def test_words_of_no_probability():
    """A split of words that both models exclude: the divergence of the rest, in which no -inf takes part."""
    args = place(make_inputs(3, 8, 8, 300))
    some = {k: v if k.endswith("hidden") else v[SPLIT:].contiguous() for k, v in args.items()}
    for side in ("student", "teacher"):
        args[f"{side}_hidden"].abs_()
        args[f"{side}_weight"][:SPLIT] = -float("inf")
    for kind in ("forward_kl", "reverse_kl"):
        found, exact = (kernels.distill_loss(*x.values(), kind, 1.0)[0] for x in (args, some))
        torch.testing.assert_close(found, exact)


def test_each_subset_of_requires_grad():
    args = place(make_inputs(33, 20, 8, 70))
    whole = run_with_grads(ops.distill_loss, args, impl="triton", grads=STUDENT)
    for subset in itertools.chain([()], [(name,) for name in STUDENT]):
        part = run_with_grads(ops.distill_loss, args, impl="triton", grads=subset)
        assert {k for k in part if k.startswith("grad")} == {f"grad_{k}" for k in subset}
        assert all(torch.equal(value, whole[key]) for key, value in part.items())


@pytest.mark.parametrize("kind", KINDS)
def test_rows_far_apart(kind):
    """Rows of all four inputs up to 2^31 elements and more from the first, in storages hardly touched."""
    args, step = make_inputs(33, 8, 4, 34, torch.bfloat16), 2**26 + 16
    far = {}
    for name, x in args.items():
        far[name] = lazy_zeros(len(x) * step, torch.bfloat16).view(len(x), step)[:, : x.shape[1]]
        far[name].copy_(x)
    results = [run(x, kind, torch.ones(33)) for x in (far, args)]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_opcheck():
    args = {k: v.requires_grad_(k in STUDENT) for k, v in place(make_inputs(9, 24, 8, 70)).items()}
    torch.library.opcheck(torch.ops.hpsafety.distill_loss.default, (*args.values(), "jsd", 0.7, "triton"))


@pytest.mark.parametrize("kind", KINDS)
def test_memory_and_traffic(kind):
    """Each row block reads each weight once (jsd: twice), backward that of the student twice; masked rows never."""
    n, d, d2, v, results = 100, 24, 40, 150, []
    args = make_inputs(n, d, d2, v, torch.bfloat16)
    trained = torch.rand(n, generator=torch.Generator().manual_seed(2)) < 0.6
    grad, kept = trained.float(), int(trained.sum())
    times = 2 if kind == "jsd" else 1
    for seed in (None, 7):
        with audit(seed, **args) as seen:
            outputs = kernels.distill_loss(*args.values(), kind, 1.0)
        seen.check()
        for side, width in (("student", d), ("teacher", d2)):
            assert seen.traffic[f"{side}_weight"].load_bytes == times * blocks(n, M) * v * width * 2
            assert seen.traffic[f"{side}_hidden"].load_bytes == times * blocks(v, N) * n * width * 2
        assert new_bytes(seen, *outputs) == 6 * blocks(v, SPLIT) * n * 4
        with audit(seed, **args, grad=grad, norm=outputs[1]) as seen:
            grads = backward(args, kind, grad, outputs)
        seen.check()
        for side, width, reads in (("student", d, 2), ("teacher", d2, 1)):
            assert seen.traffic[f"{side}_weight"].load_bytes == reads * blocks_by_part(kept) * v * width * 2
            hidden = seen.traffic[f"{side}_hidden"]
            assert hidden.load_bytes == hidden.load_unique == kept * width * 2
        assert [traffic_of(seen, x).store_bytes for x in grads] == [kept * d * 2, v * d * 2]
        results.append((*outputs, *grads))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_bound_of_memory(real_tiles):
    """At 2.1e9 logits: dz of one part, both models' rows once more, and the fp32 sums."""
    n, d, d2, v = 16_384, 512, 1024, 131_072
    with FakeTensorMode(), Allocated() as seen:
        make = lambda *shape: torch.empty(*shape, dtype=torch.bfloat16, device="cuda")  # noqa: E731
        sides = make(n, d), make(v, d), make(n, d2), make(v, d2)
        loss, norm = kernels.distill_loss(*sides, "jsd", 1.0)
        forward = seen.bytes
        kernels.distill_loss_backward(loss, *sides, norm, "jsd", 1.0, True, True)
    assert forward < 6 * n * 4 * blocks(v, linear_tiles.WORDS_PER_SPLIT) + 64 * n
    rows, words = linear_tiles.dz_part(2)
    sums = (n + words) * d * 4
    bound = (n + v) * d * 2 + linear_tiles.DZ_BYTES + n * (d + d2) * 2 + sums + 64 * n
    assert seen.bytes - forward < bound
