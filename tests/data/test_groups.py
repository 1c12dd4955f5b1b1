"""Prompt groups (design: the prompt group contract; SFT-1): `pack` against a slow, obvious implementation."""

import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hpsafety.data.groups import PromptGroup, pack

TOKENS = st.lists(st.integers(0, 50), min_size=1, max_size=6)


@st.composite
def group_strategy(draw):
    responses = draw(st.lists(TOKENS, min_size=1, max_size=5))
    masks = [draw(st.lists(st.booleans(), min_size=len(r), max_size=len(r))) for r in responses]
    return PromptGroup(draw(TOKENS), responses, draw(st.sampled_from([None, masks])))


def slow_pack(groups):
    """The table of the contract, one token at a time."""
    out = {name: [] for name in ("tokens", "positions", "segments", "predict_rows", "targets", "train_mask")}
    out |= {"cu_responses": [0], "last_rows": [], "group_of": []}
    for g, group in enumerate(groups):
        start = len(out["tokens"])
        out["tokens"] += group.prompt
        out["positions"] += range(len(group.prompt))
        prompt_end = len(out["tokens"])
        if len(group.responses) > 1:
            out["segments"].append([start, prompt_end, start, start])
        for k, response in enumerate(group.responses):
            first = len(out["tokens"])
            for i, token in enumerate(response):
                out["predict_rows"].append(prompt_end - 1 if i == 0 else len(out["tokens"]) - 1)
                out["targets"].append(token)
                out["train_mask"].append(True if group.train is None else group.train[k][i])
                out["tokens"].append(token)
                out["positions"].append(len(group.prompt) + i)
            end = len(out["tokens"])
            single = len(group.responses) == 1
            out["segments"].append([start, end, start, start] if single else [first, end, start, prompt_end])
            out["cu_responses"].append(len(out["targets"]))
            out["last_rows"].append(end - 1)
            out["group_of"].append(g)
    return out


@settings(max_examples=60, deadline=None)
@given(st.lists(group_strategy(), max_size=5))
def test_pack_equals_the_slow_implementation(groups):
    batch = pack(groups)
    for name, expected in slow_pack(groups).items():
        field = getattr(batch, name)
        assert field.tolist() == expected, name
        assert field.is_contiguous(), name
    assert batch.tokens_computed == len(batch.tokens)
    assert batch.tokens_equiv == sum(len(g.prompt) + len(r) for g in groups for r in g.responses)
    assert batch.num_trained == int(batch.train_mask.sum())


def test_dtypes_shapes_and_device():
    batch = pack([PromptGroup([1, 2], [[3], [4, 5]])])
    dtypes = {
        "tokens": torch.int64,
        "positions": torch.int32,
        "segments": torch.int32,
        "predict_rows": torch.int64,
        "targets": torch.int64,
        "train_mask": torch.bool,
        "cu_responses": torch.int32,
        "last_rows": torch.int64,
        "group_of": torch.int32,
    }
    for moved in (batch, batch.to("meta"), pack([])):
        assert {name: getattr(moved, name).dtype for name in dtypes} == dtypes
    assert batch.to("meta").tokens.device.type == "meta" and batch.to("meta").num_trained == 3
    assert pack([]).segments.shape == (0, 4) and pack([]).cu_responses.tolist() == [0]


def test_sft1_mask_is_true_exactly_on_answer_tokens():
    """SFT-1: three packed examples; prompts and separators are never targets or are masked out."""
    prompt, answer, separator = 1, 2, 3
    groups = [
        PromptGroup([prompt] * 3, [[answer] * 2]),
        PromptGroup([prompt], [[answer, separator, separator, answer]], [[True, False, False, True]]),
        PromptGroup([prompt] * 2, [[answer], [answer] * 3]),
    ]
    batch = pack(groups)
    assert batch.train_mask.tolist() == [token == answer for token in batch.targets.tolist()]
    trained = batch.targets[batch.train_mask]
    assert trained.tolist() == [answer] * int((batch.tokens == answer).sum())
    assert batch.num_trained == 8


def test_one_and_sixty_four_responses():
    one = pack([PromptGroup([1, 2, 3], [[4, 5]])])
    assert one.segments.tolist() == [[0, 5, 0, 0]]
    many = pack([PromptGroup([1, 2, 3], [[k] * (k + 1) for k in range(64)])])
    assert many.segments.shape == (65, 4)
    assert many.predict_rows[many.cu_responses[:-1].long()].tolist() == [2] * 64
    assert many.tokens_equiv - many.tokens_computed == 63 * 3


@pytest.mark.parametrize(
    "bad, message",
    [
        (PromptGroup([], [[1]]), "group 1: the prompt is empty"),
        (PromptGroup([1], []), "group 1: no responses"),
        (PromptGroup([1], [[1], []]), "group 1: response 1 is empty"),
        (PromptGroup([1], [[1], [2]], [[True]]), "group 1: train has 1 lists for 2 responses"),
        (PromptGroup([1], [[1, 2]], [[True]]), "group 1: train\\[0\\] has 1 flags for 2"),
        (PromptGroup([1], [[1, -2]]), "group 1: token id -2 is negative"),
    ],
)
def test_bad_groups_name_the_group(bad, message):
    good = PromptGroup([1, 2], [[3, 4], [5]])
    with pytest.raises(ValueError, match=message):
        pack([good, bad, good])


def test_float_tokens_are_refused():
    with pytest.raises(TypeError):
        pack([PromptGroup([1.5], [[1]])])


def test_packing_512_groups_takes_milliseconds():
    groups = [PromptGroup([7] * 150, [[9] * 150]) for _ in range(512)]
    times = []
    for _ in range(7):
        began = time.perf_counter()
        pack(groups)
        times.append(time.perf_counter() - began)
    assert min(times) < 0.05  # measured 6 ms; a loop over tokens takes more than 100
