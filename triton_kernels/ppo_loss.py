"""ppo_loss: losses, metrics and the gradients of n * loss in one pass, then one small sum. Limit: launches."""

import torch
import triton
import triton.language as tl

from hpsafety.triton_kernels.counts import inverse_count
from hpsafety.triton_kernels.launch import launch

SHARED_BYTES = (2048, 2048)  # a block's at most, on sm_80 and on sm_90
BLOCK = 512  # tokens of a program
PARTIALS = 256  # at a time
# Rows of the partial sums (7, programs) in fp64.
SURROGATE, VALUE, ENTROPY, KL, OUTSIDE, ACTIVE, LARGEST = (tl.constexpr(i) for i in range(7))


@triton.jit
def _clamp(x, low, high):
    """NaN stays NaN."""
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def _k3(d, ratio):
    """exp(d) - 1 - d. Near 0 the difference has no digits left, so there the Taylor series to d^9 / 9! serves; at
    |d| = 0.5 what it leaves out is 2e-9 of the whole."""
    series = d * (1.0 / 362880) + 1.0 / 40320
    series = series * d + 1.0 / 5040
    series = series * d + 1.0 / 720
    series = series * d + 1.0 / 120
    series = series * d + 1.0 / 24
    series = series * d + 1.0 / 6
    series = series * d + 0.5
    return tl.where(tl.abs(d) < 0.5, series * d * d, ratio - 1.0 - d)


@triton.jit
def _read(row_ptr, at, inside, active):
    """What is masked may hold anything."""
    return tl.where(active, tl.load(row_ptr + at, mask=inside, other=0.0).to(tl.float32), 0.0)


@triton.jit
def _keep(partial_ptr, row, x):
    """Sums fp32 numbers in fp64, as this program's number in a row of partials."""
    to = row * tl.num_programs(0).to(tl.int64) + tl.program_id(0)
    tl.store(partial_ptr + to, tl.sum(x.to(tl.float64), 0))


@triton.jit(do_not_specialize=["n"])
def ppo_tokens(
    logprobs_ptr, old_logprobs_ptr, advantages_ptr, values_ptr, old_values_ptr, returns_ptr, mask_ptr, entropy_ptr,
    grads_ptr, partial_ptr, n, clip_ratio, low, high, value_clip, value_coef, entropy_coef,
    HAS_ENTROPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    active = tl.load(mask_ptr + at, mask=inside, other=0).to(tl.int1)

    d = _read(logprobs_ptr, at, inside, active) - _read(old_logprobs_ptr, at, inside, active)
    advantage = _read(advantages_ptr, at, inside, active)
    ratio = tl.exp(d)
    plain, clipped = ratio * advantage, _clamp(ratio, low, high) * advantage
    keep = plain <= clipped  # ties keep the gradient; inf * 0 is NaN and does not
    tl.store(grads_ptr + at, tl.where(keep, 0.0 - plain, 0.0), mask=inside)
    _keep(partial_ptr, SURROGATE, tl.where(keep, plain, clipped))

    v, v_old = _read(values_ptr, at, inside, active), _read(old_values_ptr, at, inside, active)
    target = _read(returns_ptr, at, inside, active)
    step = v - v_old
    error, error_clipped = v - target, v_old + _clamp(step, -value_clip, value_clip) - target
    square, square_clipped = error * error, error_clipped * error_clipped
    keep = square >= square_clipped  # ties: the unclipped one; NaN: the clipped one, NaN too
    slope = tl.where(keep, error, tl.where(tl.abs(step) <= value_clip, error_clipped, 0.0))
    tl.store(grads_ptr + n + at, slope * value_coef, mask=inside)
    _keep(partial_ptr, VALUE, tl.where(keep, square, square_clipped))

    if HAS_ENTROPY:
        _keep(partial_ptr, ENTROPY, _read(entropy_ptr, at, inside, active))
        tl.store(grads_ptr + 2 * n.to(tl.int64) + at, tl.where(active, -entropy_coef, 0.0), mask=inside)
    _keep(partial_ptr, KL, _k3(d, ratio))
    _keep(partial_ptr, OUTSIDE, tl.where(tl.abs(ratio - 1.0) > clip_ratio, 1.0, 0.0))  # masked: ratio 1
    _keep(partial_ptr, ACTIVE, tl.where(active, 1.0, 0.0))
    ratio = tl.where(active, ratio, 0.0)
    bad = tl.sum((ratio != ratio).to(tl.int32), 0) > 0  # a maximum would lose a NaN
    largest = tl.where(bad, float("nan"), tl.max(tl.where(ratio != ratio, 0.0, ratio), 0))
    to = LARGEST * tl.num_programs(0).to(tl.int64) + tl.program_id(0)
    tl.store(partial_ptr + to, largest.to(tl.float64))


@triton.jit
def _pick(sums, row):
    return tl.sum(tl.where(tl.arange(0, 8) == row, sums, 0.0), 0)


@triton.jit(do_not_specialize=["partials"])
def ppo_sums(
    partial_ptr, loss_ptr, stats_ptr, count_ptr, number: tl.float64, partials, value_coef: tl.float64,
    entropy_coef: tl.float64, HAS_ENTROPY: tl.constexpr, HAS_TENSOR: tl.constexpr, HAS_NUMBER: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """All partials, in order; stats: policy_loss, value_loss, clip_fraction, approx_kl, ratio_max, 1 / n."""
    row = tl.arange(0, 8)[:, None]
    used = (row < LARGEST) & ((row != ENTROPY) | HAS_ENTROPY)
    total = tl.zeros([8, BLOCK], tl.float64)
    top = tl.zeros([BLOCK], tl.float64)
    for start in range(0, partials, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < partials
        total += tl.load(
            partial_ptr + row * partials.to(tl.int64) + at[None, :], mask=used & inside[None, :], other=0.0
        )
        ratio = tl.load(partial_ptr + LARGEST * partials.to(tl.int64) + at, mask=inside, other=0.0)
        top = tl.where((top > ratio) | (top != top), top, ratio)
    sums = tl.sum(total, 1)
    bad = tl.sum((top != top).to(tl.int32), 0) > 0
    largest = tl.where(bad, float("nan"), tl.max(tl.where(top != top, 0.0, top), 0))
    per_token = inverse_count(count_ptr, number, _pick(sums, ACTIVE), HAS_TENSOR, HAS_NUMBER)
    policy, value = 0.0 - _pick(sums, SURROGATE) * per_token, _pick(sums, VALUE) * 0.5 * per_token
    loss = policy + value_coef * value
    if HAS_ENTROPY:
        loss -= entropy_coef * _pick(sums, ENTROPY) * per_token
    tl.store(loss_ptr, loss.to(tl.float32))
    tl.store(stats_ptr, policy.to(tl.float32))
    tl.store(stats_ptr + 1, value.to(tl.float32))
    tl.store(stats_ptr + 2, (_pick(sums, OUTSIDE) * per_token).to(tl.float32))
    tl.store(stats_ptr + 3, (_pick(sums, KL) * per_token).to(tl.float32))
    tl.store(stats_ptr + 4, largest.to(tl.float32))
    tl.store(stats_ptr + 5, per_token.to(tl.float32))


def ppo_loss(
    logprobs, old_logprobs, advantages, values, old_values, returns, mask, entropy, clip_ratio, value_clip,
    value_coef, entropy_coef, num_tokens, num_tokens_tensor,
):  # fmt: skip
    """(loss, stats (6,), gradients of n * loss (2 or 3, N)); arguments as in hpsafety::ppo_loss."""
    n = logprobs.shape[0]
    fp32 = {"dtype": torch.float32}
    rows = [x.contiguous() for x in (logprobs, old_logprobs, advantages, values, old_values, returns, mask)]
    entropy = entropy if entropy is None else entropy.contiguous()
    grads = logprobs.new_empty((2 if entropy is None else 3, n), **fp32)
    loss, stats = logprobs.new_empty((), **fp32), logprobs.new_empty(6, **fp32)
    programs = triton.cdiv(n, BLOCK)
    partial = grads.new_empty((7, programs), dtype=torch.float64)
    launch(
        ppo_tokens, programs, *rows, entropy, grads, partial, n, clip_ratio, 1 - clip_ratio, 1 + clip_ratio,
        value_clip, value_coef, entropy_coef, HAS_ENTROPY=entropy is not None, BLOCK=BLOCK,
    )  # fmt: skip
    launch(
        ppo_sums, 1, partial, loss, stats, num_tokens_tensor, 0.0 if num_tokens is None else num_tokens, programs,
        value_coef, entropy_coef, HAS_ENTROPY=entropy is not None, HAS_TENSOR=num_tokens_tensor is not None,
        HAS_NUMBER=num_tokens is not None, BLOCK=PARTIALS,
    )  # fmt: skip
    return loss, stats, grads
