"""pair_loss: both gradients and the sum in one launch. Limit: the call itself, since there are hundreds of pairs; so
one program takes them all, block after block, and its order is the only one there is."""

import torch
import triton
import triton.language as tl

from hpsafety.triton_kernels.counts import inverse_count
from hpsafety.triton_kernels.launch import launch

SHARED_BYTES = (4096, 4096)  # a block's at most, on sm_80 and on sm_90
BLOCK = 1024  # pairs at a time


@triton.jit
def _softplus(x):
    """(-log sigmoid(x), its derivative), without overflow or lost digits: with e = exp(-|x|) in (0, 1] and
    t = e / (2 + e), log(1 + e) = 2 artanh(t) = 2 (t + t^3/3 + ...), cut where 1/3 no longer adds a digit."""
    e = tl.exp(-tl.abs(x))
    t = e / (2.0 + e)
    s = t * t
    series = s * (1.0 / 13) + 1.0 / 11
    series = series * s + 1.0 / 9
    series = series * s + 1.0 / 7
    series = series * s + 1.0 / 5
    series = series * s + 1.0 / 3
    series = series * s + 1.0
    return tl.where(x < 0.0, -x, 0.0) + 2.0 * t * series, 0.0 - tl.where(x > 0.0, e, 1.0) / (1.0 + e)


@triton.jit
def _auxiliary(score, safe_ptr, at, inside, weight, loss, grad):
    """Adds weight * -log sigmoid(+-score), + where safe and - where not; what has no bin keeps its bits."""
    safe = tl.load(safe_ptr + at, mask=inside, other=-1).to(tl.int32)
    known = safe >= 0
    sign = tl.where(safe == 1, 1.0, -1.0)
    value, slope = _softplus(tl.where(known, sign * score, 0.0))
    return tl.where(known, loss + weight * value, loss), tl.where(known, grad + weight * sign * slope, grad)


@triton.jit(do_not_specialize=["n"])
def pair_rows(
    chosen_ptr, rejected_ptr, margin_ptr, safe_chosen_ptr, safe_rejected_ptr, count_ptr, loss_ptr, per_pair_ptr,
    grads_ptr, n, margin_value, half_weight, number: tl.float64, HAS_MARGIN: tl.constexpr,
    HAS_CHOSEN: tl.constexpr, HAS_REJECTED: tl.constexpr, HAS_TENSOR: tl.constexpr, HAS_NUMBER: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    n = n.to(tl.int64)
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, n, BLOCK):
        at = tl.arange(0, BLOCK).to(tl.int64) + start
        inside = at < n
        chosen = tl.load(chosen_ptr + at, mask=inside, other=0.0).to(tl.float32)
        rejected = tl.load(rejected_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if HAS_MARGIN:
            gap = chosen - rejected - tl.load(margin_ptr + at, mask=inside, other=0.0).to(tl.float32)
        else:
            gap = chosen - rejected - margin_value
        loss, of_chosen = _softplus(gap)
        of_rejected = 0.0 - of_chosen
        if HAS_CHOSEN:
            loss, of_chosen = _auxiliary(chosen, safe_chosen_ptr, at, inside, half_weight, loss, of_chosen)
        if HAS_REJECTED:
            loss, of_rejected = _auxiliary(
                rejected, safe_rejected_ptr, at, inside, half_weight, loss, of_rejected
            )
        tl.store(grads_ptr + at, of_chosen, mask=inside)
        tl.store(grads_ptr + n + at, of_rejected, mask=inside)
        total += tl.where(inside, loss, 0.0).to(tl.float64)
    per_pair = inverse_count(count_ptr, number, n.to(tl.float64), HAS_TENSOR, HAS_NUMBER)
    tl.store(loss_ptr, (tl.sum(total, 0) * per_pair).to(tl.float32))
    tl.store(per_pair_ptr, per_pair.to(tl.float32))


def pair_loss(
    chosen, rejected, margin, margin_value, safe_chosen, safe_rejected, aux_weight, num_pairs, num_pairs_tensor
):  # fmt: skip
    """(loss, 1 / num_pairs, gradients of num_pairs * loss (2, P)); arguments as in hpsafety::pair_loss."""
    n, fp32 = chosen.shape[0], {"dtype": torch.float32}
    loss, per_pair = chosen.new_empty((), **fp32), chosen.new_empty((), **fp32)
    grads = chosen.new_empty((2, n), **fp32)
    bins = [None if x is None or aux_weight == 0 else x.contiguous() for x in (safe_chosen, safe_rejected)]
    launch(
        pair_rows, 1, chosen.contiguous(), rejected.contiguous(), None if margin is None else margin.contiguous(),
        *bins, num_pairs_tensor, loss, per_pair, grads, n, margin_value, aux_weight / 2,
        0.0 if num_pairs is None else num_pairs, HAS_MARGIN=margin is not None, HAS_CHOSEN=bins[0] is not None,
        HAS_REJECTED=bins[1] is not None, HAS_TENSOR=num_pairs_tensor is not None,
        HAS_NUMBER=num_pairs is not None, BLOCK=BLOCK, num_warps=8,
    )  # fmt: skip
    return loss, per_pair, grads
