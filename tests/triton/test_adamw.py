"""adamw_ and grad_norm_sq in Triton. The bug this file must catch: a chunk of a list that is taken twice or never."""

import math

import pytest
import torch

from hpsafety import ops, reference
from hpsafety.triton_kernels import adamw as kernels
from hpsafety.triton_kernels import grad_norm_sq as norm_kernels
from hpsafety.triton_kernels import launch, tensor_list
from tests.ops.forms import PAST_INT32, lazy_zeros
from tests.ops.oracle import check_error
from tests.ops.test_adamw import SETTINGS, copy_of, flat, make_grads, make_state, run_torch, same_bits
from tests.ops.test_adamw import SHAPES as ITS_SHAPES
from tests.triton.audit import audit
from tests.triton.device import DEVICE
from tests.triton.last_program import last_program, needs_interpreter

SHAPES = [(3, 5), (1,), (0, 4), (65,), (16, 4), (7, 1, 9), (200,)]
KINDS = ("params", "exp_avg", "exp_avg_sq")


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    for module in (kernels, norm_kernels):
        monkeypatch.setattr(module, "CHUNK", 64)
        monkeypatch.setattr(module, "BLOCK", 16)


def on_device(state):
    return {n: [x.to(DEVICE) for x in v] if isinstance(v, list) else v.to(DEVICE) for n, v in state.items()}


def run(state, steps, dtype=torch.float32, max_norm=1.0, shapes=SHAPES, impl="triton"):
    for i in steps:
        grads = [g.to(DEVICE) for g in make_grads(i, dtype, shapes)]
        norm = ops.grad_norm_sq(grads, impl=impl).sqrt()
        ops.adamw_(grads=grads, grad_norm=norm.to(DEVICE), max_norm=max_norm, impl=impl, **SETTINGS, **state)
    return state


@pytest.mark.parametrize("dtype, max_norm", [(torch.float32, 1.0), (torch.bfloat16, 1e6)])
def test_steps_match_torch(monkeypatch, dtype, max_norm):
    """KER-2: against torch.optim.AdamW in fp64; the budget is torch's own error in fp32."""
    monkeypatch.setattr(kernels, "CHUNK", 16384)  # the shapes of the list that torch is run on
    monkeypatch.setattr(kernels, "BLOCK", 8192)
    exact = flat(run_torch(range(3), torch.float64, dtype, max_norm))
    plain = flat(run_torch(range(3), torch.float32, dtype, max_norm))
    state = run(on_device(make_state(ITS_SHAPES)), range(3), dtype, max_norm, ITS_SHAPES)
    assert int(state.pop("step")) == 3
    ours = {name: x.cpu() for name, x in flat(state).items()}
    for kind in KINDS:
        sides = [
            torch.cat([x[n].flatten() for n in exact if n.split(".")[0] == kind])
            for x in (ours, exact, plain)
        ]
        check_error(kind, *sides)


def one_step(seed, shapes, mixed=True):
    """(lists, settings) of a drawn step; gradients of both dtypes."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda low, high: int(torch.randint(low, high + 1, (), generator=g))  # noqa: E731
    settings = {
        "lr": 10.0 ** -draw(1, 6), "betas": (draw(0, 99) / 100, draw(50, 999) / 1000), "eps": 10.0 ** -draw(5, 12),
        "weight_decay": draw(0, 3) / 10, "max_norm": float(draw(0, 2)),
    }  # fmt: skip
    lists = [[torch.randn(s, generator=g) for s in shapes] for _ in range(4)]
    lists[1] = [x.bfloat16() if mixed and draw(0, 1) else x for x in lists[1]]
    lists[3] = [x.square() for x in lists[3]]
    return lists, settings, torch.tensor(draw(0, 1000))


def check_one_step(seed, shapes):
    lists, settings, step = one_step(seed, shapes)
    norm = reference.grad_norm_sq(lists[1]).sqrt()
    exact = reference.adamw(
        *[[x.double() for x in xs] for xs in lists], grad_norm=norm, step=step, **settings
    )
    plain = reference.adamw(*lists, grad_norm=norm, step=step, **settings)
    ours, step = [[x.to(DEVICE) for x in xs] for xs in lists], step.to(DEVICE)
    copies = [torch.zeros_like(p, dtype=torch.bfloat16) for p in ours[0]] if seed % 2 else None
    ops.adamw_(*ours, grad_norm=norm.to(DEVICE), step=step, copies=copies, impl="triton", **settings)
    assert int(step) == int(exact[3])
    for kind, found, *oracles in zip(KINDS, [ours[0], *ours[2:]], exact, plain, strict=False):
        check_error(kind, *(torch.cat([x.flatten().cpu() for x in xs]) for xs in (found, *oracles)))
    assert not copies or all(torch.equal(c, p.bfloat16()) for c, p in zip(copies, ours[0], strict=True))


@pytest.mark.parametrize("seed", range(4))
def test_drawn_settings_and_both_dtypes(seed):
    check_one_step(seed, SHAPES)


@pytest.mark.sweep
@pytest.mark.parametrize("seed", range(60))
def test_drawn_lists(seed):
    g = torch.Generator().manual_seed(seed)
    draw = lambda low, high: int(torch.randint(low, high + 1, (), generator=g))  # noqa: E731
    check_one_step(seed, [(draw(0, 20), draw(1, 30)) for _ in range(draw(1, 6))])


@pytest.mark.parametrize("norm", [math.inf, math.nan])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_non_finite_norm_changes_nothing(norm, dtype):
    state = run(on_device(make_state([(5, 7)], copies=True)), range(1), shapes=[(5, 7)])
    state["copies"][0].zero_()  # a copy that is out of step stays so too
    before, grads = copy_of(state), [g.to(DEVICE) for g in make_grads(2, shapes=[(5, 7)])]
    norm = torch.tensor(norm, dtype=dtype, device=DEVICE)
    ops.adamw_(grads=grads, grad_norm=norm, max_norm=1.0, impl="triton", **SETTINGS, **state)
    assert same_bits(state, before) and int(state["step"]) == 1


def test_copies_are_rounded_to_nearest_even():
    half = 2**-8
    ties = torch.tensor([1 + half, 1 + 3 * half, -1 - half, 1 + half + 2**-20, 3.4e38, 0.0, -0.0, 1.0])
    state = on_device(make_state([(8,)], copies=True) | {"params": [ties.clone()]})
    zeros = {"grads": [torch.zeros(8, device=DEVICE)], "grad_norm": torch.tensor(0.0, device=DEVICE)}
    ops.adamw_(**zeros, max_norm=1.0, impl="triton", **SETTINGS | {"lr": 0.0}, **state)
    assert state["copies"][0].tolist() == [1.0, 1 + 2**-6, -1.0, 1 + 2**-7, math.inf, 0.0, -0.0, 1.0]
    assert torch.equal(state["params"][0].cpu(), ties)


def test_nothing_to_update_still_counts_the_step():
    assert int(run(on_device(make_state([])), range(2), shapes=[])["step"]) == 2
    assert int(run(on_device(make_state([(0, 3)])), range(2), shapes=[(0, 3)])["step"]) == 2


def test_a_tensor_is_updated_alike_wherever_it_stands():
    """Chunks and tails change no bit, nor does an address that 16 bytes do not divide."""
    cuts = (0, 1, 9, 66, 201)
    whole, parts = (on_device(make_state([(201,)])) for _ in range(2))
    for name in KINDS:
        parts[name] = [parts[name][0][a:b] for a, b in zip(cuts, cuts[1:], strict=False)]
    (grad,) = (g.to(DEVICE) for g in make_grads(0, shapes=[(201,)]))
    for state, grads in ((whole, [grad]), (parts, [grad[a:b] for a, b in zip(cuts, cuts[1:], strict=False)])):
        ops.adamw_(grads=grads, grad_norm=grad.norm(), max_norm=1.0, impl="triton", **SETTINGS, **state)
    for name in KINDS:
        assert torch.equal(torch.cat(parts[name]), whole[name][0]), name


@needs_interpreter
def test_memory_traffic_and_launches():
    """28 bytes a parameter, each once, in any order of the programs; the tables are built once."""
    shapes = [(3, 50), (1,), (64,), (257,)]
    lists, settings, _ = one_step(0, shapes, mixed=False)
    settings |= {"grad_norm": torch.tensor(1.0), "impl": "triton"}
    n, results = sum(x.numel() for x in lists[0]), []
    for seed in (None, 1):
        ours, copies = [[x.clone() for x in xs] for xs in lists], [x.bfloat16() for x in lists[0]]
        named = {f"{i}.{j}": x for i, xs in enumerate([*ours, copies]) for j, x in enumerate(xs)}
        step = torch.tensor(4)
        table, _ = tensor_list.addresses([*ours, copies])
        tables = tensor_list.chunks(ours[0], kernels.CHUNK)
        given = {
            "step": step,
            "norm": settings["grad_norm"],
            "table": table,
            "chunks": tables[0],
            "sizes": tables[1],
        }
        with audit(seed, **named, **given) as seen:
            ops.adamw_(*ours, step=step, copies=copies, **settings)
        seen.check()
        assert seen.launches == 2
        moved = [seen.traffic[name] for name in named]
        assert sum(x.load_bytes for x in moved) == 16 * n and sum(x.store_bytes for x in moved) == 14 * n
        programs = tables[0].shape[0]
        assert seen.traffic["table"].load_bytes == 5 * 8 * programs
        results.append([*ours[0], *ours[2], *ours[3], *copies])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_tables_are_kept_and_do_not_pile_up():
    tensors = [torch.zeros(5), torch.zeros(200)]
    assert tensor_list.addresses([tensors])[0] is tensor_list.addresses([tensors])[0]
    assert tensor_list.chunks(tensors, 64)[0] is tensor_list.chunks(tensors, 64)[0]
    assert tensor_list.chunks(tensors, 64)[0].tolist() == [[0, 0], [1, 0], [1, 1], [1, 2], [1, 3]]
    for _ in range(40):
        tensors.append(torch.zeros(3))
        tensor_list.addresses([tensors])
    assert len(tensor_list._addresses) <= tensor_list.KEPT


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grad_norm_sq(dtype):
    """fp64 to the last digits; each gradient read once; non-finite values pass; both dtypes in one list."""
    grads = [*make_grads(5, dtype, SHAPES), torch.ones(3), torch.randn(20, 8).to(dtype)[:, ::2]]
    exact = reference.grad_norm_sq(grads)
    found = ops.grad_norm_sq([g.to(DEVICE) for g in grads], impl="triton").cpu()
    assert found.dtype == torch.float64 and found.dim() == 0
    torch.testing.assert_close(found, exact, rtol=1e-14, atol=0)
    for bad in (math.inf, math.nan):
        pair = [torch.ones(40, device=DEVICE), torch.tensor([1.0, bad], device=DEVICE)]
        assert not torch.isfinite(ops.grad_norm_sq(pair, impl="triton"))
    assert float(ops.grad_norm_sq([torch.zeros(0, device=DEVICE)], impl="triton")) == 0
    huge = torch.full((100,), 3e38)
    expected = 100 * float(huge[0]) ** 2
    assert math.isclose(float(ops.grad_norm_sq([huge.to(DEVICE)], impl="triton")), expected, rel_tol=1e-14)


@needs_interpreter
def test_memory_of_grad_norm_sq():
    grads, results = [g for g in make_grads(0, shapes=SHAPES)], []
    grads.append(torch.ones(70).bfloat16())
    for seed in (None, 4):
        groups = [[grads[i] for i in group] for group in tensor_list.by_dtype(grads)]
        tables = {f"{i}": tensor_list.addresses([group])[0] for i, group in enumerate(groups)}
        for i, group in enumerate(groups):
            tables[f"chunks{i}"], tables[f"sizes{i}"] = tensor_list.chunks(group, norm_kernels.CHUNK)
        with audit(seed, **tables, **{f"grad{i}": x for i, x in enumerate(grads)}) as seen:
            results.append(ops.grad_norm_sq(grads, impl="triton"))
        seen.check()
        assert seen.launches == 3
        read = [x for name, x in seen.traffic.items() if name.startswith("grad")]
        assert sum(x.load_bytes for x in read) == sum(x.nbytes for x in grads)
    assert torch.equal(*results)


@needs_interpreter
def test_offsets_past_32_bits(monkeypatch):
    """The last chunk of tensors of 2^31 elements, in memory of which nothing else is touched."""
    for module in (kernels, norm_kernels):
        monkeypatch.setattr(module, "CHUNK", 2**24)
        monkeypatch.setattr(module, "BLOCK", 128)
        monkeypatch.setattr(module, "launch", last_program)
    tail = PAST_INT32 % 2**24
    lists = [[lazy_zeros(PAST_INT32)] for _ in range(4)]
    small, settings, _ = one_step(3, [(tail,)], mixed=False)
    for (far,), (near,) in zip(lists, small, strict=True):
        far[-tail:] = near
    settings |= {"grad_norm": torch.tensor(2.0), "impl": "triton"}
    for each in (lists, small):
        ops.adamw_(*each, step=torch.tensor(3), **settings)
    for (far,), (near,) in zip(lists, small, strict=True):
        assert torch.equal(far[-tail:], near)
    with launch.record() as launches:
        ops.grad_norm_sq(lists[1], impl="triton")
    assert [x.programs for x in launches] == [1, 1] and tensor_list.chunks(lists[1], 2**24)[0].shape[0] == 129
