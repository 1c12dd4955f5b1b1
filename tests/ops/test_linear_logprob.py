"""linear_logprob. The bugs this file must catch: a missing max-subtraction, and a wrong temperature factor in the
gradient."""

import itertools
import math

import pytest
import torch

from hpsafety import ops, reference
from tests.ops.forms import PAST_INT32, check_same_bits, lazy_zeros
from tests.ops.oracle import check_against_oracle, check_error, run_with_grads


def make_inputs(n, d, v, dtype=torch.float32, seed=0, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    return {
        "hidden": torch.randn(n, d, generator=g).mul(scale).to(dtype),
        "weight": torch.randn(v, d, generator=g).mul(d**-0.5).to(dtype),
        "targets": torch.randint(0, v, (n,), generator=g),
    }


def gradients(args, grad, grad_entropy=None, **kwargs):
    h, w = args["hidden"].clone().requires_grad_(), args["weight"].clone().requires_grad_()
    out = ops.linear_logprob(h, w, args["targets"], entropy=grad_entropy is not None, impl="cpu", **kwargs)
    outputs, incoming = (out, (grad, grad_entropy)) if grad_entropy is not None else ((out,), (grad,))
    return torch.autograd.grad(outputs, (h, w), incoming)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "n, d, v",
    [
        (0, 8, 5),
        (1, 64, 33),
        (15, 5, 1),
        (16, 12, 7),
        (17, 33, 2049),
        (257, 123, 507),
        (300, 64, 5003),
        (513, 16, 4096),
    ],
)
@pytest.mark.parametrize("entropy", [False, True])
def test_matches_oracle(dtype, n, d, v, entropy):
    """KER-2: forward and backward against fp64 over odd sizes and block borders."""
    out = check_against_oracle(
        "linear_logprob", ops.linear_logprob, make_inputs(n, d, v, dtype), entropy=entropy
    )
    assert out["out0"].dtype == torch.float32 and out["grad_weight"].dtype == dtype
    assert (out["out0"] <= 0).all()


@pytest.mark.parametrize("seed", range(24))
def test_random_shapes(seed):
    """KER-2 on drawn shapes, scales, temperatures and dtypes."""
    g = torch.Generator().manual_seed(seed)
    n, d, v = (int(torch.randint(1, high, (), generator=g)) for high in (300, 100, 6000))
    dtype, temperature = (torch.float32, torch.bfloat16)[seed % 2], 0.25 * (1 + seed % 7)
    args = make_inputs(n, d, v, dtype, seed, scale=10.0 ** (seed % 3 - 1))
    check_against_oracle(
        "linear_logprob", ops.linear_logprob, args, temperature=temperature, entropy=seed % 4 < 2
    )


@pytest.mark.parametrize("temperature", [0.7, 3.0])
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_temperature_and_large_logits(temperature, scale):
    """KER-2: extreme values: logits of several hundred neither overflow nor lose the gradient's temperature."""
    args = make_inputs(40, 24, 3001, scale=scale)
    out = check_against_oracle(
        "linear_logprob", ops.linear_logprob, args, temperature=temperature, entropy=True
    )
    assert (out["out0"] <= 0).all() and (out["out1"] >= 0).all()


def test_more_rows_than_a_group():
    args = make_inputs(4099, 4, 40)
    check_against_oracle("linear_logprob", ops.linear_logprob, args, entropy=True)


def test_each_subset_of_requires_grad():
    args = make_inputs(33, 20, 300)
    names = ("hidden", "weight")
    whole = run_with_grads(ops.linear_logprob, args, impl="cpu", grads=names, entropy=True)
    for size in range(len(names)):
        for subset in itertools.combinations(names, size):
            part = run_with_grads(ops.linear_logprob, args, impl="cpu", grads=subset, entropy=True)
            assert {k for k in part if k.startswith("grad")} == {f"grad_{k}" for k in subset}
            for key, value in part.items():
                assert torch.equal(value, whole[key]), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_untrained_rows_are_skipped(dtype):
    """Rows with zero gradients: exactly zero grad_hidden, and the rest as if they had not been there."""
    args = make_inputs(120, 24, 3000, dtype)
    g = torch.Generator().manual_seed(5)
    grad, grad_entropy = torch.randn(120, generator=g), torch.randn(120, generator=g)
    trained = torch.rand(120, generator=g) < 0.4
    dh, dw = gradients(args, grad * trained, grad_entropy * trained)
    assert not dh[~trained].any()
    kept = {"hidden": args["hidden"][trained], "weight": args["weight"], "targets": args["targets"][trained]}
    alone_h, alone_w = gradients(kept, grad[trained], grad_entropy[trained])
    assert torch.equal(dh[trained], alone_h) and torch.equal(dw, alone_w)
    nothing = gradients(args, torch.zeros(120), torch.zeros(120))
    assert not nothing[0].any() and not nothing[1].any()
    only_entropy = gradients(args, torch.zeros(120), grad_entropy)
    assert only_entropy[0].any() and only_entropy[1].any()


def test_untrained_rows_may_hold_anything():
    args = make_inputs(20, 16, 50)
    args["hidden"][3] = float("nan")
    grad = torch.ones(20).index_fill_(0, torch.tensor([3]), 0.0)
    dh, dw = gradients(args, grad)
    assert torch.isfinite(dw).all() and torch.isfinite(dh).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_bad_rows_stay_alone(bad):
    args = make_inputs(20, 16, 3000)
    clean = ops.linear_logprob(**args, entropy=True, impl="cpu")
    args["hidden"][3, 5] = bad
    out = ops.linear_logprob(**args, entropy=True, impl="cpu")
    rest = torch.arange(20) != 3
    for found, before in zip(out, clean, strict=True):
        assert found[3].isnan() and torch.equal(found[rest], before[rest])
    dh, _ = gradients(args, torch.ones(20), torch.ones(20))
    assert dh[3].isnan().all() and torch.isfinite(dh[rest]).all()


def test_ties_and_certainty():
    """Equal logits: uniform, entropy log V; one word far above all others: logprob 0, entropy 0."""
    w = torch.ones(40, 8)
    logp, entropy = ops.linear_logprob(
        torch.randn(3, 8), w, torch.tensor([0, 7, 39]), entropy=True, impl="cpu"
    )
    torch.testing.assert_close(logp, torch.full((3,), 40.0).log().neg())
    torch.testing.assert_close(entropy, torch.full((3,), 40.0).log())
    w[7] = 200.0
    logp, entropy = ops.linear_logprob(torch.ones(1, 8), w, torch.tensor([7]), entropy=True, impl="cpu")
    assert logp.item() == 0 and entropy.item() == 0


def test_gradient_of_logprob_sums_to_zero_over_words():
    args = make_inputs(30, 12, 700)
    _, dw = gradients(args, torch.ones(30), temperature=0.5)
    check_error("sum of dlogits", dw.sum(0), torch.zeros(12).double(), torch.full((12,), 1e-5))


def test_a_row_does_not_depend_on_its_batch():
    """Bit-equal alone, in a part and in the whole batch (short batches are padded to 16 rows)."""
    args = make_inputs(600, 64, 2500)
    whole = ops.linear_logprob(**args, entropy=True, impl="cpu")
    for first, last in [(0, 1), (7, 8), (590, 600), (100, 117), (200, 457)]:
        rows = slice(first, last)
        part = ops.linear_logprob(
            args["hidden"][rows], args["weight"], args["targets"][rows], entropy=True, impl="cpu"
        )  # fmt: skip
        for one, all_rows in zip(part, whole, strict=True):
            assert torch.equal(one, all_rows[rows])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_and_repeats_change_no_bit(dtype, threads):
    check_same_bits(ops.linear_logprob, make_inputs(700, 40, 4500, dtype), threads, repeats=3, entropy=True)
    check_same_bits(ops.linear_logprob, make_inputs(40, 16, 2100, dtype), threads, entropy=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_offsets_past_32_bits(dtype):
    """A weight of more than 2^31 elements, zeros but for its last word: exact values for that word and for another."""
    d = 4096
    v = PAST_INT32 // d + 4096  # so that whole tiles of words lie beyond
    weight = lazy_zeros(v * d, dtype).view(v, d)
    weight[-1] = 1
    hidden = torch.full((2, d), 2.0**-9, dtype=dtype)  # the last word's logit is 8
    logprobs = ops.linear_logprob(hidden, weight, torch.tensor([v - 1, 0]), impl="cpu")
    norm = math.log(math.exp(8) + v - 1)
    torch.testing.assert_close(logprobs, torch.tensor([8 - norm, -norm]))


@pytest.mark.slow
def test_more_logits_than_32_bits_count():
    """N * V past 2^31, forward and backward: the rows of one block, repeated, give that block's bits again."""
    v, d, block = 32_800, 4, 4096
    args = make_inputs(block, d, v)
    many = PAST_INT32 // v // block + 1
    whole = args | {k: args[k].repeat(many, *[1] * (args[k].dim() - 1)) for k in ("hidden", "targets")}
    assert whole["hidden"].shape[0] * v > 2**31
    one = run_with_grads(ops.linear_logprob, args, impl="cpu", grads=())
    out = run_with_grads(ops.linear_logprob, whole, impl="cpu", grads=())
    assert torch.equal(out["out0"], one["out0"].repeat(many))
    n = whole["hidden"].shape[0]
    dh, dw = gradients(whole, torch.ones(n))
    dh_one, dw_one = gradients(args, torch.ones(block))
    assert torch.equal(dh, dh_one.repeat(many, 1))
    torch.testing.assert_close(dw, dw_one * many, rtol=1e-4, atol=1e-3)


def test_non_contiguous():
    args = make_inputs(40, 66, 90)
    hidden, weight = args["hidden"][:, ::2], args["weight"][::3, 1::2]
    targets = torch.randint(0, 30, (80,))[::2]
    check_against_oracle(
        "linear_logprob", ops.linear_logprob, {"hidden": hidden, "weight": weight, "targets": targets}
    )
    plain = reference.linear_logprob(hidden, weight, targets)
    torch.testing.assert_close(ops.linear_logprob(hidden, weight, targets.int(), impl="cpu"), plain)
    h = hidden.clone().requires_grad_()
    expanded = torch.autograd.grad(ops.linear_logprob(h, weight, targets, impl="cpu").sum(), h)[0]  # stride 0
    torch.testing.assert_close(
        expanded, gradients({"hidden": hidden, "weight": weight, "targets": targets}, torch.ones(40))[0]
    )


def test_reference_gradcheck():
    args = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in [(4, 3), (6, 3)]]
    targets = torch.tensor([0, 5, 2, 2])
    assert torch.autograd.gradcheck(lambda h, w: reference.linear_logprob(h, w, targets, 0.7, True), args)


@pytest.mark.parametrize("entropy", [False, True])
def test_opcheck(entropy):
    h, w, targets = make_inputs(9, 24, 70).values()
    h.requires_grad_(), w.requires_grad_()
    args = (h, w, targets, 0.7, entropy, "cpu")
    ops.linear_logprob(*args[:-1], impl="cpu")  # loads the kernels
    torch.library.opcheck(torch.ops.hpsafety.linear_logprob.default, args)
    through_dispatcher = torch.ops.hpsafety.linear_logprob(*args)[0]
    eager = ops.linear_logprob(*args[:-1], impl="cpu")
    assert torch.equal(through_dispatcher, eager[0] if entropy else eager)


@pytest.mark.slow
def test_compile():
    args = make_inputs(20, 24, 70)
    compiled = torch.compile(lambda **kw: ops.linear_logprob(**kw, entropy=True, impl="cpu"), fullgraph=True)
    ours, plain = (
        run_with_grads(compiled, args),
        run_with_grads(ops.linear_logprob, args, entropy=True, impl="cpu"),
    )
    assert all(torch.equal(ours[k], plain[k]) for k in plain)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"hidden": torch.zeros(3)}, "hidden must be"),
        ({"weight": torch.zeros(5, 7)}, r"weight must be \(V, 8\)"),
        ({"weight": torch.zeros(5, 8, dtype=torch.bfloat16)}, "weight must be"),
        ({"weight": torch.zeros(5, 8, device="meta")}, r"weight must be .* on cpu .* on meta"),
        (
            {"targets": torch.zeros(3, dtype=torch.int64, device="meta")},
            "targets must be .* on cpu, got .* on meta",
        ),
        (
            {n: torch.zeros(k, 8).double() for n, k in (("hidden", 3), ("weight", 5))},
            "hidden must be float32 or",
        ),
        ({"targets": torch.zeros(2, dtype=torch.int64)}, r"targets must be \(3,\)"),
        ({"targets": torch.zeros(3)}, "targets must be"),
        ({"targets": torch.tensor([0, 5, 1])}, r"targets must lie in \[0, 5\), got values from 0 to 5"),
        ({"targets": torch.tensor([0, -100, 1])}, "targets must lie in"),
        ({"temperature": 0.0}, "temperature must be"),
        ({"temperature": float("nan")}, "temperature must be"),
    ],
)
def test_bad_arguments(change, message):
    args = {
        "hidden": torch.zeros(3, 8),
        "weight": torch.zeros(5, 8),
        "targets": torch.zeros(3, dtype=torch.int64),
    }
    with pytest.raises(ValueError, match=message):
        ops.linear_logprob(**(args | change), impl="cpu")


def test_kernel_refuses_targets_out_of_range():
    """A compiled graph skips the checks in Python; the kernel must not index past its buffers."""
    with pytest.raises(ValueError, match="targets must lie in"):
        torch.ops.hpsafety.linear_logprob(
            torch.zeros(2, 8), torch.zeros(5, 8), torch.tensor([0, 5]), 1.0, False, "cpu"
        )


@pytest.mark.parametrize("impl, holds", [("cpu", False), ("reference", True)])
def test_never_holds_the_logits(impl, holds):
    """No single allocation near N x V; the oracle, which holds it, shows that the measurement would see it."""
    args = make_inputs(1500, 8, 20_000)  # logits: 120 MB
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        run_with_grads(ops.linear_logprob, args, impl=impl)
    assert (max(event.self_cpu_memory_usage for event in profile.events()) > 60e6) == holds
