"""ppo_loss. The bug this file must catch: the clipped branch kept where the advantage is negative (max for min)."""

import itertools

import pytest
import torch

from hpsafety import ops, reference
from hpsafety.reference.ppo_loss import PPOLoss
from tests.ops.oracle import check_against_oracle, check_error, run_with_grads

GRADS = ("logprobs", "values", "entropy")
SIZES = [0, 1, 7, 15, 16, 17, 257, 4095, 4096, 4097, 20_003]


def make_inputs(n, dtype=torch.float32, seed=0, spread=0.25, masked=0.3, entropy=True):
    g = torch.Generator().manual_seed(seed)

    def normal(scale=1.0, mean=0.0):
        return (torch.randn(n, generator=g) * scale + mean).to(dtype)

    args = {"logprobs": normal(mean=-3.0), "advantages": normal(), "returns": normal(), "values": normal()}
    args["old_logprobs"] = (args["logprobs"].float() + torch.randn(n, generator=g) * spread).to(dtype)
    args["old_values"] = (args["values"].float() + torch.randn(n, generator=g) * 0.3).to(dtype)
    args["mask"] = torch.rand(n, generator=g) >= masked
    return args | ({"entropy": normal(0.3, 2.0)} if entropy else {})


def run(args, grads=GRADS, **kwargs):
    grads = tuple(k for k in grads if k in args)
    return run_with_grads(ops.ppo_loss, args, grads=grads, impl="cpu", **kwargs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("n", SIZES)
def test_matches_oracle(dtype, entropy, n):
    """KER-2: every field and gradient against fp64 over odd sizes and block borders."""
    args = make_inputs(n, dtype, entropy=entropy)
    out = check_against_oracle("ppo_loss", ops.ppo_loss, args, entropy_coef=0.02 if entropy else 0.0)
    assert all(out[f"out{i}"].dtype == torch.float32 and out[f"out{i}"].dim() == 0 for i in range(6))
    assert {k for k in out if k.startswith("grad")} == {f"grad_{k}" for k in GRADS[: 2 + entropy]}
    assert out["grad_logprobs"].dtype == dtype


@pytest.mark.parametrize("seed", range(25))
def test_random_sweep(seed):
    g = torch.Generator().manual_seed(100 + seed)
    n = int(torch.randint(0, 9000, (), generator=g))
    unit = torch.rand(6, generator=g).tolist()
    args = make_inputs(
        n, torch.bfloat16 if seed % 3 == 0 else torch.float32, seed, spread=unit[0], masked=unit[1]
    )
    args["values"] = args["values"].float()  # a mix of storage types
    settings = {
        "clip_ratio": unit[2] / 2,
        "value_clip": unit[3],
        "value_coef": unit[4],
        "entropy_coef": unit[5],
    }
    num_tokens = (None, 3.0 * n + 1, torch.tensor(2 * n + 5))[seed % 3]
    check_against_oracle("ppo_loss", ops.ppo_loss, args, num_tokens=num_tokens, **settings)


@pytest.mark.parametrize("advantage", [1.5, -1.5])
@pytest.mark.parametrize("ratio", [0.5, 0.79, 0.81, 1.0, 1.19, 1.21, 2.0])
def test_policy_loss_inside_and_outside_the_clip(advantage, ratio):
    """PPO-5: value and gradient for rho inside and outside [0.8, 1.2] and both signs of A, by hand in float64."""
    d = torch.tensor([ratio], dtype=torch.float64).log().float()
    exact = float(d.double().exp())
    args = {k: torch.zeros(1) for k in ("values", "old_values", "returns", "old_logprobs")}
    args |= {"logprobs": d, "advantages": torch.tensor([advantage]), "mask": torch.ones(1, dtype=torch.bool)}
    out = run(args)
    passes = ratio <= 1.2 if advantage > 0 else ratio >= 0.8
    surrogate = min(exact * advantage, min(max(exact, 0.8), 1.2) * advantage)
    assert abs(float(out["out1"]) + surrogate) < 1e-6
    weight = torch.randn((), generator=torch.Generator().manual_seed(0), dtype=torch.float64)  # of out0
    gradient = float(out["grad_logprobs"]) / float(weight)
    assert abs(gradient - (-exact * advantage if passes else 0.0)) < 1e-6
    assert float(out["out3"]) == float(abs(exact - 1) > 0.2)
    assert abs(float(out["out5"]) - exact) < 1e-6


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize("advantage, side", [(1.0, 1), (-1.0, -1), (0.0, 1), (2.0, 0), (-2.0, 0)])
def test_policy_kink(impl, advantage, side):
    """rho exactly on the border (or inside, or A = 0): both branches are equal, the unclipped one has the gradient."""
    logprob = torch.tensor([0.25 * side], requires_grad=True)
    ratio = float(logprob.detach().exp())
    zeros, mask = torch.zeros(1), torch.ones(1, dtype=torch.bool)
    args = (logprob, zeros, torch.tensor([advantage]), zeros, zeros, zeros, mask)
    out = ops.ppo_loss(*args, clip_ratio=abs(ratio - 1), impl=impl)
    out.loss.backward()
    assert float(logprob.grad) == -ratio * advantage and float(out.clip_fraction) == 0


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize(
    "value, old, target, expected",
    [
        (0.5, 0.5, 1.0, -0.5),  # unmoved: equal
        (1.25, 0.5, 1.0, 0.25),  # moved past value_clip, errors +-0.25 tie: the unclipped one
        (1.0, 0.5, 1.0, 0.0),  # the clipped error is larger, and does not move with the value
        (1.5, 0.5, 1.0, 0.5),  # the unclipped error is larger
        (0.75, 0.5, 1.0, -0.25),  # on the border of the clip: equal
    ],
)
def test_value_kink(impl, value, old, target, expected):
    """value_clip 0.25, gradient v - R where the unclipped error is chosen."""
    v, zeros, mask = (
        torch.tensor([value], requires_grad=True),
        torch.zeros(1),
        torch.ones(1, dtype=torch.bool),
    )
    args = (zeros, zeros, zeros, v, torch.tensor([old]), torch.tensor([target]), mask)
    ops.ppo_loss(*args, value_clip=0.25, value_coef=1.0, impl=impl).loss.backward()
    assert float(v.grad) == expected


@pytest.mark.parametrize("junk", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_masked_tokens_contribute_nothing(junk, impl):
    """PPO-6: whatever masked tokens hold, every field and gradient keeps its bits; their gradients are 0."""
    clean = make_inputs(333)
    dirty = {k: v if k == "mask" else torch.where(clean["mask"], v, junk) for k, v in clean.items()}
    kwargs = {"grads": GRADS, "impl": impl, "entropy_coef": 0.1}
    a, b = (run_with_grads(ops.ppo_loss, x, **kwargs) for x in (clean, dirty))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert all(not b[f"grad_{k}"][~clean["mask"]].any() for k in GRADS)
    kept = {k: v[clean["mask"]] for k, v in clean.items()}
    if impl == "cpu":
        alone = run_with_grads(ops.ppo_loss, kept, **kwargs)
        for k in a:
            found = a[k][clean["mask"]] if k.startswith("grad") else a[k]
            torch.testing.assert_close(found, alone[k], rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", ["number", "tensor"])
def test_micro_batches_add_up(kind):
    """Loss, metrics and gradients do not depend on the split when num_tokens is global; ratio_max is maximised."""
    args = make_inputs(5000)
    n = int(args["mask"].sum())
    count = n if kind == "number" else torch.tensor(n)
    whole = run(args, entropy_coef=0.05)
    for borders in [(0, 5000), (0, 1, 5000), (0, 17, 17, 4096, 4100, 5000), (0, 2500, 5000)]:
        parts = [
            run({k: v[a:b] for k, v in args.items()}, entropy_coef=0.05, num_tokens=count)
            for a, b in itertools.pairwise(borders)
        ]
        for i in range(5):
            total = sum(p[f"out{i}"].double() for p in parts)
            torch.testing.assert_close(total.float(), whole[f"out{i}"], rtol=2e-6, atol=1e-7)
        assert max(p["out5"] for p in parts) == whole["out5"]
        for name in GRADS:
            joined = torch.cat([p[f"grad_{name}"] for p in parts])
            torch.testing.assert_close(joined, whole[f"grad_{name}"], rtol=2e-6, atol=0)


def test_first_step_has_ratio_one():
    """PPO-4: logprobs is old_logprobs: rho = 1 to the bit at every token, KL 0, nothing clipped."""
    args = make_inputs(4099)
    out = ops.ppo_loss(**(args | {"old_logprobs": args["logprobs"]}), impl="cpu")
    assert float(out.ratio_max) == 1 and float(out.approx_kl) == 0 and float(out.clip_fraction) == 0
    per_token = ops.ppo_loss(**(args | {"old_logprobs": args["logprobs"]}), clip_ratio=0.0, impl="cpu")
    assert float(per_token.clip_fraction) == 0, "every rho is exactly 1"


def test_small_kl_keeps_its_digits():
    """exp(d) - 1 - d is d^2 / 2 for small d: never negative, and right where the plain difference has no digits."""
    d = torch.logspace(-6, 0, 2001) * torch.tensor([1.0, -1.0]).repeat(1001)[:2001]
    zeros, mask = torch.zeros(2001), torch.ones(2001, dtype=torch.bool)
    for i in range(0, 2001, 50):
        one = slice(i, i + 1)
        out = ops.ppo_loss(d[one], *(zeros[one],) * 5, mask[one], impl="cpu")
        exact = float(torch.expm1(d[one].double()) - d[one].double())
        assert abs(float(out.approx_kl) - exact) <= 3e-6 * exact


@pytest.mark.parametrize("num_tokens", [None, 0, torch.tensor(0), 10])
def test_nothing_to_train_on(num_tokens):
    """All masked, or a count of 0: zeros and zero gradients, never NaN."""
    args = make_inputs(50)
    args["mask"] = torch.zeros(50, dtype=torch.bool)
    out = run(args, entropy_coef=0.1, num_tokens=num_tokens)
    assert all(not v.any() for v in out.values())
    empty = run({k: v[:0] for k, v in args.items()}, entropy_coef=0.1, num_tokens=num_tokens)
    assert all(not v.any() for v in empty.values())


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_overflowing_ratio(impl):
    """rho = inf: clipped with gradient 0 where A > 0, 0 where A = 0, infinite where A < 0."""
    mask = torch.ones(1, dtype=torch.bool)
    zeros = torch.zeros(1)
    for advantage, loss, gradient in [(1.0, -1.2, 0.0), (0.0, 0.0, 0.0), (-1.0, torch.inf, torch.inf)]:
        logprob = torch.full((1,), 200.0, requires_grad=True)
        out = ops.ppo_loss(logprob, zeros, torch.tensor([advantage]), zeros, zeros, zeros, mask, impl=impl)
        out.loss.backward()
        assert out.loss.item() == pytest.approx(loss) and float(logprob.grad) == gradient
        assert float(out.ratio_max) == torch.inf


@pytest.mark.parametrize(
    "name", ["logprobs", "old_logprobs", "advantages", "values", "old_values", "returns"]
)
@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_nan_propagates(name, impl):
    args = make_inputs(40, masked=0.0)
    args[name][7] = torch.nan
    out = ops.ppo_loss(**args, impl=impl)
    assert out.loss.isnan() and out.ratio_max.isnan() == (name in ("logprobs", "old_logprobs"))


def test_gradients_flow_through_loss_alone():
    args = make_inputs(20)
    leaves = {k: v.clone().requires_grad_(v.is_floating_point()) for k, v in args.items()}
    out = ops.ppo_loss(**leaves, entropy_coef=0.1, impl="cpu")
    assert isinstance(out, PPOLoss) and out._fields == reference.ppo_loss(**args)._fields
    assert [field for field in out._fields if getattr(out, field).requires_grad] == ["loss"]
    (out.loss * 3 + out.approx_kl).backward()
    assert {k for k, v in leaves.items() if v.grad is not None} == set(GRADS)
    once = run(args, entropy_coef=0.1)
    weight = torch.randn((), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(leaves["values"].grad, (once["grad_values"] / weight * 3).float())


def test_each_subset_of_requires_grad():
    args = make_inputs(100)
    whole = run(args, entropy_coef=0.1)
    for size in range(3):
        for subset in itertools.combinations(GRADS, size):
            part = run(args, subset, entropy_coef=0.1)
            assert {k for k in part if k.startswith("grad")} == {f"grad_{k}" for k in subset}
            assert all(torch.equal(part[k], whole[k]) for k in part)


def test_non_contiguous():
    args = make_inputs(300)
    apart = {k: torch.stack((v, v), 1)[:, 0] for k, v in args.items()}
    assert not apart["mask"].is_contiguous()
    a, b = run(args, entropy_coef=0.1), run(apart, entropy_coef=0.1)
    assert all(torch.equal(a[k], b[k]) for k in a)
    args |= {"returns": torch.zeros(1).expand(300), "advantages": torch.ones(1).expand(300)}
    check_against_oracle("ppo_loss", ops.ppo_loss, args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_and_repeats_change_no_bit(dtype):
    args = make_inputs(33_001, dtype)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        first = run(args, entropy_coef=0.1)
        for threads in (1, 2, 3) * 33 + (1,):
            torch.set_num_threads(threads)
            again = run(args, entropy_coef=0.1)
            assert all(torch.equal(first[k], again[k]) for k in first), threads
    finally:
        torch.set_num_threads(before)


def test_reference_gradcheck():
    args = {k: v.double() if v.is_floating_point() else v for k, v in make_inputs(12).items()}
    leaves = [args[k].requires_grad_() for k in GRADS]

    def loss(logprobs, values, entropy):
        changed = args | {"logprobs": logprobs, "values": values, "entropy": entropy}
        return reference.ppo_loss(**changed, entropy_coef=0.1).loss

    assert torch.autograd.gradcheck(loss, leaves)


def op_arguments(args, number, tensor):
    names = ("logprobs", "old_logprobs", "advantages", "values", "old_values", "returns", "mask")
    return (*(args[k] for k in names), args.get("entropy"), 0.2, 0.2, 0.5, 0.0, number, tensor, "cpu")


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("tensor", [None, torch.tensor(30)])
def test_opcheck(entropy, tensor):
    args = make_inputs(19, entropy=entropy)
    for name in GRADS[: 2 + entropy]:
        args[name].requires_grad_()
    eager = ops.ppo_loss(**args, num_tokens=tensor, impl="cpu")  # loads the kernels
    arguments = op_arguments(args, None, tensor)
    torch.library.opcheck(torch.ops.hpsafety.ppo_loss.default, arguments)
    assert torch.equal(torch.ops.hpsafety.ppo_loss(*arguments)[0], eager.loss)


@pytest.mark.slow
@pytest.mark.parametrize("num_tokens", [None, 50, torch.tensor(50)])
def test_compile(num_tokens):
    args = make_inputs(40)

    def call(**kw):
        return ops.ppo_loss(**kw, entropy_coef=0.1, num_tokens=num_tokens, impl="cpu")

    ours = run_with_grads(torch.compile(call, fullgraph=True), args, grads=GRADS)
    plain = run_with_grads(call, args, grads=GRADS)
    assert all(torch.equal(ours[k], plain[k]) for k in plain)


def test_backends_are_told_apart():
    """The default on CPU is the kernel; "reference" is the oracle, and takes fp64."""
    args = make_inputs(10)
    before = reference.calls["ppo_loss"]
    assert torch.equal(ops.ppo_loss(**args).loss, ops.ppo_loss(**args, impl="cpu").loss)
    assert reference.calls["ppo_loss"] == before
    doubles = {k: v.double() if v.is_floating_point() else v for k, v in args.items()}
    assert ops.ppo_loss(**doubles, impl="reference").loss.dtype == torch.float64
    assert reference.calls["ppo_loss"] == before + 1


@pytest.mark.parametrize(
    "change, message",
    [
        ({"logprobs": torch.zeros(3, 1)}, "logprobs must be"),
        ({"old_logprobs": torch.zeros(4)}, "old_logprobs must be"),
        ({"advantages": torch.zeros(3, dtype=torch.float64)}, "advantages must be .* float32 or bfloat16"),
        ({"values": torch.zeros(3, dtype=torch.int64)}, "values must be"),
        ({"old_values": torch.zeros(2)}, "old_values must be"),
        ({"returns": torch.zeros(3, device="meta")}, "returns must be .* on cpu"),
        ({"entropy": torch.zeros(4)}, "entropy must be"),
        ({"mask": torch.ones(3)}, r"mask must be \(3,\) bool"),
        ({"mask": torch.ones(3, dtype=torch.uint8)}, "mask must be"),
        ({"mask": torch.ones(2, dtype=torch.bool)}, "mask must be"),
        ({"clip_ratio": -0.1}, "clip_ratio must be"),
        ({"value_clip": float("nan")}, "value_clip must be"),
        ({"value_coef": float("inf")}, "value_coef must be"),
        ({"entropy_coef": 0.1}, "entropy is None"),
        ({"num_tokens": -1}, "num_tokens must be"),
        ({"num_tokens": float("nan")}, "num_tokens must be"),
        ({"num_tokens": torch.tensor([3])}, "num_tokens must be"),
        ({"num_tokens": torch.tensor(-3)}, "num_tokens must be"),
    ],
)
def test_bad_arguments(change, message):
    names = ("logprobs", "old_logprobs", "advantages", "values", "old_values", "returns")
    args = {k: torch.zeros(3) for k in names} | {"mask": torch.ones(3, dtype=torch.bool)}
    with pytest.raises(ValueError, match=message):
        ops.ppo_loss(**(args | change), impl="cpu")


def test_kernel_refuses_rows_of_other_lengths():
    args = make_inputs(5)
    for name, bad in [
        ("values", torch.zeros(4)),
        ("mask", torch.ones(4, dtype=torch.bool)),
        ("mask", torch.ones(5)),
    ]:
        with pytest.raises(ValueError, match=f"{name} must be"):
            torch.ops.hpsafety.ppo_loss(*op_arguments(args | {name: bad}, None, None))


def test_rows_past_two_to_the_31(far_rows):
    """Rows that lie more than 2^31 elements into their storage."""
    near = make_inputs(100, masked=0.0, entropy=False)
    far = {k: v if k == "mask" else far_rows(v) for k, v in near.items()}
    a, b = run(near), run(far)
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_error_check_would_see_a_lost_token():
    """The budget is far below one token's share: dropping one of 300 fails."""
    args = make_inputs(300, masked=0.0)
    exact = reference.ppo_loss(**{k: v if k == "mask" else v.double() for k, v in args.items()})
    lost = args | {"mask": args["mask"].clone().index_fill_(0, torch.tensor([5]), False)}
    with pytest.raises(AssertionError, match="max error"):
        check_error(
            "loss", ops.ppo_loss(**lost, num_tokens=300).loss, exact.loss, reference.ppo_loss(**args).loss
        )
