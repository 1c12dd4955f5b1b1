"""adamw_ and grad_norm_sq. The bug this file must catch: the bias correction of step t instead of t + 1."""

import functools
import math

import pytest
import torch
from safetensors.torch import load, save

from hpsafety import ops, reference
from tests.ops.forms import PAST_INT32, lazy_zeros
from tests.ops.oracle import check_error

SHAPES = [(3, 5), (1,), (0, 4), (16_385,), (29, 30), (7, 1, 3)]  # the largest: a kernel chunk and one more
SETTINGS = {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def make_grads(step, dtype=torch.float32, shapes=SHAPES):
    generator = torch.Generator().manual_seed(1000 + step)
    return [torch.randn(s, generator=generator).mul(10.0 ** (step % 3 - 1)).to(dtype) for s in shapes]


def make_state(shapes=SHAPES, copies=False):
    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(s, generator=generator) for s in shapes]
    state = {"params": params}
    state["exp_avg"], state["exp_avg_sq"] = ([torch.zeros_like(p) for p in params] for _ in range(2))
    state["step"] = torch.tensor(0)
    if copies:
        state["copies"] = [p.bfloat16() for p in params]
    return state


def run(state, steps, dtype=torch.float32, max_norm=1.0, impl="cpu", shapes=SHAPES):
    for i in steps:
        grads = make_grads(i, dtype, shapes)
        norm = ops.grad_norm_sq(grads, impl=impl).sqrt()
        ops.adamw_(grads=grads, grad_norm=norm, max_norm=max_norm, impl=impl, **SETTINGS, **state)
    return state


@functools.cache
def run_torch(steps, dtype, grad_dtype, max_norm):
    """torch.optim.AdamW with clip_grad_norm_, in dtype; the gradients are first rounded to grad_dtype."""
    params = [p.to(dtype).requires_grad_() for p in make_state()["params"]]
    optimizer = torch.optim.AdamW(params, **SETTINGS, foreach=False)
    for i in steps:
        for p, g in zip(params, make_grads(i, grad_dtype), strict=True):
            p.grad = g.to(dtype)
        if 0 < max_norm < math.inf:
            torch.nn.utils.clip_grad_norm_(params, max_norm)
        optimizer.step()
    states = [optimizer.state[p] for p in params]
    return {
        "params": [p.detach() for p in params],
        "exp_avg": [s["exp_avg"] for s in states],
        "exp_avg_sq": [s["exp_avg_sq"] for s in states],
    }


def flat(state):
    return {f"{n}.{i}": x for n, v in state.items() for i, x in enumerate(v if isinstance(v, list) else [v])}


def same_bits(a, b):
    a, b = flat(a), flat(b)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def copy_of(state):
    return {n: [x.clone() for x in v] if isinstance(v, list) else v.clone() for n, v in state.items()}


@pytest.mark.parametrize("max_norm", [1.0, 1e6, math.inf, 0.0])
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_hundred_steps_match_torch(max_norm, grad_dtype, impl):
    """KER-2: against torch.optim.AdamW in fp64; the budget is torch's own error in fp32."""
    steps = range(100 if max_norm == 1.0 and impl == "cpu" else 10)
    exact = flat(run_torch(steps, torch.float64, grad_dtype, max_norm))
    plain = flat(run_torch(steps, torch.float32, grad_dtype, max_norm))
    state = run(make_state(), steps, grad_dtype, max_norm, impl)
    assert int(state.pop("step")) == len(steps)
    ours = flat(state)
    # Kind by kind over all tensors: a moment of one element may cancel to far below what was rounded on the way.
    for kind in ("params", "exp_avg", "exp_avg_sq"):
        sides = [
            torch.cat([x[n].flatten() for n in exact if n.split(".")[0] == kind])
            for x in (ours, exact, plain)
        ]
        check_error(kind, *sides)


def test_reference_in_fp64_is_torch():
    state, steps = make_state(), range(20)
    lists = [[x.double() for x in state[n]] for n in ("params", "exp_avg", "exp_avg_sq")]
    step = state["step"]
    for i in steps:
        grads = [g.double() for g in make_grads(i)]
        norm = reference.grad_norm_sq(grads).sqrt()
        *lists, step, _ = reference.adamw(
            lists[0], grads, *lists[1:], step=step, grad_norm=norm, max_norm=1.0, **SETTINGS
        )
    exact = run_torch(steps, torch.float64, torch.float32, 1.0)
    for ours, name in zip(lists, exact, strict=True):
        for x, y in zip(ours, exact[name], strict=True):
            torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("seed", range(24))
def test_random_lists_match_the_oracle(seed):
    """KER-2 on drawn lists of shapes, settings, steps and dtypes: one step, against fp64."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda low, high: int(torch.randint(low, high + 1, (), generator=g))  # noqa: E731
    shapes = [(draw(0, 90), draw(1, 60)) for _ in range(draw(1, 5))] + [(draw(1, 40_000),)]
    settings = {
        "lr": 10.0 ** -draw(1, 6), "betas": (draw(0, 99) / 100, draw(50, 999) / 1000), "eps": 10.0 ** -draw(5, 12),
        "weight_decay": draw(0, 3) / 10, "step": torch.tensor(draw(0, 1000)), "max_norm": float(draw(0, 2)),
    }  # fmt: skip
    rand = lambda: [torch.randn(s, generator=g) for s in shapes]  # noqa: E731
    lists = [rand(), make_grads(seed, (torch.float32, torch.bfloat16)[seed % 2], shapes), rand()]
    lists.append([x.square() for x in rand()])
    norm = reference.grad_norm_sq(lists[1]).sqrt()
    exact = reference.adamw(*[[x.double() for x in xs] for xs in lists], grad_norm=norm, **settings)
    plain = reference.adamw(*lists, grad_norm=norm, **settings)
    ops.adamw_(*lists, grad_norm=norm, impl="cpu", **settings)
    assert int(settings["step"]) == int(exact[3])
    for kind, ours, *oracles in zip(
        ("params", "exp_avg", "exp_avg_sq"), [lists[0], *lists[2:]], exact, plain, strict=False
    ):
        check_error(kind, *(torch.cat([x.flatten() for x in xs]) for xs in (ours, *oracles)))


def test_same_bits_again_and_for_any_thread_count(threads):
    shapes = [*SHAPES, (100_003,)]
    threads(1)
    first = run(make_state(shapes, copies=True), range(2), shapes=shapes)
    for i in range(100):
        threads(1 + i % 3)
        assert same_bits(run(make_state(shapes, copies=True), range(2), shapes=shapes), first), i


def test_a_tensor_is_updated_alike_wherever_it_stands():
    """Chunks and tails cannot change a value: each element of one tensor, alone, gets the same bits."""
    whole, parts = make_state([(20_001,)]), make_state([(20_001,)])
    cuts = (0, 1, 9, 16_385, 20_001)
    for name in ("params", "exp_avg", "exp_avg_sq"):
        parts[name] = [parts[name][0][a:b].clone() for a, b in zip(cuts, cuts[1:], strict=False)]
    for i in range(3):
        (grad,) = make_grads(i, shapes=[(20_001,)])
        norm = grad.norm()
        ops.adamw_(grads=[grad], grad_norm=norm, max_norm=1.0, impl="cpu", **SETTINGS, **whole)
        pieces = [grad[a:b] for a, b in zip(cuts, cuts[1:], strict=False)]
        ops.adamw_(grads=pieces, grad_norm=norm, max_norm=1.0, impl="cpu", **SETTINGS, **parts)
    for name in ("params", "exp_avg", "exp_avg_sq"):
        assert torch.equal(torch.cat(parts[name]), whole[name][0]), name


def test_resume_is_bit_equal():
    """SFT-4: state saved and loaded again goes on as if nothing had happened."""
    whole = run(make_state(copies=True), range(8))
    half = run(make_state(copies=True), range(4))
    loaded = load(save(flat(half)))
    resumed = {n: [loaded[f"{n}.{i}"] for i in range(len(SHAPES))] for n in half if n != "step"}
    resumed["step"] = loaded["step.0"]
    assert same_bits(run(resumed, range(4, 8)), whole)


@pytest.mark.parametrize("norm", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_non_finite_norm_changes_nothing(norm, dtype, impl):
    state = run(make_state(copies=True), range(2))
    state["copies"][0].zero_()  # a copy that is out of step stays so too
    before, grads = copy_of(state), make_grads(2)
    grads[0][0, 0] = norm
    norm = torch.tensor(norm, dtype=dtype)
    ops.adamw_(grads=grads, grad_norm=norm, max_norm=1.0, impl=impl, **SETTINGS, **state)
    assert same_bits(state, before) and int(state["step"]) == 2


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_copies_are_rounded_to_nearest_even(impl):
    state = run(make_state(copies=True), range(3), impl=impl)
    for p, c in zip(state["params"], state["copies"], strict=True):
        assert torch.equal(c, p.bfloat16())
    half = 2**-8
    ties = torch.tensor(
        [1 + half, 1 + 3 * half, -1 - half, 1 + half + 2**-20, 3.4e38, 0.0, -0.0, 1.0, 1 + half]
    )
    state = make_state([(9,)], copies=True) | {"params": [ties.clone()]}
    frozen = SETTINGS | {"lr": 0.0}
    zeros = {"grads": [torch.zeros(9)], "grad_norm": torch.tensor(0.0)}
    ops.adamw_(**zeros, max_norm=1.0, impl=impl, **frozen, **state)
    expected = [1.0, 1 + 2**-6, -1.0, 1 + 2**-7, math.inf, 0.0, -0.0, 1.0, 1.0]
    assert state["copies"][0].tolist() == expected and torch.equal(state["params"][0], ties)


def test_gradients_are_left_alone_and_parameters_may_require_grad():
    state, grads = make_state(), make_grads(0)
    state["params"] = [torch.nn.Parameter(p) for p in state["params"]]
    before = [g.clone() for g in grads]
    ops.adamw_(grads=grads, grad_norm=torch.tensor(9.0), max_norm=1.0, impl="cpu", **SETTINGS, **state)
    assert all(torch.equal(a, b) for a, b in zip(grads, before, strict=True))
    assert same_bits({"params": [p.detach() for p in state["params"]]}, {"params": run_once(9.0)["params"]})


def run_once(norm):
    state = make_state()
    grads = make_grads(0)
    ops.adamw_(grads=grads, grad_norm=torch.tensor(norm), max_norm=1.0, impl="cpu", **SETTINGS, **state)
    return state


def test_nothing_to_update_still_counts_the_step():
    """A rank whose shard is empty keeps in step with the others."""
    for impl in ("cpu", "reference"):
        assert int(run(make_state([]), range(2), shapes=[], impl=impl)["step"]) == 2


@pytest.mark.parametrize(
    "change, message",
    [
        ({"params": [torch.zeros(4, 3).double()]}, "params must be float32"),
        ({"params": [torch.zeros(3, 4).t()]}, r"params\[0\] must be a contiguous \(4, 3\)"),
        ({"grads": []}, "grads must have 1 tensors, got 0"),
        ({"grads": [torch.zeros(12)]}, r"grads\[0\] must be"),
        ({"grads": [torch.zeros(4, 3).half()]}, r"grads\[0\] must be .*float32 or .*bfloat16"),
        ({"grads": [torch.zeros(4, 6)[:, ::2]]}, r"grads\[0\] must be a contiguous"),
        ({"exp_avg": [torch.zeros(4, 3).bfloat16()]}, r"exp_avg\[0\] must be"),
        ({"exp_avg_sq": [torch.zeros(1, 3).expand(4, 3)]}, r"exp_avg_sq\[0\] must be a contiguous"),
        ({"copies": [torch.zeros(4, 3)]}, r"copies\[0\] must be"),
        ({"copies": [torch.zeros(4, 3).bfloat16()] * 2}, "copies must have 1 tensors, got 2"),
        ({"step": 3}, "step must be a 0-dim tensor"),
        ({"step": torch.tensor(1.0)}, "step must be a 0-dim tensor of torch.int64"),
        ({"grad_norm": torch.ones(1)}, "grad_norm must be a 0-dim tensor"),
        ({"grad_norm": torch.ones((), device="meta")}, "grad_norm must be on the parameters' device"),
        ({"grads": [torch.zeros(4, 3, device="meta")]}, r"grads\[0\] must be .* on cpu, got .* on meta"),
        ({"step": torch.tensor(1, device="meta")}, "step must be on the parameters' device"),
        ({"lr": -1.0}, "must be >= 0"),
        ({"betas": (0.9, 1.0)}, r"betas must lie in \[0, 1\)"),
    ],
)
def test_bad_arguments(change, message):
    args = make_state([(4, 3)]) | SETTINGS | {"grads": [torch.zeros(4, 3)], "grad_norm": torch.tensor(1.0)}
    with pytest.raises(ValueError, match=message):
        ops.adamw_(**args | {"max_norm": 1.0} | change)


def test_overlapping_tensors_are_refused():
    storage = torch.zeros(30)
    args = make_state([(10,), (10,)]) | SETTINGS | {"grad_norm": torch.tensor(1.0), "max_norm": 1.0}
    apart, across = [storage[:10], storage[10:20]], [storage[:10], storage[9:19]]
    zeros = [torch.zeros(10), torch.zeros(10)]
    ops.adamw_(grads=zeros, **args | {"params": apart})
    with pytest.raises(ValueError, match=r"params\[1\] overlaps params\[0\]"):
        ops.adamw_(grads=zeros, **args | {"params": across})
    with pytest.raises(ValueError, match="overlaps"):
        ops.adamw_(grads=[zeros[0], storage[5:15]], **args | {"params": apart})
    with pytest.raises(ValueError, match="overlaps"):
        ops.adamw_(grads=zeros, **args | {"exp_avg_sq": args["exp_avg"]})
    ops.adamw_(grads=across, **args)  # two gradients may share memory: they are only read


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grad_norm_sq(dtype, threads):
    grads = [*make_grads(5, dtype, [*SHAPES, (50_001,)]), torch.ones(3), torch.randn(20, 8).to(dtype)[:, ::2]]
    exact = reference.grad_norm_sq(grads)
    results = []
    for count in (1, 2, 3, 1):
        threads(count)
        results.append(ops.grad_norm_sq(grads, impl="cpu"))
    assert results[0].dtype == torch.float64 and results[0].dim() == 0
    assert all(torch.equal(r, results[0]) for r in results)
    torch.testing.assert_close(results[0], exact, rtol=1e-14, atol=0)


def test_offsets_past_32_bits():
    """The chunks of a tensor of more than 2^31 elements, here of a gradient, which is only read: adamw_ itself walks
    the same list of chunks, and would have to write 30 GB."""
    grad = lazy_zeros(PAST_INT32, torch.bfloat16)
    grad[-3:], grad[2**31 - 1] = 2.0, 1.0
    assert float(ops.grad_norm_sq([torch.ones(5), grad], impl="cpu")) == 5 + 12 + 1


def test_grad_norm_sq_edges():
    huge = torch.full((100,), 3e38)
    expected = 100 * float(huge[0]) ** 2
    assert math.isclose(float(ops.grad_norm_sq([huge], impl="cpu")), expected, rel_tol=1e-14)
    for bad in (math.inf, math.nan):
        assert not torch.isfinite(ops.grad_norm_sq([torch.ones(40), torch.tensor([1.0, bad])], impl="cpu"))
    assert float(ops.grad_norm_sq([])) == 0 and float(ops.grad_norm_sq([torch.zeros(0)], impl="cpu")) == 0
    with pytest.raises(ValueError, match=r"grads\[1\] must be float32 or bfloat16"):
        ops.grad_norm_sq([torch.zeros(1), torch.zeros(1).double()])
