"""The memory plan against what tensors really take. The bug this file must catch: a tensor kept for backward, a copy
or a role that the plan does not count."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from hpsafety.config import PPOConfig
from hpsafety.data.groups import pack
from hpsafety.model import lora
from hpsafety.model.heads import value_model_from
from hpsafety.safety import ppo_memory
from hpsafety.safety.ppo_memory import make_plan, num_parameters, saved_per_token
from hpsafety.train import distributed
from hpsafety.train.optim import AdamW
from hpsafety.train.ppo_step import ActorCritic
from tests.tiny import random_groups, tiny_config, tiny_model

WORLD = distributed.World(0, 1, torch.device("cpu"))
SHAPES = [
    {},
    {"width": 48, "mlp_width": 112, "num_layers": 3, "num_kv_heads": 4, "head_dim": 16, "tied": False},
]


def config(**changes) -> PPOConfig:
    values = {"model": "m", "data": ("d",), "out": "o", "safety_rm": "s", "helpful_rm": "h", "batch": 64,
              "minibatch": 32, "k": 2, "max_new_tokens": 32}  # fmt: skip
    return PPOConfig(**(values | changes))


def plan(cfg=None, dtype=torch.float32, judges=2, ranks=1, base=0, longest=50, host=True, **shape):
    policy = tiny_config(**(SHAPES[1] | shape))
    critic = dataclasses.replace(policy, tied=True)
    return make_plan(cfg or config(), policy, critic, [critic] * judges, dtype, longest=longest,
                     kv_memory=2**30, ranks=ranks, base=base, host=host)  # fmt: skip


def kept_by(model, call) -> int:
    """Bytes of the distinct tensors that backward finds, parameters and tables apart."""
    apart = {p.untyped_storage().data_ptr() for p in model.parameters()}
    apart |= {t.untyped_storage().data_ptr() for t in model.rope(torch.device("cpu"))}
    sizes, alive = {}, []

    def keep(t):
        alive.append(t)
        if t.is_floating_point() and t.untyped_storage().data_ptr() not in apart:
            sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        call()
    return sum(sizes.values())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("longest", [10, 40])
def test_what_blocks_keep_is_the_formula(shape, dtype, rank, longest):
    """Two models of different depth, on two sizes of batch: the difference over one block's tokens is exact. The last
    block and the head keep less, so whole models are compared with and without their first block."""
    batch = pack(random_groups(6, 3, longest=longest))
    kept = []
    for layers in (2, 3):
        model = tiny_model(**(shape | {"num_layers": layers}))
        if rank:
            lora.add_adapters(model, rank, 0)
        model = model.to(dtype)
        kept.append(kept_by(model, lambda m=model: m.logprobs(batch)))
    expected = batch.tokens_computed * saved_per_token(tiny_config(**shape), dtype.itemsize, rank)
    assert kept[1] - kept[0] == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [0, 4])
def test_roles_are_what_models_and_optimisers_hold(dtype, rank):
    """Weights, copies, masters, moments and gradients of policy and critic, to the byte."""
    policy = tiny_model()
    critic = value_model_from(policy, share=rank > 0)
    models = {"policy": policy, "critic": critic}
    if rank:
        for model in models.values():
            lora.add_adapters(model, rank, 0)
    optimizers = [AdamW(model, dtype) for model in models.values()]
    held = [p for m in models.values() for p in m.parameters()]
    for optimizer in optimizers:
        held += [*optimizer.state().values(), *(optimizer.main_grads or [])]
    sizes = {t.data_ptr(): t.nbytes for t in held if t.dim()}
    shapes = (policy.config, critic.config, [policy.config])
    got = make_plan(config(lora_rank=rank), *shapes, dtype, longest=50, kv_memory=2**30)
    roles = {n: r for n, r in got.roles.items() if n not in ("process", "reference", "reward models")}
    assert sum(r.weights + r.optimiser for r in roles.values()) == sum(sizes.values())
    batch = pack(random_groups(4))
    policy.logprobs(batch).sum().backward()
    critic.values(batch).sum().backward()
    grads = [p.grad.nbytes for m in models.values() for p in m.parameters() if p.grad is not None]
    assert sum(r.gradients for r in roles.values()) == sum(grads) and bool(grads) == (dtype == torch.float32)


def test_choices_save_what_they_promise():
    """bf16 halves the frozen ones; mapped ones count in their own phase only, one after the other; adapters leave one
    trunk and drop the moments and gradients of whole models."""
    whole = 4 * num_parameters(tiny_config(**SHAPES[1]))
    judge = 4 * (num_parameters(tiny_config(**(SHAPES[1] | {"tied": True}))) + 48)
    resident, bf16, mapped = (plan(config(frozen=name)) for name in ("resident", "bf16", "mapped"))
    adapters = plan(config(lora_rank=4))
    assert resident.phases["update"] - bf16.phases["update"] == (whole + 2 * judge) // 2
    assert resident.phases["update"] - mapped.phases["update"] == whole + 2 * judge
    assert resident.phases["loading"] - mapped.phases["loading"] == 2 * judge
    assert resident.phases["score"] - mapped.phases["score"] == whole + judge
    assert resident.phases["logprobs"] - mapped.phases["logprobs"] == 2 * judge
    assert resident.phases["update"] - adapters.phases["update"] > 5 * whole
    assert plan(ranks=2).phases["saving"] - plan(ranks=2, host=False).phases["saving"] == whole
    assert plan(judges=1).phases["score"] == resident.phases["score"] - judge
    for each in (resident, bf16, mapped, adapters):
        name, peak = each.peak
        assert each.phases[name] == peak == max(each.phases.values())


def test_the_plan_grows_with_what_takes_memory():
    first = plan()
    grown = (
        plan(base=1000), plan(width=64), plan(num_layers=4), plan(vocab_size=90), plan(longest=70),
        plan(config(tokens_per_batch=4096)), plan(config(max_new_tokens=64)),
    )  # fmt: skip
    assert all(other.peak[1] > first.peak[1] for other in grown)
    assert plan(base=1000).phases == {name: n + 1000 for name, n in first.phases.items()}
    less = plan(config(recompute=True)), plan(ranks=4), plan(config(tokens_per_batch=128))
    assert all(other.phases["update"] < first.phases["update"] for other in less)


def test_a_table_of_roles_and_phases():
    lines = plan(config(frozen="mapped"), base=300 * 2**20).lines()
    assert lines[0].startswith("ppo: memory planned per rank, MiB: peak 3")
    assert lines[2].split() == ["process", "300", "-", "-", "-"]
    assert lines[-1].count(",") == 6 and "helpfulness RM" in lines[-2] and lines[-2].split()[-2] == "-"


@pytest.mark.parametrize(
    "peak, said", [(1.1, ""), (1.2, "20% over the plan, more than the 15% it allows for")]
)
def test_the_peak_is_said_beside_the_plan(peak, said, monkeypatch, capsys):
    mine = plan(base=2**30)
    monkeypatch.setattr(ppo_memory, "peak_bytes", lambda device: int(peak * mine.peak[1]))
    record = ppo_memory.check_memory(mine, before=2**29, world=WORLD)
    (line,) = capsys.readouterr().err.splitlines()
    assert f"planned {record['planned_mb']:,}" in line and f"peak memory {record['peak_mb']:,} MiB" in line
    assert line.endswith(said) and ("over the plan" in line) == bool(said)


def test_a_peak_from_before_the_run_tells_nothing(monkeypatch, capsys):
    monkeypatch.setattr(ppo_memory, "peak_bytes", lambda device: 2**40)
    assert ppo_memory.check_memory(plan(), before=2**40, world=WORLD)["peak_mb"] is None
    assert not capsys.readouterr().err


def test_the_process_is_what_models_do_not_explain(monkeypatch):
    """What is in memory is taken from the process, shared weights once."""
    policy = tiny_model()
    critic = value_model_from(policy)
    actor = ActorCritic(policy, critic, AdamW(policy), AdamW(critic))
    count = sum(p.numel() for p in [*policy.parameters(), *critic.parameters()])
    monkeypatch.setattr(ppo_memory, "resident", lambda: 10**9)
    monkeypatch.setattr(ppo_memory, "LIBRARIES", 0)
    found = ppo_memory.plan_of(
        config(), actor, policy, SimpleNamespace(trunks=[policy]), 50, torch.float32, WORLD
    ).roles["process"]  # fmt: skip
    # Weights and two moments; and each optimiser's count of steps.
    assert found.weights == 10**9 - 12 * count - 16
