"""linear_cross_entropy. The bug this file must catch: a gradient that ignores the row's weight, or is scaled twice."""

import itertools
import math

import pytest
import torch

from hpsafety import ops, reference
from tests.ops.forms import PAST_INT32, check_same_bits, lazy_zeros
from tests.ops.oracle import check_against_oracle, run_with_grads
from tests.ops.test_linear_logprob import make_inputs as logprob_inputs

TRAINED = ("hidden", "weight")


def make_inputs(n, d, v, dtype=torch.float32, seed=0, scale=1.0):
    args = logprob_inputs(n, d, v, dtype, seed, scale)
    return args | {
        "row_weights": torch.rand(n, generator=torch.Generator().manual_seed(seed + 1)) / max(1, n)
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "n, d, v",
    [(0, 8, 5), (1, 64, 33), (15, 5, 3), (17, 33, 2049), (257, 123, 507), (300, 64, 5003), (513, 16, 4096)],
)
def test_matches_oracle(dtype, n, d, v):
    """KER-2: loss, logprobs and gradients against fp64 over odd sizes and block borders."""
    args = make_inputs(n, d, v, dtype)
    out = check_against_oracle("linear_cross_entropy", ops.linear_cross_entropy, args, grads=TRAINED)
    assert out["out0"].dtype == out["out1"].dtype == torch.float32 and (out["out1"] <= 0).all()


@pytest.mark.parametrize("seed", range(24))
def test_random_shapes(seed):
    """KER-2 on drawn shapes, scales and dtypes; every second draw leaves a third of the rows out."""
    g = torch.Generator().manual_seed(seed)
    n, d, v = (int(torch.randint(1, high, (), generator=g)) for high in (600, 60, 4000))
    args = make_inputs(n, d, v, (torch.float32, torch.bfloat16)[seed % 2], seed, 10.0 ** (seed % 3 - 1))
    if seed % 4 < 2:
        args["row_weights"] *= torch.rand(n, generator=g) < 0.7
    check_against_oracle("linear_cross_entropy", ops.linear_cross_entropy, args, grads=TRAINED)


def test_large_logits():
    check_against_oracle(
        "linear_cross_entropy", ops.linear_cross_entropy, make_inputs(40, 24, 3001, scale=300.0), grads=TRAINED
    )  # fmt: skip


def test_agrees_with_linear_logprob():
    args = make_inputs(300, 24, 3000)
    loss, logprobs = ops.linear_cross_entropy(**args, impl="cpu")
    others = ops.linear_logprob(args["hidden"], args["weight"], args["targets"], impl="cpu")
    torch.testing.assert_close(logprobs, others, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(loss, -(args["row_weights"] * others).sum())


def test_each_subset_of_requires_grad():
    args = make_inputs(33, 20, 300)
    whole = run_with_grads(ops.linear_cross_entropy, args, impl="cpu", grads=TRAINED)
    for size in range(2):
        for subset in itertools.combinations(TRAINED, size):
            part = run_with_grads(ops.linear_cross_entropy, args, impl="cpu", grads=subset)
            assert {k for k in part if k.startswith("grad")} == {f"grad_{k}" for k in subset}
            for key, value in part.items():
                torch.testing.assert_close(value, whole[key], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("share", [0.0, 0.4])
def test_rows_of_weight_zero(share):
    """They get their logprob and no gradient; the rest is as if they had not been there. All masked: loss 0."""
    args = make_inputs(120, 24, 3000)
    trained = torch.rand(120, generator=torch.Generator().manual_seed(3)) < share
    args["row_weights"] *= trained
    args["hidden"][~trained] *= 5
    out = run_with_grads(ops.linear_cross_entropy, args, impl="cpu", grads=TRAINED)
    assert not out["grad_hidden"][~trained].any()
    torch.testing.assert_close(
        out["out1"], reference.linear_logprob(args["hidden"], args["weight"], args["targets"])
    )
    kept = {k: v if k == "weight" else v[trained] for k, v in args.items()}
    alone = run_with_grads(ops.linear_cross_entropy, kept, impl="cpu", grads=TRAINED)
    assert torch.equal(out["grad_weight"], alone["grad_weight"]) and torch.equal(out["out0"], alone["out0"])
    assert torch.equal(out["grad_hidden"][trained], alone["grad_hidden"])


def test_scales_by_the_incoming_gradient_and_gives_it_away():
    args = make_inputs(20, 16, 50)
    h, w = args["hidden"].requires_grad_(), args["weight"].requires_grad_()
    call = lambda: ops.linear_cross_entropy(h, w, args["targets"], args["row_weights"], impl="cpu")  # noqa: E731
    once, thrice = torch.autograd.grad(call()[0], (h, w)), torch.autograd.grad(call()[0] * 3, (h, w))
    for a, b in zip(once, thrice, strict=True):
        torch.testing.assert_close(3 * a, b)
    loss, logprobs = call()
    assert not logprobs.requires_grad
    loss.backward(retain_graph=True)
    torch.testing.assert_close(w.grad, once[1])
    with pytest.raises(RuntimeError, match="backward runs once"):
        loss.backward()


def test_no_gradient_work_without_grad():
    args = make_inputs(20, 16, 50)
    args["hidden"].requires_grad_()
    with torch.no_grad():
        loss, _ = ops.linear_cross_entropy(**args, impl="cpu")
    assert not loss.requires_grad
    torch.testing.assert_close(loss, ops.linear_cross_entropy(**args, impl="cpu")[0].detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_and_repeats_change_no_bit(dtype, threads):
    args, small = make_inputs(400, 40, 4500, dtype), make_inputs(40, 16, 2100, dtype)
    check_same_bits(ops.linear_cross_entropy, args, threads, repeats=3, grads=TRAINED)
    check_same_bits(ops.linear_cross_entropy, small, threads, grads=TRAINED)


def test_non_contiguous():
    args = make_inputs(40, 66, 90)
    views = {"hidden": args["hidden"][:, ::2], "weight": args["weight"].t()[1::2].t()}
    views["targets"] = args["targets"].repeat_interleave(2)[::2]
    views["row_weights"] = args["row_weights"].repeat_interleave(2)[::2]
    ours = run_with_grads(ops.linear_cross_entropy, views, impl="cpu", grads=TRAINED)
    dense = {k: v.contiguous() for k, v in views.items()}
    for name, value in run_with_grads(ops.linear_cross_entropy, dense, impl="cpu", grads=TRAINED).items():
        assert torch.equal(ours[name], value), name
    one = views | {"row_weights": torch.full((), 0.1).expand(40)}  # stride 0
    check_against_oracle("linear_cross_entropy", ops.linear_cross_entropy, one, grads=TRAINED)


def test_offsets_past_32_bits():
    """A weight of more than 2^31 elements, zeros but for its last word: exact loss and gradient of hidden."""
    d = 4096
    v = PAST_INT32 // d + 4096  # so that whole tiles of words lie beyond
    weight = lazy_zeros(v * d).view(v, d)
    weight[-1] = 1
    hidden = torch.full((1, d), 2.0**-9, requires_grad=True)  # the last word's logit is 8
    loss, _ = ops.linear_cross_entropy(hidden, weight, torch.tensor([v - 1]), torch.ones(1), impl="cpu")
    norm = math.log(math.exp(8) + v - 1)
    torch.testing.assert_close(loss.detach(), torch.tensor(norm - 8))
    loss.backward()
    torch.testing.assert_close(hidden.grad, torch.full((1, d), math.exp(8 - norm) - 1))


@pytest.mark.slow
def test_more_logits_than_32_bits_count():
    """N * V past 2^31: the rows of one chunk, repeated, give that chunk's bits again."""
    v, d, chunk = 32_800, 4, 256
    args = make_inputs(chunk, d, v)
    many = PAST_INT32 // v // chunk + 1
    whole = args | {k: x.repeat(many, *[1] * (x.dim() - 1)) for k, x in args.items() if k != "weight"}
    assert whole["hidden"].shape[0] * v > 2**31
    one = run_with_grads(ops.linear_cross_entropy, args, impl="cpu", grads=TRAINED)
    out = run_with_grads(ops.linear_cross_entropy, whole, impl="cpu", grads=TRAINED)
    assert torch.equal(out["out1"], one["out1"].repeat(many))
    assert torch.equal(out["grad_hidden"], one["grad_hidden"].repeat(many, 1))
    torch.testing.assert_close(out["grad_weight"], one["grad_weight"] * many, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(out["out0"], one["out0"] * many)


def test_bad_rows_stay_alone():
    args = make_inputs(20, 16, 3000)
    args["hidden"][3, 5] = float("nan")
    _, logprobs = ops.linear_cross_entropy(**args, impl="cpu")
    assert logprobs.isnan().tolist() == [i == 3 for i in range(20)]
    args["row_weights"][3] = 0
    out = run_with_grads(ops.linear_cross_entropy, args, impl="cpu", grads=TRAINED)
    assert torch.isfinite(out["out0"]) and torch.isfinite(out["grad_weight"]).all()


def test_reference_gradcheck():
    args = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in [(4, 3), (6, 3)]]
    targets, weights = torch.tensor([0, 5, 2, 2]), torch.rand(4, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda h, w: reference.linear_cross_entropy(h, w, targets, weights)[0], args
    )


def test_opcheck():
    h, w, targets, row_weights = make_inputs(9, 24, 70).values()
    h.requires_grad_(), w.requires_grad_()
    eager = ops.linear_cross_entropy(h, w, targets, row_weights, impl="cpu")
    args = (h, w, targets, row_weights, True, True, "cpu")
    torch.library.opcheck(torch.ops.hpsafety.linear_cross_entropy.default, args)
    through_dispatcher = torch.ops.hpsafety.linear_cross_entropy(*args)
    assert torch.equal(through_dispatcher[0], eager[0]) and torch.equal(through_dispatcher[1], eager[1])


@pytest.mark.slow
def test_compile():
    args = make_inputs(20, 24, 70)
    compiled = torch.compile(lambda **kw: ops.linear_cross_entropy(**kw, impl="cpu"), fullgraph=True)
    ours = run_with_grads(compiled, args, grads=TRAINED)
    plain = run_with_grads(ops.linear_cross_entropy, args, impl="cpu", grads=TRAINED)
    assert ours.keys() == plain.keys() and all(torch.equal(ours[k], plain[k]) for k in plain)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"row_weights": torch.zeros(2)}, r"row_weights must be \(3,\)"),
        ({"row_weights": torch.zeros(3, dtype=torch.float64)}, "row_weights must be"),
        ({"row_weights": torch.zeros(3, device="meta")}, r"row_weights must be .* on cpu, got .* on meta"),
        ({"weight": torch.zeros(5, 8, device="meta")}, r"weight must be .* on cpu .* on meta"),
        (
            {n: torch.zeros(k, 8).double() for n, k in (("hidden", 3), ("weight", 5))},
            "hidden must be float32 or",
        ),
        ({"targets": torch.tensor([0, 5, 1])}, r"linear_cross_entropy: targets must lie in \[0, 5\)"),
        ({"weight": torch.zeros(5, 7)}, "linear_cross_entropy: weight must be"),
    ],
)
def test_bad_arguments(change, message):
    args = {
        "hidden": torch.zeros(3, 8),
        "weight": torch.zeros(5, 8),
        "targets": torch.zeros(3, dtype=torch.int64),
    }
    with pytest.raises(ValueError, match=message):
        ops.linear_cross_entropy(**(args | {"row_weights": torch.zeros(3)} | change), impl="cpu")
