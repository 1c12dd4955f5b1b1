"""ppo_loss in CUDA: allocates the outputs of csrc/cuda/ppo_loss.cu and launches it."""

import torch

from hpsafety.cuda_kernels.library import launch

BLOCK = 1024  # tokens of a block
PARTIALS = 7  # sums of a block
# Of num_tokens_tensor's types; 0 is for none, 1 for a number.
COUNTS = {torch.float64: 2, torch.float32: 3, torch.int64: 4}


def ppo_loss(
    logprobs, old_logprobs, advantages, values, old_values, returns, mask, entropy, clip_ratio, value_clip,
    value_coef, entropy_coef, num_tokens, num_tokens_tensor,
):  # fmt: skip
    """(loss, stats (6,), gradients of n * loss (2 or 3, N)); arguments as in hpsafety::ppo_loss."""
    n = logprobs.shape[0]
    fp32 = {"dtype": torch.float32}
    rows = [x.contiguous() for x in (logprobs, old_logprobs, advantages, values, old_values, returns)]
    rows.append(entropy if entropy is None else entropy.contiguous())
    bf16 = sum(1 << i for i, x in enumerate(rows) if x is not None and x.dtype == torch.bfloat16)
    kind, count = int(num_tokens is not None), num_tokens_tensor
    if count is not None:
        count = count if count.dtype in COUNTS else count.to(torch.float64)
        kind = COUNTS[count.dtype]
    loss, stats = logprobs.new_empty((), **fp32), logprobs.new_empty(6, **fp32)
    grads = logprobs.new_empty((2 if entropy is None else 3, n), **fp32)
    partials = logprobs.new_empty((PARTIALS, -(-n // BLOCK)), dtype=torch.float64)
    launch(
        "hps_ppo_loss", "ppppppp i p l ffff dd i p d pppp", *rows, bf16, mask.contiguous(), n, clip_ratio,
        1 - clip_ratio, 1 + clip_ratio, value_clip, value_coef, entropy_coef, kind, count, num_tokens or 0.0, partials,
        loss, stats, grads,
    )  # fmt: skip
    return loss, stats, grads
