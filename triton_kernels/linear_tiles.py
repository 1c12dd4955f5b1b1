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
WORDS_OF_DZ = (4096, 16384)  # least and most words of a part of dz
GROUP = 16  # row blocks that walk the words together
KEPT_BLOCK = 4096


def _tiles(m: int, n: int, k: int, warps: int, stages: int) -> dict:
    return {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "num_warps": warps, "num_stages": stages}


# (kernel, fp32): tiles on sm_80, on sm_90. fp32 has no tensor cores here: true fp32 products.
TILES = {
    ("logits", False): (_tiles(128, 128, 64, 8, 3), _tiles(128, 256, 64, 8, 3)),
    ("logits", True): (_tiles(64, 64, 32, 8, 2), _tiles(64, 64, 32, 8, 2)),
    ("pair", False): (_tiles(128, 128, 64, 8, 3), _tiles(128, 128, 64, 8, 3)),
    ("pair", True): (_tiles(64, 64, 32, 8, 2), _tiles(64, 64, 32, 8, 2)),
    ("gradient", False): (_tiles(128, 128, 64, 8, 3), _tiles(128, 256, 64, 8, 3)),
    ("gradient", True): (_tiles(64, 64, 32, 8, 2), _tiles(64, 64, 32, 8, 2)),
}


def tiles(kernel: str, x: torch.Tensor) -> dict:
    """BLOCK_M, BLOCK_N, BLOCK_K, num_warps and num_stages of a kernel over tensors like x."""
    return dict(TILES[kernel, x.dtype == torch.float32][capability(x.device) >= (9, 0)])


def with_rows(x: torch.Tensor) -> torch.Tensor:
    """x (rows, width) with the elements of a row side by side; rows may stand apart."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


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
    launch(keep_rows, 1, value, more, index, count, n, HAS_MORE=more is not None, BLOCK=KEPT_BLOCK, num_warps=8)
    return index, count


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
    row = tl.load(index_ptr + first_row + place, mask=row_mask, other=0).to(tl.int64)
    at = row[:, None] * d + column[None, :]
    mask = row_mask[:, None] & (column < d)[None, :]
    word = tl.arange(0, BLOCK_K)
    dz_ptrs = dz_ptr + place.to(tl.int64)[:, None] * dz_stride + word[None, :]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if add:
        total = tl.load(sum_ptr + at, mask=mask, other=0.0)
    for k in range(0, words, BLOCK_K):
        w_ptrs = w_ptr + (k + word).to(tl.int64)[:, None] * w_stride + column[None, :]
        if EVEN_WORDS:
            dz = tl.load(dz_ptrs + k, mask=row_mask[:, None], other=0.0)
        else:
            dz = tl.load(dz_ptrs + k, mask=row_mask[:, None] & (k + word < words)[None, :], other=0.0)
        if EVEN_WORDS and EVEN_D:
            w = tl.load(w_ptrs)
        else:
            w = tl.load(w_ptrs, mask=(k + word < words)[:, None] & (column < d)[None, :], other=0.0)
        total = tl.dot(dz, w, total, input_precision="ieee")
    if last:
        tl.store(out_ptr + at, total, mask=mask)
    else:
        tl.store(sum_ptr + at, total, mask=mask)


@triton.jit(do_not_specialize=["first_row", "rows", "words", "add", "last"])
def weight_gradient(
    dz_ptr, x_ptr, index_ptr, count_ptr, sum_ptr, out_ptr, first_row, rows, words, d, dz_stride, x_stride, add, last,
    EVEN_WORDS: tl.constexpr, EVEN_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """dz^T (words, rows) @ x[index] (rows, D), likewise; sums and output start at the first of the words."""
    block, part = grouped(tl.program_id(0), tl.cdiv(words, BLOCK_M), tl.cdiv(d, BLOCK_N), GROUP)
    here = tl.minimum(tl.load(count_ptr) - first_row, rows)
    word = block * BLOCK_M + tl.arange(0, BLOCK_M)
    column = part * BLOCK_N + tl.arange(0, BLOCK_N)
    word_mask, column_mask = word < words, column < d
    at = word.to(tl.int64)[:, None] * d + column[None, :]
    mask = word_mask[:, None] & column_mask[None, :]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if add:
        total = tl.load(sum_ptr + at, mask=mask, other=0.0)
    for k in range(0, here, BLOCK_K):
        place = k + tl.arange(0, BLOCK_K)
        row_mask = place < here
        row = tl.load(index_ptr + first_row + place, mask=row_mask, other=0).to(tl.int64)
        dz_ptrs = dz_ptr + place.to(tl.int64)[:, None] * dz_stride + word[None, :]
        x_ptrs = x_ptr + row[:, None] * x_stride + column[None, :]
        if EVEN_WORDS:
            dz = tl.load(dz_ptrs, mask=row_mask[:, None], other=0.0)
        else:
            dz = tl.load(dz_ptrs, mask=row_mask[:, None] & word_mask[None, :], other=0.0)
        if EVEN_D:
            x = tl.load(x_ptrs, mask=row_mask[:, None], other=0.0)
        else:
            x = tl.load(x_ptrs, mask=row_mask[:, None] & column_mask[None, :], other=0.0)
        total = tl.dot(tl.trans(dz), x, total, input_precision="ieee")
    if last:
        tl.store(out_ptr + at, total, mask=mask)
    else:
        tl.store(sum_ptr + at, total, mask=mask)


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
    """out = dz^T @ hidden[index] over the kept rows from `first_row` on, through the sums; out (words of dz, D)."""
    index, count = kept
    words, d = out.shape
    config = tiles("gradient", hidden)
    launch(
        weight_gradient, triton.cdiv(words, config["BLOCK_M"]) * triton.cdiv(d, config["BLOCK_N"]),
        dz, hidden, index, count, sums, out, first_row, rows, words, d, dz.stride(0), hidden.stride(0),
        int(add), int(last), EVEN_WORDS=words % config["BLOCK_M"] == 0, EVEN_D=d % config["BLOCK_N"] == 0,
        GROUP=GROUP, **config,
    )  # fmt: skip


def dz_part(n: int, v: int, item: int) -> tuple[int, int]:
    """Rows and words of the dz that stands at a time: as few parts as DZ_BYTES allows, all words before all rows."""
    elements = DZ_BYTES // item
    rows, (least, most) = triton.cdiv(n, 256) * 256, WORDS_OF_DZ
    words = min(max(elements // rows // 256 * 256, least), most, triton.cdiv(v, 256) * 256)
    return min(rows, max(elements // words // 256, 1) * 256), words


def linear_backward(dlogits, hidden, weight, kept, need_hidden: bool, need_weight: bool):
    """(grad_hidden, grad_weight) by recomputation; empty where not wanted.

    dlogits(dz, first_row, rows, first_word, words) launches what fills dz for the kept rows from first_row on.
    Beside the gradients it holds dz (DZ_BYTES) and, for bf16, the sums in fp32: (N, D) where V takes several parts,
    and (words of dz, D) where N does. An element's sum runs over rows or words in order, whatever the parts are.
    """
    (n, d), v = hidden.shape, weight.shape[0]
    grad_hidden = hidden.new_zeros(hidden.shape if need_hidden else (0,))
    if n == 0:
        return grad_hidden, weight.new_zeros(weight.shape if need_weight else (0,))
    grad_weight = weight.new_empty(weight.shape if need_weight else (0,))
    rows, words = dz_part(n, v, hidden.element_size())
    dz = hidden.new_empty((rows, words))
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
            dlogits(dz, first_row, some, first_word, end - first_word)
            if need_hidden:
                part = weight[first_word:end]
                launch_hidden_gradient(
                    dz, part, kept, dh_sums, grad_hidden, first_row, some, first_word > 0, end == v
                )
            if need_weight:
                out = grad_weight[first_word:end]
                sums = out if dw_sums is None else dw_sums
                launch_weight_gradient(
                    dz, hidden, kept, sums, out, first_row, some, first_row > 0, first_row + rows >= n
                )
    return grad_hidden, grad_weight
