"""distill_loss. The bugs this file must catch: teacher and student exchanged, a normaliser left out of the log-ratio of
the streamed tiles, and the missing KL term of a gradient."""

import itertools
import math

import pytest
import torch

from hpsafety import ops, reference
from tests.ops.oracle import check_against_oracle, check_error, run_with_grads

KINDS = ("forward_kl", "reverse_kl", "jsd")
STUDENT = ("student_hidden", "student_weight")


def make_inputs(n, d, d2, v, dtype=torch.float32, teacher_dtype=None, seed=0, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    teacher_dtype = teacher_dtype or dtype
    return {
        "student_hidden": torch.randn(n, d, generator=g).mul(scale).to(dtype),
        "student_weight": torch.randn(v, d, generator=g).mul(d**-0.5).to(dtype),
        "teacher_hidden": torch.randn(n, d2, generator=g).mul(scale).to(teacher_dtype),
        "teacher_weight": torch.randn(v, d2, generator=g).mul(d2**-0.5).to(teacher_dtype),
    }


def close_pair(n, d, v, distance, seed=0):
    """A student that all but agrees with its teacher."""
    args = make_inputs(n, d, d, v, seed=seed)
    noise = torch.randn(n, d, generator=torch.Generator().manual_seed(seed + 1))
    args["teacher_hidden"] = args["student_hidden"] + distance * noise
    args["teacher_weight"] = args["student_weight"].clone()
    return args


def check(args, kind, **kwargs):
    out = check_against_oracle("distill_loss", ops.distill_loss, args, kind=kind, grads=STUDENT, **kwargs)
    assert out["out0"].dtype == torch.float32 and not (out["out0"] < 0).any()
    if kind == "jsd":
        assert not (out["out0"] > math.log(2) * (1 + 1e-6)).any()
    return out


def gradients(args, kind, grad, **kwargs):
    leaves = args | {k: args[k].clone().requires_grad_() for k in STUDENT}
    return torch.autograd.grad(
        ops.distill_loss(**leaves, kind=kind, impl="cpu", **kwargs), [leaves[k] for k in STUDENT], grad
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "n, d, d2, v",
    [
        (0, 8, 4, 5),
        (1, 64, 32, 33),
        (15, 5, 7, 1),
        (17, 33, 12, 2049),
        (127, 32, 8, 63),
        (129, 8, 64, 2048),
        (257, 123, 40, 507),
        (300, 64, 96, 4197),
    ],
)
def test_matches_oracle(kind, dtype, n, d, d2, v):
    """KER-2: forward and backward against fp64 over odd sizes and block borders; the widths differ."""
    out = check(make_inputs(n, d, d2, v, dtype), kind)
    assert all(out[f"grad_{k}"].dtype == dtype for k in STUDENT)


@pytest.mark.parametrize("kind", KINDS)
def test_random_sweep(kind):
    """KER-2: ragged shapes, temperatures and mixed dtypes, drawn by seed."""
    g = torch.Generator().manual_seed(KINDS.index(kind))
    draw = lambda low, high: int(torch.randint(low, high, (), generator=g))  # noqa: E731
    dtypes = (torch.float32, torch.bfloat16)
    for seed in range(20):
        d, d2 = (32 * draw(1, 4) if draw(0, 2) else draw(1, 70) for _ in range(2))
        n, v = draw(1, 150) if draw(0, 3) else draw(150, 400), draw(1, 90) if draw(0, 2) else draw(90, 4200)
        args = make_inputs(n, d, d2, v, dtypes[draw(0, 2)], dtypes[draw(0, 2)], seed, scale=draw(1, 6))
        check(args, kind, temperature=draw(1, 8) / 4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("student, teacher", [(0, 1), (1, 0)])
def test_dtypes_may_differ(kind, student, teacher):
    dtypes = (torch.float32, torch.bfloat16)
    check(make_inputs(70, 32, 64, 3000, dtypes[student], dtypes[teacher]), kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [0.5, 3.0])
def test_temperature_and_large_logits(kind, temperature):
    """KER-2: logits of several hundred: most probabilities underflow on one side or both, nothing is NaN."""
    out = check(make_inputs(40, 24, 16, 3001, scale=100.0), kind, temperature=temperature)
    assert all(torch.isfinite(v).all() for v in out.values())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("distance", [1e-1, 1e-3])
def test_close_distributions(kind, distance):
    """Late in distillation p and q all but agree; loss and gradient stay as good as plain torch, and not negative."""
    check(close_pair(70, 32, 3000, distance), kind)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_distributions(kind):
    args = close_pair(40, 24, 2500, 0.0)
    assert not ops.distill_loss(**args, kind=kind, impl="cpu").any()
    dh, dw = gradients(args, kind, torch.ones(40))
    assert dh.abs().max() < 1e-6 and dw.abs().max() < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_a_common_offset_costs_no_digit(kind):
    """Softmax does not see an offset of all logits of a row, and neither may the log-ratio lose digits to it."""
    args = make_inputs(20, 16, 16, 700)
    for side, offset in (("student", 4096.0), ("teacher", -2048.0)):
        hidden, weight = args[f"{side}_hidden"], args[f"{side}_weight"]
        args[f"{side}_hidden"] = torch.cat([hidden.mul(64).round().div(64), torch.full((20, 1), offset)], 1)
        args[f"{side}_weight"] = torch.cat([weight.mul(64).round().div(64), torch.ones(700, 1)], 1)
    check(args, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_certainty_has_exact_limits(kind):
    """One-hot against one-hot: all other probabilities underflow to 0 and 0 log 0 is 0."""
    weight = torch.zeros(40, 2)
    weight[3, 0], weight[7, 1] = 400.0, 400.0
    first, second = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    same = ops.distill_loss(first, weight, first, weight, kind=kind, impl="cpu")
    apart = ops.distill_loss(first, weight, second, weight, kind=kind, impl="cpu")
    assert same.item() == 0
    assert apart.item() == pytest.approx(math.log(2) if kind == "jsd" else 400.0, rel=1e-6)
    args = dict(zip(make_inputs(1, 1, 1, 1), (first, weight, second, weight), strict=True))
    assert all(torch.isfinite(g).all() for g in gradients(args, kind, torch.ones(1)))


def test_forward_and_reverse_are_mirrored():
    args = make_inputs(30, 20, 20, 2300)
    mirrored = dict(zip(args, [*args.values()][2:] + [*args.values()][:2], strict=True))
    forward = ops.distill_loss(**args, kind="forward_kl", impl="cpu")
    assert torch.equal(forward, ops.distill_loss(**mirrored, kind="reverse_kl", impl="cpu"))
    assert not torch.allclose(forward, ops.distill_loss(**args, kind="reverse_kl", impl="cpu"))
    jsd, other = (ops.distill_loss(**a, kind="jsd", impl="cpu") for a in (args, mirrored))
    torch.testing.assert_close(jsd, other)


def test_a_certain_teacher_gives_cross_entropy():
    args = make_inputs(30, 20, 4, 900)
    args["teacher_hidden"] = torch.ones(30, 4) * 100
    args["teacher_weight"] = torch.zeros(900, 4)
    args["teacher_weight"][17] = 1.0
    targets = torch.full((30,), 17)
    logprobs = ops.linear_logprob(args["student_hidden"], args["student_weight"], targets, impl="cpu")
    torch.testing.assert_close(ops.distill_loss(**args, impl="cpu"), -logprobs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_more_rows_than_a_group(kind):
    check(make_inputs(4099, 32, 3, 40), kind)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_each_subset_of_requires_grad(kind, dtype):
    args = make_inputs(33, 32, 12, 300, dtype)
    whole = run_with_grads(ops.distill_loss, args, impl="cpu", grads=STUDENT, kind=kind)
    for size in range(len(STUDENT)):
        for subset in itertools.combinations(STUDENT, size):
            part = run_with_grads(ops.distill_loss, args, impl="cpu", grads=subset, kind=kind)
            assert {k for k in part if k.startswith("grad")} == {f"grad_{k}" for k in subset}
            for key, value in part.items():
                assert torch.equal(value, whole[key]), key


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_the_teacher_gets_no_gradient(impl):
    args = {k: v.requires_grad_() for k, v in make_inputs(5, 6, 7, 20).items()}
    ops.distill_loss(**args, impl=impl).sum().backward()
    assert all((v.grad is not None) == (k in STUDENT) for k, v in args.items())
    for k in STUDENT:
        args[k].requires_grad_(False)
    assert not ops.distill_loss(**args, impl=impl).requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_untrained_rows_are_skipped(kind, dtype):
    """Rows with zero gradient: exactly zero grad_hidden, whatever they hold, and the rest as if they had not been."""
    args = make_inputs(120, 32, 24, 3000, dtype)
    g = torch.Generator().manual_seed(5)
    grad, trained = torch.randn(120, generator=g), torch.rand(120, generator=g) < 0.4
    args["student_hidden"][~trained], args["teacher_hidden"][~trained] = float("nan"), float("inf")
    dh, dw = gradients(args, kind, grad * trained)
    kept = {k: v[trained] if k.endswith("hidden") else v for k, v in args.items()}
    alone_h, alone_w = gradients(kept, kind, grad[trained])
    assert not dh[~trained].any() and torch.equal(dh[trained], alone_h) and torch.equal(dw, alone_w)
    assert not any(grads.any() for grads in gradients(args, kind, torch.zeros(120)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_bad_rows_stay_alone(kind, side, bad):
    args = make_inputs(20, 16, 8, 3000)
    clean = ops.distill_loss(**args, kind=kind, impl="cpu")
    args[f"{side}_hidden"][3, 5] = bad
    out, rest = ops.distill_loss(**args, kind=kind, impl="cpu"), torch.arange(20) != 3
    assert out[3].isnan() and torch.equal(out[rest], clean[rest])
    dh, _ = gradients(args, kind, torch.ones(20))
    assert dh[3].isnan().all() and torch.isfinite(dh[rest]).all()


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_sums_to_zero_over_words(kind):
    _, dw = gradients(make_inputs(30, 12, 9, 700), kind, torch.ones(30), temperature=0.5)
    check_error("sum of dlogits", dw.sum(0), torch.zeros(12).double(), torch.full((12,), 1e-5))


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_does_not_depend_on_its_batch(kind):
    args = make_inputs(500, 64, 32, 2500)
    whole = ops.distill_loss(**args, kind=kind, impl="cpu")
    for rows in (slice(0, 1), slice(7, 8), slice(490, 500), slice(100, 117), slice(200, 457)):
        part = {k: v[rows] if k.endswith("hidden") else v for k, v in args.items()}
        assert torch.equal(ops.distill_loss(**part, kind=kind, impl="cpu"), whole[rows])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_threads_and_repeats_change_no_bit(kind, dtype):
    args = make_inputs(300, 64, 32, 4500, dtype)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        first = run_with_grads(ops.distill_loss, args, impl="cpu", grads=STUDENT, kind=kind)
        for threads in (2, 3, 2, 1):
            torch.set_num_threads(threads)
            again = run_with_grads(ops.distill_loss, args, impl="cpu", grads=STUDENT, kind=kind)
            assert all(torch.equal(first[k], again[k]) for k in first), threads
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_hundred_repeats(kind, dtype):
    args = make_inputs(40, 32, 32, 90, dtype)
    first = run_with_grads(ops.distill_loss, args, impl="cpu", grads=STUDENT, kind=kind)
    for _ in range(100):
        again = run_with_grads(ops.distill_loss, args, impl="cpu", grads=STUDENT, kind=kind)
        assert all(torch.equal(first[k], again[k]) for k in first)


def test_non_contiguous():
    args = make_inputs(40, 66, 34, 90)
    views = {k: v[:, ::2] if k.endswith("hidden") else v[::3, 1::2] for k, v in args.items()}
    for kind in KINDS:
        check(views, kind)
    expanded = gradients(views, "jsd", torch.ones(1).expand(40))  # stride 0
    assert all(
        torch.equal(a, b) for a, b in zip(expanded, gradients(views, "jsd", torch.ones(40)), strict=True)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_reference_gradcheck(kind):
    sh, sw, th, tw = (v.double() for v in make_inputs(4, 3, 2, 6).values())
    leaves = sh.requires_grad_(), sw.requires_grad_()
    assert torch.autograd.gradcheck(lambda h, w: reference.distill_loss(h, w, th, tw, kind, 0.7), leaves)


@pytest.mark.parametrize("kind", KINDS)
def test_reference_is_the_textbook_formula(kind):
    """Against torch's own kl_div on probabilities, in fp64."""
    args = {k: v.double() for k, v in make_inputs(6, 5, 4, 30).items()}
    q, p = (
        (args[f"{side}_hidden"] @ args[f"{side}_weight"].T / 2).softmax(-1) for side in ("student", "teacher")
    )
    kl = lambda a, b: torch.nn.functional.kl_div(b.log(), a, reduction="none").sum(-1)  # noqa: E731
    m = (p + q) / 2
    exact = {"forward_kl": kl(p, q), "reverse_kl": kl(q, p), "jsd": (kl(p, m) + kl(q, m)) / 2}[kind]
    torch.testing.assert_close(reference.distill_loss(**args, kind=kind, temperature=2.0), exact)


@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(kind):
    args = {k: v.requires_grad_(k in STUDENT) for k, v in make_inputs(9, 24, 8, 70).items()}
    eager = ops.distill_loss(**args, kind=kind, temperature=0.7, impl="cpu")
    positional = (*args.values(), kind, 0.7, "cpu")
    torch.library.opcheck(torch.ops.hpsafety.distill_loss.default, positional)
    assert torch.equal(torch.ops.hpsafety.distill_loss(*positional)[0], eager)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_compile(kind):
    args = make_inputs(20, 24, 8, 70)
    compiled = torch.compile(lambda **kw: ops.distill_loss(**kw, kind=kind, impl="cpu"), fullgraph=True)
    ours = run_with_grads(compiled, args, grads=STUDENT)
    plain = run_with_grads(ops.distill_loss, args, impl="cpu", grads=STUDENT, kind=kind)
    assert ours.keys() == plain.keys() and all(torch.equal(ours[k], plain[k]) for k in plain)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"student_hidden": torch.zeros(3)}, r"student_hidden must be \(N, D\)"),
        ({"student_hidden": torch.zeros(3, 8, dtype=torch.float64)}, "student_hidden must be"),
        ({"student_weight": torch.zeros(5, 7)}, r"student_weight must be \(V, 8\)"),
        ({"teacher_weight": torch.zeros(5, 4, dtype=torch.bfloat16)}, r"teacher_weight must be \(V, 4\)"),
        ({"teacher_weight": torch.zeros(6, 4)}, "teacher_weight must have 5 words"),
        ({"teacher_hidden": torch.zeros(2, 4)}, "teacher_hidden must have 3 rows"),
        ({"student_weight": torch.zeros(0, 8), "teacher_weight": torch.zeros(0, 4)}, "with V > 0"),
        ({"kind": "kl"}, "kind must be one of forward_kl, reverse_kl, jsd, got 'kl'"),
        ({"temperature": 0.0}, "temperature must be"),
        ({"temperature": float("inf")}, "temperature must be"),
    ],
)
def test_bad_arguments(change, message):
    args = make_inputs(3, 8, 4, 5)
    with pytest.raises(ValueError, match=message):
        ops.distill_loss(**(args | change))


def test_kernel_checks_for_itself():
    """A compiled graph skips the checks in Python; the kernel must not read past its inputs."""
    sh, sw, th, tw = make_inputs(3, 8, 4, 5).values()
    for args in [(sh, sw, th[:2], tw, "jsd"), (sh, sw, th, tw[:4], "jsd"), (sh, sw[:, :5], th, tw, "jsd")]:
        with pytest.raises(ValueError, match="N and V common"):
            torch.ops.hpsafety.distill_loss(*args, 1.0, "cpu")
    with pytest.raises(ValueError, match="kind must be"):
        torch.ops.hpsafety.distill_loss(sh, sw, th, tw, "kl", 1.0, "cpu")


def test_default_backend():
    args, before = make_inputs(3, 8, 4, 5), reference.calls["distill_loss"]
    default = ops.distill_loss(**args)
    assert reference.calls["distill_loss"] == before
    assert torch.equal(default, ops.distill_loss(**args, impl="cpu"))
    torch.testing.assert_close(default, ops.distill_loss(**args, impl="reference"))
    assert reference.calls["distill_loss"] == before + 1


@pytest.mark.parametrize(
    "impl, kind, holds", [*(("cpu", k, False) for k in KINDS), ("reference", "forward_kl", True)]
)
def test_never_holds_the_logits(impl, kind, holds):
    """No single allocation near N x V; the oracle, which holds it, shows that the measurement would see it."""
    args = make_inputs(900, 8, 8, 20_000)  # logits: 72 MB; jsd holds 128 rows of both models, 20 MB
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        run_with_grads(ops.distill_loss, args, impl=impl, kind=kind, grads=STUDENT)
    assert (max(event.self_cpu_memory_usage for event in profile.events()) > 36e6) == holds


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_more_than_2_to_the_31_logits(kind):
    """N x V = 2.2e9 by rows that repeat: the last rows agree with the first to the bit, forward and backward."""
    n, v = 68_000, 33_000
    small = make_inputs(4, 2, 2, v)
    args = {k: x.repeat(n // 4, 1) if k.endswith("hidden") else x for k, x in small.items()}
    grad = torch.zeros(n)
    grad[-4:] = 1
    leaves = args | {"student_hidden": args["student_hidden"].requires_grad_()}
    loss = ops.distill_loss(**leaves, kind=kind, impl="cpu")
    assert torch.equal(loss[-4:], loss[:4]) and torch.equal(loss[n // 2 : n // 2 + 4], loss[:4])
    (dh,) = torch.autograd.grad(loss, leaves["student_hidden"], grad)
    alone = gradients(small, kind, torch.ones(4))[0]
    assert torch.equal(dh[-4:], alone) and not dh[:-4].any()
