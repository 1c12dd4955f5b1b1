"""Adapters beside frozen weights. The bug this file must catch: a term that is not scaled, or added to another product,
and a trunk that trains along."""

import copy
import math

import pytest
import torch

from hpsafety.data.groups import PromptGroup, pack
from hpsafety.model import lora
from hpsafety.model.fused import norm_linear, swiglu_linear
from hpsafety.model.gemm import Adapter, linear
from hpsafety.model.heads import value_model_from
from hpsafety.model.io import load_model, save_state
from tests.tiny import random_groups, tiny_config, tiny_model

CHANGES = [{}, {"tied": False, "qkv_bias": True, "o_bias": True, "mlp_bias": True, "num_kv_heads": 4}]


def stirred(model, seed: int = 1):
    """Adapters that do something: up is zero at first."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(".up"):
                p.normal_(0.0, 0.1, generator=generator)
    return model


def adapted(seed: int = 0, rank: int = 3, **changes):
    model = tiny_model(seed, **changes)
    lora.add_adapters(model, rank, seed)
    return model


def rms(x, w):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * w


FORMS = {
    "linear": (lambda x, w, b, a, n: linear(x, w, b, a), lambda x, w, b, n: x @ w.t() + b),
    "norm": (
        lambda x, w, b, a, n: norm_linear(x, n, 1e-5, w, b, 0.5 * x, a)[0],
        lambda x, w, b, n: rms(1.5 * x, n) @ w.t() + b,
    ),
    "swiglu": (
        lambda x, w, b, a, n: swiglu_linear(torch.cat([x, 2 * x], 1), w, b, a),
        lambda x, w, b, n: (torch.nn.functional.silu(x) * 2 * x) @ w.t() + b,
    ),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rows", [1, 40])
def test_forward_and_backward_are_those_of_the_dense_weight(form, rows):
    """W + s up down in fp64. Tolerance: sums of at most 40 products of order 1 in fp32, 40 * 2^-24 = 2.4e-6, times the
    few products a gradient passes through."""
    g = torch.Generator().manual_seed(rows)
    shapes = {"x": (rows, 40), "w": (24, 40), "b": (24,), "down": (3, 40), "up": (24, 3), "n": (40,)}
    wide = {name: torch.randn(shape, generator=g, dtype=torch.float64) for name, shape in shapes.items()}
    wide["w"], wide["down"] = wide["w"] / 40**0.5, wide["down"] / 40**0.5
    small = {name: t.float() for name, t in wide.items()}
    wide = {name: t.double().requires_grad_(name in ("x", "down", "up")) for name, t in small.items()}
    small = {name: t.requires_grad_(name in ("x", "down", "up")) for name, t in small.items()}
    ours, plain = FORMS[form]
    got = ours(small["x"], small["w"], small["b"], Adapter(small["down"], small["up"], 2.0), small["n"])
    dense = wide["w"] + 2.0 * wide["up"] @ wide["down"]
    expected = plain(wide["x"], dense, wide["b"], wide["n"])
    assert torch.allclose(got.double(), expected, atol=5e-5, rtol=1e-5)
    weights = torch.randn(got.shape, generator=g, dtype=torch.float64)
    (got * weights.float()).sum().backward()
    (expected * weights).sum().backward()
    for name in ("x", "down", "up"):
        assert torch.allclose(small[name].grad.double(), wide[name].grad, atol=5e-4, rtol=1e-4), name
    assert small["w"].grad is None
    with torch.no_grad():
        again = ours(small["x"], small["w"], small["b"], Adapter(small["down"], small["up"], 2.0), small["n"])
    assert torch.equal(again, got)  # so that a policy measured without gradients is the one that is trained


@pytest.mark.parametrize("changes", CHANGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fresh_adapters_change_no_bit(changes, dtype):
    """PPO-4: up is zero, so policy and reference are the same to the bit."""
    model = adapted(**changes).to(dtype)
    plain, batch = lora.without_adapters(model), pack(random_groups(5, 2))
    assert torch.equal(model.logprobs(batch).detach(), plain.logprobs(batch))
    stirred(model)
    assert not torch.equal(model.logprobs(batch).detach(), plain.logprobs(batch))


@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_reach_adapters_only(recompute):
    """The trunk takes no gradient, from the policy's loss or from the critic's; each model's adapters are its own."""
    policy = tiny_model(tied=False)
    critic = value_model_from(policy, share=True)
    for number, model in enumerate((policy, critic)):
        lora.add_adapters(model, 3, number)
        model.recompute = recompute
        stirred(model, number)
    with torch.no_grad():
        critic.value.fill_(0.1)
    batch = pack(random_groups(5, 2))
    policy.logprobs(batch).sum().backward()
    assert all(p.grad is None for p in critic.parameters())
    critic.values(batch).sum().backward()
    for model in (policy, critic):
        for name, p in model.named_parameters():
            trains = ".lora." in name or name == "value"
            assert p.requires_grad == trains and (p.grad is not None) == trains, name
            assert not trains or bool(p.grad.any()), name
    shared = [(a, b) for a, b in zip(policy.blocks, critic.blocks, strict=True)]
    assert all(a.qkv is b.qkv and a.down is b.down and a.lora is not b.lora for a, b in shared)
    assert not torch.equal(policy.blocks[0].lora["qkv"].down, critic.blocks[0].lora["qkv"].down)


def test_gradients_are_those_of_the_dense_model():
    """Whole model: with s = 2, d/d up = s G down^T and d/d down = s up^T G, G the dense weight's gradient."""
    model, batch = stirred(adapted()), pack(random_groups(6, 2))
    dense = tiny_model()
    with torch.no_grad():
        for name, p in dense.named_parameters():
            p.copy_(lora.Merged(model)[name])
    model.logprobs(batch).sum().backward()
    dense.logprobs(batch).sum().backward()
    for ours, theirs in zip(model.blocks, dense.blocks, strict=True):
        for name, part in ours.lora.items():
            whole = getattr(theirs, name).grad.view(part.up.shape[0], -1)
            for got, expected in (
                (part.up.grad, 2.0 * whole @ part.down.t()),
                (part.down.grad, 2.0 * part.up.t() @ whole),
            ):
                # Both round some hundred sums: 1e-3 of the largest element is far from a wrong factor.
                assert (got - expected).abs().max() < 1e-3 * expected.abs().max(), name


@pytest.mark.parametrize("changes", CHANGES)
def test_the_saved_model_is_base_and_adapters(changes, tmp_path):
    """Merged weights in Hugging Face layout: logprobs within fp32 rounding of the adapted model's, far from the base's;
    the trunk itself stays as it was."""
    model, batch = stirred(adapted(**changes)), pack(random_groups(6, 2))
    before = {name: p.detach().clone() for name, p in lora.trunk_parameters(model)}
    save_state(model.config, lora.Merged(model), None, {}, tmp_path / "saved")
    saved = load_model(tmp_path / "saved")
    got, expected = saved.logprobs(batch), model.logprobs(batch)
    assert torch.allclose(got, expected, atol=2e-4)
    assert (lora.without_adapters(model).logprobs(batch) - expected).abs().max() > 0.01
    assert all(torch.equal(before[name], p) for name, p in lora.trunk_parameters(model))


def test_a_small_change_of_a_bf16_trunk_is_not_rounded_away(tmp_path):
    model = adapted(dtype=torch.bfloat16)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(".up"):
                p.fill_(2.0**-14)
    merged = lora.Merged(model)["blocks.0.o"]
    changed = merged - model.blocks[0].o.detach().float()
    part = model.blocks[0].lora["o"]
    assert merged.dtype == torch.float32
    assert torch.allclose(changed, 2.0 * part.up.float() @ part.down.float(), atol=2.0**-20)


def test_the_sampler_uses_the_adapters():
    """The engine's logprobs are the trainer's, and not the base's."""
    model = stirred(adapted())
    prompts = [[5, 6, 7], [9, 3]]
    rollouts = model.generate(prompts, 2, 8, seed=3, stop=[])
    groups = [PromptGroup(p, [r.tokens for r in rollouts[2 * i : 2 * i + 2]]) for i, p in enumerate(prompts)]
    sampled = torch.tensor([x for r in rollouts for x in r.logprobs])
    batch = pack(groups)
    assert torch.allclose(sampled, model.logprobs(batch).detach(), atol=1e-4)
    assert (sampled - lora.without_adapters(model).logprobs(batch)).abs().max() > 0.01


@pytest.mark.parametrize("rank", [1, 5])
def test_number_of_parameters(rank):
    for changes in CHANGES:
        model = adapted(rank=rank, **changes)
        mine = sum(p.numel() for name, p in model.named_parameters() if ".lora." in name)
        assert lora.num_parameters(tiny_config(**changes), rank) == mine
        again = adapted(rank=rank, **changes)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_a_copy_keeps_its_adapters():
    """copy.deepcopy and state_dict see adapters as any parameter."""
    model = stirred(adapted())
    twin, batch = copy.deepcopy(model), pack(random_groups(3))
    assert torch.equal(twin.logprobs(batch), model.logprobs(batch))
    size = sum(math.prod(t.shape) for n, t in model.state_dict().items() if ".lora." in n)
    assert size == lora.num_parameters(model.config, 3)
