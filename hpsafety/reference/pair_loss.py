"""Oracle of pair_loss: plain torch, any dtype."""

import torch
from torch.nn.functional import logsigmoid


def _auxiliary(score, safe):
    """-1/2 [s log sigmoid(r) + (1 - s) log(1 - sigmoid(r))]; 0 where there is no bin."""
    known = safe >= 0
    signed = torch.where(safe == 1, score, -score)  # log(1 - sigmoid(r)) = log sigmoid(-r)
    return torch.where(known, -logsigmoid(torch.where(known, signed, 0)) / 2, 0)


def pair_loss(chosen, rejected, margin, safe_chosen=None, safe_rejected=None, aux_weight=0.0, num_pairs=None):
    """sum over pairs of [-log sigmoid(chosen - rejected - margin) + aux_weight L_aux] / num_pairs, with

    L_aux = -1/2 sum over both responses of [s log sigmoid(r) + (1 - s) log(1 - sigmoid(r))]

    chosen, rejected            (P,) scores (logits)
    margin                      (P,), or a number
    safe_chosen, safe_rejected  (P,) int8: s = 1 safe, 0 unsafe, -1 no bin (adds 0); None is -1 throughout
    num_pairs                   a number or a 0-dim tensor; None is P; 0 gives 0
    returns                     scalar; gradients to chosen and rejected
    """
    dtype = torch.promote_types(chosen.dtype, torch.float32)
    c, r = chosen.to(dtype), rejected.to(dtype)
    m = margin.detach().to(dtype) if isinstance(margin, torch.Tensor) else margin
    n = torch.as_tensor(c.numel() if num_pairs is None else num_pairs, dtype=dtype, device=c.device)
    total = -logsigmoid(c - r - m)
    for score, safe in ((c, safe_chosen), (r, safe_rejected)):
        if aux_weight != 0 and safe is not None:
            total = total + aux_weight * _auxiliary(score, safe)
    return total.sum() * torch.where(n == 0, 0, 1 / n)
