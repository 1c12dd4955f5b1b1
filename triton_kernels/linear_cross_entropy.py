"""linear_cross_entropy: loss, logprobs and both gradients in one go. Limit: three GEMMs.

Rows of weight zero get their logprob from linear_logprob's forward; the others are gathered, and taken in parts. Of a
part, e = exp(z - the largest z of its tile of words) stands for all words in the gradients' dtype, and is scaled to
dz in place once the row's normaliser is known. z itself would need fp32.
"""

import torch
import triton
import triton.language as tl

from hpsafety.triton_kernels.launch import launch
from hpsafety.triton_kernels.linear_logprob import score_rows
from hpsafety.triton_kernels.linear_tiles import (
    GROUP,
    finite_reference,
    gathered,
    grouped,
    kept_rows,
    launch_hidden_gradient,
    launch_weight_gradient,
    tile_logits,
    tiles,
    with_rows,
)

SHARED_BYTES = (98304, 196608)  # of a block on sm_80, sm_90 at most; tests/triton/test_static.py compares
DZ_BYTES = 256 << 20  # of dz: every part of rows reads and writes the fp32 sums of the weight's gradient
LEAST_ROWS, MOST_ROWS = 256, 8192
MERGED_ROWS, MERGED_TILES = 32, 32
SCALED_ROWS = 16
LOSS_BLOCK = 2048


@triton.jit(do_not_specialize=["first_row", "rows"])
def exponential_tiles(
    x_ptr, w_ptr, target_ptr, index_ptr, count_ptr, e_ptr, m_ptr, s_ptr, logit_ptr, first_row, rows, v, d, w_stride,
    e_stride, EVEN_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """e = exp(z - m) of one tile, m (tiles, rows) its rows' largest z, s (tiles, rows) the fp32 sums; logit (rows,)."""
    block, tile = grouped(tl.program_id(0), tl.cdiv(rows, BLOCK_M), tl.cdiv(v, BLOCK_N), GROUP)
    here = tl.minimum(tl.load(count_ptr) - first_row, rows)
    if block * BLOCK_M >= here:
        return
    place = block * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = place < here
    word = tile * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    z = tile_logits(
        x_ptr, (first_row + place).to(tl.int64), row_mask, d, w_ptr, word, word < v, w_stride, d,
        BLOCK_M, BLOCK_N, BLOCK_K, EVEN_D,
    )  # fmt: skip
    z = tl.where((word < v)[None, :], z, float("-inf"))
    row = tl.load(index_ptr + first_row + place, mask=row_mask, other=0).to(tl.int64)
    target = tl.load(target_ptr + row, mask=row_mask, other=-1).to(tl.int64)
    first = tile * BLOCK_N
    hit = row_mask & (target >= first) & (target < tl.minimum(first + BLOCK_N, v))
    tl.store(logit_ptr + place, tl.sum(tl.where(word[None, :] == target[:, None], z, 0.0), 1), mask=hit)
    m = tl.max(z, 1)
    e = tl.exp(z - finite_reference(m)[:, None])
    at = tile.to(tl.int64) * rows + place
    tl.store(m_ptr + at, m, mask=row_mask)
    tl.store(s_ptr + at, tl.sum(e, 1), mask=row_mask)
    e_at = place.to(tl.int64)[:, None] * e_stride + word[None, :]
    tl.store(e_ptr + e_at, e, mask=row_mask[:, None] & (word < v)[None, :])


@triton.jit(do_not_specialize=["first_row", "rows"])
def merge_tiles(
    m_ptr, s_ptr, logit_ptr, target_ptr, index_ptr, count_ptr, logprob_ptr, norm_ptr, first_row, rows, v, row_tiles,
    ROWS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """The tiles' numbers in order: norm (m, log s) by place, logprob by row. No finite maximum: NaN."""
    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mask = place < tl.minimum(tl.load(count_ptr) - first_row, rows)
    m = tl.full([ROWS], float("-inf"), tl.float32)
    s = tl.zeros([ROWS], tl.float32)
    for first in range(0, row_tiles, TILES):
        tile = first + tl.arange(0, TILES).to(tl.int64)
        inside = (tile < row_tiles)[:, None] & mask[None, :]
        at = tile[:, None] * rows + place[None, :]
        m_part = tl.load(m_ptr + at, mask=inside, other=float("-inf"))
        s_part = tl.load(s_ptr + at, mask=inside, other=0.0)
        top = tl.maximum(m, tl.max(m_part, 0))
        reference = finite_reference(top)
        s = tl.exp(m - reference) * s + tl.sum(tl.exp(m_part - reference[None, :]) * s_part, 0)
        m = top
    log_s = tl.where(m == float("-inf"), float("nan"), tl.log(s))
    row = tl.load(index_ptr + first_row + place, mask=mask, other=0).to(tl.int64)
    target = tl.load(target_ptr + row, mask=mask, other=-1).to(tl.int64)
    known = mask & (target >= 0) & (target < v)
    logprob = (tl.load(logit_ptr + place, mask=known, other=float("nan")) - m) - log_s
    tl.store(logprob_ptr + row, tl.where(logprob > 0, 0.0, logprob), mask=mask)
    tl.store(norm_ptr + place, m, mask=mask)
    tl.store(norm_ptr + rows + place, log_s, mask=mask)


@triton.jit(do_not_specialize=["first_row", "rows"])
def scale_tiles(
    e_ptr, m_ptr, norm_ptr, target_ptr, row_weight_ptr, index_ptr, count_ptr, first_row, rows, v, row_tiles, e_stride,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dz = weight (p - [word is the target]) in the place of e.

    p - 1 loses nothing to the rounding of e: where p exceeds a half, the word is its tile's largest and e is 1.
    """
    block, tile = tl.program_id(0) // row_tiles, tl.program_id(0) % row_tiles
    place = block * ROWS + tl.arange(0, ROWS)
    mask = place < tl.minimum(tl.load(count_ptr) - first_row, rows)
    row = tl.load(index_ptr + first_row + place, mask=mask, other=0).to(tl.int64)
    weight = tl.load(row_weight_ptr + row, mask=mask, other=0.0)
    target = tl.load(target_ptr + row, mask=mask, other=-1).to(tl.int64)
    m = tl.load(norm_ptr + place, mask=mask, other=0.0)
    log_s = tl.load(norm_ptr + rows + place, mask=mask, other=0.0)
    tile_m = tl.load(m_ptr + tile.to(tl.int64) * rows + place, mask=mask, other=0.0)
    factor = weight * tl.exp((tile_m - m) - log_s)
    word = tile * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    at = place.to(tl.int64)[:, None] * e_stride + word[None, :]
    inside = mask[:, None] & (word < v)[None, :]
    dz = tl.load(e_ptr + at, mask=inside, other=0.0).to(tl.float32) * factor[:, None]
    dz = tl.where(word[None, :] == target[:, None], dz - weight[:, None], dz)
    tl.store(e_ptr + at, dz, mask=inside)


@triton.jit(do_not_specialize=["n"])
def weighted_loss(logprob_ptr, row_weight_ptr, loss_ptr, n, BLOCK: tl.constexpr):
    """loss = -sum of weight * logprob over the rows of a weight that is not zero, in fp64. One program."""
    total = tl.zeros([BLOCK], tl.float64)
    for first in range(0, n, BLOCK):
        row = first + tl.arange(0, BLOCK)
        weight = tl.load(row_weight_ptr + row, mask=row < n, other=0.0)
        logprob = tl.load(logprob_ptr + row, mask=(row < n) & (weight != 0), other=0.0)
        total += weight.to(tl.float64) * logprob.to(tl.float64)
    tl.store(loss_ptr, -tl.sum(total, 0))


def rows_of_part(v: int, item: int) -> int:
    """Rows whose dz stands at a time: by V alone, as sums run part by part."""
    return min(max(DZ_BYTES // item // v // 256 * 256, LEAST_ROWS), MOST_ROWS)


def _train(hidden, weight, targets, row_weights, logprobs, need_hidden: bool, need_weight: bool):
    """Writes the logprobs of the rows that have a weight; returns those rows and the gradients."""
    (n, d), v = hidden.shape, weight.shape[0]
    kept = kept_rows(row_weights)
    index, count = kept
    rows = min(n, rows_of_part(v, hidden.element_size()))
    config = tiles("logits", hidden)
    words = config["BLOCK_N"]
    row_tiles = triton.cdiv(v, words)
    compact, fp32 = gathered(hidden, kept), torch.float32
    grad_hidden = hidden.new_zeros(hidden.shape if need_hidden else (0,))
    grad_weight = weight.new_empty(weight.shape if need_weight else (0,))
    if n == 0:
        return kept, grad_hidden, grad_weight.zero_()
    sums = grad_weight
    if need_weight and n > rows and weight.dtype != fp32:
        sums = weight.new_empty(weight.shape, dtype=fp32)
    dz = hidden.new_empty((rows, triton.cdiv(v, 16) * 16))
    m, s = (hidden.new_empty((row_tiles, rows), dtype=fp32) for _ in range(2))
    logits, norm = hidden.new_empty(rows, dtype=fp32), hidden.new_empty((2, rows), dtype=fp32)
    for first in range(0, n, rows):
        some = min(rows, n - first)
        launch(
            exponential_tiles, triton.cdiv(some, config["BLOCK_M"]) * row_tiles,
            compact, weight, targets, index, count, dz, m, s, logits, first, some, v, d, weight.stride(0), dz.stride(0),
            EVEN_D=d % config["BLOCK_K"] == 0, GROUP=GROUP, **config,
        )  # fmt: skip
        launch(
            merge_tiles, triton.cdiv(some, MERGED_ROWS),
            m, s, logits, targets, index, count, logprobs, norm, first, some, v, row_tiles,
            ROWS=MERGED_ROWS, TILES=MERGED_TILES,
        )  # fmt: skip
        launch(
            scale_tiles, triton.cdiv(some, SCALED_ROWS) * row_tiles,
            dz, m, norm, targets, row_weights, index, count, first, some, v, row_tiles, dz.stride(0),
            ROWS=SCALED_ROWS, BLOCK=words,
        )  # fmt: skip
        if need_hidden:
            launch_hidden_gradient(dz, weight, kept, grad_hidden, grad_hidden, first, some, False, True)
        if need_weight:
            launch_weight_gradient(
                dz, compact, kept, sums, grad_weight, first, some, first > 0, first + some == n
            )
    return kept, grad_hidden, grad_weight


def linear_cross_entropy(hidden, weight, targets, row_weights, need_hidden, need_weight):
    """(loss, logprobs, grad_hidden, grad_weight), the gradients empty where not wanted."""
    hidden, weight, targets = with_rows(hidden), with_rows(weight), targets.contiguous()
    row_weights = row_weights.contiguous()
    n = hidden.shape[0]
    logprobs, loss = row_weights.new_empty(n), row_weights.new_empty(())
    rest, grad_hidden, grad_weight = None, hidden.new_empty(0), weight.new_empty(0)
    if need_hidden or need_weight:
        rest, grad_hidden, grad_weight = _train(
            hidden, weight, targets, row_weights, logprobs, need_hidden, need_weight
        )
    score_rows(hidden, weight, targets, 1.0, logprobs, rest=rest)
    launch(weighted_loss, 1, logprobs, row_weights, loss, n, BLOCK=LOSS_BLOCK)
    return loss, logprobs, grad_hidden, grad_weight
