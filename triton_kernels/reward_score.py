"""reward_score in two launches: both heads and the route of each response, then whitening and the best of each group.

Limit: bytes, the last rows of the responses; nobody reads the others. The heads come from the cache.
"""

import torch
import triton
import triton.language as tl

from hpsafety.triton_kernels.launch import launch

SHARED_BYTES = (32, 32)  # a block's at most, on sm_80 and on sm_90
COLUMNS = 1024  # of a row at a time
RESPONSES = 1024  # whitened at a time
MEMBERS = 64  # of a group at a time


@triton.jit
def _logit(row_ptr, head_ptr, norm_ptr, eps, D: tl.constexpr, HAS_NORM: tl.constexpr, BLOCK: tl.constexpr):
    """x . (norm * head) / rms(x) in fp32 lanes, which are added in fp64."""
    dots, squares = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for start in range(0, D, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(row_ptr + column, mask=column < D, other=0.0).to(tl.float32)
        weight = tl.load(head_ptr + column, mask=column < D, other=0.0).to(tl.float32)
        if HAS_NORM:
            weight *= tl.load(norm_ptr + column, mask=column < D, other=0.0).to(tl.float32)
            squares += x * x
        dots += x * weight
    logit = tl.sum(dots.to(tl.float64), 0)
    if HAS_NORM:
        logit /= tl.sqrt(tl.sum(squares.to(tl.float64), 0) / D + eps)
    return logit.to(tl.float32)


@triton.jit
def score_responses(
    safety_ptr, helpful_ptr, rows_ptr, head_safety_ptr, head_helpful_ptr, norm_safety_ptr, norm_helpful_ptr,
    tags_ptr, r_safety_ptr, r_helpful_ptr, combined_ptr, safety_stride, helpful_stride, eps: tl.float64, threshold,
    D1: tl.constexpr, D2: tl.constexpr, HAS_NORM1: tl.constexpr, HAS_NORM2: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    response = tl.program_id(0).to(tl.int64)
    row = tl.load(rows_ptr + response).to(tl.int64)
    safety_ptr += row * safety_stride
    helpful_ptr += row * helpful_stride
    safety = _logit(safety_ptr, head_safety_ptr, norm_safety_ptr, eps, D1, HAS_NORM1, BLOCK)
    helpful = _logit(helpful_ptr, head_helpful_ptr, norm_helpful_ptr, eps, D2, HAS_NORM2, BLOCK)
    # From fp64 to fp32, and against fp32: the logit of 0.15 is then exactly 0.15. NaN does not pass and stays.
    probability = (1.0 / (1.0 + tl.exp(-safety.to(tl.float64)))).to(tl.float32)
    passes = (probability >= threshold) & (tl.load(tags_ptr + response).to(tl.int32) == 0)
    tl.store(r_safety_ptr + response, safety)
    tl.store(r_helpful_ptr + response, helpful)
    tl.store(combined_ptr + response, tl.where(passes, helpful, safety))


@triton.jit
def _whiten(z_ptr, out_ptr, responses, BLOCK: tl.constexpr):
    """(z - mean) / (std + 1e-8) in fp64; zeros where all are equal. One pass makes the sums, of differences to the
    first score: it is one of the scores, so that the variance is no smaller than what cancels by much."""
    first = tl.load(z_ptr).to(tl.float64)
    total, squares = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    low, high = tl.full([BLOCK], float("inf"), tl.float32), tl.full([BLOCK], float("-inf"), tl.float32)
    bad = tl.zeros([BLOCK], tl.int32)
    for start in range(0, responses, BLOCK):
        at = tl.arange(0, BLOCK).to(tl.int64) + start
        inside = at < responses
        z = tl.load(z_ptr + at, mask=inside, other=0.0)
        off = tl.where(inside, z.to(tl.float64) - first, 0.0)
        total += off
        squares += off * off
        low, high = tl.where(inside & (z < low), z, low), tl.where(inside & (z > high), z, high)
        bad += (z != z).to(tl.int32)
    mean = tl.sum(total, 0) / responses
    variance = tl.sum(squares, 0) / responses - mean * mean
    scale = tl.sqrt(tl.where(variance < 0.0, 0.0, variance)) + 1e-8
    equal = (tl.min(low, 0) >= tl.max(high, 0)) & (tl.sum(bad, 0) == 0)
    for start in range(0, responses, BLOCK):
        at = tl.arange(0, BLOCK).to(tl.int64) + start
        inside = at < responses
        off = tl.load(z_ptr + at, mask=inside, other=0.0).to(tl.float64) - first
        tl.store(out_ptr + at, tl.where(equal, 0.0, (off - mean) / scale).to(tl.float32), mask=inside)


@triton.jit
def _best(z_ptr, begin, end, BLOCK: tl.constexpr):
    """Index of the highest score, the lowest of equals; NaN only where there is nothing else."""
    best, found = tl.full([], float("-inf"), tl.float32), end
    for start in range(begin, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        z = tl.load(z_ptr + at, mask=at < end, other=float("nan"))
        top = tl.max(tl.where(z == z, z, float("-inf")), 0)
        here = tl.min(tl.where(z == top, at, end), 0)
        better = (here < end) & ((found == end) | (top > best))
        best, found = tl.where(better, top, best), tl.where(better, here, found)
    return tl.where(found == end, begin, found)


@triton.jit(do_not_specialize=["responses"])
def whiten_and_choose(
    combined_ptr, whitened_ptr, offsets_ptr, best_ptr, responses, BLOCK: tl.constexpr, MEMBERS: tl.constexpr
):  # fmt: skip
    """Program 0 whitens all responses, each other one looks for the best of a group."""
    group = tl.program_id(0).to(tl.int64) - 1
    if group < 0:
        _whiten(combined_ptr, whitened_ptr, responses, BLOCK)
    else:
        begin, end = tl.load(offsets_ptr + group).to(tl.int64), tl.load(offsets_ptr + group + 1).to(tl.int64)
        tl.store(best_ptr + group, _best(combined_ptr, begin, end, MEMBERS))


def _rows(hidden):
    return hidden if hidden.stride(1) == 1 else hidden.contiguous()  # rows may lie apart: few are read


def reward_score(
    hidden_safety, hidden_helpful, last_rows, head_safety, head_helpful, is_safety, cu_groups, norm_safety,
    norm_helpful, eps, threshold,
):  # fmt: skip
    """(r_safety, r_helpful, combined, whitened, best_of_group); arguments as in hpsafety::reward_score."""
    responses, groups = last_rows.shape[0], cu_groups.shape[0] - 1
    scores = [hidden_safety.new_empty(responses, dtype=torch.float32) for _ in range(4)]
    r_safety, r_helpful, combined, whitened = scores
    best = last_rows.new_empty(groups, dtype=torch.int64)
    safety, helpful = _rows(hidden_safety), _rows(hidden_helpful)
    weights = [
        x if x is None else x.contiguous() for x in (head_safety, head_helpful, norm_safety, norm_helpful)
    ]
    widest = max(safety.shape[1], helpful.shape[1])
    launch(
        score_responses, responses, safety, helpful, last_rows.contiguous(), *weights, is_safety.contiguous(),
        r_safety, r_helpful, combined, safety.stride(0), helpful.stride(0), eps, threshold, D1=safety.shape[1],
        D2=helpful.shape[1], HAS_NORM1=norm_safety is not None, HAS_NORM2=norm_helpful is not None,
        BLOCK=min(triton.next_power_of_2(widest), COLUMNS),
    )  # fmt: skip
    launch(
        whiten_and_choose, groups + 1 if responses else 0, combined, whitened, cu_groups.contiguous(), best, responses,
        BLOCK=RESPONSES, MEMBERS=MEMBERS,
    )  # fmt: skip
    return (*scores, best)
