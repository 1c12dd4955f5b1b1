"""Oracle of rms_norm: plain torch, any dtype."""

import torch


def rms_norm(x, weight, eps, residual=None):
    """y = x / sqrt(mean(x^2) + eps) * weight over the last dim; with a residual, x + residual is normalised.

    x         (T, D)
    weight    (D,)
    residual  (T, D) or None
    returns   y (T, D), or (y, x + residual)
    """
    if residual is not None:
        x = x + residual
    y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight
    return y if residual is None else (y, x)
