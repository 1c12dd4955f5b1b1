"""How much of the attention falls on the first turn's instruction, by layer and turn: an analysis pass of its own.

The model's blocks run one after the other; beside each, q k^T and its softmax are computed in plain torch for the
answers' rows, ROWS of them at a time, so that memory is (heads x ROWS x tokens) numbers and no more.

A few tokens draw attention whatever they say (sinks: Xiao et al. 2023, Sun et al. 2024). In smollm2 one is the first
"the" of a text: inside an instruction it gets 0.1 of all attention where every other word gets 0.0005, and the picture
would be of that "the" alone. So sinks are found by the model before training, and left out for both.

Legend: T tokens, H query heads, G kv heads, K head dim, R rows, I tokens of the instruction.
"""

import torch
import torch.nn.functional as nnf

from hpsafety import ops
from hpsafety.data.chat import encode_dialogue, encode_prompt
from hpsafety.data.groups import pack
from hpsafety.model.gemm import linear
from hpsafety.safety.gatt_instructions import attach

ROWS = 64
SINK = 20  # times the median of the instruction's tokens: a sink is 100 and more, the words that matter are up to 5


def spans(tokenizer, row: dict):
    """(group, (start, end) of the instruction, [(start, end) of each turn's answer]), in tokens of one packed dialogue.

    row  of recall-NAME.jsonl, with an instruction in its first user turn and at least one answer
    The instruction's tokens are those by which the first turn differs from the same turn without it.
    """
    users, said = [m["content"] for m in row["prompt"]], row["said"]
    messages = []
    for user, answer in zip(users, said, strict=False):
        messages += [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
    group = encode_dialogue(tokenizer, messages[:-1], messages[-1]["content"])
    bare = encode_prompt(tokenizer, users[0].removeprefix(attach(row["instruction"], "")))
    start = _shared(group.prompt, bare)
    tail = _shared(group.prompt[start:][::-1], bare[start:][::-1])
    mask = [True] * len(group.responses[0]) if group.train is None else list(group.train[0])
    edges = [i for i in range(len(mask) + 1) if (i < len(mask) and mask[i]) != (i > 0 and mask[i - 1])]
    first = len(group.prompt)
    answers = [(first + a, first + b) for a, b in zip(edges[::2], edges[1::2], strict=True)]
    return group, (start, len(group.prompt) - tail), answers


def _shared(a: list[int], b: list[int]) -> int:
    """Length of the beginning that both have."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


@torch.no_grad()
def instruction_mass(
    model, group, instruction: tuple[int, int], answers: list[tuple[int, int]]
) -> torch.Tensor:
    """(layers, turns, I) fp64: the attention on each of the instruction's tokens, mean over heads and over the rows
    that predict a turn's answer; a row's attention sums to 1 over all it sees.

    group  one dialogue (one response);  instruction, answers: token spans, end exclusive
    """
    batch = pack([group]).to(model.embed.device)
    cos, sin = model.rope(batch.tokens.device)
    x, delta = nnf.embedding(batch.tokens, model.embed), None
    mass = []
    for block in model.blocks:
        qkv, x = block.project_qkv(x, delta)
        q, k, v = ops.rope_qkv(qkv, batch.positions, cos, sin)
        rows = [torch.arange(start - 1, end - 1, device=q.device) for start, end in answers]
        mass.append(torch.stack([_mass(q, k, r, instruction) for r in rows]))
        out = ops.attention(q, k, v, batch.segments).flatten(1)
        delta, x = block.mlp(x, linear(out, block.o, block.o_bias))
    return torch.stack(mass)


def _mass(q_THK, k_TGK, rows_R, instruction: tuple[int, int]) -> torch.Tensor:
    """(I,) fp64 on the CPU."""
    heads, size = q_THK.shape[1:]
    keys = k_TGK.float().repeat_interleave(heads // k_TGK.shape[1], dim=1)
    columns = torch.arange(len(k_TGK), device=k_TGK.device)
    total = torch.zeros(instruction[1] - instruction[0], dtype=torch.float64)
    for part in rows_R.split(ROWS):
        scores = torch.einsum("rhk,thk->hrt", q_THK[part].float(), keys) * size**-0.5
        weights = scores.masked_fill(columns > part[:, None], float("-inf")).softmax(-1)
        total += weights[..., instruction[0] : instruction[1]].mean(0).sum(0).double().cpu()
    return total / len(rows_R)


def find_sinks(mass_LTI: torch.Tensor) -> list[int]:
    """The instruction's tokens whose mean attention is more than SINK times the median of all of them."""
    mean = mass_LTI.mean((0, 1))
    return (mean > SINK * mean.median()).nonzero().flatten().tolist()


def mean_mass(model, rows: list[dict], sinks: list[list[int]] | None = None) -> dict:
    """Means over the dialogues, up to the last turn that all of them have, as JSON numbers.

    rows     see `spans`;  sinks: tokens to leave out of each dialogue's instruction; found here where None
    returns  by_layer (layers x turns); uniform: by turn, the share of the tokens that are the instruction's, which
             uniform attention would give; dialogues: how many; sinks, and sink_words: their text
    """
    found, masses, shares, words = [], [], [], []
    for number, row in enumerate(rows):
        group, (start, end), answers = spans(model.tokenizer, row)
        mass = instruction_mass(model, group, (start, end), answers)
        out = find_sinks(mass) if sinks is None else sinks[number]
        kept = [i for i in range(end - start) if i not in out]
        found.append(out)
        masses.append(mass[:, :, kept].sum(-1))
        shares.append([len(kept) / ((a + b) / 2) for a, b in answers])
        words += [model.tokenizer.decode([group.prompt[start + i]], skip_special=False) for i in out]
    turns, count = min(mass.shape[1] for mass in masses), len(rows)
    return {
        "by_layer": (sum(mass[:, :turns] for mass in masses) / count).tolist(),
        "uniform": [sum(share[t] for share in shares) / count for t in range(turns)],
        "dialogues": count, "sinks": found, "sink_words": words,
    }  # fmt: skip
