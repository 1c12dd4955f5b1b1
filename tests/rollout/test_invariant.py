"""--batch-invariant (issue 6, Build 6): a sampled token's logprob is the training pass's to the bit.

The bugs this file must catch: decoding whose attention cuts keys where training does not; a single response joined with
its prompt in training; logprobs from the sampler's own products.
"""

import random

import pytest
import torch

from hpsafety import ops
from hpsafety.data.groups import PromptGroup, pack
from hpsafety.rollout import invariance, passes
from hpsafety.rollout.engine import Engine, Request
from hpsafety.rollout.sampler import Settings
from tests.tiny import tiny_model

SHAPES = {
    "4 heads on 2": {},
    "8 heads on 1": {"width": 64, "num_heads": 8, "num_kv_heads": 1, "head_dim": 8, "vocab_size": 300},
    "3 heads on 3, biases": {
        "width": 48,
        "num_heads": 3,
        "num_kv_heads": 3,
        "head_dim": 32,
        "qkv_bias": True,
        "o_bias": True,
    },  # fmt: skip
}


def model_of(shape: str, dtype=torch.float32):
    model = tiny_model(seed=4, dtype=dtype, max_positions=512, **SHAPES[shape])
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                p.normal_(generator=torch.Generator().manual_seed(1))
    if why := invariance.fault(model):
        pytest.skip(why)
    return model


def some_prompts(lengths, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(67) for _ in range(n)] for n in lengths]


def sampled(model, prompts, k: int, **changes) -> tuple[list[PromptGroup], torch.Tensor]:
    """The groups sampled, and the sampler's logprobs in the order of a packed batch."""
    values = {"max_new_tokens": 200, "seed": 7, "stop": frozenset([3]), "batch_invariant": True}
    engine = Engine(model, Settings(**(values | changes)))
    found = dict(engine.groups(Request(prompt, k, i) for i, prompt in enumerate(prompts)))
    samples = [found[i] for i in range(len(prompts))]
    groups = [PromptGroup(p, [s.tokens for s in own]) for p, own in zip(prompts, samples, strict=True)]
    return groups, torch.tensor([x for own in samples for s in own for x in s.logprobs])


@torch.no_grad()
def trained(model, batches, temperature: float = 1.0, entropy: bool = False) -> torch.Tensor:
    """The training pass's logprobs over packed batches of groups."""
    out = [model.logprobs(pack(groups, join_single=False), temperature, entropy) for groups in batches]
    return torch.cat([x[0] if entropy else x for x in out])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_sampled_token_has_the_trainers_bits(dtype, shape):
    """Prompts and responses around the borders of one block of keys and of two, k of 1, 3 and 8, two temperatures, with
    sequences that enter and leave; trained as one packed row and group by group, with entropies and without."""
    model = model_of(shape, dtype)
    border = some_prompts([1, 95, 96, 97, 191, 192, 193])
    longest = 0
    for k, prompts, temperature in (
        (1, border, 1.0), (1, border, 0.7), (3, border, 0.7), (8, some_prompts([96, 193, 2], 1), 1.0),
        (8, some_prompts([40], 2), 0.0),
    ):  # fmt: skip
        groups, ours = sampled(model, prompts, k, temperature=temperature, max_batch=11)
        for batches, entropy in (([groups], False), ([[g] for g in groups], True)):
            theirs = trained(model, batches, temperature or 1.0, entropy)
            assert torch.equal(ours, theirs), (k, temperature, float((ours - theirs).abs().max()))
        longest = max(longest, *(len(r) for g in groups for r in g.responses))
    assert longest > 193  # over two blocks of own keys


def test_what_is_needed_for_it():
    """A single response joined with its prompt, or the default sampler, differs: so the test above can fail."""
    model, prompts = model_of("8 heads on 1"), some_prompts([95, 193])
    groups, ours = sampled(model, prompts, 1)
    assert torch.equal(ours, trained(model, [groups]))
    with torch.no_grad():
        assert not torch.equal(ours, model.logprobs(pack(groups)))  # joined with the prompt: other blocks
    plain_groups, plain = sampled(model, prompts, 1, batch_invariant=False)
    assert not torch.equal(plain, trained(model, [plain_groups]))


@pytest.mark.parametrize("part", ["attention", "logprobs"])
def test_each_part_of_the_sampler_is_needed(part, monkeypatch):
    """With splits in decoding, or with logprobs of the sampler's own products, bits differ."""
    model, prompts = model_of("8 heads on 1"), some_prompts([300])  # more than one split of keys
    if part == "attention":
        real = ops.paged_attention
        monkeypatch.setattr(ops, "paged_attention", lambda *args, sequential: real(*args))
    else:
        draw = passes.draw
        off = Settings(seed=7)
        monkeypatch.setattr(passes, "draw", lambda m, hidden, _, *keys: draw(m, hidden, off, *keys))
    groups, ours = sampled(model, prompts, 2)
    assert not torch.equal(ours, trained(model, [groups]))


def test_neither_batch_nor_memory_changes_a_bit():
    """Alone or among others, in any order, with any page size and any prefill budget."""
    model, prompts = model_of("4 heads on 2"), some_prompts([3, 96, 40, 97, 10, 193])
    groups, ours = sampled(model, prompts, 2, max_new_tokens=110)
    for changes in ({"max_batch": 1}, {"page_size": 7}, {"page_size": 256}, {"prefill_tokens": 50}):
        again, same = sampled(model, prompts, 2, max_new_tokens=110, **changes)
        assert again == groups and torch.equal(same, ours), changes


def test_a_machine_that_cannot_says_why(monkeypatch):
    """fault: a product whose rows depend on each other, a logprob op that does, and ops served by the reference."""
    model = model_of("4 heads on 2")
    with monkeypatch.context() as patch:
        patch.setenv("HPSAFETY_IMPL", "reference")
        assert "attention is served by reference" in invariance.fault(model)
    with monkeypatch.context() as patch:
        patch.setattr(invariance, "row_bound", lambda model: 1e-7)
        assert "products change by up to 1.0e-07" in invariance.fault(model)
    real = ops.linear_logprob
    with monkeypatch.context() as patch:
        patch.setattr(ops, "linear_logprob", lambda hidden, *rest: real(hidden, *rest) - 1e-3 * len(hidden))
        assert "logprobs change by up to 3.0e-01" in invariance.fault(model)
    assert invariance.fault(model) is None
