"""linear_logprob, forward and backward. Limit: the GEMMs (one forward, three backward).

Forward: a program takes a block of rows through WORDS_PER_SPLIT words, tile by tile; two numbers per row and split
remain (three with the entropy), which a second kernel merges in order. Splits depend on V alone, so that a row's
numbers do not depend on the other rows. Backward: linear_tiles.linear_backward, dz from the two numbers per row that
normalise it.
"""

import torch
import triton
import triton.language as tl

from hpsafety.triton_kernels.launch import launch
from hpsafety.triton_kernels.linear_tiles import (
    GROUP,
    add_by_parts,
    finite_reference,
    grouped,
    kept_rows,
    linear_backward,
    splits_of,
    tile_logits,
    tiles,
    with_rows,
)

SHARED_BYTES = (98304, 196608)  # of a block on sm_80, sm_90 at most; tests/triton/test_static.py compares
MERGED_ROWS, MERGED_SPLITS = 32, 32


@triton.jit
def add_terms(sums, z, _, words, rows):
    """Of s and u."""
    s, u = sums
    reference, ENTROPY = rows
    below = z - reference[:, None]
    e = tl.exp(below)
    s += tl.sum(e, 1)
    if ENTROPY:
        u += tl.sum(tl.where(e == 0, 0.0, e * below), 1)
    return s, u


@triton.jit(do_not_specialize=["n"])
def linear_logprob_forward(
    x_ptr, w_ptr, target_ptr, index_ptr, count_ptr, partial_ptr, logit_ptr, n, v, d, x_stride, w_stride, alpha,
    splits, REST: tl.constexpr, ENTROPY: tl.constexpr, EVEN_D: tl.constexpr, TILES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Of z = alpha x w^T, per row and split: m = max z, s = sum exp(z - m), u = sum exp(z - m) (z - m).

    REST: only the rows of index[count:]. logit: z of the target. A NaN comes out in s, whatever m is then.
    """
    block, split = grouped(tl.program_id(0), tl.cdiv(n, BLOCK_M), splits, GROUP)
    place = block * BLOCK_M + tl.arange(0, BLOCK_M)
    if REST:
        skipped = tl.load(count_ptr)
        if block * BLOCK_M >= n - skipped:
            return
        row_mask = place < n - skipped
        row = tl.load(index_ptr + skipped + place, mask=row_mask, other=0).to(tl.int64)
    else:
        row_mask = place < n
        row = place.to(tl.int64)
    target = tl.load(target_ptr + row, mask=row_mask, other=-1).to(tl.int64)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    s = tl.zeros([BLOCK_M], tl.float32)
    u = tl.zeros([BLOCK_M], tl.float32)
    for tile in tl.range(0, TILES, disable_licm=True):
        first = (split * TILES + tile) * BLOCK_N
        if first < v:
            word = first + tl.arange(0, BLOCK_N).to(tl.int64)
            z = tile_logits(
                x_ptr,
                row,
                row_mask,
                x_stride,
                w_ptr,
                word,
                word < v,
                w_stride,
                d,
                BLOCK_M,
                BLOCK_N,
                BLOCK_K,
                EVEN_D,
            )
            column = tl.arange(0, BLOCK_N)
            z = tl.where((column < v - first)[None, :], z * alpha, float("-inf"))
            at_target = column[None, :] == (target - first).to(tl.int32)[:, None]
            hit = row_mask & (target >= first) & (target < tl.minimum(first + BLOCK_N, v))
            tl.store(logit_ptr + row, tl.sum(tl.where(at_target, z, 0.0), 1), mask=hit)
            top = tl.maximum(m, tl.max(z, 1))
            reference = finite_reference(top)
            scale = tl.exp(m - reference)
            if ENTROPY:
                u = scale * (u + (finite_reference(m) - reference) * s)
            s, u = add_by_parts(add_terms, (scale * s, u), z, z, v - first, (reference, ENTROPY))
            m = top
    at = split.to(tl.int64) * n + row
    tl.store(partial_ptr + at, m, mask=row_mask)
    size = splits.to(tl.int64) * n
    tl.store(partial_ptr + size + at, s, mask=row_mask)
    if ENTROPY:
        tl.store(partial_ptr + 2 * size + at, u, mask=row_mask)


@triton.jit(do_not_specialize=["n"])
def merge_logprobs(
    partial_ptr, logit_ptr, target_ptr, index_ptr, count_ptr, logprob_ptr, norm_ptr, entropy_ptr, n, v, splits,
    REST: tl.constexpr, NORM: tl.constexpr, ENTROPY: tl.constexpr, ROWS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """The splits' numbers in order: logprob, norm (m, log s), entropy. A row without a finite maximum is NaN."""
    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    if REST:
        skipped = tl.load(count_ptr)
        mask = place < n - skipped
        row = tl.load(index_ptr + skipped + place, mask=mask, other=0).to(tl.int64)
    else:
        mask = place < n
        row = place.to(tl.int64)
    m = tl.full([ROWS], float("-inf"), tl.float32)
    s = tl.zeros([ROWS], tl.float32)
    u = tl.zeros([ROWS], tl.float32)
    shift = tl.zeros([ROWS], tl.float32)
    size = splits.to(tl.int64) * n
    for first in range(0, splits, SPLITS):
        split = first + tl.arange(0, SPLITS).to(tl.int64)
        inside = (split < splits)[:, None] & mask[None, :]
        at = split[:, None] * n + row[None, :]
        m_part = tl.load(partial_ptr + at, mask=inside, other=float("-inf"))
        s_part = tl.load(partial_ptr + size + at, mask=inside, other=0.0)
        top = tl.maximum(m, tl.max(m_part, 0))
        reference = finite_reference(top)
        scale, scale_part = tl.exp(m - reference), tl.exp(m_part - reference[None, :])
        if ENTROPY:
            u_part = tl.load(partial_ptr + 2 * size + at, mask=inside, other=0.0)
            u_part = scale_part * (u_part + (finite_reference(m_part) - reference[None, :]) * s_part)
            u = scale * (u + (shift - reference) * s) + tl.sum(u_part, 0)
        s = scale * s + tl.sum(scale_part * s_part, 0)
        m = top
        shift = reference
    log_s = tl.where(m == float("-inf"), float("nan"), tl.log(s))
    target = tl.load(target_ptr + row, mask=mask, other=-1).to(tl.int64)
    known = mask & (target >= 0) & (target < v)  # a target that is no word has no logit: NaN
    logprob = (tl.load(logit_ptr + row, mask=known, other=float("nan")) - m) - log_s
    tl.store(logprob_ptr + row, tl.where(logprob > 0, 0.0, logprob), mask=mask)
    if NORM:
        tl.store(norm_ptr + row, m, mask=mask)
        tl.store(norm_ptr + n + row, log_s, mask=mask)
    if ENTROPY:
        tl.store(entropy_ptr + row, log_s - u / s, mask=mask)


def score_rows(hidden, weight, targets, alpha, logprobs, norm=None, entropies=None, rest=None) -> None:
    """Writes the logprobs, the norm and the entropies of all rows, or of those that `rest` (index, count) left out."""
    (n, d), v = hidden.shape, weight.shape[0]
    config = tiles("logits", hidden)
    in_split, splits = splits_of(v, config["BLOCK_N"])
    index, count = rest if rest is not None else (None, None)
    partial = logprobs.new_empty((3 if entropies is not None else 2, splits, n))
    logits = logprobs.new_empty(n)
    launch(
        linear_logprob_forward, triton.cdiv(n, config["BLOCK_M"]) * splits,
        hidden, weight, targets, index, count, partial, logits, n, v, d, hidden.stride(0), weight.stride(0), alpha,
        splits, REST=rest is not None, ENTROPY=entropies is not None, EVEN_D=d % config["BLOCK_K"] == 0,
        TILES=in_split, GROUP=GROUP, **config,
    )  # fmt: skip
    launch(
        merge_logprobs, triton.cdiv(n, MERGED_ROWS),
        partial, logits, targets, index, count, logprobs, norm, entropies, n, v, splits,
        REST=rest is not None, NORM=norm is not None, ENTROPY=entropies is not None,
        ROWS=MERGED_ROWS, SPLITS=MERGED_SPLITS,
    )  # fmt: skip


def linear_logprob(hidden, weight, targets, temperature, entropy):
    """(logprobs (N,), norm (2, N), entropies (N,) or empty), fp32; arguments as in hpsafety::linear_logprob."""
    hidden, weight, targets = with_rows(hidden), with_rows(weight), targets.contiguous()
    n = hidden.shape[0]
    logprobs, norm = hidden.new_empty(n, dtype=torch.float32), hidden.new_empty((2, n), dtype=torch.float32)
    entropies = hidden.new_empty(n if entropy else 0, dtype=torch.float32)
    score_rows(hidden, weight, targets, 1 / temperature, logprobs, norm, entropies if entropy else None)
    return logprobs, norm, entropies


@triton.jit(do_not_specialize=["n", "first_row", "rows", "first_word", "words"])
def logprob_dlogits(
    x_ptr, w_ptr, target_ptr, grad_ptr, grad_entropy_ptr, norm_ptr, entropy_ptr, index_ptr, count_ptr, dz_ptr,
    n, first_row, rows, first_word, words, d, w_stride, dz_stride, alpha,
    ENTROPY: tl.constexpr, EVEN_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """dz = p (a + b (log p + H)), and -a more at the target, with a and b the row's gradients over -temperature.

    x are the gathered rows; everything else of a row stands where index says.
    """
    block, tile = grouped(tl.program_id(0), tl.cdiv(rows, BLOCK_M), tl.cdiv(words, BLOCK_N), GROUP)
    here = tl.minimum(tl.load(count_ptr) - first_row, rows)
    if block * BLOCK_M >= here:
        return
    place = block * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = place < here
    word = tile * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)  # of those from first_word on, as is w_ptr
    z = tile_logits(
        x_ptr, (first_row + place).to(tl.int64), row_mask, d, w_ptr, word, word < words, w_stride, d,
        BLOCK_M, BLOCK_N, BLOCK_K, EVEN_D,
    )  # fmt: skip
    row = tl.load(index_ptr + first_row + place, mask=row_mask, other=0).to(tl.int64)
    m = tl.load(norm_ptr + row, mask=row_mask, other=0.0)
    log_s = tl.load(norm_ptr + n + row, mask=row_mask, other=0.0)
    target = tl.load(target_ptr + row, mask=row_mask, other=-1).to(tl.int64) - first_word
    a = -tl.load(grad_ptr + row, mask=row_mask, other=0.0) * alpha
    # Rounded before m is subtracted, as in the forward; the choice keeps the two from becoming one FMA.
    z = tl.where((word < words)[None, :], z * alpha, 0.0)
    logp = (z - m[:, None]) - log_s[:, None]
    p = tl.exp(logp)
    if ENTROPY:
        b = -tl.load(grad_entropy_ptr + row, mask=row_mask, other=0.0) * alpha
        h = tl.load(entropy_ptr + row, mask=row_mask, other=0.0)
        dz = tl.where(p == 0, 0.0, p * (a[:, None] + b[:, None] * (logp + h[:, None])))
    else:
        dz = p * a[:, None]
    dz = tl.where(word[None, :] == target[:, None], dz - a[:, None], dz)
    at = place.to(tl.int64)[:, None] * dz_stride + word[None, :]
    tl.store(dz_ptr + at, dz, mask=row_mask[:, None] & (word < words)[None, :])


def linear_logprob_backward(
    grad, grad_entropy, hidden, weight, targets, norm, entropy, temperature, need_hidden, need_weight
):
    """(grad_hidden, grad_weight), empty where not wanted; rows whose incoming gradients are zero are left out."""
    hidden, weight, targets, norm = (
        with_rows(hidden),
        with_rows(weight),
        targets.contiguous(),
        norm.contiguous(),
    )
    grad = grad.to(torch.float32).contiguous()
    with_entropy = grad_entropy is not None
    grad_entropy = grad_entropy.to(torch.float32).contiguous() if with_entropy else None
    entropy = entropy.contiguous() if with_entropy else None
    kept = kept_rows(grad, grad_entropy)
    (n, d), config = hidden.shape, tiles("logits", hidden)

    def dlogits(dz, gathered_hidden, first_row, rows, first_word, words):
        launch(
            logprob_dlogits, triton.cdiv(rows, config["BLOCK_M"]) * triton.cdiv(words, config["BLOCK_N"]),
            gathered_hidden, weight.narrow(0, first_word, words), targets, grad, grad_entropy, norm, entropy, *kept, dz,
            n, first_row, rows, first_word, words, d, weight.stride(0), dz.stride(0),
            1 / temperature, ENTROPY=with_entropy, EVEN_D=d % config["BLOCK_K"] == 0, GROUP=GROUP, **config,
        )  # fmt: skip

    return linear_backward(dlogits, hidden, weight, kept, need_hidden, need_weight)
