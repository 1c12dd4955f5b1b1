"""Oracle of adamw_ and grad_norm_sq: plain torch, any dtype; returns new tensors where the op writes in place."""

import math

import torch


def grad_norm_sq(grads):
    """The sum of squares over all tensors, in float64: 0-dim."""
    total = torch.zeros((), dtype=torch.float64, device=grads[0].device if grads else None)
    for grad in grads:
        total = total + grad.double().square().sum()
    return total


def adamw(
    params, grads, exp_avg, exp_avg_sq, *, lr, betas, eps, weight_decay, step, grad_norm, max_norm, low_dtypes=(),
):  # fmt: skip
    """One AdamW step after clipping to max_norm; nothing changes when grad_norm is not finite.

    Clipping as torch.nn.utils.clip_grad_norm_, the update as torch.optim.AdamW.
    low_dtypes  dtypes of the rounded copies, one per parameter, or ()
    returns     params, exp_avg, exp_avg_sq (lists), step, and the copies (list)
    """
    beta1, beta2 = betas
    finite = torch.isfinite(grad_norm)
    clipping = 0 < max_norm < math.inf
    clip = (max_norm / (grad_norm.double() + 1e-6)).clamp(max=1.0) if clipping else torch.ones_like(grad_norm)
    t = (step + 1).double()
    step_size = lr / (1 - beta1**t)
    root = (1 - beta2**t).sqrt()
    out_p, out_m, out_v = [], [], []
    for p, g, m, v in zip(params, grads, exp_avg, exp_avg_sq, strict=True):
        g = g.to(p.dtype) * clip.to(p.dtype)
        new_m = beta1 * m + (1 - beta1) * g
        new_v = beta2 * v + (1 - beta2) * g * g
        denominator = new_v.sqrt() / root.to(p.dtype) + eps
        new_p = p * (1 - lr * weight_decay) - step_size.to(p.dtype) * new_m / denominator
        out_p.append(torch.where(finite, new_p, p))
        out_m.append(torch.where(finite, new_m, m))
        out_v.append(torch.where(finite, new_v, v))
    copies = [p.to(dtype) for p, dtype in zip(out_p, low_dtypes, strict=False)]
    return out_p, out_m, out_v, step + finite.to(step.dtype), copies
