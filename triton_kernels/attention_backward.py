"""attention, backward. Limit: FLOPs on the tensor cores.

With P = 2^(S - lse), D = rowsum(dO * O) and dS = P * (dP - D): dV = P^T dO, dP = dO V^T, dQ = scale dS K and
dK = scale dS^T Q. One kernel owns tiles of keys and sums dK, dV over all rows that see them: those of their own
segments and of every run whose prefix holds them, so a prompt's are summed over all its responses and query heads on
chip. Another owns tiles of query rows, as forward does, and sums dQ. Both make S and dP: seven products instead of
five, which buys one writer for every sum, no atomics, and the same bits at every run.

Blocks of rows are counted from the start of the segment or run that they belong to, and come in one order, so that the
bits of a group's gradients do not depend on what else is in the batch. That holds for finite gradients: a NaN of a row
also reaches the gradients of the others that share its tile.
"""

import math

import torch
import triton
import triton.language as tl

from hpsafety.triton_kernels.attention import (
    below,
    columns_upto,
    dense_last,
    load_rows,
    offsets,
    pack,
    strides,
    tile_rows,
)
from hpsafety.triton_kernels.attention_tiles import key_tiles, query_tiles
from hpsafety.triton_kernels.launch import capability, launch

SHARED_BYTES = (98816, 131072)
NEVER = tl.constexpr(2**31 - 1)


def keys_config(block_dim: int, dtype: torch.dtype, chip: tuple[int, int]) -> dict:
    """KEYS of a tile, ROWS of a block of scores, for dK and dV."""
    if dtype == torch.float32:
        return {"ROWS": 16, "KEYS": 32, "num_warps": 8, "num_stages": 1}
    if block_dim > 128:
        return {"ROWS": 32, "KEYS": 64, "num_warps": 8, "num_stages": 1}
    if block_dim > 64:  # 64 rows would spill
        return {"ROWS": 32, "KEYS": 128, "num_warps": 8, "num_stages": 3 if chip < (9, 0) else 2}
    return {"ROWS": 64, "KEYS": 128, "num_warps": 8, "num_stages": 2}


def rows_config(block_dim: int, dtype: torch.dtype, chip: tuple[int, int]) -> dict:
    """ROWS of a tile, KEYS of a block of scores, for dQ."""
    if dtype == torch.float32:
        return {"ROWS": 16 if block_dim > 64 else 64, "KEYS": 16, "num_warps": 8, "num_stages": 1}
    if block_dim > 128:
        return {"ROWS": 64, "KEYS": 32, "num_warps": 8, "num_stages": 1}
    return {"ROWS": 128, "KEYS": 64, "num_warps": 8, "num_stages": 2}


@triton.jit(do_not_specialize=["rows"])
def attention_delta(
    grad_ptr, out_ptr, lse_ptr, stats_ptr, rows, heads, GRAD_TOKEN: tl.constexpr, GRAD_HEAD: tl.constexpr,
    DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """stats (T, H, 2): lse, and delta = rowsum(dO * O), side by side, so that one load brings both."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    dim = tl.arange(0, BLOCK_DIM)
    keep = (row < rows)[:, None] & (dim < DIM)[None, :]
    at = row // heads * GRAD_TOKEN + row % heads * GRAD_HEAD
    grad = tl.load(grad_ptr + at[:, None] + dim[None, :], mask=keep, other=0.0).to(tl.float32)
    out = tl.load(out_ptr + (row * DIM)[:, None] + dim[None, :], mask=keep, other=0.0).to(tl.float32)
    tl.store(stats_ptr + row * 2, tl.load(lse_ptr + row, mask=row < rows, other=0.0), mask=row < rows)
    tl.store(stats_ptr + row * 2 + 1, tl.sum(grad * out, 1), mask=row < rows)


@triton.jit
def load_values(ptrs, there, PARTIAL: tl.constexpr):
    if PARTIAL:
        return tl.load(ptrs, mask=there, other=0.0)
    else:
        return tl.load(ptrs)


@triton.jit
def row_offsets(
    row, TOKEN: tl.constexpr, HEAD: tl.constexpr, PACK: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr
):
    """Of the rows of one block: row r is token r // PACK and head r % PACK."""
    if STEP % PACK == 0:
        low = row % STEP
        far = offsets(row // STEP, STEP // PACK * TOKEN, (ROWS + STEP - 1) // STEP)
        return offsets(low // PACK, TOKEN, STEP // PACK) + offsets(low % PACK, HEAD, PACK) + far
    else:
        return offsets(row // PACK, TOKEN, ROWS // PACK) + offsets(row % PACK, HEAD, PACK)


@triton.jit
def token_below(row, limit, PACK: tl.constexpr, STEP: tl.constexpr):
    """row // PACK < limit, with constants on one side."""
    if PACK == 1:
        return row % STEP < limit - row // STEP * STEP
    else:
        return row // PACK < limit


@triton.jit
def from_token(from_, row, PACK: tl.constexpr):
    """(keys, rows): whether a row's token, counted from the block's first, is from_ of the key or a later one.

    A lane of an MMA has the rows 2n, 2n + 1, then those 8, 16, .. on: constants are on one side.
    """
    lane = row % 8 // 2 * 2 // PACK
    return (row // PACK - lane)[None, :] >= from_[:, None] - lane[None, :]


@triton.jit
def add_to_keys(
    dk, dv, k, v, q_ptr, grad_ptr, stats_ptr, q_at, grad_at, row_at, there, row, dim, scale_log2, sees, pulls,
    PACK: tl.constexpr, DIM: tl.constexpr, PARTIAL: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """dK / scale and dV with one block of rows added. PARTIAL: some rows may not be there; MASKED: or not see all keys.

    sees           key j is seen by the block's tokens from sees[j] on
    pulls          the same for dS: of the one key that a row sees the weight is 1 whatever its score
    """
    q = load_rows(q_ptr, q_at, there, dim, DIM, DIM != dim.shape[0], PARTIAL)
    grad = load_rows(grad_ptr, grad_at, there, dim, DIM, DIM != dim.shape[0], PARTIAL)
    PAIRS: tl.constexpr = dim.shape[0] <= 64  # lse and delta by one load, which costs registers
    s = tl.dot(k, tl.trans(q), input_precision="ieee")
    ds = tl.dot(v, tl.trans(grad), input_precision="ieee")
    if PAIRS:
        pairs = stats_ptr + (row_at[:, None] + tl.arange(0, 2)[None, :])
        lse, delta = tl.split(load_values(pairs, there[:, None], PARTIAL))
    else:
        lse = load_values(stats_ptr + row_at, there, PARTIAL)
    weights = tl.exp2(tl.fma(s, scale_log2, -lse[None, :]))
    if MASKED:
        weights = tl.where(from_token(sees, row, PACK), weights, 0.0)
    if not PAIRS:
        delta = load_values(stats_ptr + row_at + 1, there, PARTIAL)
    ds = weights * (ds - delta[None, :])
    if MASKED:
        ds = tl.where(from_token(pulls, row, PACK), ds, 0.0)
    dv = tl.dot(weights.to(q.dtype), grad, dv, input_precision="ieee")
    return tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee"), dv


@triton.jit(do_not_specialize=["tokens"])
def attention_backward_keys(
    grad_ptr, q_ptr, k_ptr, v_ptr, stats_ptr, dk_ptr, dv_ptr, tiles_ptr, parts_ptr, scale,
    scale_log2, tokens, kv_heads, GRAD_TOKEN: tl.constexpr, GRAD_HEAD: tl.constexpr, Q_TOKEN: tl.constexpr,
    Q_HEAD: tl.constexpr, K_TOKEN: tl.constexpr, K_HEAD: tl.constexpr, V_TOKEN: tl.constexpr, V_HEAD: tl.constexpr,
    RATIO: tl.constexpr, PACK: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):  # fmt: skip
    TOKENS: tl.constexpr = ROWS // PACK
    CHUNKS: tl.constexpr = (RATIO + PACK - 1) // PACK
    WHOLE: tl.constexpr = ROWS % PACK == 0 and RATIO % PACK == 0  # a block may have all its rows
    program = tl.program_id(0)
    tile_ptr = tiles_ptr + (program // kv_heads).to(tl.int64) * 5
    kv_head = program % kv_heads
    key0 = tl.load(tile_ptr) * KEYS
    segment0 = tl.load(tile_ptr + 1)
    owners = tl.load(tile_ptr + 2) - segment0
    run0 = tl.load(tile_ptr + 3)
    parts = owners + tl.load(tile_ptr + 4) - run0

    column = tl.arange(0, KEYS)
    key = key0 + column
    dim = tl.arange(0, BLOCK_DIM)
    k_tile = k_ptr + key0.to(tl.int64) * K_TOKEN + kv_head.to(tl.int64) * K_HEAD
    v_tile = v_ptr + key0.to(tl.int64) * V_TOKEN + kv_head.to(tl.int64) * V_HEAD
    k = load_rows(k_tile, offsets(column, K_TOKEN, KEYS), key < tokens, dim, DIM, DIM != BLOCK_DIM, True)
    v = load_rows(v_tile, offsets(column, V_TOKEN, KEYS), key < tokens, dim, DIM, DIM != BLOCK_DIM, True)
    row = tl.arange(0, ROWS)
    row_token, row_head = row // PACK, row % PACK
    q_at = row_offsets(row, Q_TOKEN, Q_HEAD, PACK, ROWS, 2048 // BLOCK_DIM)
    grad_at = row_offsets(row, GRAD_TOKEN, GRAD_HEAD, PACK, ROWS, 2048 // BLOCK_DIM)
    heads = kv_heads * RATIO
    row_at = (row_token * heads + row_head) * 2

    step = tl.full([], TOKENS, tl.int64)
    dk = tl.zeros([KEYS, BLOCK_DIM], tl.float32)
    dv = tl.zeros([KEYS, BLOCK_DIM], tl.float32)
    # Each part twice: the blocks that do not see all keys, then those that do, then the last block, if it is not whole.
    for index in range(0, parts * CHUNKS * 2):
        part = index // (CHUNKS * 2)
        rest = index % 2
        part_ptr = parts_ptr + tl.where(part < owners, segment0 + part, run0 - owners + part).to(tl.int64) * 5
        seen0 = tl.load(part_ptr)
        seen1 = tl.load(part_ptr + 1)
        row0 = tl.load(part_ptr + 2)
        row1 = tl.where((seen0 < key0 + KEYS) & (seen1 > key0), tl.load(part_ptr + 3), row0)
        # A prefix ends before the rows that see it begin: for a run, begin is 0, and so is diagonal if it counts.
        begin = tl.maximum(key0 - row0, 0) // TOKENS
        diagonal = tl.cdiv(tl.maximum(key0 + KEYS - 1 - row0, 0), TOKENS)
        inside = (seen0 <= key0) & (tl.minimum(key0 + KEYS, tokens) <= seen1)
        end = tl.cdiv(row1 - row0, TOKENS)
        whole = (row1 - row0) // TOKENS if WHOLE else end
        masked_end = tl.where(inside, tl.minimum(diagonal, end), end)
        whole_end = tl.maximum(masked_end, whole)
        begin = tl.where(rest == 1, whole_end, begin)
        masked_end = tl.where(rest == 1, end, masked_end)
        sees = tl.where((key >= seen0) & (key < seen1), key, NEVER)
        pulls = tl.where(key == tl.load(part_ptr + 4), key + 1, sees)
        chunk = index // 2 % CHUNKS
        head0 = kv_head * RATIO + chunk * PACK
        there = (row < TOKENS * PACK) & (chunk * PACK + row_head < RATIO)
        token0 = row0 + begin * TOKENS
        first = token0.to(tl.int64)
        q_block = q_ptr + head0.to(tl.int64) * Q_HEAD + first * Q_TOKEN
        grad_block = grad_ptr + head0.to(tl.int64) * GRAD_HEAD + first * GRAD_TOKEN
        stats_block = stats_ptr + (first * heads + head0) * 2
        for _ in range(begin, masked_end):
            here = there & token_below(row, row1 - token0, PACK, 2048 // BLOCK_DIM)
            dk, dv = add_to_keys(
                dk, dv, k, v, q_block, grad_block, stats_block, q_at, grad_at, row_at, here, row, dim, scale_log2,
                sees - token0, pulls - token0, PACK, DIM, True, True,
            )  # fmt: skip
            token0 += TOKENS
            q_block += step * Q_TOKEN
            grad_block += step * GRAD_TOKEN
            stats_block += step * heads * 2
        for _ in range(tl.maximum(begin, masked_end), whole_end):
            here = there & token_below(row, row1 - token0, PACK, 2048 // BLOCK_DIM)
            dk, dv = add_to_keys(
                dk, dv, k, v, q_block, grad_block, stats_block, q_at, grad_at, row_at, here, row, dim, scale_log2,
                sees, pulls, PACK, DIM, not WHOLE, False,
            )  # fmt: skip
            token0 += TOKENS
            q_block += step * Q_TOKEN
            grad_block += step * GRAD_TOKEN
            stats_block += step * heads * 2

    keep = (key < tokens)[:, None] & (dim < DIM)[None, :]
    at = ((key.to(tl.int64) * kv_heads + kv_head) * DIM)[:, None] + dim[None, :]
    tl.store(dk_ptr + at, dk * scale, mask=keep)
    tl.store(dv_ptr + at, dv, mask=keep)


@triton.jit
def attention_backward_rows(
    grad_ptr, q_ptr, k_ptr, v_ptr, stats_ptr, dq_ptr, segments_ptr, tiles_ptr, scale, scale_log2, kv_heads,
    GRAD_TOKEN: tl.constexpr, GRAD_HEAD: tl.constexpr, Q_TOKEN: tl.constexpr, Q_HEAD: tl.constexpr,
    K_TOKEN: tl.constexpr, K_HEAD: tl.constexpr, V_TOKEN: tl.constexpr, V_HEAD: tl.constexpr, RATIO: tl.constexpr,
    PACK: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """dQ of a tile; blocks of keys as in forward."""
    CHUNKS: tl.constexpr = (RATIO + PACK - 1) // PACK
    program = tl.program_id(0)
    tile_ptr = tiles_ptr + (program // (kv_heads * CHUNKS)).to(tl.int64) * 4
    kv_head = program // CHUNKS % kv_heads
    first = tl.load(tile_ptr)
    last = tl.load(tile_ptr + 1)
    segment0 = tl.load(tile_ptr + 2)
    segment1 = tl.load(tile_ptr + 3)
    if first >= last:
        return
    token, head, valid = tile_rows(first, kv_head, program % CHUNKS, RATIO, PACK, ROWS)
    valid = valid & (token < last)
    dim = tl.arange(0, BLOCK_DIM)
    wide_token, wide_head = token.to(tl.int64), head.to(tl.int64)
    q = load_rows(q_ptr, wide_token * Q_TOKEN + wide_head * Q_HEAD, valid, dim, DIM, DIM != BLOCK_DIM, True)
    grad = load_rows(
        grad_ptr, wide_token * GRAD_TOKEN + wide_head * GRAD_HEAD, valid, dim, DIM, DIM != BLOCK_DIM, True
    )
    row_at = wide_token * (kv_heads * RATIO) + head
    lse = tl.load(stats_ptr + row_at * 2, mask=valid, other=0.0)
    delta = tl.load(stats_ptr + row_at * 2 + 1, mask=valid, other=0.0)
    column = tl.arange(0, KEYS)
    k_at = offsets(column, K_TOKEN, KEYS, 2048 // BLOCK_DIM)
    v_at = offsets(column, V_TOKEN, KEYS, 2048 // BLOCK_DIM)
    k_ptr += kv_head.to(tl.int64) * K_HEAD
    v_ptr += kv_head.to(tl.int64) * V_HEAD
    segment_ptr = segments_ptr + segment0.to(tl.int64) * 4
    start = tl.load(segment_ptr)
    prefix0 = tl.load(segment_ptr + 2)
    prefix1 = tl.where(segment0 < segment1, tl.load(segment_ptr + 3), prefix0)
    prefix_blocks = (prefix1 - prefix0) // KEYS
    own_blocks = tl.where(segment1 - segment0 == 1, (first - start) // KEYS, 0)

    dq = tl.zeros([ROWS, BLOCK_DIM], tl.float32)
    for block in range(0, prefix_blocks + own_blocks):
        own = start + (block - prefix_blocks) * KEYS
        key = tl.where(block < prefix_blocks, prefix0 + block * KEYS, own).to(tl.int64)
        k = load_rows(k_ptr + key * K_TOKEN, k_at, column, dim, DIM, DIM != BLOCK_DIM, False)
        weights = tl.exp2(tl.fma(tl.dot(q, tl.trans(k), input_precision="ieee"), scale_log2, -lse[:, None]))
        v = load_rows(v_ptr + key * V_TOKEN, v_at, column, dim, DIM, DIM != BLOCK_DIM, False)
        ds = weights * (tl.dot(grad, tl.trans(v), input_precision="ieee") - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")

    first = tl.load(tile_ptr, volatile=True)
    last = tl.load(tile_ptr + 1, volatile=True)
    segment0 = tl.load(tile_ptr + 2, volatile=True)
    segment1 = tl.load(tile_ptr + 3, volatile=True)
    token, head, valid = tile_rows(first, kv_head, program % CHUNKS, RATIO, PACK, ROWS)
    valid = valid & (token < last)
    for segment in range(segment0, segment1 + 1):
        if segment == segment1:
            key0 = prefix0 + prefix_blocks * KEYS
            key1 = prefix1
            sees = tl.zeros([ROWS], tl.int32) + prefix1 - 1
        else:
            key0 = tl.load(segment_ptr + (segment - segment0) * 4)
            end = tl.load(segment_ptr + (segment - segment0) * 4 + 1)
            key1 = tl.minimum(end, last)
            alone = (prefix0 >= prefix1) & (
                token == key0
            )  # a row that sees one key: its weight is 1 whatever q is
            sees = tl.where((token >= key0) & (token < end) & (alone == 0), token, -1)
            key0 += own_blocks * KEYS
        for block in range(0, tl.cdiv(key1 - key0, KEYS)):
            key = key0 + block * KEYS
            there = below(column, key1 - key, 2048 // BLOCK_DIM)
            k = load_rows(k_ptr + key.to(tl.int64) * K_TOKEN, k_at, there, dim, DIM, DIM != BLOCK_DIM, True)
            weights = tl.exp2(
                tl.fma(tl.dot(q, tl.trans(k), input_precision="ieee"), scale_log2, -lse[:, None])
            )
            v = load_rows(v_ptr + key.to(tl.int64) * V_TOKEN, v_at, there, dim, DIM, DIM != BLOCK_DIM, True)
            ds = weights * (tl.dot(grad, tl.trans(v), input_precision="ieee") - delta[:, None])
            ds = tl.where(columns_upto(column, sees - key), ds, 0.0)
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")

    keep = valid[:, None] & (dim < DIM)[None, :]
    at = (token.to(tl.int64) * (kv_heads * RATIO) + head) * DIM
    tl.store(dq_ptr + at[:, None] + dim[None, :], dq * scale, mask=keep)


def attention_backward(grad, q, k, v, out, lse, segments, softmax_scale, deterministic):
    """(dq, dk, dv); deterministic always."""
    grad, q, k, v = map(dense_last, (grad, q, k, v))
    out, lse, segments = out.contiguous(), lse.contiguous(), segments.contiguous()
    tokens, heads, dim = q.shape
    kv_heads = k.shape[1]
    if not tokens or not segments.shape[0]:
        return q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    stats = lse.new_empty(tokens, heads, 2)
    block_dim = max(16, triton.next_power_of_2(dim))
    dims = {"DIM": dim, "BLOCK_DIM": block_dim}
    rows = max(1, 4096 // block_dim)
    launch(
        attention_delta, triton.cdiv(tokens * heads, rows), grad, out, lse, stats, tokens * heads, heads,
        **strides(grad=grad), **dims, ROWS=rows,
    )  # fmt: skip
    scales = (softmax_scale, softmax_scale * math.log2(math.e))
    constants = strides(grad=grad, q=q, k=k, v=v) | dims
    config = keys_config(block_dim, q.dtype, capability(q.device))
    tables = key_tiles(segments, tokens, config["KEYS"])
    launch(
        attention_backward_keys, len(tables.tiles) * kv_heads, grad, q, k, v, stats, dk, dv,
        tables.tiles, tables.parts, *scales, tokens, kv_heads, **constants, **pack(heads, kv_heads, config["ROWS"]),
        **config,
    )  # fmt: skip
    config = rows_config(block_dim, q.dtype, capability(q.device))
    packed = pack(heads, kv_heads, config["ROWS"])
    tiles = query_tiles(segments, tokens, config["ROWS"] // packed["PACK"])
    launch(
        attention_backward_rows, len(tiles) * kv_heads * triton.cdiv(packed["RATIO"], packed["PACK"]), grad, q, k, v,
        stats, dq, segments, tiles, *scales, kv_heads, **constants, **packed, **config,
    )  # fmt: skip
    return dq, dk, dv
