"""The engine (design sections 4 and 7, PPO-4): same key, same bits, whatever the batch, the memory and the page size.

The bug this file must catch: an own page whose tokens are read by another sample (block tables not made anew when a
sequence leaves).
"""

import random

import pytest
import torch

from hpsafety.data.groups import PromptGroup, pack
from hpsafety.errors import InputError, RunError
from hpsafety.rollout.engine import Engine, Request
from hpsafety.rollout.kv_cache import page_bytes
from hpsafety.rollout.passes import row_bound
from hpsafety.rollout.sampler import Settings
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def model():
    return tiny_model(seed=4)


def some_prompts(count: int, longest: int = 40, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(67) for _ in range(rng.randint(1, longest))] for _ in range(count)]


def pages(model, count: int, page_size: int = 16) -> int:
    """Bytes of so many pages."""
    return count * page_bytes(model.config, page_size, model.embed.dtype)


def sample(model, requests, **changes) -> tuple[dict, Engine]:
    """(prompt, sample) -> (tokens, logprobs, finish), and the engine that made them, with no page lost."""
    values = {"max_new_tokens": 12, "temperature": 1.1, "top_p": 0.9, "seed": 7, "stop": frozenset([3, 9])}
    engine = Engine(model, Settings(**(values | changes)))
    done = list(engine.rollouts(requests))
    cache = engine.cache
    assert cache.num_free == cache.num_pages and cache.taken == cache.returned
    out = {(r.prompt_index, r.sample_index): (r.tokens, r.logprobs, r.finish) for r in done}
    assert len(out) == len(done)
    return out, engine


def requests_for(prompts, k=2) -> list[Request]:
    return [Request(p, k, i) for i, p in enumerate(prompts)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sequence_does_not_change_by_a_bit(dtype):
    """Design section 7: alone, among others, in any order, with little memory, any page size and any prefill budget."""
    model = tiny_model(seed=4, dtype=dtype)
    if row_bound(model):
        pytest.skip("rows of this CPU's products depend on the rows beside them")
    prompts = some_prompts(20)
    everything, _ = sample(model, requests_for(prompts))
    assert len(everything) == 40 and len({len(t) for t, _, _ in everything.values()}) > 3
    for index in (0, 7, 19):
        alone, _ = sample(model, [Request(prompts[index], 1, index)])
        assert alone[index, 0] == everything[index, 0]
    more, _ = sample(model, requests_for(prompts, k=5))
    assert {key: more[key] for key in everything} == everything
    reordered = random.Random(1).sample(requests_for(prompts), 20)
    longest = (max(map(len, prompts)) + 15) // 16 + 1
    for changes in (
        {"max_batch": 1}, {"max_batch": 3}, {"prefill_tokens": 1}, {"prefill_tokens": 50},
        {"kv_memory": pages(model, longest)}, {"kv_memory": pages(model, longest + 3)},
        {"page_size": 1}, {"page_size": 17}, {"page_size": 64}, {"page_size": 256},
    ):  # fmt: skip
        again, _ = sample(model, reordered, **changes)
        assert again == everything, changes


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.3])
def test_logprobs_equal_the_training_path(model, temperature):
    """Issue 5, PPO-4: within 1e-4 of model.logprobs in fp32, at the sampling temperature (1 where it is 0)."""
    prompts = some_prompts(9)
    out, _ = sample(model, requests_for(prompts, k=3), temperature=temperature, top_p=0.8)
    groups = [PromptGroup(p, [out[i, s][0] for s in range(3)]) for i, p in enumerate(prompts)]
    with torch.no_grad():
        exact = model.logprobs(pack(groups), temperature or 1.0)
    ours = torch.tensor([x for i in range(len(prompts)) for s in range(3) for x in out[i, s][1]])
    assert ours.shape == exact.shape and float((ours - exact).abs().max()) < 1e-4


@pytest.mark.parametrize("k", [1, 2, 7, 64])
def test_a_prompt_is_computed_once(model, k):
    """Issue 5: prefilled once for its k samples, also when memory lets them in one by one."""
    prompts = some_prompts(3)
    longest = (max(map(len, prompts)) + 15) // 16 + 1
    for memory in (None, pages(model, longest)):
        out, engine = sample(model, requests_for(prompts, k), kv_memory=memory, max_batch=100)
        assert len(out) == 3 * k and engine.prefilled_tokens == sum(map(len, prompts))
        sampled = sum(len(tokens) for tokens, _, _ in out.values())
        assert engine.decoded_tokens == sampled - 3 * k  # a last token is never fed
        if memory:
            assert engine.cache.most_used <= longest


def test_samples_of_a_prompt_share_its_pages(model):
    prompt = some_prompts(1, 100, seed=3)[0] + [1] * 40
    _, engine = sample(model, [Request(prompt, 16, 0)], max_new_tokens=10, stop=frozenset())
    assert engine.cache.most_used == (len(prompt) + 15) // 16 + 16  # one own page each


def test_out_of_pages_storm():
    """Issue 5: 2,000 requests with 1/20 of the memory they want all finish, and no page is lost."""
    model = tiny_model(seed=1, num_layers=1)
    prompts, size = some_prompts(2000, 24), 4
    wanted = sum((len(p) + size - 1) // size + 2 for p in prompts)
    stop = frozenset(range(8))
    out, engine = sample(
        model, requests_for(prompts, 1), max_new_tokens=9, page_size=size, max_batch=2000, stop=stop,
        kv_memory=pages(model, wanted // 20, size),
    )  # fmt: skip
    assert len(out) == 2000 and engine.prefilled_tokens == sum(map(len, prompts))
    assert engine.cache.num_pages == wanted // 20 >= engine.cache.most_used > wanted // 25
    assert engine.cache.taken == wanted == engine.cache.returned
    for tokens, _, finish in out.values():
        assert not stop & set(tokens[:-1])
        assert (finish == "stop") == (tokens[-1] in stop) and (finish == "stop" or len(tokens) == 9)


def test_an_update_of_the_weights_is_seen_at_once():
    """Issue 5: weights are read in place. First the head changes between two steps, then all weights between runs."""
    model, prompts = tiny_model(seed=4, tied=False), some_prompts(4)
    engine = Engine(model, Settings(max_new_tokens=6, temperature=0.0))
    for request in requests_for(prompts, 1):
        engine.add(request)
    said = [[t.token] for t in engine.step()]
    with torch.no_grad():
        model.head.neg_()
    for token in engine.step():
        text = prompts[token.prompt_index] + said[token.prompt_index]
        with torch.no_grad():
            logits = model.head @ model(pack([PromptGroup(text, [[0]])]))[-2]
        assert token.token == int(logits.argmax())
    before = model.generate(prompts, k=2, seed=1)
    fresh = tiny_model(seed=5, tied=False)
    with torch.no_grad():
        for p, q in zip(model.parameters(), fresh.parameters(), strict=True):
            p.copy_(q)
    assert model.generate(prompts, k=2, seed=1) == fresh.generate(prompts, k=2, seed=1) != before


def test_requests_are_pulled_as_there_is_room(model):
    """A file larger than memory can be sampled: no more requests are held than the batch and one that waits."""
    pulled = finished = 0

    def source():
        nonlocal pulled
        for i in range(50):
            pulled += 1
            yield Request([1, 2, i], 1, i)

    engine = Engine(model, Settings(max_new_tokens=5, max_batch=4))
    for _ in engine.rollouts(source()):
        finished += 1
        assert pulled - finished <= 4 + 1
    assert finished == pulled == 50


def test_groups_come_whole_and_in_order_of_samples(model):
    engine = Engine(model, Settings(max_new_tokens=9, stop=frozenset(range(20)), max_batch=5))
    sizes = [3, 1, 8, 2]
    seen = dict(engine.groups(Request([5, i], k, i) for i, k in enumerate(sizes)))
    assert sorted(seen) == [0, 1, 2, 3]
    for index, rollouts in seen.items():
        assert [(r.prompt_index, r.sample_index) for r in rollouts] == [
            (index, s) for s in range(sizes[index])
        ]


def test_stop_and_length(model):
    """A response ends with its stop token, which is kept, or with max_new_tokens; one new token needs no own page."""
    out, _ = sample(model, requests_for(some_prompts(8)), stop=frozenset(range(0, 67, 2)))
    assert {finish for _, _, finish in out.values()} == {"stop"}
    assert all(t[-1] % 2 == 0 and all(x % 2 for x in t[:-1]) for t, _, _ in out.values())
    out, engine = sample(model, requests_for([[1], [2]]), max_new_tokens=1, stop=frozenset())
    assert [len(t) for t, _, _ in out.values()] == [1] * 4 and engine.cache.taken == 2


def test_idle_engine_and_no_requests(model):
    engine = Engine(model, Settings())
    assert engine.step() == [] and list(engine.rollouts(())) == [] and model.generate([]) == []


def test_memory_too_small_for_one_sequence(model):
    """Issue 5, bad input: both numbers and the flag to raise."""
    each = pages(model, 1)
    engine = Engine(model, Settings(kv_memory=pages(model, 3), max_new_tokens=17))
    engine.add(Request([1] * 32, 4, 0))
    with pytest.raises(
        InputError, match=f"needs {4 * each:,} bytes and {3 * each:,} are there; raise --kv-memory"
    ):
        engine.add(Request([1] * 33, 1, 1))


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": -0.1}, {"temperature": float("nan")}, {"temperature": float("inf")}, {"top_p": 0.0},
        {"top_p": 1.01}, {"top_p": float("nan")}, {"top_k": -1}, {"max_new_tokens": 0}, {"max_batch": 0},
        {"page_size": 0}, {"prefill_tokens": 0},
    ],
)  # fmt: skip
def test_settings_refuse(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        Settings(**changes)


def test_nan_stops_the_run_and_names_the_prompt():
    """Issue 5: no silence. Only the third prompt meets the damaged row of the embedding."""
    model = tiny_model(seed=4, tied=False)
    with torch.no_grad():
        model.embed[5] = float("nan")
    with pytest.raises(RunError, match=r"prompt 2, sample 0: .* not finite"):
        model.generate([[1, 2], [3], [4, 5, 6]], k=2, stop=list(range(67)))
