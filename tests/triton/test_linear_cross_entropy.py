"""linear_cross_entropy in Triton. The bugs this file must catch: a tile's exponentials that are not brought to their
row's maximum, and rows of weight zero that shift the others' places."""

import itertools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from hpsafety import ops
from hpsafety.triton_kernels import linear_cross_entropy as kernels
from hpsafety.triton_kernels.launch import record
from tests.ops.forms import lazy_zeros
from tests.ops.oracle import run_with_grads
from tests.ops.test_linear_cross_entropy import TRAINED, make_inputs
from tests.triton.audit import audit
from tests.triton.device import DEVICE, check_triton, place
from tests.triton.linear_forms import (
    SPLIT,
    Allocated,
    M,
    N,
    blocks,
    blocks_by_part,
    real_tiles,
    small_tiles,
    traffic_of,
)

__all__ = ["real_tiles", "small_tiles"]  # fixtures
DTYPES = [torch.float32, torch.bfloat16]


def masked(args, share, seed=3):
    """(trained rows, arguments): the other rows weigh nothing."""
    trained = torch.rand(len(args["targets"]), generator=torch.Generator().manual_seed(seed)) < share
    return trained, place(args | {"row_weights": args["row_weights"] * trained})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "n, d, v", [(0, 8, 5), (1, 64, 33), (15, 5, 1), (31, 33, 127), (33, 32, 129), (130, 24, 200)]
)
def test_matches_oracle(dtype, n, d, v):
    """KER-2: loss, logprobs and gradients around the borders of tiles and of parts."""
    out = check_triton(
        "linear_cross_entropy", ops.linear_cross_entropy, make_inputs(n, d, v, dtype), grads=TRAINED
    )
    assert (out["out1"] <= 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_real_tiles(dtype, real_tiles):
    args = make_inputs(130, 40, 150, dtype)
    check_triton("linear_cross_entropy", ops.linear_cross_entropy, args, grads=TRAINED)


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_logits(dtype):
    """Tiles whose largest logits are hundreds apart, and words that are all but certain."""
    args = make_inputs(40, 24, 301, dtype, scale=100.0)
    check_triton("linear_cross_entropy", ops.linear_cross_entropy, args, grads=TRAINED)


def test_gradient_of_a_certain_target():
    """p - 1 of a target that is all but certain: from its own logit in fp32, not from a probability in bf16."""
    weight = torch.zeros(70, 8)
    weight[:, 0] = -1.0
    weight[5, 0] = 10.0
    args = {
        "hidden": torch.eye(8)[:1].repeat(3, 1), "weight": weight, "targets": torch.full((3,), 5),
        "row_weights": torch.ones(3),
    }  # fmt: skip
    args = place(args | {k: args[k].bfloat16() for k in TRAINED})
    dw = run_with_grads(ops.linear_cross_entropy, args, impl="triton", grads=TRAINED)["grad_weight"].double()
    p = torch.softmax(args["hidden"][0].double() @ args["weight"].T.double(), 0)
    factor = dw[0, 0] / p[0]  # the projection's weight of the loss, times three rows
    torch.testing.assert_close(dw[5, 0], factor * (p[5] - 1), rtol=2e-2, atol=0)


@pytest.mark.sweep
@pytest.mark.parametrize("seed", range(60))
def test_drawn_shapes(seed):
    g = torch.Generator().manual_seed(seed)
    n, d, v = (int(torch.randint(1, high, (), generator=g)) for high in (150, 100, 600))
    args = make_inputs(n, d, v, DTYPES[seed % 2], seed, 10.0 ** (seed % 3 - 1))
    if seed % 4 < 2:
        args["row_weights"] *= torch.rand(n, generator=g) < 0.7
    check_triton("linear_cross_entropy", ops.linear_cross_entropy, args, grads=TRAINED)


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_rows_of_weight_zero(share):
    """They get their logprob and no gradient; the rest is to the bit as if they had not been there. All: loss 0."""
    trained, args = masked(make_inputs(100, 24, 150), share)
    args["hidden"][~trained] *= 5
    out = run_with_grads(ops.linear_cross_entropy, args, impl="triton", grads=TRAINED)
    scored = ops.linear_logprob(args["hidden"], args["weight"], args["targets"], impl="triton")
    torch.testing.assert_close(out["out1"], scored)
    assert torch.equal(out["out1"][~trained], scored[~trained])
    kept = {k: v if k == "weight" else v[trained] for k, v in args.items()}
    alone = run_with_grads(ops.linear_cross_entropy, kept, impl="triton", grads=TRAINED)
    torch.testing.assert_close(out["out0"], alone["out0"])
    assert torch.equal(out["grad_weight"], alone["grad_weight"])
    assert torch.equal(out["grad_hidden"][trained], alone["grad_hidden"])
    assert not out["grad_hidden"][~trained].any() and (share or not out["out0"])


def test_each_subset_of_requires_grad():
    args = place(make_inputs(33, 20, 150))
    whole = run_with_grads(ops.linear_cross_entropy, args, impl="triton", grads=TRAINED)
    for subset in itertools.chain([()], [(name,) for name in TRAINED]):
        part = run_with_grads(ops.linear_cross_entropy, args, impl="triton", grads=subset)
        assert {k for k in part if k.startswith("grad")} == {f"grad_{k}" for k in subset}
        for key, value in part.items():
            torch.testing.assert_close(value, whole[key], rtol=1e-6, atol=1e-7)


def test_bad_rows_stay_alone():
    args = place(make_inputs(40, 16, 150))
    args["hidden"][3, 5] = float("nan")
    loss, logprobs = ops.linear_cross_entropy(**args, impl="triton")
    assert loss.isnan() and logprobs.isnan().tolist() == [i == 3 for i in range(40)]
    args["row_weights"][3] = 0
    out = run_with_grads(ops.linear_cross_entropy, args, impl="triton", grads=TRAINED)
    assert torch.isfinite(out["out0"]) and torch.isfinite(out["grad_weight"]).all()
    assert out["out1"].isnan().tolist() == [i == 3 for i in range(40)]


def test_rows_far_apart():
    """Rows of hidden and of the weight up to 2^31 elements and more from the first, in storages hardly touched."""
    args, step = make_inputs(33, 8, 34, torch.bfloat16), 2**26 + 16
    far = dict(args)
    for name in TRAINED:
        rows = args[name].shape[0]
        far[name] = lazy_zeros(rows * step, torch.bfloat16).view(rows, step)[:, :8]
        far[name].copy_(args[name])
    results = [kernels.linear_cross_entropy(*x.values(), True, True) for x in (far, args)]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_opcheck():
    h, w, targets, row_weights = place(make_inputs(9, 24, 70)).values()
    args = (h.requires_grad_(), w.requires_grad_(), targets, row_weights, True, True, "triton")
    torch.library.opcheck(torch.ops.hpsafety.linear_cross_entropy.default, args)


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_memory_and_traffic(share):
    """Of the trained rows hidden is read once, and the weight twice by each of their row blocks; once for the rest."""
    n, d, v, results = 100, 40, 150, []
    trained, args = masked(make_inputs(n, d, v, torch.bfloat16), share)
    kept = int(trained.sum())
    for seed in (None, 4):
        with audit(seed, **args) as seen:
            results.append(kernels.linear_cross_entropy(*args.values(), True, True))
        seen.check()
        whole = d * 2
        assert seen.traffic["hidden"].load_bytes == (kept + blocks(v, N) * (n - kept)) * whole
        rest_blocks = blocks(n - kept, M)
        assert seen.traffic["weight"].load_bytes == (2 * blocks_by_part(kept) + rest_blocks) * v * whole
        _, logprobs, dh, dw = results[-1]
        assert traffic_of(seen, logprobs).store_bytes == n * 4
        assert traffic_of(seen, dh).store_bytes == kept * whole
        assert traffic_of(seen, dw).store_bytes == v * whole
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("v", [32_000, 131_072])
def test_bound_of_memory(v, real_tiles):
    """At 2.1e9 logits: dz of one part, the rows once more, the weight's gradient in fp32, and numbers by tile."""
    n, d = 16_384, 1024
    with FakeTensorMode(), Allocated() as seen, record((9, 0)) as launches:
        hidden, weight = (torch.empty(rows, d, dtype=torch.bfloat16, device="cuda") for rows in (n, v))
        targets, row_weights = (torch.empty(n, dtype=x, device="cuda") for x in (torch.int64, torch.float32))
        kernels.linear_cross_entropy(hidden, weight, targets, row_weights, True, True)
    rows = kernels.rows_of_part(v, 2)
    assert rows * v * 2 <= kernels.DZ_BYTES
    scores = 2 * n * 4 * blocks(v, 1024) + 2 * rows * 4 * blocks(v, 128)
    assert seen.bytes < (n + v) * d * 2 + kernels.DZ_BYTES + n * d * 2 + v * d * 4 + scores + 64 * n
    assert len(launches) == 5 + 5 * blocks(n, rows)


def test_scoring_alone_makes_no_gradient():
    args = place(make_inputs(40, 16, SPLIT + 2))
    with record() as launches:
        kernels.linear_cross_entropy(*args.values(), False, False)
    names = [x.kernel.__name__ for x in launches]
    assert names == ["linear_logprob_forward", "merge_logprobs", "weighted_loss"]
    assert DEVICE == args["hidden"].device.type
