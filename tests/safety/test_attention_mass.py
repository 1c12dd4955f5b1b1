"""Attention on the instruction. The bug this file must catch: rows that are one off, or a mass that is no share."""

import pytest
import torch

from hpsafety.data.chat import encode_prompt
from hpsafety.model.io import load_model, save_model
from hpsafety.safety import attention_mass
from hpsafety.safety.attention_mass import find_sinks, instruction_mass, mean_mass, spans
from tests.stages.conftest import write_tokenizer
from tests.tiny import tiny_model

ROW = {
    "instruction": "do it.",
    "prompt": [{"role": "user", "content": text} for text in ("do it.\n\nwhat now?", "and then?", "why?")],
    "said": ["a b", "", "c"],
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny"
    save_model(tiny_model(seed=2, max_positions=400), str(folder))
    write_tokenizer(folder)
    return load_model(str(folder))


def tokens_of(group) -> list[int]:
    return [*group.prompt, *group.responses[0]]


def test_spans(model):
    """The instruction's own tokens, and each turn's answer with its end of turn."""
    group, (start, end), answers = spans(model.tokenizer, ROW)
    tokens = tokens_of(group)
    assert model.tokenizer.decode(tokens[start:end], False) == "do it.\n\n"
    assert [model.tokenizer.decode(tokens[a:b], False) for a, b in answers] == [
        "a b<|im_end|>",
        "<|im_end|>",
        "c<|im_end|>",
    ]
    messages = [ROW["prompt"][0], {"role": "assistant", "content": "a b"}, ROW["prompt"][1]]
    assert answers[1][0] == len(encode_prompt(model.tokenizer, messages))


def test_mass_equals_a_plain_forward(model, monkeypatch):
    """Against attention written out in fp64 over the whole row, for every split of the rows."""
    group, instruction, answers = spans(model.tokenizer, ROW)
    expected = by_hand(model, tokens_of(group), instruction, answers)
    for rows in (64, 1, 2):
        monkeypatch.setattr(attention_mass, "ROWS", rows)
        mass = instruction_mass(model, group, instruction, answers)
        assert mass.shape == (2, 3, 8) and torch.allclose(mass, expected, atol=1e-6)
    everything = instruction_mass(model, group, (0, len(tokens_of(group))), answers).sum(-1)
    assert torch.allclose(everything, torch.ones(2, 3, dtype=torch.float64), atol=1e-6)


@torch.no_grad()
def by_hand(model, tokens, instruction, answers):
    c, x = model.config, model.embed.double()[torch.tensor(tokens)]
    cos, sin = (t.double() for t in model.rope("cpu"))
    count, half, out = len(tokens), c.head_dim // 2, []

    def norm(x, weight):
        return x / (x.square().mean(-1, keepdim=True) + c.norm_eps).sqrt() * weight.double()

    def rotate(h):
        low, high, cs, sn = h[..., :half], h[..., half:], cos[:count, None], sin[:count, None]
        return torch.cat([low * cs - high * sn, high * cs + low * sn], -1)

    for block in model.blocks:
        qkv = torch.einsum("td,gjkd->tgjk", norm(x, block.attn_norm), block.qkv.double())
        q, k, v = rotate(qkv[:, :, :-2].flatten(1, 2)), rotate(qkv[:, :, -2]), qkv[:, :, -1]
        j = q.shape[1] // k.shape[1]
        scores = torch.einsum("shk,thk->hst", q, k.repeat_interleave(j, 1)) / c.head_dim**0.5
        weights = scores.masked_fill(torch.ones(count, count).triu(1).bool(), -torch.inf).softmax(-1)
        part = weights[..., instruction[0] : instruction[1]].mean(0)
        out.append(torch.stack([part[a - 1 : b - 1].mean(0) for a, b in answers]))
        mixed = torch.einsum("hst,thk->shk", weights, v.repeat_interleave(j, 1)).flatten(1)
        x = x + mixed @ block.o.double().T
        gate, up = (norm(x, block.mlp_norm) @ w.double().T for w in block.gate_up)
        x = x + (torch.nn.functional.silu(gate) * up) @ block.down.double().T
    return torch.stack(out)


def test_mean_over_dialogues(model):
    """Up to the last turn that all have; without the sinks, which the model before training names for both."""
    short = ROW | {"said": ["c", "a b"]}
    one, two = mean_mass(model, [ROW], [[]]), mean_mass(model, [short], [[]])
    both = mean_mass(model, [ROW, short], [[], []])
    assert (
        both["dialogues"] == 2
        and [len(row) for row in both["by_layer"]] == [2, 2]
        and len(one["uniform"]) == 3
    )
    for layer in range(2):
        a, b = one["by_layer"][layer], two["by_layer"][layer]
        assert both["by_layer"][layer] == pytest.approx([(a[0] + b[0]) / 2, (a[1] + b[1]) / 2])
    assert one["uniform"][0] > one["uniform"][2] > 0
    group, span, answers = spans(model.tokenizer, ROW)
    mass = instruction_mass(model, group, span, answers)
    less = mean_mass(model, [ROW], [[0, 3]])
    assert torch.allclose(torch.tensor(less["by_layer"]), mass[:, :, [1, 2, 4, 5, 6, 7]].sum(-1).float())
    assert less["sink_words"] == ["d", "i"] and less["uniform"][0] == pytest.approx(6 / 8 * one["uniform"][0])


def test_sinks():
    """A token far above the others, in the mean over layers and turns; words that matter a little more are none."""
    mass = torch.full((4, 3, 9), 0.0005, dtype=torch.float64)
    mass[:, :, 2] *= 5
    assert find_sinks(mass) == []
    mass[1:3, :, 7] = 0.3
    assert find_sinks(mass) == [7]
