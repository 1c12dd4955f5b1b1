"""gae in CUDA: allocates the outputs of csrc/cuda/gae.cu and launches it."""

import torch

from hpsafety.cuda_kernels.library import launch


def gae(rewards, values, cu_responses, gamma, lam):
    """(advantages, returns), fp32; arguments as in hpsafety::gae."""
    advantages, returns = (rewards.new_empty(rewards.shape, dtype=torch.float32) for _ in range(2))
    offsets, responses = cu_responses.contiguous(), cu_responses.shape[0] - 1
    if responses > 0:
        launch(
            "hps_gae", "ppp iii l dd pp", rewards.contiguous(), values.contiguous(), offsets,
            rewards.dtype == torch.bfloat16, values.dtype == torch.bfloat16, offsets.dtype == torch.int64, responses,
            gamma, gamma * lam, advantages, returns,
        )  # fmt: skip
    return advantages, returns
