"""sample: one word per row by Gumbel-max from counter-based noise, under top-k and top-p, and its logprob.

The arithmetic is defined in hpsafety/reference/sample.py and repeated to the bit: fp32 additions and multiplications in
that order and never fused (fp_fusion=False at every launch), integer sums, ties by index. So every backend draws the
same words, and neither chunks nor the order of programs matter. Limit: Philox and two logarithms a word, then bytes.

A row is cut into chunks of CHUNK words, a program each:

    row_maxima      largest logit and first word that is NaN or +inf, of each chunk
    draw            masses of the chunk, and its allowed word with the largest y + noise
    finish          the row's word and logprob, from its chunks

That is all without top-k and top-p: two passes, since a word's score is rounded relative to the row's maximum. Each of
top-k and top-p first looks for its border, the last word allowed in the order of logits downwards, equals by index:

    slice_weights   weight of the chunk's words (1, or the mass) in each of SLICES slices of y
    collect         words of the slice in which the weights, added up from the top, reach the target
    find_border     bisects the keys of those words, then counts equals

B rows, V words, C chunks of a row.
"""

import math

import torch
import triton
import triton.language as tl

from hpsafety.triton_kernels.launch import launch
from hpsafety.triton_kernels.sample_arithmetic import (
    key_of,
    log2_of,
    mass_of,
    noise_of,
    philox,
    slice_of,
    top_p_target,
)

SHARED_BYTES = (32768, 32768)
SLICES = 16
BLOCK = 2048  # words that find_border looks at in one step
LIST = 4096  # words that find_border takes from a list; where the slice has more, it looks at the whole row
LN2 = tl.constexpr(0.693147182)
NO_INDEX = tl.constexpr(2147483647)


# ---- a row ----


@triton.jit
def row_top(maxima_ptr, bad_ptr, row, chunks, CHUNKS: tl.constexpr):
    """(largest logit, whether the row has no softmax, lowest index of a NaN or +inf). Broken rows count as zeros."""
    chunk = tl.arange(0, CHUNKS)
    maxima = tl.load(maxima_ptr + row * chunks + chunk, mask=chunk < chunks, other=float("-inf"))
    bad = tl.min(tl.load(bad_ptr + row * chunks + chunk, mask=chunk < chunks, other=NO_INDEX), 0)
    top = tl.max(maxima, 0)
    broken = (bad != NO_INDEX) | (top == float("-inf"))
    return tl.where(broken, 0.0, top), broken, bad


@triton.jit
def load_words(logits_ptr, word, mask, broken):
    """Logits of words; -inf where masked."""
    x = tl.load(logits_ptr + word, mask=mask, other=float("-inf")).to(tl.float32) + 0.0  # -0 becomes 0
    return tl.where(broken & mask, 0.0, x)


@triton.jit
def allows(key, word, border_key, border_word):
    return (key > border_key) | ((key == border_key) & (word <= border_word))


@triton.jit
def row_maxima(logits_ptr, maxima_ptr, bad_ptr, stride, words, chunks, CHUNK: tl.constexpr):
    row = (tl.program_id(0) // chunks).to(tl.int64)
    word = tl.program_id(0) % chunks * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(logits_ptr + row * stride + word, mask=word < words, other=float("-inf")).to(tl.float32) + 0.0
    bad = (x != x) | (x == float("inf"))
    tl.store(maxima_ptr + tl.program_id(0), tl.max(tl.where(bad, float("-inf"), x), 0))
    tl.store(bad_ptr + tl.program_id(0), tl.min(tl.where(bad, word, NO_INDEX), 0))


# ---- the borders of top-k and top-p ----


@triton.jit
def slice_weights(
    logits_ptr, maxima_ptr, bad_ptr, border_ptr, weights_ptr, counts_ptr, stride, words, chunks, scale,
    MASSES: tl.constexpr, BORDER: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, SLICES: tl.constexpr,
):  # fmt: skip
    """counts (B, C, SLICES) int32 of the words, and with MASSES weights (B, C, SLICES) int64; those a border allows."""
    row = (tl.program_id(0) // chunks).to(tl.int64)
    word = tl.program_id(0) % chunks * CHUNK + tl.arange(0, CHUNK)
    top, broken, _ = row_top(maxima_ptr, bad_ptr, row, chunks, CHUNKS)
    inside = word < words
    x = load_words(logits_ptr + row * stride, word, inside, broken)
    if BORDER:
        inside &= allows(key_of(x), word, tl.load(border_ptr + 2 * row), tl.load(border_ptr + 2 * row + 1))
    y = (x - top) * scale
    index = slice_of(y)
    at = tl.program_id(0).to(tl.int64) * SLICES
    tl.store(counts_ptr + at + tl.arange(0, SLICES), tl.histogram(index, SLICES, mask=inside))
    if MASSES:
        mass = tl.where(inside, mass_of(y), 0)
        for i in tl.static_range(SLICES):
            tl.store(weights_ptr + at + i, tl.sum(tl.where(index == i, mass, 0), 0))


@triton.jit
def target_slice(
    weights_ptr, row, chunks, target, MASSES: tl.constexpr, CHUNKS: tl.constexpr, SLICES: tl.constexpr
):
    """(the slice in which the row's weights reach the target, what is left of the target in it)."""
    chunk, i = tl.arange(0, CHUNKS)[:, None], tl.arange(0, SLICES)
    at = (row * chunks + chunk) * SLICES + i[None, :]
    sums = tl.sum(tl.load(weights_ptr + at, mask=chunk < chunks, other=0).to(tl.int64), 0)
    if MASSES:
        target = top_p_target(tl.sum(sums, 0), target)
    reached = tl.cumsum(sums, 0)
    found = tl.min(tl.where(reached >= target, i, SLICES - 1), 0)
    return found, target - tl.sum(tl.where(i < found, sums, 0), 0)


@triton.jit(do_not_specialize=["target"])
def collect(
    logits_ptr, maxima_ptr, bad_ptr, border_ptr, weights_ptr, counts_ptr, list_ptr, stride, words, chunks, scale,
    target, MASSES: tl.constexpr, BORDER: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
    SLICES: tl.constexpr, LIST: tl.constexpr,
):  # fmt: skip
    """The first LIST words of the target's slice, in order, to list (B, LIST) int32. target: top_k, or top_p 2^31."""
    row = (tl.program_id(0) // chunks).to(tl.int64)
    mine = tl.program_id(0) % chunks
    found, _ = target_slice(weights_ptr, row, chunks, target.to(tl.int64), MASSES, CHUNKS, SLICES)
    chunk = tl.arange(0, CHUNKS)
    counts = tl.load(counts_ptr + (row * chunks + chunk) * SLICES + found, mask=chunk < chunks, other=0)
    first = tl.sum(tl.where(chunk < mine, counts, 0), 0)
    count = tl.sum(tl.where(chunk == mine, counts, 0), 0)
    if (count == 0) | (first >= LIST):
        return
    word = mine * CHUNK + tl.arange(0, CHUNK)
    top, broken, _ = row_top(maxima_ptr, bad_ptr, row, chunks, CHUNKS)
    inside = word < words
    x = load_words(logits_ptr + row * stride, word, inside, broken)
    if BORDER:
        inside &= allows(key_of(x), word, tl.load(border_ptr + 2 * row), tl.load(border_ptr + 2 * row + 1))
    inside &= slice_of((x - top) * scale) == found
    place = first + tl.cumsum(inside.to(tl.int32), 0) - 1
    tl.store(list_ptr + row * LIST + place, word, mask=inside & (place < LIST))


@triton.jit
def candidates(
    logits_ptr, list_ptr, first, count, listed, top, broken, scale, found, border_key, border_word,
    BORDER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(word, logit, key, whether it is one) of BLOCK words: of the list, or of the row where that is too long."""
    at = first + tl.arange(0, BLOCK)
    mask = at < count
    word = tl.where(listed, tl.load(list_ptr + at, mask=at < tl.where(listed, count, 0), other=0), at)
    x = load_words(logits_ptr, word, mask, broken)
    key = key_of(x)
    mask &= slice_of((x - top) * scale) == found
    if BORDER:
        mask &= allows(key, word, border_key, border_word)
    return word, x, key, mask


@triton.jit(do_not_specialize=["target"])
def find_border(
    logits_ptr, maxima_ptr, bad_ptr, border_ptr, weights_ptr, counts_ptr, list_ptr, new_border_ptr, stride, words,
    chunks, scale, target, MASSES: tl.constexpr, BORDER: tl.constexpr, CHUNKS: tl.constexpr, SLICES: tl.constexpr,
    LIST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(key, word) of the last allowed word of a row, to new_border (B, 2) int32."""
    row = tl.program_id(0).to(tl.int64)
    found, left = target_slice(weights_ptr, row, chunks, target.to(tl.int64), MASSES, CHUNKS, SLICES)
    chunk = tl.arange(0, CHUNKS)
    counts = tl.load(counts_ptr + (row * chunks + chunk) * SLICES + found, mask=chunk < chunks, other=0)
    count = tl.sum(counts, 0)
    listed = count <= LIST
    count = tl.where(listed, count, words)
    top, broken, _ = row_top(maxima_ptr, bad_ptr, row, chunks, CHUNKS)
    border_key, border_word = 0, 0
    if BORDER:
        border_key, border_word = tl.load(border_ptr + 2 * row), tl.load(border_ptr + 2 * row + 1)
    logits_ptr += row * stride
    list_ptr += row * LIST
    low, high = tl.full([], 2147483647, tl.int64), tl.full([], -2147483648, tl.int64)
    for first in tl.range(0, count, BLOCK, disable_licm=True):
        word, x, key, is_one = candidates(
            logits_ptr, list_ptr, first, count, listed, top, broken, scale, found, border_key, border_word, BORDER,
            BLOCK,
        )  # fmt: skip
        low = tl.minimum(low, tl.min(tl.where(is_one, key, 2147483647), 0).to(tl.int64))
        high = tl.maximum(high, tl.max(tl.where(is_one, key, -2147483648), 0).to(tl.int64))
    above = tl.full([], 0, tl.int64)  # weight of the keys above `high`
    while low < high:  # the largest key for which the words from it on reach what is left
        middle = high - ((high - low) >> 1)
        weight = tl.full([], 0, tl.int64)
        for first in tl.range(0, count, BLOCK, disable_licm=True):
            word, x, key, is_one = candidates(
                logits_ptr, list_ptr, first, count, listed, top, broken, scale, found, border_key, border_word, BORDER,
                BLOCK,
            )  # fmt: skip
            is_one &= key >= middle
            if MASSES:
                weight += tl.sum(tl.where(is_one, mass_of((x - top) * scale), 0), 0)
            else:
                weight += tl.sum(is_one.to(tl.int32), 0)
        if weight >= left:
            low = middle
        else:
            high, above = middle - 1, weight
    equals = left - above  # of those with the border's key, by index
    if MASSES:
        bits = low.to(tl.int32)
        last_x = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
        mass = mass_of((last_x - top) * scale)
        equals = (equals + mass - 1) // mass
    seen, last = tl.full([], 0, tl.int32), tl.full([], -1, tl.int32)
    for first in tl.range(0, count, BLOCK, disable_licm=True):
        word, x, key, is_one = candidates(
            logits_ptr, list_ptr, first, count, listed, top, broken, scale, found, border_key, border_word, BORDER,
            BLOCK,
        )  # fmt: skip
        is_one &= key == low
        place = seen + tl.cumsum(is_one.to(tl.int32), 0)
        last = tl.maximum(last, tl.max(tl.where(is_one & (place == equals), word, -1), 0))
        seen += tl.sum(is_one.to(tl.int32), 0)
    tl.store(new_border_ptr + 2 * row, low.to(tl.int32))
    tl.store(new_border_ptr + 2 * row + 1, last)


# ---- the draw ----


@triton.jit
def draw(
    logits_ptr, maxima_ptr, bad_ptr, border_ptr, seeds_ptr, positions_ptr, totals_ptr, scores_ptr, tokens_ptr, stride,
    words, chunks, scale, GREEDY: tl.constexpr, BORDER: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Sum of masses, and the best score and its lowest word, of one chunk.

    Output j of a Philox block belongs to the words 32 j .. 32 j + 31 of 128, so the chunk is taken in four quarters
    of such runs, whose loads are contiguous.
    """
    row = (tl.program_id(0) // chunks).to(tl.int64)
    top, broken, _ = row_top(maxima_ptr, bad_ptr, row, chunks, CHUNKS)
    lane = tl.arange(0, CHUNK // 4)
    first = tl.program_id(0) % chunks * CHUNK
    if not GREEDY:
        block = (first // 4 + lane).to(tl.uint32)
        r0, r1, r2, r3 = philox(tl.load(seeds_ptr + row), tl.load(positions_ptr + row), block)
    if BORDER:
        border_key, border_word = tl.load(border_ptr + 2 * row), tl.load(border_ptr + 2 * row + 1)
    total = tl.zeros([CHUNK // 4], tl.int64)
    best = tl.full([CHUNK // 4], float("-inf"), tl.float32)
    token = tl.full([CHUNK // 4], NO_INDEX, tl.int32)
    for j in tl.static_range(4):
        word = first + lane // 32 * 128 + lane % 32 + 32 * j
        inside = word < words
        x = load_words(logits_ptr + row * stride, word, inside, broken)
        y = (x - top) * scale
        total += tl.where(inside, mass_of(y), 0)
        if GREEDY:
            score = x
        else:
            score = y + noise_of(r0 if j == 0 else (r1 if j == 1 else (r2 if j == 2 else r3)))
        if BORDER:
            inside &= allows(key_of(x), word, border_key, border_word)
        better = inside & (score > best)  # a lane's words come in order
        best, token = tl.where(better, score, best), tl.where(better, word, token)
    top_score = tl.max(best, 0)
    tl.store(totals_ptr + tl.program_id(0), tl.sum(total, 0))
    tl.store(scores_ptr + tl.program_id(0), top_score)
    tl.store(tokens_ptr + tl.program_id(0), tl.min(tl.where(best == top_score, token, NO_INDEX), 0))


@triton.jit
def finish(
    logits_ptr, maxima_ptr, bad_ptr, totals_ptr, scores_ptr, tokens_ptr, token_ptr, logprob_ptr, stride, chunks, scale,
    CHUNKS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    top, broken, bad = row_top(maxima_ptr, bad_ptr, row, chunks, CHUNKS)
    chunk = tl.arange(0, CHUNKS)
    at, mask = row * chunks + chunk, chunk < chunks
    total = tl.sum(tl.load(totals_ptr + at, mask=mask, other=0), 0)
    scores = tl.load(scores_ptr + at, mask=mask, other=float("-inf"))
    tokens = tl.load(tokens_ptr + at, mask=mask, other=NO_INDEX)
    token = tl.min(tl.where(scores == tl.max(scores, 0), tokens, NO_INDEX), 0)
    x = load_words(logits_ptr + row * stride, token, True, broken)
    bits = (x - top) * scale - log2_of(total.to(tl.float32) * 9.094947017729282e-13)
    tl.store(logprob_ptr + row, tl.where(broken, float("nan"), bits * LN2))
    tl.store(token_ptr + row, tl.where(broken, tl.where(bad == NO_INDEX, 0, bad), token).to(tl.int64))


def _chunk() -> int:
    """Words of a chunk; a multiple of 128."""
    return 4096


def sample(logits, temperature, top_p, top_k, seeds, positions):
    """(tokens (B,) int64, logprobs (B,) fp32); arguments as in hpsafety::sample."""
    rows, words = logits.shape
    if seeds.numel() != rows or positions.numel() != rows:
        raise ValueError(
            f"sample: expected one seed and one position per row ({rows}), got {seeds.numel()} and {positions.numel()}"
        )
    if rows and not 0 < words <= 1 << 23:
        raise ValueError(f"sample: logits must have 1 to 2^23 columns, got {words}")
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    seeds, positions = seeds.contiguous(), positions.contiguous()
    greedy = temperature == 0
    scale = min(max(math.log2(math.e) / (temperature or 1.0), 2.0**-126), torch.finfo(torch.float32).max)
    chunk = _chunk()
    chunks = triton.cdiv(words, chunk)
    size = {"CHUNKS": triton.next_power_of_2(max(chunks, 1)), "fp_fusion": False}
    programs, stride = rows * chunks, logits.stride(0)

    def empty(dtype, *shape):
        return logits.new_empty(shape, dtype=dtype)

    maxima, bad = empty(torch.float32, rows, chunks), empty(torch.int32, rows, chunks)
    first = {"CHUNK": chunk, "num_warps": 8, "fp_fusion": False}
    launch(row_maxima, programs, logits, maxima, bad, stride, words, chunks, **first)
    border = None

    def next_border(target, masses):
        counts = empty(torch.int32, rows, chunks, SLICES)
        weights = empty(torch.int64, rows, chunks, SLICES) if masses else counts
        words_of_slice, found = empty(torch.int32, rows, LIST), empty(torch.int32, rows, 2)
        common = size | {"MASSES": masses, "BORDER": border is not None, "SLICES": SLICES}
        row = (logits, maxima, bad, border, weights, counts)
        numbers = (stride, words, chunks, scale)
        launch(slice_weights, programs, *row, *numbers, CHUNK=chunk, num_warps=8, **common)
        launch(
            collect, programs, *row, words_of_slice, *numbers, target, CHUNK=chunk, LIST=LIST,
            num_warps=8, **common,
        )  # fmt: skip
        launch(
            find_border, rows, *row, words_of_slice, found, *numbers, target, LIST=LIST,
            BLOCK=BLOCK, num_warps=8, **common,
        )  # fmt: skip
        return found

    if not greedy and 0 < top_k < words:
        border = next_border(top_k, masses=False)
    if not greedy and top_p < 1:
        border = next_border(math.ceil(top_p * 2**31), masses=True)
    totals, scores = empty(torch.int64, rows, chunks), empty(torch.float32, rows, chunks)
    best = empty(torch.int32, rows, chunks)
    launch(
        draw, programs, logits, maxima, bad, border, seeds, positions, totals, scores, best, stride, words, chunks,
        scale, GREEDY=greedy, BORDER=border is not None, CHUNK=chunk, num_warps=8, **size,
    )  # fmt: skip
    tokens, logprobs = empty(torch.int64, rows), empty(torch.float32, rows)
    partial = (logits, maxima, bad, totals, scores, best)
    launch(finish, rows, *partial, tokens, logprobs, stride, chunks, scale, **size)
    return tokens, logprobs
