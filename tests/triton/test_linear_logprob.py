"""linear_logprob in Triton. The bugs this file must catch: a split that is merged without its rescaling, a sum that
one part of dz leaves out or takes twice, and a row without gradient that is read."""

import itertools
import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from hpsafety import ops
from hpsafety.triton_kernels import linear_logprob as kernels
from hpsafety.triton_kernels import linear_tiles
from hpsafety.triton_kernels.launch import record
from tests.ops.forms import lazy_zeros
from tests.ops.oracle import run_with_grads
from tests.ops.test_linear_logprob import make_inputs
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


def run(args, grad, grad_entropy=None, temperature=1.0, **needs):
    """Outputs and gradients, (logprobs, entropies or None, grad_hidden, grad_weight), by the launch functions."""
    outputs = kernels.linear_logprob(*args.values(), temperature, grad_entropy is not None)
    return *outputs, *backward(args, grad, grad_entropy, outputs, temperature, **needs)


def backward(args, grad, grad_entropy, outputs, temperature=1.0, need_hidden=True, need_weight=True):
    _, norm, entropies = outputs
    return kernels.linear_logprob_backward(
        grad, grad_entropy, *args.values(), norm, None if grad_entropy is None else entropies, temperature,
        need_hidden, need_weight,
    )  # fmt: skip


def incoming(n, seed=5, share=1.0):
    """Two rows of gradients, zero in the same rows."""
    g = torch.Generator().manual_seed(seed)
    trained = torch.rand(n, generator=g) < share
    grads = [torch.randn(n, generator=g) * trained for _ in range(2)]
    return trained, *(x.to(DEVICE) for x in grads)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize(
    "n, d, v", [(0, 8, 5), (1, 64, 33), (15, 5, 1), (31, 33, 127), (33, 32, 129), (65, 24, 200)]
)
def test_matches_oracle(dtype, entropy, n, d, v):
    """KER-2: forward and backward around the borders of tiles, of splits and of the parts of dz."""
    out = check_triton("linear_logprob", ops.linear_logprob, make_inputs(n, d, v, dtype), entropy=entropy)
    assert out["grad_weight"].dtype == dtype and (out["out0"] <= 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_real_tiles(dtype, real_tiles):
    args = make_inputs(130, 40, 150, dtype)
    check_triton("linear_logprob", ops.linear_logprob, args, entropy=True, temperature=0.5)


@pytest.mark.parametrize("temperature, scale", [(0.7, 1.0), (3.0, 100.0)])
def test_temperature_and_large_logits(temperature, scale):
    args = make_inputs(20, 24, 301, scale=scale)
    out = check_triton("linear_logprob", ops.linear_logprob, args, entropy=True, temperature=temperature)
    assert (out["out0"] <= 0).all() and (out["out1"] >= 0).all()


@pytest.mark.sweep
@pytest.mark.parametrize("seed", range(60))
def test_drawn_shapes(seed):
    g = torch.Generator().manual_seed(seed)
    n, d, v = (int(torch.randint(1, high, (), generator=g)) for high in (150, 100, 700))
    args = make_inputs(n, d, v, DTYPES[seed % 2], seed, scale=10.0 ** (seed % 3 - 1))
    temperature = 0.25 * (1 + seed % 7)
    check_triton(
        "linear_logprob", ops.linear_logprob, args, temperature=temperature, entropy=seed % 4 < 2
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_without_gradient(dtype):
    """They may hold anything and get exact zeros; the rest is to the bit as if they had not been there."""
    args = place(make_inputs(70, 24, 130, dtype))
    trained, grad, grad_entropy = incoming(70, share=0.6)
    *_, dh, dw = run(args, grad, grad_entropy)
    kept = {k: v if k == "weight" else v[trained] for k, v in args.items()}
    *_, alone_h, alone_w = run(kept, grad[trained], grad_entropy[trained])
    assert torch.equal(dh[trained], alone_h) and torch.equal(dw, alone_w) and not dh[~trained].any()
    outputs = kernels.linear_logprob(*args.values(), 1.0, True)
    args["hidden"][~trained] = float("nan")
    dirty_h, dirty_w = backward(args, grad, grad_entropy, outputs)
    assert torch.equal(dirty_h, dh) and torch.equal(dirty_w, dw)


def test_either_gradient_keeps_a_row():
    args = place(make_inputs(40, 16, 70))
    zeros, grad = torch.zeros(40, device=DEVICE), torch.ones(40, device=DEVICE)
    *_, dh, dw = run(args, zeros, grad)
    assert (dh != 0).any(1).all() and dw.any()
    *_, dh, dw = run(args, grad, zeros)
    assert (dh != 0).any(1).all() and dw.any()
    *_, dh, dw = run(args, zeros, zeros)
    assert not dh.any() and not dw.any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_bad_rows_stay_alone(bad):
    args = place(make_inputs(35, 16, 200))
    ones, rest = torch.ones(35, device=DEVICE), torch.arange(35) != 3
    clean = run(args, ones, ones)
    args["hidden"][3, 5] = bad
    logprobs, norm, entropies, dh, _ = run(args, ones, ones)
    for found, before in ((logprobs, clean[0]), (entropies, clean[2]), (dh, clean[3])):
        assert found[3].isnan().all() and torch.equal(found[rest], before[rest])


def test_words_of_no_probability():
    """Logits of -inf, a whole split of them, count as probability 0 and take part in nothing."""
    args = place(make_inputs(3, 8, 300))
    args["hidden"].abs_()
    words = torch.cat([torch.arange(SPLIT, 200), torch.arange(201, 300)])
    some = args | {"weight": args["weight"][words], "targets": torch.tensor([0, 5, 170], device=DEVICE)}
    args["weight"][:SPLIT] = args["weight"][200] = -float("inf")
    args["targets"] = words.to(DEVICE)[some["targets"]]
    found, exact = (kernels.linear_logprob(*x.values(), 1.0, True) for x in (args, some))
    torch.testing.assert_close(found[0], exact[0])
    torch.testing.assert_close(found[2], exact[2])
    args["targets"][1] = 200
    assert kernels.linear_logprob(*args.values(), 1.0, False)[0][1] == -math.inf


def test_ties_and_certainty():
    w = torch.ones(80, 8, device=DEVICE)
    hidden, targets = torch.ones(3, 8, device=DEVICE), torch.tensor([0, 7, 79], device=DEVICE)
    logp, entropy = ops.linear_logprob(hidden, w, targets, entropy=True, impl="triton")
    torch.testing.assert_close(logp, torch.full_like(logp, -math.log(80)))
    torch.testing.assert_close(entropy, torch.full_like(logp, math.log(80)))
    w[7] = 200.0
    logp, entropy = ops.linear_logprob(hidden, w, targets, entropy=True, impl="triton")
    assert logp[1] == 0 and not entropy.any()


def test_a_target_that_is_no_word_gives_nan():
    """Values on a GPU are not checked beforehand; nothing is read or written at such an index."""
    args = place(make_inputs(4, 8, 70))
    args["targets"] = torch.tensor([3, 70, -1, 2**40], device=DEVICE)
    assert kernels.linear_logprob(*args.values(), 1.0, False)[0].isnan().tolist() == [False, True, True, True]


def test_each_subset_of_requires_grad():
    args = place(make_inputs(33, 20, 150))
    whole = run_with_grads(ops.linear_logprob, args, impl="triton", grads=("hidden", "weight"), entropy=True)
    for subset in itertools.chain([()], [("hidden",), ("weight",)]):
        part = run_with_grads(ops.linear_logprob, args, impl="triton", grads=subset, entropy=True)
        assert {k for k in part if k.startswith("grad")} == {f"grad_{k}" for k in subset}
        assert all(torch.equal(value, whole[key]) for key, value in part.items())


def test_a_row_does_not_depend_on_its_batch():
    args = place(make_inputs(70, 40, 300))
    whole = kernels.linear_logprob(*args.values(), 1.0, True)
    for rows in (slice(0, 1), slice(7, 8), slice(30, 67)):
        part = kernels.linear_logprob(args["hidden"][rows], args["weight"], args["targets"][rows], 1.0, True)
        assert all(torch.equal(a, b[..., rows]) for a, b in zip(part, whole, strict=True))


def test_rows_far_apart():
    """Rows of hidden and of the weight up to 2^31 elements and more from the first, in storages hardly touched."""
    args, step = make_inputs(33, 8, 34, torch.bfloat16), 2**26 + 16
    far = dict(args)
    for name in ("hidden", "weight"):
        rows = args[name].shape[0]
        far[name] = lazy_zeros(rows * step, torch.bfloat16).view(rows, step)[:, :8]
        far[name].copy_(args[name])
    grad = torch.ones(33)
    for a, b in zip(run(far, grad), run(args, grad), strict=True):
        assert torch.equal(a, b)


def test_views():
    args = make_inputs(40, 66, 90)
    hidden, weight = args["hidden"][:, ::2], args["weight"][::3, 1::2]
    targets = torch.randint(0, 30, (80,), generator=torch.Generator().manual_seed(0))[::2]
    views = {"hidden": hidden, "weight": weight, "targets": targets.int()}
    check_triton("linear_logprob", ops.linear_logprob, views)
    h = hidden.to(DEVICE).clone().requires_grad_()
    out = ops.linear_logprob(h, weight.to(DEVICE), targets.to(DEVICE), impl="triton")
    (expanded,) = torch.autograd.grad(out.sum(), h)  # a gradient of stride 0
    (whole,) = torch.autograd.grad(
        ops.linear_logprob(h, weight.to(DEVICE), targets.to(DEVICE), impl="triton"), h, torch.ones_like(out)
    )
    assert torch.equal(expanded, whole)


def test_opcheck():
    h, w, targets = place(make_inputs(9, 24, 70)).values()
    args = (h.requires_grad_(), w.requires_grad_(), targets, 0.7, True, "triton")
    torch.library.opcheck(torch.ops.hpsafety.linear_logprob.default, args)


@pytest.mark.parametrize("n, d, v", [(70, 40, 300), (32, 32, 64)])
def test_memory_and_traffic_of_the_forward(n, d, v):
    """Each row block reads the weight once, each tile of words hidden once; the same bits in any order of programs."""
    args, outs = make_inputs(n, d, v, torch.bfloat16), []
    row_blocks, splits = blocks(n, M), blocks(v, SPLIT)
    for seed in (None, 1, 2):
        with audit(seed, **args) as seen:
            outs.append(kernels.linear_logprob(*args.values(), 1.0, True))
        seen.check()
        assert seen.traffic["weight"].load_bytes == row_blocks * v * d * 2
        assert seen.traffic["hidden"].load_bytes == blocks(v, N) * n * d * 2
        assert seen.traffic["targets"].load_bytes == (splits + 1) * n * 8
        for out in outs[-1]:
            assert traffic_of(seen, out).store_bytes == out.numel() * 4
        assert new_bytes(seen, *outs[-1]) == (3 * splits + 1) * n * 4
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*outs, strict=True))


@pytest.mark.parametrize("share", [1.0, 0.4])
def test_memory_and_traffic_of_the_backward(share):
    """Rows without gradient are never read, the others once; a tile of the weight twice by each row block."""
    n, d, v = 100, 40, 150
    args, results = make_inputs(n, d, v, torch.bfloat16), []
    trained, grad, grad_entropy = incoming(n, share=share)
    kept = int(trained.sum())
    outputs = kernels.linear_logprob(*args.values(), 1.0, True)
    for seed in (None, 3):
        with audit(seed, **args, grad=grad, ge=grad_entropy, norm=outputs[1], entropies=outputs[2]) as seen:
            results.append(backward(args, grad, grad_entropy, outputs))
        seen.check()
        hidden = seen.traffic["hidden"]
        assert hidden.load_bytes == hidden.load_unique == kept * d * 2
        assert seen.traffic["weight"].load_bytes == 2 * blocks_by_part(kept) * v * d * 2
        dh, dw = results[-1]
        assert traffic_of(seen, dh).store_bytes == kept * d * 2  # zeros came with the allocation
        assert traffic_of(seen, dw).store_bytes == dw.numel() * 2
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_bound_of_memory(dtype, real_tiles):
    """At 2.1e9 logits the backward holds dz of one part, the rows once more and the fp32 sums; no N x V, no sync."""
    n, d, v, item = 16_384, 1024, 131_072, dtype.itemsize
    with FakeTensorMode(), Allocated() as seen, record((9, 0)) as launches:
        hidden, weight = (torch.empty(rows, d, dtype=dtype, device="cuda") for rows in (n, v))
        targets = torch.empty(n, dtype=torch.int64, device="cuda")
        logprobs, norm, _ = kernels.linear_logprob(hidden, weight, targets, 1.0, False)
        forward = seen.bytes
        kernels.linear_logprob_backward(
            logprobs, None, hidden, weight, targets, norm, None, 1.0, True, True
        )  # fmt: skip
    assert forward < 2 * n * 4 * blocks(v, linear_tiles.WORDS_PER_SPLIT) + 64 * n
    rows, words = linear_tiles.dz_part(item)
    assert rows * words * item == linear_tiles.DZ_BYTES
    sums = (n + words) * d * 4 if item == 2 else 0
    gradients = (n + v) * d * item
    assert seen.bytes - forward < gradients + linear_tiles.DZ_BYTES + n * d * item + sums + 64 * n
    assert len(launches) == 4 + 3 * blocks(n, rows) * blocks(v, words)
