"""Text from a model: prompts prefilled as one packed row, then one token per sequence and step with a KV cache.

Simple and correct; the paged engine takes its place in hpsafety/rollout. Rows leave the batch as they finish.
A draw is keyed by (seed, prompt index, sample index, position), so it depends on nothing else in the batch; position
counts the new tokens from 0.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as nnf

from hpsafety import ops
from hpsafety.model.gemm import linear


@dataclass(frozen=True)
class Rollout:
    """One sampled response. `tokens` includes the stop token when finish is "stop"; `logprobs` are of the full
    vocabulary at the sampling temperature (1 where it is 0), one per token."""

    prompt_index: int
    sample_index: int
    tokens: list[int]
    logprobs: list[float]
    finish: str  # "stop" or "length"


def _check(config, prompts, k, max_new_tokens, temperature, top_p, top_k) -> None:
    if k < 1 or max_new_tokens < 1:
        raise ValueError(f"generate: k and max_new_tokens must be at least 1, got {k} and {max_new_tokens}")
    if not (0.0 <= temperature < float("inf")) or not (0.0 < top_p <= 1.0) or top_k < 0:
        raise ValueError(
            f"generate: need temperature >= 0, 0 < top_p <= 1, top_k >= 0; got {temperature}, {top_p}, {top_k}"
        )
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"generate: prompt {i} is empty; give it at least one token")
        if len(prompt) + max_new_tokens > config.max_positions:
            raise ValueError(
                f"generate: prompt {i} has {len(prompt)} tokens, which with {max_new_tokens} new ones exceed the "
                f"context of {config.max_positions}; shorten it or lower max_new_tokens"
            )


_MASK = 2**64 - 1


def _mix(x: int) -> int:
    """The output step of splitmix64: a bijection of 64-bit integers that changes half of the bits for any one."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & _MASK
    return x ^ (x >> 31)


def _row_seed(seed: int, prompt_index: int, sample_index: int) -> int:
    """The int64 key of one response's draws.

    Each number is added, times splitmix64's odd increment, to the mix of those before it. So the samples of one prompt
    never share a key, nor do the prompts of one seed at the same sample; the rest meet by chance, one pair in 2^64.
    """
    state = seed & _MASK
    for number in (prompt_index, sample_index):
        state = _mix(state) + (number + 1) * 0x9E3779B97F4A7C15 & _MASK
    state = _mix(state)
    return state - 2**64 if state >= 2**63 else state


class _Cache:
    """Keys and values (B, S, G, K) per layer, left-aligned; lengths (B,)."""

    def __init__(self, model, prompts, k, max_new_tokens):
        c, dtype, device = model.config, model.embed.dtype, model.embed.device
        size = max(map(len, prompts)) + max_new_tokens
        shape = (c.num_layers, len(prompts) * k, size, c.num_kv_heads, c.head_dim)
        self.keys, self.values = (
            torch.zeros(shape, dtype=dtype, device=device),
            torch.zeros(shape, dtype=dtype, device=device),
        )
        self.lengths = torch.tensor([len(p) for p in prompts for _ in range(k)], device=device)

    def keep(self, rows: torch.Tensor) -> None:
        self.keys, self.values, self.lengths = self.keys[:, rows], self.values[:, rows], self.lengths[rows]


def _prefill(model, prompts, k, cache) -> torch.Tensor:
    """Runs the prompts as one packed row, fills the cache, returns the last row of each prompt, k times: (B, D)."""
    device, c = model.embed.device, model.config
    lengths = torch.tensor([len(p) for p in prompts])
    ends = lengths.cumsum(0)
    starts = ends - lengths
    tokens = torch.tensor([t for p in prompts for t in p], device=device)
    positions = torch.cat([torch.arange(n, dtype=torch.int32) for n in lengths]).to(device)
    segments = torch.stack([starts, ends, starts, starts], 1).to(torch.int32).to(device)
    cos, sin = model.rope(device)
    x, delta = nnf.embedding(tokens, model.embed), None
    for layer, block in enumerate(model.blocks):
        qkv, x = block.project_qkv(x, delta)
        q, key, value = ops.rope_qkv(qkv, positions, cos, sin)
        for i, (a, b) in enumerate(zip(starts.tolist(), ends.tolist(), strict=True)):
            cache.keys[layer, i * k : (i + 1) * k, : b - a] = key[a:b]
            cache.values[layer, i * k : (i + 1) * k, : b - a] = value[a:b]
        out = ops.attention(q, key, value, segments)
        delta, x = block.mlp(x, linear(out.flatten(1), block.o, block.o_bias))
    last = (ends - 1).to(device).repeat_interleave(k)
    return ops.rms_norm(x[last], model.norm, c.norm_eps, delta[last])[0]


def _decode(model, tokens, cache) -> torch.Tensor:
    """One step for every row of the cache: tokens (B,) -> hidden (B, D); lengths grow by one."""
    cos, sin = model.rope(tokens.device)
    positions, rows = cache.lengths.to(torch.int32), torch.arange(tokens.shape[0], device=tokens.device)
    size = int(cache.lengths.max()) + 1
    mask = (torch.arange(size, device=tokens.device) <= cache.lengths[:, None])[:, None, None]
    x, delta = nnf.embedding(tokens, model.embed), None
    for layer, block in enumerate(model.blocks):
        qkv, x = block.project_qkv(x, delta)
        q, key, value = ops.rope_qkv(qkv, positions, cos, sin)
        cache.keys[layer, rows, cache.lengths] = key
        cache.values[layer, rows, cache.lengths] = value
        keys, values = (
            cache.keys[layer, :, :size].transpose(1, 2),
            cache.values[layer, :, :size].transpose(1, 2),
        )
        out = nnf.scaled_dot_product_attention(q.unsqueeze(2), keys, values, attn_mask=mask, enable_gqa=True)
        delta, x = block.mlp(x, linear(out.flatten(1), block.o, block.o_bias))
    cache.lengths += 1
    return ops.rms_norm(x, model.norm, model.config.norm_eps, delta)[0]


@torch.no_grad()
def generate(model, prompts, k, max_new_tokens, temperature, top_p, top_k, seed, stop) -> list[Rollout]:
    """See design: k Rollouts per prompt, in order of (prompt, sample). temperature 0 is greedy.

    prompts  lists of token ids; stop  token ids that end a response, None for the model's end-of-turn and eos ids
    Raises ValueError for an empty prompt, one that exceeds the context, or a setting out of range.
    """
    _check(model.config, prompts, k, max_new_tokens, temperature, top_p, top_k)
    if not prompts:
        return []
    if stop is None:
        stop = model.tokenizer.stop_ids if model.tokenizer is not None else _eos(model.generation)
    stop, cache = frozenset(stop), _Cache(model, prompts, k, max_new_tokens)
    live = [(i, s) for i in range(len(prompts)) for s in range(k)]
    out: dict[tuple[int, int], tuple[list, list]] = {key: ([], []) for key in live}
    finished: dict[tuple[int, int], str] = {}
    hidden = _prefill(model, prompts, k, cache)
    seeds = torch.tensor([_row_seed(seed, *key) for key in live], device=hidden.device)
    for position in range(max_new_tokens):
        logits = nnf.linear(hidden, model.head_weight)
        tokens, logprobs = ops.sample(
            logits, temperature, top_p, top_k, seeds, torch.full_like(seeds, position)
        )
        for key, token, logprob in zip(live, tokens.tolist(), logprobs.tolist(), strict=True):
            out[key][0].append(token)
            out[key][1].append(logprob)
            if token in stop:
                finished[key] = "stop"
        rows = [row for row, key in enumerate(live) if key not in finished]
        if not rows or position + 1 == max_new_tokens:
            break
        if len(rows) < len(live):
            live = [live[row] for row in rows]
            index = torch.tensor(rows, device=tokens.device)
            cache.keep(index)
            tokens, seeds = tokens[index], seeds[index]
        hidden = _decode(model, tokens, cache)
    return [Rollout(*key, *out[key], finished.get(key, "length")) for key in out]


def _eos(generation: dict) -> tuple[int, ...]:
    ids = generation.get("eos_token_id")
    return () if ids is None else tuple(ids) if isinstance(ids, list) else (ids,)
