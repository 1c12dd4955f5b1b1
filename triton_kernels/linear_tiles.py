"""What linear_logprob, linear_cross_entropy and distill_loss share: logits of one tile, the rows that have a gradient,
and the two GEMMs with dz, the gradient of the logits, which stands for a part of the rows and of the words at a time.

N rows, D width, V words. Limit: the GEMMs. A program that shares a tile of the weight with others runs beside them
(`grouped`), so that L2 serves it.
"""

import torch
import triton
import triton.language as tl

from hpsafety.triton_kernels.launch import capability, launch

DZ_BYTES = 64 << 20  # of dz in linear_backward, whatever N and V are
ROWS_OF_DZ = 4096
GROUP = 16  # row blocks that walk the words together
KEPT_BLOCK = 4096
PART = tl.constexpr(32)  # columns of a tile whose terms a forward adds up at once
WORDS_PER_SPLIT = 1024  # of the forward
GATHERED = {"ROWS": 4, "BLOCK": 1024}


def _tiles(m: int, n: int, k: int, warps: int, stages: int) -> dict:
    return {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "num_warps": warps, "num_stages": stages}


# (kernel, fp32): tiles on sm_80, on sm_90. fp32 has no tensor cores here: true fp32 products.
TILES = {
    ("logits", False): (_tiles(128, 128, 64, 8, 4), _tiles(128, 256, 64, 8, 4)),
    ("logits", True): (_tiles(64, 64, 32, 8, 2), _tiles(64, 64, 32, 8, 2)),
    ("pair", False): (_tiles(128, 128, 32, 8, 4), _tiles(128, 128, 64, 8, 4)),
    ("pair", True): (_tiles(64, 64, 32, 8, 2), _tiles(64, 64, 32, 8, 2)),
    ("gradient", False): (_tiles(128, 128, 64, 8, 4), _tiles(128, 256, 64, 8, 4)),
    ("gradient", True): (_tiles(64, 64, 32, 8, 2), _tiles(64, 64, 32, 8, 2)),
}


def tiles(kernel: str, x: torch.Tensor) -> dict:
    """BLOCK_M, BLOCK_N, BLOCK_K, num_warps and num_stages of a kernel over tensors like x."""
    return dict(TILES[kernel, x.dtype == torch.float32][capability(x.device) >= (9, 0)])


def with_rows(x: torch.Tensor) -> torch.Tensor:
    """x (rows, width) with the elements of a row side by side; rows may stand apart."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


@triton.jit
def finite_reference(m):
    """What exponents are taken against: the largest logit, or 0 where there is none above -inf yet."""
    return tl.where(m == float("-inf"), 0.0, m)


def splits_of(v: int, block: int) -> tuple[int, int]:
    """(tiles of `block` words in a split, splits) of a forward: by V alone, so that a row depends on no other row."""
    in_split = max(1, WORDS_PER_SPLIT // block)
    return in_split, triton.cdiv(v, in_split * block)


@triton.jit
def grouped(program, row_blocks, columns, GROUP: tl.constexpr):
    """(row block, column) of a program: GROUP row blocks walk all columns together."""
    first = program // (GROUP * columns) * GROUP
    size = tl.minimum(row_blocks - first, GROUP)
    inside = program % (GROUP * columns)
    return first + inside % size, inside // size


@triton.jit
def tile_logits(
    x_ptr, row, row_mask, x_stride, w_ptr, word, word_mask, w_stride, d,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_D: tl.constexpr,
):  # fmt: skip
    """x[row] @ w[word]^T, (BLOCK_M, BLOCK_N) fp32; row and word int64; zeros where they are masked."""
    column = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + row[:, None] * x_stride + column[None, :]
    w_ptrs = w_ptr + word[None, :] * w_stride + column[:, None]
    z = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, d, BLOCK_K):
        if EVEN_D:
            x = tl.load(x_ptrs + k, mask=row_mask[:, None], other=0.0)
            w = tl.load(w_ptrs + k, mask=word_mask[None, :], other=0.0)
        else:
            inside = k + column < d
            x = tl.load(x_ptrs + k, mask=row_mask[:, None] & inside[None, :], other=0.0)
            w = tl.load(w_ptrs + k, mask=word_mask[None, :] & inside[:, None], other=0.0)
        z = tl.dot(x, w, z, input_precision="ieee")
    return z


@triton.jit
def halves(z):
    """Left and right half of a tile's columns: each thread's own registers where a half is PART or wider."""
    return z.reshape(z.shape[0], 2, z.shape[1] // 2).permute(0, 2, 1).split()


@triton.jit
def add_by_parts(add: tl.constexpr, sums, a, b, words, rows):
    """sums (a tuple) after add(sums, a, b, words, rows) for each PART columns of the tiles a and b that hold words.

    Registers do not do for the terms of whole tiles at once. That is what a compiler makes of them without the branch
    around each part, and without disable_licm, which keeps the addresses of the next product out of the loop's way.
    words: from the first column on; negative where none is left. rows: a tuple of what `add` needs of the rows.
    """
    if a.shape[1] > PART:
        left_a, right_a = halves(a)
        left_b, right_b = halves(b)
        sums = add_by_parts(add, sums, left_a, left_b, words, rows)
        return add_by_parts(add, sums, right_a, right_b, words - left_a.shape[1], rows)
    else:
        if words > 0:
            sums = add(sums, a, b, words, rows)
        return sums


@triton.jit(do_not_specialize=["n"])
def keep_rows(value_ptr, more_ptr, index_ptr, count_ptr, n, HAS_MORE: tl.constexpr, BLOCK: tl.constexpr):
    """index: the rows where value or more is not zero, in order; the others from the end backwards. One program."""
    kept = 0
    for first in range(0, n, BLOCK):
        row = first + tl.arange(0, BLOCK)
        inside = row < n
        wanted = tl.load(value_ptr + row, mask=inside, other=0.0) != 0
        if HAS_MORE:
            wanted = wanted | (tl.load(more_ptr + row, mask=inside, other=0.0) != 0)
        flag = wanted.to(tl.int32)
        before = kept + tl.cumsum(flag, 0) - flag
        tl.store(index_ptr + tl.where(wanted, before, n - 1 - (row - before)), row, mask=inside)
        kept += tl.sum(flag, 0)
    tl.store(count_ptr, kept)


def kept_rows(value: torch.Tensor, more: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """(index (N,) int32, count (1,) int32) of the rows whose value, fp32, is not zero, or whose `more` is not.

    They stay on the device: kernels take grids for N rows, and programs past the count leave at once.
    """
    n = value.shape[0]
    index, count = value.new_empty(n, dtype=torch.int32), value.new_empty(1, dtype=torch.int32)
    launch(
        keep_rows, 1, value, more, index, count, n, HAS_MORE=more is not None, BLOCK=KEPT_BLOCK, num_warps=8
    )
    return index, count


@triton.jit(do_not_specialize=["n"])
def gather_rows(
    x_ptr, index_ptr, count_ptr, out_ptr, n, d, x_stride, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """out[i] = x[index[i]] for i below count."""
    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_mask = place < tl.load(count_ptr)
    row = tl.load(index_ptr + place, mask=row_mask, other=0).to(tl.int64)
    for first in range(0, d, BLOCK):
        column = first + tl.arange(0, BLOCK)
        mask = row_mask[:, None] & (column < d)[None, :]
        x = tl.load(x_ptr + row[:, None] * x_stride + column[None, :], mask=mask)
        tl.store(out_ptr + place.to(tl.int64)[:, None] * d + column[None, :], x, mask=mask)


def gathered(x: torch.Tensor, kept) -> torch.Tensor:
    """(N, D): the kept rows side by side, and nothing after them."""
    n, d = x.shape
    out = x.new_empty((n, d))
    launch(gather_rows, triton.cdiv(n, GATHERED["ROWS"]), x, *kept, out, n, d, x.stride(0), **GATHERED)
    return out


@triton.jit
def store_part(sum_ptr, out_ptr, at, mask, total, add, last):
    """The sum of one more part: on top of those before it where `add`, to be gone on with unless it is the last."""
    if add:
        total += tl.load(sum_ptr + at, mask=mask, other=0.0)
    if last:
        tl.store(out_ptr + at, total, mask=mask)
    else:
        tl.store(sum_ptr + at, total, mask=mask)


@triton.jit(do_not_specialize=["first_row", "rows", "words", "add", "last"])
def hidden_gradient(
    dz_ptr, w_ptr, index_ptr, count_ptr, sum_ptr, out_ptr, first_row, rows, words, d, dz_stride, w_stride, add, last,
    EVEN_WORDS: tl.constexpr, EVEN_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """dz (rows, words) @ w (words, D), on top of the fp32 sums where `add`, to them or where `last` to the output."""
    row_blocks = tl.cdiv(rows, BLOCK_M)
    block, part = grouped(tl.program_id(0), row_blocks, tl.cdiv(d, BLOCK_N), GROUP)
    here = tl.minimum(tl.load(count_ptr) - first_row, rows)
    if block * BLOCK_M >= here:
        return
    place = block * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = place < here
    column = part * BLOCK_N + tl.arange(0, BLOCK_N)
    word = tl.arange(0, BLOCK_K)
    dz_ptrs = dz_ptr + place.to(tl.int64)[:, None] * dz_stride + word[None, :]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    w_ptrs = w_ptr + word.to(tl.int64)[:, None] * w_stride + column[None, :]
    w_step = tl.full([], BLOCK_K, tl.int64) * w_stride
    for k in range(0, words, BLOCK_K):
        if EVEN_WORDS:
            dz = tl.load(dz_ptrs, mask=row_mask[:, None], other=0.0)
        else:
            dz = tl.load(dz_ptrs, mask=row_mask[:, None] & (k + word < words)[None, :], other=0.0)
        if EVEN_WORDS and EVEN_D:
            w = tl.load(w_ptrs)
        else:
            w = tl.load(w_ptrs, mask=(k + word < words)[:, None] & (column < d)[None, :], other=0.0)
        total = tl.dot(dz, w, total, input_precision="ieee")
        dz_ptrs += BLOCK_K
        w_ptrs += w_step
    row = tl.load(index_ptr + first_row + place, mask=row_mask, other=0).to(tl.int64)
    at = row[:, None] * d + column[None, :]
    store_part(sum_ptr, out_ptr, at, row_mask[:, None] & (column < d)[None, :], total, add, last)


@triton.jit(do_not_specialize=["first_row", "rows", "words", "add", "last"])
def weight_gradient(
    dz_ptr, x_ptr, count_ptr, sum_ptr, out_ptr, first_row, rows, words, d, dz_stride, add, last,
    EVEN_WORDS: tl.constexpr, EVEN_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """dz^T (words, rows) @ x (rows, D), likewise; x are the gathered rows, sums and output the part's words."""
    block, part = grouped(tl.program_id(0), tl.cdiv(words, BLOCK_M), tl.cdiv(d, BLOCK_N), GROUP)
    here = tl.minimum(tl.load(count_ptr) - first_row, rows)
    word = block * BLOCK_M + tl.arange(0, BLOCK_M)
    column = part * BLOCK_N + tl.arange(0, BLOCK_N)
    word_mask, column_mask = word < words, column < d
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    place = tl.arange(0, BLOCK_K)
    dz_ptrs = dz_ptr + place.to(tl.int64)[None, :] * dz_stride + word[:, None]
    x_ptrs = x_ptr + (first_row + place).to(tl.int64)[:, None] * d + column[None, :]
    for k in range(0, here, BLOCK_K):
        row_mask = place < here - k
        if EVEN_WORDS:
            dz = tl.load(dz_ptrs, mask=row_mask[None, :], other=0.0)
        else:
            dz = tl.load(dz_ptrs, mask=row_mask[None, :] & word_mask[:, None], other=0.0)
        if EVEN_D:
            x = tl.load(x_ptrs, mask=row_mask[:, None], other=0.0)
        else:
            x = tl.load(x_ptrs, mask=row_mask[:, None] & column_mask[None, :], other=0.0)
        total = tl.dot(dz, x, total, input_precision="ieee")
        dz_ptrs += BLOCK_K * dz_stride
        x_ptrs += BLOCK_K * d
    at = word.to(tl.int64)[:, None] * d + column[None, :]
    store_part(sum_ptr, out_ptr, at, word_mask[:, None] & column_mask[None, :], total, add, last)


def launch_hidden_gradient(dz, weight, kept, sums, out, first_row, rows, add, last) -> None:
    """out[index] = dz @ weight for the kept rows from `first_row` on, through the sums; out (N, D)."""
    index, count = kept
    words, d = weight.shape
    config = tiles("gradient", weight)
    launch(
        hidden_gradient, triton.cdiv(rows, config["BLOCK_M"]) * triton.cdiv(d, config["BLOCK_N"]),
        dz, weight, index, count, sums, out, first_row, rows, words, d, dz.stride(0), weight.stride(0),
        int(add), int(last), EVEN_WORDS=words % config["BLOCK_K"] == 0, EVEN_D=d % config["BLOCK_N"] == 0,
        GROUP=GROUP, **config,
    )  # fmt: skip


def launch_weight_gradient(dz, hidden, kept, sums, out, first_row, rows, add, last) -> None:
    """out = dz^T @ hidden over the gathered rows from `first_row` on, through the sums; out (words of dz, D)."""
    words, d = out.shape
    config = tiles("gradient", hidden)
    launch(
        weight_gradient, triton.cdiv(words, config["BLOCK_M"]) * triton.cdiv(d, config["BLOCK_N"]),
        dz, hidden, kept[1], sums, out, first_row, rows, words, d, dz.stride(0),
        int(add), int(last), EVEN_WORDS=words % config["BLOCK_M"] == 0, EVEN_D=d % config["BLOCK_N"] == 0,
        GROUP=GROUP, **config,
    )  # fmt: skip


def dz_part(item: int) -> tuple[int, int]:
    """Most rows and words of the dz that stands at a time; the same for every N and V, as sums run part by part."""
    return ROWS_OF_DZ, DZ_BYTES // item // ROWS_OF_DZ


def linear_backward(dlogits, hidden, weight, kept, need_hidden: bool, need_weight: bool):
    """(grad_hidden, grad_weight) by recomputation; empty where not wanted.

    dlogits(dz, hidden, first_row, rows, first_word, words) launches what fills dz for the kept rows from first_row on;
    its hidden are those rows, gathered. Beside the gradients it holds dz (DZ_BYTES), the kept rows once more and, for
    bf16, the sums in fp32: (N, D) where V takes several parts, (words of dz, D) where N does. Within a part and over
    the parts an element's sum runs in order.
    """
    (n, d), v = hidden.shape, weight.shape[0]
    grad_hidden = hidden.new_zeros(hidden.shape if need_hidden else (0,))
    if n == 0:
        return grad_hidden, weight.new_zeros(weight.shape if need_weight else (0,))
    grad_weight = weight.new_empty(weight.shape if need_weight else (0,))
    rows, words = dz_part(hidden.element_size())
    dz = hidden.new_empty((min(rows, n), triton.cdiv(min(words, v), 16) * 16))
    compact = gathered(hidden, kept)
    dh_sums, dw_sums = grad_hidden, None
    if hidden.dtype != torch.float32:
        if need_hidden and v > words:
            dh_sums = hidden.new_empty((n, d), dtype=torch.float32)
        if need_weight and n > rows:
            dw_sums = weight.new_empty((min(words, v), d), dtype=torch.float32)
    for first_word in range(0, v, words):
        end = min(first_word + words, v)
        for first_row in range(0, n, rows):
            some = min(rows, n - first_row)
            dlogits(dz, compact, first_row, some, first_word, end - first_word)
            if need_hidden:
                part = weight.narrow(0, first_word, end - first_word)
                launch_hidden_gradient(
                    dz, part, kept, dh_sums, grad_hidden, first_row, some, first_word > 0, end == v
                )
            if need_weight:
                out = grad_weight.narrow(0, first_word, end - first_word)
                sums = out if dw_sums is None else dw_sums
                launch_weight_gradient(
                    dz, compact, kept, sums, out, first_row, some, first_row > 0, first_row + rows >= n
                )
    return grad_hidden, grad_weight
