"""Oracle of reward_score: plain torch, any dtype."""

import math
from typing import NamedTuple

import torch


class RewardScore(NamedTuple):
    """What reward_score returns; R responses in groups."""

    r_safety: torch.Tensor  # (R,) fp32 logits
    r_helpful: torch.Tensor  # (R,) fp32 logits
    combined: torch.Tensor  # (R,) fp32 logits: one of the two
    whitened: torch.Tensor  # (R,) fp32: combined, mean 0 and std 1 over the R rows
    best_of_group: torch.Tensor  # (groups,) int64: index in [0, R) of each group's best response


def _logits(hidden, last_rows, head, norm, eps):
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    x, weight = hidden[last_rows].detach().to(dtype), head.detach().to(dtype)
    if norm is not None:
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * norm.detach().to(dtype)
    return (x * weight).sum(-1)


def _whiten(z):
    if z.numel() == 0 or z.max() == z.min():
        return torch.zeros_like(z)
    x = z.double()
    return ((x - x.mean()) / (x.std(correction=0) + 1e-8)).to(z.dtype)


def _best(scores: list[float], start: int, end: int) -> int:
    """The highest score's index, the lowest of equals; NaN only where there is nothing else."""
    best = start
    for i in range(start, end):
        if scores[i] > scores[best] or (math.isnan(scores[best]) and not math.isnan(scores[i])):
            best = i
    return best


def reward_score(
    hidden_safety, hidden_helpful, last_rows, head_safety, head_helpful, is_safety, cu_groups, *,
    norm_safety=None, norm_helpful=None, eps=1e-5, threshold=0.15,
):  # fmt: skip
    """Scores of both reward models at each response's last row, which of the two counts, and the best per group.

    r         hidden[last_rows] @ head, after an RMSNorm with weight norm_* where given; a logit
    combined  r_safety where is_safety or sigmoid(r_safety) < threshold, else r_helpful. The sigmoid is taken in
              fp64 of the fp32 logit, and compared in fp32: the logit of 0.15 counts as 0.15 and goes to helpful
    whitened  (combined - mean) / (std + 1e-8) over the R rows, in fp64, population std; zeros where all are equal
    best_of_group  index in [0, R) of the highest combined of each group, the lowest index of equals
    """
    r_safety = _logits(hidden_safety, last_rows, head_safety, norm_safety, eps)
    r_helpful = _logits(hidden_helpful, last_rows, head_helpful, norm_helpful, eps)
    probability = r_safety.float().double().sigmoid().float()
    passes = probability >= torch.tensor(threshold, dtype=torch.float32)  # NaN does not
    combined = torch.where(is_safety | ~passes, r_safety, r_helpful)
    bounds, scores = cu_groups.tolist(), combined.tolist()
    best = [_best(scores, start, end) for start, end in zip(bounds, bounds[1:], strict=False)]
    best_of_group = torch.tensor(best, dtype=torch.int64, device=combined.device)
    return RewardScore(r_safety, r_helpful, combined, _whiten(combined), best_of_group)
