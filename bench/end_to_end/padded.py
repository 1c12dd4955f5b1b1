"""What the plain transformers loops share: length-sorted micro-batches, right padding, fused AdamW.

Padding stands on the right and attention is causal, so that no token attends to padding and sdpa keeps its fast path
without a mask.
"""

from collections.abc import Callable

import torch

from bench.end_to_end.common import BETAS, EPS, WEIGHT_DECAY


def micro_batches(items: list, length: Callable, tokens_per_batch: int) -> list[list]:
    """Longest first; a micro-batch's padded rectangle stays within the budget, a longer item is alone.

    length  of an item, in tokens of the rectangle
    """
    batches: list[list] = []
    longest = 0
    for item in sorted(items, key=lambda item: -length(item)):
        if not batches or longest * (len(batches[-1]) + 1) > tokens_per_batch:
            batches.append([])
            longest = length(item)
        batches[-1].append(item)
    return batches


def right_padded(rows: list[list[int]], pad: int) -> torch.Tensor:
    """(B, L) int64."""
    tokens = torch.full((len(rows), max(map(len, rows))), pad, dtype=torch.long)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = torch.tensor(row)
    return tokens


def adamw(model) -> torch.optim.AdamW:
    """The Llama 2 paper's constants; weight decay on matrices only."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=BETAS, eps=EPS, fused=True)
