"""sample in CUDA: allocates the outputs and the workspace of csrc/cuda/sample.cu and launches it."""

import math

import torch

from hpsafety.cuda_kernels.library import launch

CHUNK = 2048  # words of a block
SLICES = 16


def sample(logits, temperature, top_p, top_k, seeds, positions):
    """(tokens (B,) int64, logprobs (B,) fp32); arguments as in hpsafety::sample.

    3 launches; 2 more for each of top-k and top-p, the number depends on no value of a tensor.
    """
    rows, words = logits.shape
    if seeds.numel() != rows or positions.numel() != rows:
        raise ValueError(
            f"sample: expected one seed and one position per row ({rows}), got {seeds.numel()} and {positions.numel()}"
        )
    if rows and not 0 < words <= 1 << 23:
        raise ValueError(f"sample: logits must have 1 to 2^23 columns, got {words}")
    tokens, logprobs = logits.new_empty(rows, dtype=torch.int64), logits.new_empty(rows, dtype=torch.float32)
    if not rows:
        return tokens, logprobs
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    greedy = temperature == 0
    scale = min(max(math.log2(math.e) / (temperature or 1.0), 2.0**-126), torch.finfo(torch.float32).max)
    chunks = -(-words // CHUNK)
    maxima = logits.new_empty((rows, chunks), dtype=torch.float32)
    totals, ranks = (logits.new_empty((rows, chunks), dtype=torch.int64) for _ in range(2))
    weights = places = None
    if not greedy and (0 < top_k < words or top_p < 1):
        weights = logits.new_empty((rows, chunks, SLICES), dtype=torch.int64)
        places = logits.new_empty(rows, dtype=torch.int64)
    launch(
        "hps_sample", "ppp i lll f i ll ppppp pp", logits, seeds.contiguous(), positions.contiguous(),
        logits.dtype == torch.bfloat16, logits.stride(0), rows, words, scale, greedy, top_k, math.ceil(top_p * 2**31),
        maxima, weights, places, totals, ranks, tokens, logprobs,
    )  # fmt: skip
    return tokens, logprobs
