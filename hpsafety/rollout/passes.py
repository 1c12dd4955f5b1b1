"""The two passes of the engine, on the model's own weights: prompts as one packed row, then a token per sequence.

Every weight is read where it stands at every call, so an update is seen by the next. A row's bits do not depend on the
rows beside it: the products pad to MIN_ROWS (model/gemm.py), all other ops work row by row or sequence by sequence.

Legend: T tokens, B sequences, P prompts, D width, G kv heads, K head dim, V vocabulary.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as nnf

from hpsafety import ops
from hpsafety.model.gemm import plain_linear, row_difference
from hpsafety.rollout.kv_cache import PageCache


def _table(rows: list[list[int]], device) -> torch.Tensor:
    """(rows, longest) int32; what stands past a row's end is never read."""
    width = max(map(len, rows), default=0)
    padded = [row + [0] * (width - len(row)) for row in rows]
    return torch.tensor(padded, dtype=torch.int32, device=device).view(len(rows), width)


def _layers(model, tokens_T, positions_T, slots_T, cache: PageCache, attend, rows=None):
    """All blocks, the tokens' keys and values written to their slots: hidden rows after the final norm.

    attend  (q, k, v, layer) -> (T, H, K)
    rows    (W,) int64 or None: after the last attention go on with these rows only; the result is then (W, D)
    """
    cos, sin = model.rope(tokens_T.device)
    k_slots, v_slots = cache.k.flatten(1, 2), cache.v.flatten(1, 2)  # (L, slots, G, K)
    x_TD, delta_TD = nnf.embedding(tokens_T, model.embed), None
    for layer, block in enumerate(model.blocks):
        qkv, x_TD = block.project_qkv(x_TD, delta_TD)
        q_THK, k_TGK, v_TGK = ops.rope_qkv(qkv, positions_T, cos, sin)
        k_slots[layer].index_copy_(0, slots_T, k_TGK)
        v_slots[layer].index_copy_(0, slots_T, v_TGK)
        out_TI = attend(q_THK, k_TGK, v_TGK, layer).flatten(1)
        if rows is not None and layer + 1 == len(model.blocks):
            out_TI, x_TD = out_TI.index_select(0, rows), x_TD.index_select(0, rows)
        delta_TD, x_TD = block.mlp(x_TD, block.project_o(out_TI))
    return ops.rms_norm(x_TD, model.norm, model.config.norm_eps, delta_TD)[0]


@torch.no_grad()
def prefill(model, prompts: list[list[int]], pages: list[list[int]], cache: PageCache) -> torch.Tensor:
    """Computes the prompts as one packed row and fills their pages: the hidden row of each last token, (P, D)."""
    device = model.embed.device
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    ends = lengths.cumsum(0)
    starts = ends - lengths
    tokens = torch.tensor([token for prompt in prompts for token in prompt], device=device)
    positions = torch.cat([torch.arange(n, dtype=torch.int32) for n in lengths.tolist()]).to(device)
    slots = torch.cat([cache.slots(own, len(prompt)) for own, prompt in zip(pages, prompts, strict=True)])
    segments = torch.stack([starts, ends, starts, starts], 1).to(device, torch.int32)

    def attend(q, k, v, layer):
        return ops.attention(q, k, v, segments)

    return _layers(model, tokens, positions, slots.to(device), cache, attend, (ends - 1).to(device))


@dataclass(slots=True)
class Tables:
    """What a decode step needs to know of its B sequences. Made when a sequence enters or leaves; between that, a step
    adds one to the counts.

    made         (B,) int32 tokens sampled so far; the last of them is not in the cache yet
    prompt_lens  (B,) int32
    own          (B, pages) int32 pages of the sampled tokens
    prefix       (pages of the prompts (P, pages), their lengths (P,), prompt of each sequence (B,)), int32
    seeds        (B,) int64
    """

    made: torch.Tensor
    prompt_lens: torch.Tensor
    own: torch.Tensor
    prefix: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    seeds: torch.Tensor


def make_tables(made, own_pages, prompts_of, prompt_pages, prompt_lens, seeds, device) -> Tables:
    """From lists: per sequence made, own_pages, prompts_of (index of its prompt) and seeds; per prompt the rest."""
    ints = {"dtype": torch.int32, "device": device}
    lens, of = torch.tensor(prompt_lens, **ints), torch.tensor(prompts_of, **ints)
    return Tables(
        made=torch.tensor(made, **ints),
        prompt_lens=lens[of.long()],
        own=_table(own_pages, device),
        prefix=(_table(prompt_pages, device), lens, of),
        seeds=torch.tensor(seeds, dtype=torch.int64, device=device),
    )


@torch.no_grad()
def decode(
    model, tokens_B: torch.Tensor, tables: Tables, cache: PageCache, sequential: bool = False
) -> torch.Tensor:
    """Puts each sequence's last sampled token into the cache: hidden (B, D), which predicts the next one.

    sequential  attention in the order of the training pass, so that hidden is that pass's row to the bit
    """
    size, last = cache.page_size, (tables.made - 1).long()
    page = tables.own.gather(1, (last // size)[:, None]).squeeze(1).long()
    positions = tables.prompt_lens + tables.made - 1

    def attend(q, k, v, layer):
        k_pages, v_pages = cache.k[layer], cache.v[layer]
        return ops.paged_attention(
            q, k_pages, v_pages, tables.own, tables.made, tables.prefix, sequential=sequential
        )

    return _layers(model, tokens_B, positions, page * size + last % size, cache, attend)


@torch.no_grad()
def draw(model, hidden_BD, settings, seeds_B, positions_B) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens (B,) int64, full-vocabulary logprobs (B,) fp32) of the words that follow the hidden rows."""
    logits = plain_linear(hidden_BD, model.head_weight)
    tokens, logprobs = ops.sample(
        logits, settings.temperature, settings.top_p, settings.top_k, seeds_B, positions_B
    )
    if settings.batch_invariant:  # by the op of the training pass, which has products of its own
        logprobs = ops.linear_logprob(hidden_BD, model.head_weight, tokens, settings.temperature or 1.0)
    return tokens, logprobs


def row_bound(model) -> float:
    """How far a row of this model's products may move with the rows beside it, relative to the largest element.

    0.0: by no bit, so a response depends on nothing else in the batch. Measured once per process and shape.
    """
    block, dtype, device = model.blocks[0], model.embed.dtype, str(model.embed.device)
    weights = [block.qkv, block.o, block.gate_up, block.down, model.head_weight]
    weights += block.lora.parameters() if block.lora is not None else []
    shapes = {(w.numel() // w.shape[-1], w.shape[-1]) for w in weights}
    return max(row_difference(outputs, inputs, dtype, device) for outputs, inputs in sorted(shapes))
