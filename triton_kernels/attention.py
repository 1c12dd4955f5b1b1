"""attention, forward. Limit: FLOPs on the tensor cores; then the exponentials, at small head dims.

T tokens, H query heads, G kv heads, K head dim. A tile (attention_tiles.py) is some tokens of one run times query
heads of one kv head: its row r is token r // PACK and head r % PACK of them. All segments of a run have one prefix, so
a tile reads a block of it once for all its tokens and heads, be they of one response or of many.

Keys come in blocks counted from the start of the prefix, and of each segment. A row meets the blocks that it sees in
one order, and those of its neighbours add exact zeros: its bits are the same alone, and whatever shares its tile.

A weight of 0 times a value of NaN or infinity is NaN. So a tile whose sums have NaN anywhere is done once more by a
second launch, in which such values reach only the rows that see them; other tiles return from it at once.
"""

import math

import torch
import triton
import triton.language as tl

from hpsafety.triton_kernels.attention_tiles import query_tiles
from hpsafety.triton_kernels.launch import capability, launch

SHARED_BYTES = (98816, 163840)  # of backward too
LOWEST = tl.constexpr(
    -3.4028234663852886e38
)  # the first maximum: finite, so that a score of -inf has weight 0
MINUS_INF = tl.constexpr(float("-inf"))
INF = tl.constexpr(float("inf"))


def forward_config(block_dim: int, dtype: torch.dtype, chip: tuple[int, int]) -> dict:
    """ROWS and KEYS of a block of scores, warps and stages. No spill in any loop; see bench/static."""
    if dtype == torch.float32:
        keys = {256: 16, 128: 32}.get(block_dim, 32)
        return {"ROWS": 32 if block_dim > 64 else 64, "KEYS": keys, "num_warps": 8, "num_stages": 1}
    if block_dim > 128:
        return {"ROWS": 128, "KEYS": 32 if chip < (9, 0) else 64, "num_warps": 8, "num_stages": 2}
    return {"ROWS": 128, "KEYS": 128, "num_warps": 8, "num_stages": 2}


def pack(heads: int, kv_heads: int, rows: int) -> dict:
    """RATIO query heads share a kv head; PACK of them are in one tile."""
    return {"RATIO": heads // kv_heads, "PACK": min(heads // kv_heads, rows)}


def strides(**tensors) -> dict:
    """Q_TOKEN, Q_HEAD, ...: constants, as they are a model's, so that the loops know which offsets fit 32 bits."""
    return {
        f"{name.upper()}_{axis}": x.stride(i)
        for name, x in tensors.items()
        for i, axis in enumerate(("TOKEN", "HEAD"))
    }


def dense_last(x):
    return x if x.stride(-1) == 1 else x.contiguous()


@triton.jit
def tile_rows(first, kv_head, chunk, RATIO: tl.constexpr, PACK: tl.constexpr, ROWS: tl.constexpr):
    """(token, head, whether there is such a head) of each row of a tile."""
    row = tl.arange(0, ROWS)
    of_group = chunk * PACK + row % PACK
    return first + row // PACK, kv_head * RATIO + of_group, (row < ROWS // PACK * PACK) & (of_group < RATIO)


@triton.jit
def offsets(index, STRIDE: tl.constexpr, COUNT: tl.constexpr, STEP: tl.constexpr = 1):
    """Of the rows of one block."""
    if STRIDE * COUNT < 2**30:
        return index % STEP * STRIDE + index // STEP * (STEP * STRIDE)
    else:
        return index.to(tl.int64) * STRIDE


@triton.jit
def below(index, limit, STEP: tl.constexpr):
    """index < limit, with the index as a lane's own number, and constants on the other side."""
    return index % STEP < limit - index // STEP * STEP


@triton.jit
def columns_upto(column, last):
    """(rows, columns): column <= last of the row. A lane of an MMA has columns 2n, 2n + 1, then those 8, 16, .. on."""
    lane = column % 8 // 2 * 2
    return (column // 8 * 8 + column % 2)[None, :] <= last[:, None] - lane[None, :]


@triton.jit
def load_rows(ptr, at, there, dim, DIM: tl.constexpr, PADDED: tl.constexpr, MASKED: tl.constexpr):
    """(rows, dim) from the rows' offsets; zeros past DIM if PADDED, and if MASKED in the rows that are not there."""
    ptrs = ptr + (at[:, None] + dim[None, :])
    if PADDED:
        if MASKED:
            return tl.load(ptrs, mask=there[:, None] & (dim < DIM)[None, :], other=0.0)
        else:
            return tl.load(ptrs, mask=(dim < DIM)[None, :], other=0.0)
    elif MASKED:
        return tl.load(ptrs, mask=there[:, None], other=0.0)
    else:
        return tl.load(ptrs)


@triton.jit
def softmax_step(s, top, total, acc, scale_log2):
    """Weights 2^(s - top) of a block of scores; the sums so far are brought to the new maximum."""
    now = tl.maximum(top, tl.max(s, 1) * scale_log2)
    weights = tl.exp2(tl.fma(s, scale_log2, -now[:, None]))
    shrink = tl.exp2(top - now)
    parts = tl.reshape(weights, (weights.shape[0], weights.shape[1] // 8, 8))
    return weights, now, total * shrink[:, None] + tl.sum(parts, 1), acc * shrink[:, None]


@triton.jit
def finite(x):
    return tl.abs(x.to(tl.float32)) < INF


@triton.jit
def add_not_finite(
    acc, weights, sees, v_ptr, key, key1, dim, V_TOKEN: tl.constexpr, DIM: tl.constexpr, KEYS: tl.constexpr
):
    """acc + weights @ v over those values of a block that are NaN or infinite, for the rows that see them."""
    column = tl.arange(0, KEYS)
    for j in range(0, KEYS):
        here = tl.where(key + j < key1, dim, DIM) < DIM
        v = tl.load(v_ptr + (key + j).to(tl.int64) * V_TOKEN + dim, mask=here, other=0.0)
        weight = tl.sum(tl.where((column == j)[None, :], weights, 0.0), 1)
        counts = (key + j <= sees)[:, None] & (finite(v) == 0)[None, :]
        acc += tl.where(counts, weight[:, None] * v.to(tl.float32)[None, :], 0.0)
    return acc


@triton.jit
def attention_forward(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, segments_ptr, tiles_ptr, redo_ptr, scale_log2, kv_heads,
    Q_TOKEN: tl.constexpr, Q_HEAD: tl.constexpr, K_TOKEN: tl.constexpr, K_HEAD: tl.constexpr, V_TOKEN: tl.constexpr,
    V_HEAD: tl.constexpr, RATIO: tl.constexpr, PACK: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, REDO: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """PARTS programs share a tile: each has that part of the columns of V and of the output."""
    CHUNKS: tl.constexpr = (RATIO + PACK - 1) // PACK
    program = tl.program_id(0) // PARTS
    tile_ptr = tiles_ptr + (program // (kv_heads * CHUNKS)).to(tl.int64) * 4
    kv_head = program // CHUNKS % kv_heads
    chunk = program % CHUNKS
    first = tl.load(tile_ptr)
    last = tl.load(tile_ptr + 1)
    segment0 = tl.load(tile_ptr + 2)
    segment1 = tl.load(tile_ptr + 3)
    todo = first < last
    if REDO:
        todo = todo & (tl.load(redo_ptr + program, mask=todo, other=0) != 0)
    if not todo:
        return
    token, head, valid = tile_rows(first, kv_head, chunk, RATIO, PACK, ROWS)
    valid = valid & (token < last)
    dim = tl.arange(0, BLOCK_DIM)
    out_dim = tl.program_id(0) % PARTS * (BLOCK_DIM // PARTS) + tl.arange(0, BLOCK_DIM // PARTS)
    q_at = token.to(tl.int64) * Q_TOKEN + head.to(tl.int64) * Q_HEAD
    q = load_rows(q_ptr, q_at, valid, dim, DIM, DIM != BLOCK_DIM, True)
    column = tl.arange(0, KEYS)
    k_at = offsets(column, K_TOKEN, KEYS, 2048 // BLOCK_DIM)
    v_at = offsets(column, V_TOKEN, KEYS, 2048 // BLOCK_DIM)
    k_ptr += kv_head.to(tl.int64) * K_HEAD
    v_ptr += kv_head.to(tl.int64) * V_HEAD
    segment_ptr = segments_ptr + segment0.to(tl.int64) * 4
    start = tl.load(segment_ptr)
    prefix0 = tl.load(segment_ptr + 2)
    prefix1 = tl.where(
        segment0 < segment1, tl.load(segment_ptr + 3), prefix0
    )  # rows of no segment see nothing
    prefix_blocks = (prefix1 - prefix0) // KEYS
    own_blocks = tl.where(segment1 - segment0 == 1, (first - start) // KEYS, 0)

    top = tl.full([ROWS], LOWEST, tl.float32)
    total = tl.zeros([ROWS, 8], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_DIM // PARTS], tl.float32)
    begin = tl.where(prefix_blocks > 0, prefix0, start).to(tl.int64)
    k_block = k_ptr + begin * K_TOKEN
    v_block = v_ptr + begin * V_TOKEN
    jump = start - prefix0 - (prefix_blocks - 1) * KEYS
    for block in range(0, prefix_blocks + own_blocks):  # whole blocks that every row sees
        k = load_rows(k_block, k_at, column, dim, DIM, DIM != BLOCK_DIM, False)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")
        weights, top, total, acc = softmax_step(s, top, total, acc, scale_log2)
        v = load_rows(v_block, v_at, column, out_dim, DIM, DIM != BLOCK_DIM, False)
        acc = tl.dot(weights.to(v.dtype), v, acc, input_precision="ieee")
        step = tl.where(block == prefix_blocks - 1, jump, KEYS).to(tl.int64)
        k_block += step * K_TOKEN
        v_block += step * V_TOKEN

    # Read and computed again, so that no row's address stays in registers through the loop above.
    first = tl.load(tile_ptr, volatile=True)
    last = tl.load(tile_ptr + 1, volatile=True)
    segment0 = tl.load(tile_ptr + 2, volatile=True)
    segment1 = tl.load(tile_ptr + 3, volatile=True)
    token, head, valid = tile_rows(first, kv_head, chunk, RATIO, PACK, ROWS)
    valid = valid & (token < last)
    segment_ptr = segments_ptr + segment0.to(tl.int64) * 4
    start = tl.load(segment_ptr, volatile=True)
    prefix0 = tl.load(segment_ptr + 2, volatile=True)
    prefix1 = tl.where(segment0 < segment1, tl.load(segment_ptr + 3, volatile=True), prefix0)
    prefix_blocks = (prefix1 - prefix0) // KEYS
    own_blocks = tl.where(segment1 - segment0 == 1, (first - start) // KEYS, 0)
    for segment in range(segment0, segment1 + 1):  # the rest of each segment's blocks, then of the prefix's
        if segment == segment1:
            key0 = prefix0 + prefix_blocks * KEYS
            key1 = prefix1
            sees = tl.zeros([ROWS], tl.int32) + prefix1 - 1
        else:
            key0 = tl.load(segment_ptr + (segment - segment0) * 4)
            end = tl.load(segment_ptr + (segment - segment0) * 4 + 1)
            key1 = tl.minimum(end, last)
            sees = tl.where((token >= key0) & (token < end), token, -1)
            key0 += own_blocks * KEYS
        for block in range(0, tl.cdiv(key1 - key0, KEYS)):
            key = key0 + block * KEYS
            there = below(column, key1 - key, 2048 // BLOCK_DIM)
            k = load_rows(k_ptr + key.to(tl.int64) * K_TOKEN, k_at, there, dim, DIM, DIM != BLOCK_DIM, True)
            s = tl.dot(q, tl.trans(k), input_precision="ieee")
            s = tl.where(columns_upto(column, sees - key), s, MINUS_INF)
            weights, top, total, acc = softmax_step(s, top, total, acc, scale_log2)
            v_block = v_ptr + key.to(tl.int64) * V_TOKEN
            v = load_rows(v_block, v_at, there, out_dim, DIM, DIM != BLOCK_DIM, True)
            if REDO:
                acc = add_not_finite(acc, weights, sees, v_ptr, key, key1, out_dim, V_TOKEN, DIM, KEYS)
                # Loaded again without those values: where() would be done on the operands, 8 times in registers.
                keep = there[:, None] & (out_dim < DIM)[None, :] & finite(v)
                v = tl.load(v_block + (v_at[:, None] + out_dim[None, :]), mask=keep, other=0.0)
            acc = tl.dot(weights.to(v.dtype), v, acc, input_precision="ieee")

    total = tl.sum(total, 1)
    at = token.to(tl.int64) * (kv_heads * RATIO) + head
    keep = valid[:, None] & (out_dim < DIM)[None, :]
    # Rows of no segment have a sum of 0, and so may others have (scores of -inf only, NaN): the segment tells.
    nothing = segment0 == segment1
    out = acc / tl.where(nothing, 1.0, total)[:, None]
    tl.store(out_ptr + (at * DIM)[:, None] + out_dim[None, :], out, mask=keep)
    if not REDO:
        tl.store(lse_ptr + at, tl.where(nothing, 0.0, top + tl.log2(total)), mask=valid)
        # Last: a reduction of acc before its store costs registers in the loops.
        tl.store(redo_ptr + program, tl.max((tl.sum(acc * 0.0, 1) != 0.0).to(tl.int32), 0))


def attention(q, k, v, segments, softmax_scale, deterministic):
    """(out (T, H, K), lse (T, H) fp32, base 2); always deterministic."""
    q, k, v, segments = dense_last(q), dense_last(k), dense_last(v), segments.contiguous()
    tokens, heads, dim = q.shape
    kv_heads = k.shape[1]
    if not tokens or not segments.shape[0]:
        return q.new_zeros(q.shape), q.new_zeros(q.shape[:2], dtype=torch.float32)
    block_dim = max(16, triton.next_power_of_2(dim))
    config = forward_config(block_dim, q.dtype, capability(q.device))
    packed = pack(heads, kv_heads, config["ROWS"])
    tiles = query_tiles(segments, tokens, config["ROWS"] // packed["PACK"])
    programs = len(tiles) * kv_heads * triton.cdiv(packed["RATIO"], packed["PACK"])
    out, lse = q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)
    redo = q.new_empty(programs, dtype=torch.int32)
    scale_log2 = softmax_scale * math.log2(math.e)
    for again in (False, True):
        parts = 1
        if (
            again
        ):  # its counts take as many registers as its sums; values are looked at before they are shared
            parts, config = max(1, block_dim // 32), config | {"num_stages": 1}
        launch(
            attention_forward, programs * parts, q, k, v, out, lse, segments, tiles, redo, scale_log2, kv_heads,
            **strides(q=q, k=k, v=v), **packed, DIM=dim, BLOCK_DIM=block_dim, REDO=again, PARTS=parts, **config,
        )  # fmt: skip
    return out, lse
