"""How much of the attention falls on the first turn's instruction, by layer and turn: an analysis pass of its own.

The model's blocks run one after the other; beside each, q k^T and its softmax are computed in plain torch for the
answers' rows, ROWS of them at a time, so that memory is (heads x ROWS x tokens) numbers and no more.

Legend: T tokens, H query heads, G kv heads, K head dim, R rows.
"""

import torch
import torch.nn.functional as nnf

from hpsafety import ops
from hpsafety.data.chat import encode_dialogue, encode_prompt
from hpsafety.data.groups import pack
from hpsafety.model.gemm import linear
from hpsafety.safety.gatt_instructions import attach

ROWS = 64


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
    """(layers, turns) fp64: mean over heads and over the rows that predict a turn's answer of the attention's sum over
    the instruction's tokens; each row's attention sums to 1 over all it sees.

    group  one dialogue (one response);  instruction, answers: token spans, end exclusive
    """
    batch = pack([group]).to(model.embed.device)
    cos, sin = model.rope(batch.tokens.device)
    x, delta = nnf.embedding(batch.tokens, model.embed), None
    mass = torch.zeros(len(model.blocks), len(answers), dtype=torch.float64)
    for layer, block in enumerate(model.blocks):
        qkv, x = block.project_qkv(x, delta)
        q, k, v = ops.rope_qkv(qkv, batch.positions, cos, sin)
        for turn, (start, end) in enumerate(answers):
            mass[layer, turn] = _mass(q, k, torch.arange(start - 1, end - 1, device=q.device), instruction)
        out = ops.attention(q, k, v, batch.segments).flatten(1)
        delta, x = block.mlp(x, linear(out, block.o, block.o_bias))
    return mass


def _mass(q_THK, k_TGK, rows_R, instruction: tuple[int, int]) -> float:
    heads, size = q_THK.shape[1:]
    keys = k_TGK.float().repeat_interleave(heads // k_TGK.shape[1], dim=1)
    columns, total = torch.arange(len(k_TGK), device=k_TGK.device), 0.0
    for part in rows_R.split(ROWS):
        scores = torch.einsum("rhk,thk->hrt", q_THK[part].float(), keys) * size**-0.5
        weights = scores.masked_fill(columns > part[:, None], float("-inf")).softmax(-1)
        total += float(weights[..., instruction[0] : instruction[1]].sum(-1).mean(0).double().sum())
    return total / len(rows_R)


def mean_mass(model, rows: list[dict]) -> dict:
    """Means over the dialogues, as JSON numbers: by_layer (layers x turns), `dialogues` that had each turn, `uniform`:
    the share of the tokens that are the instruction's, which uniform attention would give. rows: see `spans`."""
    total: list[torch.Tensor] = []
    shares: list[list[float]] = []
    for row in rows:
        group, instruction, answers = spans(model.tokenizer, row)
        total.append(instruction_mass(model, group, instruction, answers))
        shares.append([(instruction[1] - instruction[0]) / ((a + b) / 2) for a, b in answers])
    turns = max(mass.shape[1] for mass in total)
    counts = [sum(mass.shape[1] > t for mass in total) for t in range(turns)]
    by_layer = [
        [sum(float(m[layer, t]) for m in total if m.shape[1] > t) / counts[t] for t in range(turns)]
        for layer in range(len(model.blocks))
    ]
    share = [sum(s[t] for s in shares if len(s) > t) / counts[t] for t in range(turns)]
    return {"by_layer": by_layer, "dialogues": counts, "uniform": share}
