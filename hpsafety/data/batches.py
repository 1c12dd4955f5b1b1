"""From groups to steps: data order, token-budget micro-batches, balance over ranks, nested subsets."""

import heapq
from collections.abc import Sequence

import numpy as np

from hpsafety.data.groups import PromptGroup


def group_tokens(group: PromptGroup) -> int:
    """Tokens computed for a group: its prompt once, and its responses."""
    return len(group.prompt) + sum(len(response) for response in group.responses)


def micro_batches(groups: Sequence[PromptGroup], tokens_per_batch: int) -> list[list[int]]:
    """Indices of whole groups per micro-batch: first-fit decreasing, each batch longest group first.

    tokens_per_batch  the budget in computed tokens; a group longer than it forms a micro-batch of its own
    Every group appears exactly once; nothing is cut (spec SFT-3).
    """
    if tokens_per_batch < 1:
        raise ValueError(f"tokens_per_batch must be at least 1, got {tokens_per_batch}")
    sizes = np.array([group_tokens(group) for group in groups], dtype=np.int64)
    room = np.full(len(sizes) + 1, max(tokens_per_batch, int(sizes.max(initial=0))), dtype=np.int64)
    batches: list[list[int]] = []
    for index in np.argsort(-sizes, kind="stable"):
        slot = int(np.argmax(room[: len(batches) + 1] >= sizes[index]))
        if slot == len(batches):
            batches.append([])
            room[slot] = tokens_per_batch
        room[slot] -= sizes[index]
        batches[slot].append(int(index))
    return batches


def predicted_flops(
    group: PromptGroup,
    *,
    num_layers: int,
    width: int,
    mlp_width: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    vocab_size: int,
) -> float:
    """FLOPs of one forward pass over a group, a multiply-add as 2; backward costs twice as much again.

    Linear layers see each token once, attention its causal pairs, the head the trained rows.
    """
    prompt, responses = len(group.prompt), [len(response) for response in group.responses]
    trained = sum(responses) if group.train is None else sum(sum(map(bool, mask)) for mask in group.train)
    projections = width * head_dim * (2 * num_heads + 2 * num_kv_heads)
    linear = 2.0 * group_tokens(group) * (projections + 3 * width * mlp_width)
    pairs = prompt * (prompt + 1) / 2 + sum(r * prompt + r * (r + 1) / 2 for r in responses)
    attention = 4.0 * num_heads * head_dim * pairs
    return num_layers * (linear + attention) + 2.0 * width * vocab_size * trained


def balance(costs: Sequence[float], num_ranks: int) -> list[list[int]]:
    """Indices per rank, the costliest item first to the least loaded rank (ties: lower index, lower rank)."""
    if num_ranks < 1:
        raise ValueError(f"num_ranks must be at least 1, got {num_ranks}")
    ranks: list[list[int]] = [[] for _ in range(num_ranks)]
    loads = [(0.0, rank) for rank in range(num_ranks)]
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        load, rank = heapq.heappop(loads)
        ranks[rank].append(index)
        heapq.heappush(loads, (load + costs[index], rank))
    return ranks


def drop_long(groups: Sequence[PromptGroup], max_length: int) -> tuple[list[int], int]:
    """(indices kept, number dropped): prompt and longest response together must fit `max_length` tokens."""
    kept = [
        index
        for index, group in enumerate(groups)
        if len(group.prompt) + max(map(len, group.responses), default=0) <= max_length
    ]
    return kept, len(groups) - len(kept)


def epoch_order(num_items: int, epoch: int, seed: int) -> np.ndarray:
    """(num_items,) int64 permutation of seed and epoch alone, so that a resumed run needs no state."""
    return np.random.default_rng([seed, epoch]).permutation(num_items)


def step_slices(num_items: int, batch: int) -> list[slice]:
    """The steps of one pass: no step spans two passes, the last takes what is left."""
    if batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")
    return [slice(start, min(start + batch, num_items)) for start in range(0, num_items, batch)]


def nested_subset(num_items: int, fraction: float, seed: int) -> np.ndarray:
    """Sorted int64 indices of round(fraction * num_items) items; nested for one seed (SFT-7)."""
    if not 0.0 <= fraction <= 1.0:
        raise ValueError(f"fraction must lie in [0, 1], got {fraction}")
    count = int(np.floor(fraction * num_items + 0.5))
    return np.sort(np.random.default_rng([seed, num_items]).permutation(num_items)[:count])
