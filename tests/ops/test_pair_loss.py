"""pair_loss. The bug this file must catch: the margin added instead of subtracted."""

import itertools
import math

import pytest
import torch

from hpsafety import ops, reference
from tests.ops.oracle import check_against_oracle, run_with_grads

MARGINS = {"none": (0, 0, 0, 0), "small": (1, 2 / 3, 1 / 3, 0), "large": (3, 2, 1, 0)}
GRADS = ("chosen", "rejected")


def make_inputs(p, dtype=torch.float32, seed=0, bins=True, scale=2.0):
    g = torch.Generator().manual_seed(seed)
    args = {k: torch.randn(p, generator=g).mul(scale).to(dtype) for k in GRADS}
    args["margin"] = torch.randint(0, 4, (p,), generator=g).to(dtype)
    if bins:
        args |= {
            k: torch.randint(-1, 2, (p,), generator=g).to(torch.int8)
            for k in ("safe_chosen", "safe_rejected")
        }
    return args


def run(args, grads=GRADS, **kwargs):
    return run_with_grads(ops.pair_loss, args, grads=grads, impl="cpu", **kwargs)


def gradients(c, r, *args, **kwargs):
    c, r = c.clone().requires_grad_(), r.clone().requires_grad_()
    return torch.autograd.grad(ops.pair_loss(c, r, *args, impl="cpu", **kwargs), (c, r))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bins", [False, True])
@pytest.mark.parametrize("p", [0, 1, 7, 15, 16, 17, 512, 4095, 4096, 4097])
def test_matches_oracle(dtype, bins, p):
    """KER-2: value and gradients against fp64 over odd sizes and block borders."""
    out = check_against_oracle(
        "pair_loss", ops.pair_loss, make_inputs(p, dtype, bins=bins), aux_weight=float(bins)
    )
    assert out["out0"].dtype == torch.float32 and out["out0"].dim() == 0
    assert {k for k in out if k.startswith("grad")} == {"grad_chosen", "grad_rejected"}


@pytest.mark.parametrize("seed", range(25))
def test_random_sweep(seed):
    g = torch.Generator().manual_seed(100 + seed)
    p = int(torch.randint(0, 700, (), generator=g))
    args = make_inputs(
        p, torch.bfloat16 if seed % 3 == 0 else torch.float32, seed, scale=float(10 ** (seed % 4 - 1))
    )
    if seed % 4 == 0:
        args["margin"] = 1 / 3
    if seed % 5 == 0:
        del args["safe_rejected"]
    num_pairs = (None, 2 * p + 1, torch.tensor(3 * p + 1))[seed % 3]
    weight = float(torch.rand((), generator=g))
    check_against_oracle("pair_loss", ops.pair_loss, args, aux_weight=weight, num_pairs=num_pairs)


@pytest.mark.parametrize("variant", MARGINS)
@pytest.mark.parametrize("rating", range(4))
@pytest.mark.parametrize("gap", [-80.0, -3.0, -0.1, 0.0, 0.7, 4.0, 80.0, 500.0, -500.0])
def test_ranking_loss(variant, rating, gap):
    """RM-1, RM-2: 3 margins x 4 ratings against a float64 formula; the gradient is -sigmoid(-(gap - m)), and the
    opposite; finite at gaps of +-80 and more."""
    margin = MARGINS[variant][rating]
    c, r = torch.tensor([gap + 1]), torch.tensor([1.0])
    x = gap - margin
    loss = float(ops.pair_loss(c, r, margin, impl="cpu"))
    exact = math.log1p(math.exp(-x)) if x > 0 else math.log1p(math.exp(x)) - x
    assert math.isfinite(loss) and abs(loss - exact) <= 1e-6 * max(1, exact)
    dc, dr = gradients(c, r, margin)
    sigmoid = 1 / (1 + math.exp(x)) if x < 700 else 0.0
    assert abs(float(dc) + sigmoid) <= 1e-6 and float(dr) == -float(dc)
    assert float(dc) < 0 or gap > 80, "a pair in the right order still has a gradient"
    row = torch.tensor([margin], dtype=torch.float32)
    assert torch.equal(ops.pair_loss(c, r, row, impl="cpu"), ops.pair_loss(c, r, margin, impl="cpu"))


@pytest.mark.parametrize("bins", [(1, 0), (1, 1), (0, 0), (-1, -1), (1, -1), (-1, 0)])
@pytest.mark.parametrize("scores", [(1.5, -0.5), (-2.0, 3.0), (90.0, -90.0), (-90.0, 90.0)])
def test_auxiliary_loss(bins, scores):
    """RM-3: L_aux against float64 for each bin; a response without a bin adds 0."""

    def softplus(x):
        return max(x, 0) + math.log1p(math.exp(-abs(x)))

    exact = sum(softplus(-r if s else r) / 2 for s, r in zip(bins, scores, strict=True) if s >= 0)
    slopes = [((1 / (1 + math.exp(-r))) - s) / 2 if s >= 0 else 0 for s, r in zip(bins, scores, strict=True)]
    c, r = (torch.tensor([x]) for x in scores)
    safe = [torch.tensor([s], dtype=torch.int8) for s in bins]
    without, within = (ops.pair_loss(c, r, 0.0, *safe, aux_weight=w, impl="cpu") for w in (0.0, 1.0))
    assert abs(float(within) - float(without) - exact) <= 1e-6 * max(1, float(within))
    base, full = gradients(c, r, 0.0), gradients(c, r, 0.0, *safe, aux_weight=1.0)
    for i in range(2):
        assert abs(float(full[i] - base[i]) - slopes[i]) <= 1e-6


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_without_weight_the_bins_change_no_bit(impl):
    """RM-3: aux_weight = 0 equals the pure ranking run, and so does any weight where no pair has a bin."""
    args = make_inputs(333)
    pure = {k: args[k] for k in ("chosen", "rejected", "margin")}
    none = torch.full((333,), -1, dtype=torch.int8)
    plain = run_with_grads(ops.pair_loss, pure, grads=GRADS, impl=impl)
    unweighted = run_with_grads(ops.pair_loss, args, grads=GRADS, impl=impl, aux_weight=0.0)
    unbinned = run_with_grads(
        ops.pair_loss,
        pure | {"safe_chosen": none, "safe_rejected": none},
        grads=GRADS,
        impl=impl,
        aux_weight=1.0,
    )
    for key in plain:
        assert torch.equal(plain[key], unweighted[key]) and torch.equal(plain[key], unbinned[key])


@pytest.mark.parametrize("kind", ["number", "tensor"])
def test_micro_batches_add_up(kind):
    """RM-8: accumulation with a global num_pairs equals one big batch."""
    args = make_inputs(500)
    count = 500 if kind == "number" else torch.tensor(500)
    whole = run(args, aux_weight=0.5)
    for borders in [(0, 1, 500), (0, 100, 100, 317, 500)]:
        parts = [
            run({k: v[a:b] for k, v in args.items()}, aux_weight=0.5, num_pairs=count)
            for a, b in itertools.pairwise(borders)
        ]
        torch.testing.assert_close(sum(p["out0"] for p in parts), whole["out0"], rtol=1e-6, atol=0)
        for name in GRADS:
            joined = torch.cat([p[f"grad_{name}"] for p in parts])
            torch.testing.assert_close(joined, whole[f"grad_{name}"], rtol=1e-6, atol=0)


def test_no_pairs():
    args = make_inputs(4)
    for changed, num_pairs in [
        ({k: v[:0] for k, v in args.items()}, None),
        (args, 0),
        (args, torch.tensor(0)),
    ]:
        out = run(changed, aux_weight=1.0, num_pairs=num_pairs)
        assert all(not v.any() for v in out.values())


def test_not_finite():
    """NaN propagates; a gap of +inf costs nothing, -inf without bound; a score without a bin may not be read."""
    inf, nan = float("inf"), float("nan")
    zero = torch.zeros(1)
    for gap, loss, slope in [(inf, 0.0, 0.0), (-inf, inf, -1.0), (nan, nan, nan)]:
        c = torch.tensor([gap])
        torch.testing.assert_close(
            ops.pair_loss(c, zero, 0.0, impl="cpu"), torch.tensor(loss), equal_nan=True
        )
        torch.testing.assert_close(gradients(c, zero, 0.0)[0], torch.tensor([slope]), equal_nan=True)


def test_gradients_are_scaled_and_go_to_the_scores_alone():
    args = make_inputs(40)
    leaves = {k: v.clone().requires_grad_(v.is_floating_point()) for k, v in args.items()}
    (ops.pair_loss(**leaves, aux_weight=1.0, impl="cpu") * 3).backward()
    assert leaves["margin"].grad is None
    dc, dr = gradients(*args.values(), aux_weight=1.0)
    torch.testing.assert_close(leaves["chosen"].grad, dc * 3)
    torch.testing.assert_close(leaves["rejected"].grad, dr * 3)
    for subset in [(), ("chosen",), ("rejected",)]:
        part, whole = run(args, subset, aux_weight=1.0), run(args, aux_weight=1.0)
        assert {k for k in part if k.startswith("grad")} == {f"grad_{k}" for k in subset}
        assert all(torch.equal(part[k], whole[k]) for k in part)


def test_non_contiguous():
    args = make_inputs(300)
    apart = {k: torch.stack((v, v), 1)[:, 0] for k, v in args.items()}
    a, b = run(args, aux_weight=1.0), run(apart, aux_weight=1.0)
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_and_repeats_change_no_bit(dtype):
    args = make_inputs(33_001, dtype)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        first = run(args, aux_weight=0.7)
        for threads in (1, 2, 3) * 33 + (1,):
            torch.set_num_threads(threads)
            again = run(args, aux_weight=0.7)
            assert all(torch.equal(first[k], again[k]) for k in first), threads
    finally:
        torch.set_num_threads(before)


def test_reference_gradcheck():
    c, r, margin, *safe = make_inputs(12).values()
    leaves = [c.double().requires_grad_(), r.double().requires_grad_()]
    assert torch.autograd.gradcheck(lambda c, r: reference.pair_loss(c, r, margin, *safe, 0.7), leaves)


@pytest.mark.parametrize("tensors", [False, True])
def test_opcheck(tensors):
    c, r, margin, *safe = make_inputs(19).values()
    c.requires_grad_(), r.requires_grad_()
    count = torch.tensor(30) if tensors else None
    eager = ops.pair_loss(c, r, margin if tensors else 0.5, *safe, 1.0, num_pairs=count, impl="cpu")
    arguments = (c, r, margin if tensors else None, 0.5, *safe, 1.0, None, count, "cpu")
    torch.library.opcheck(torch.ops.hpsafety.pair_loss.default, arguments)
    assert torch.equal(torch.ops.hpsafety.pair_loss(*arguments)[0], eager)


@pytest.mark.slow
def test_compile():
    args = make_inputs(40)
    compiled = torch.compile(lambda **kw: ops.pair_loss(**kw, aux_weight=1.0, impl="cpu"), fullgraph=True)
    ours, plain = run_with_grads(compiled, args, grads=GRADS), run(args, aux_weight=1.0)
    assert all(torch.equal(ours[k], plain[k]) for k in plain)


def test_backends_are_told_apart():
    args = make_inputs(10)
    before = reference.calls["pair_loss"]
    assert torch.equal(ops.pair_loss(**args), ops.pair_loss(**args, impl="cpu"))
    assert reference.calls["pair_loss"] == before
    ops.pair_loss(**args, impl="reference")
    assert reference.calls["pair_loss"] == before + 1


@pytest.mark.parametrize(
    "change, message",
    [
        ({"chosen": torch.zeros(3, 1)}, "chosen must be"),
        ({"chosen": torch.zeros(3, dtype=torch.float64)}, "chosen must be"),
        ({"rejected": torch.zeros(2)}, "rejected must be"),
        ({"margin": torch.zeros(2)}, "margin must be"),
        ({"margin": torch.zeros(3, dtype=torch.int64)}, "margin must be"),
        ({"margin": float("nan")}, "margin must be finite"),
        ({"safe_chosen": torch.zeros(3)}, r"safe_chosen must be \(3,\) int8"),
        ({"safe_rejected": torch.zeros(2, dtype=torch.int8)}, "safe_rejected must be"),
        (
            {"safe_rejected": torch.tensor([0, 2, -1], dtype=torch.int8)},
            "safe_rejected must hold .* from -1 to 2",
        ),
        ({"aux_weight": -1.0}, "aux_weight must be"),
        ({"num_pairs": -1}, "num_pairs must be"),
        ({"num_pairs": torch.ones(2)}, "num_pairs must be"),
    ],
)
def test_bad_arguments(change, message):
    args = {"chosen": torch.zeros(3), "rejected": torch.zeros(3), "margin": 0.0}
    with pytest.raises(ValueError, match=message):
        ops.pair_loss(**(args | change), impl="cpu")


def test_kernel_refuses_rows_of_other_lengths():
    row, short = torch.zeros(5), torch.zeros(4, dtype=torch.int8)
    for arguments in [(row, torch.zeros(4), None, 0.0, None, None), (row, row, None, 0.0, short, None)]:
        with pytest.raises(ValueError, match="must be"):
            torch.ops.hpsafety.pair_loss(*arguments, 1.0, None, None, "cpu")


def test_rows_past_two_to_the_31(far_rows):
    near = make_inputs(100)
    far = {k: far_rows(v) if v.is_floating_point() else v for k, v in near.items()}
    a, b = run(near, aux_weight=1.0), run(far, aux_weight=1.0)
    assert all(torch.equal(a[k], b[k]) for k in a)
