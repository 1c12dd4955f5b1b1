"""Oracle of ppo_loss: plain torch, any dtype."""

from typing import NamedTuple

import torch


class PPOLoss(NamedTuple):
    """What ppo_loss returns: 0-dim tensors, of which `loss` alone carries gradients."""

    loss: torch.Tensor
    policy_loss: torch.Tensor
    value_loss: torch.Tensor
    clip_fraction: torch.Tensor
    approx_kl: torch.Tensor
    ratio_max: torch.Tensor


def ppo_loss(
    logprobs, old_logprobs, advantages, values, old_values, returns, mask, *,
    entropy=None, clip_ratio=0.2, value_clip=0.2, value_coef=0.5, entropy_coef=0.0, num_tokens=None,
):  # fmt: skip
    """With m the mask, n = num_tokens (default sum m), d = logprobs - old_logprobs and rho = exp(d):

    policy_loss    -sum m min(rho A, clip(rho) A) / n, rho clipped to 1 +- clip_ratio
    value_loss     1/2 sum m max((v - R)^2, (v_old + clip(v - v_old) - R)^2) / n, clipped to +- value_clip
    loss           policy_loss + value_coef value_loss - entropy_coef sum m entropy / n
    clip_fraction  sum m [|rho - 1| > clip_ratio] / n
    approx_kl      sum m (exp(d) - 1 - d) / n
    ratio_max      max of rho where m = 1; 0 where nothing is

    The rows are (N,), mask bool, num_tokens a number or a 0-dim tensor. Where two branches tie, the unclipped one
    has the gradient. n = 0 gives zeros.
    """
    dtype = torch.promote_types(logprobs.dtype, torch.float32)

    def active(row):
        return torch.where(mask, row.to(dtype), 0)

    n = torch.as_tensor(mask.sum() if num_tokens is None else num_tokens, dtype=dtype, device=mask.device)
    per_token = torch.where(n == 0, 0, 1 / n)

    d = active(logprobs) - active(old_logprobs.detach())
    ratio = d.detach().exp()
    a = active(advantages.detach())
    clipped = ratio.clamp(1 - clip_ratio, 1 + clip_ratio) * a
    unclipped = ratio * a <= clipped
    # The clipped branch is constant; leaving it out of exp keeps inf * 0 out of the gradient.
    surrogate = torch.where(unclipped, torch.where(unclipped, d, 0).exp() * a, clipped)
    policy_loss = -surrogate.sum() * per_token

    v, v_old, r = active(values), active(old_values.detach()), active(returns.detach())
    error = (v - r).square()
    error_clipped = (v_old + (v - v_old).clamp(-value_clip, value_clip) - r).square()
    value_loss = torch.where(error >= error_clipped, error, error_clipped).sum() * per_token / 2

    loss = policy_loss + value_coef * value_loss
    if entropy is not None:
        loss = loss - entropy_coef * active(entropy).sum() * per_token
    outside = mask & ((ratio - 1).abs() > clip_ratio)
    return PPOLoss(
        loss,
        policy_loss.detach(),
        value_loss.detach(),
        outside.sum() * per_token,
        (d.detach().expm1() - d.detach()).sum() * per_token,
        torch.cat((active(ratio), ratio.new_zeros(1))).max(),
    )
