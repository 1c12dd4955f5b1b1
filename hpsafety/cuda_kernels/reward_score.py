"""reward_score in CUDA: allocates the outputs of csrc/cuda/reward_score.cu and launches it."""

import torch

from hpsafety.cuda_kernels.library import launch


def _rows(hidden):
    return hidden if hidden.stride(1) == 1 else hidden.contiguous()  # rows may lie apart: few are read


def reward_score(
    hidden_safety, hidden_helpful, last_rows, head_safety, head_helpful, is_safety, cu_groups, norm_safety,
    norm_helpful, eps, threshold,
):  # fmt: skip
    """(r_safety, r_helpful, combined, whitened, best_of_group); arguments as in hpsafety::reward_score."""
    responses, groups = last_rows.shape[0], cu_groups.shape[0] - 1
    scores = [hidden_safety.new_empty(responses, dtype=torch.float32) for _ in range(4)]
    best = last_rows.new_empty(groups, dtype=torch.int64)
    if responses:
        safety, helpful, rows = _rows(hidden_safety), _rows(hidden_helpful), last_rows.contiguous()
        heads = [
            x if x is None else x.contiguous() for x in (head_safety, head_helpful, norm_safety, norm_helpful)
        ]
        launch(
            "hps_reward_score", "pppi pppppp llll ii ll df ppppp", safety, helpful, rows, rows.dtype == torch.int64,
            *heads,
            is_safety.contiguous(), cu_groups.to(torch.int32).contiguous(), safety.stride(0), helpful.stride(0),
            safety.shape[1], helpful.shape[1], safety.dtype == torch.bfloat16, helpful.dtype == torch.bfloat16,
            responses, groups, eps, threshold, *scores, best,
        )  # fmt: skip
    return (*scores, best)
