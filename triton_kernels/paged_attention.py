"""paged_attention: decoding over keys and values that stand in pages. Limit: the bytes of K and V.

A sequence's keys are cut into splits of SPLIT keys, counted from the start of its group's prefix and again from the
start of its own tokens. A program attends from the query heads of one kv head to one split: own tokens with the heads
of one sequence, a prefix with a tile of (member, head) rows of one group, so that its pages are read once for as many
members as fill a tile. It leaves (maximum, sum, output) of each row in fp32, base 2, and `combine` merges them: prefix
before own tokens, split by split. Nothing of that depends on the batch, so neither does a bit of a sequence's result.

Sequential: one split without end. The prefix's program leaves the state of its running softmax, the own tokens' program
goes on from there, block after block, and `combine` divides.

All grids follow from what the host knows, the widths of the tables; programs past the live lengths leave at once.
So a CUDA graph can replay the launches.

B sequences, H query heads, G kv heads, K head dim.
"""

import torch
import triton
import triton.language as tl

from hpsafety.triton_kernels.launch import launch

SHARED_BYTES = (69760, 98432)  # of head dim 256, on sm_80 and on sm_90
SPLIT = 512  # keys: fp32 partials of 4 query heads are then 3 % of a bf16 split's bytes, written and read
LOG2_E = 1.4426950408889634
MAX_LENGTH = 2**31 - 1


@triton.jit
def softmax_step(s, scale, top, total):
    """One block of scores s (rows, keys), -inf where unseen, into a running softmax: (weights, rescale, top, total).

    scale   of the scores, times log2(e); top and total are in base 2. A row without any score above -inf keeps a sum
            of 0, so that later blocks, or the merge, decide whether it is NaN
    """
    new_top = tl.maximum(top, tl.max(s, 1) * scale)
    base = tl.where(new_top == float("-inf"), 0.0, new_top)
    weights = tl.exp2(tl.fma(s, scale, -base[:, None]))
    rescale = tl.exp2(top - base)
    return weights, rescale, new_top, total * rescale + tl.sum(weights, 1)


@triton.jit
def attend(
    q, top, total, out, k_ptr, v_ptr, table_ptr, first, end, k_page, k_slot, v_page, v_slot, scale,
    PAGE: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Takes q (rows, BLOCK_DIM) through the keys first..end of one row of a table, KEYS at a time."""
    column = tl.arange(0, BLOCK_DIM)[None, :]
    for key in range(first, end, KEYS):
        token = key + tl.arange(0, KEYS)
        seen = token < end
        page = tl.load(table_ptr + token // PAGE, mask=seen, other=0).to(tl.int64)
        slot = (token % PAGE).to(tl.int64)
        mask = seen[:, None] if DIM == BLOCK_DIM else seen[:, None] & (column < DIM)
        k = tl.load(k_ptr + (page * k_page + slot * k_slot)[:, None] + column, mask=mask, other=0.0)
        v = tl.load(v_ptr + (page * v_page + slot * v_slot)[:, None] + column, mask=mask, other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")
        s = tl.where(seen[None, :], s, float("-inf"))
        weights, rescale, top, total = softmax_step(s, scale, top, total)
        out = tl.dot(weights.to(v.dtype), v, out * rescale[:, None], input_precision="ieee")
    return top, total, out


@triton.jit(do_not_specialize=["batch"])
def plan_prefixes(
    group_of_ptr, order_ptr, bounds_ptr, tile_group_ptr, batch, HEADS: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """For group program_id: its members' places in `order`, (first, end) of them in `bounds`, and its tiles.

    Group g owns the tiles from first * HEADS // ROWS + g up to the next group's: always enough for its rows, and known
    without the other groups' tiles. Those it does not need get -1.
    """
    group = tl.program_id(0)
    first, members = 0, 0
    for start in range(0, batch, BLOCK):
        b = start + tl.arange(0, BLOCK)
        of = tl.load(group_of_ptr + b, mask=b < batch, other=2147483647)
        first += tl.sum((of < group).to(tl.int32), 0)
        members += tl.sum((of == group).to(tl.int32), 0)
    tl.store(bounds_ptr + 2 * group, first)
    tl.store(bounds_ptr + 2 * group + 1, first + members)
    place = first
    for start in range(0, batch, BLOCK):
        b = start + tl.arange(0, BLOCK)
        of = tl.load(group_of_ptr + b, mask=b < batch, other=2147483647)
        mine = (of == group).to(tl.int32)
        tl.store(order_ptr + place + tl.cumsum(mine, 0) - 1, b, mask=mine > 0)
        place += tl.sum(mine, 0)
    tile0 = first * HEADS // ROWS + group
    end = (first + members) * HEADS // ROWS + group + 1
    used = tile0 + tl.cdiv(members * HEADS, ROWS)
    for start in range(tile0, end, BLOCK):
        tile = start + tl.arange(0, BLOCK)
        tl.store(tile_group_ptr + tile, tl.where(tile < used, group, -1), mask=tile < end)


@triton.jit(do_not_specialize=["tiles", "kv_heads", "columns", "slots"])
def attend_prefixes(
    q_ptr, k_ptr, v_ptr, table_ptr, lens_ptr, order_ptr, bounds_ptr, tile_group_ptr, out_ptr, top_ptr, total_ptr,
    tiles, kv_heads, columns, slots, k_page, k_slot, k_head, v_page, v_slot, v_head, scale,
    HEADS: tl.constexpr, PAGE: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Tile (fastest: the tiles of a group share its pages in the L2 cache), kv head, split."""
    tile = tl.program_id(0) % tiles
    head = (tl.program_id(0) // tiles % kv_heads).to(tl.int64)
    split = tl.program_id(0) // tiles // kv_heads
    group = tl.load(tile_group_ptr + tile).to(tl.int64)
    if group < 0:
        return
    length = tl.load(lens_ptr + group)
    key0 = split * SPLIT
    if key0 >= length:
        return
    end = length if SPLIT == 0 else key0 + tl.minimum(length - key0, SPLIT)
    member0 = tl.load(bounds_ptr + 2 * group)
    members = tl.load(bounds_ptr + 2 * group + 1) - member0
    row = (tile - (member0 * HEADS // ROWS + group)) * ROWS + tl.arange(0, ROWS)
    inside = row < members * HEADS
    b = tl.load(order_ptr + member0 + row // HEADS, mask=inside, other=0).to(tl.int64)
    query = (b * kv_heads + head) * HEADS + row % HEADS
    column = tl.arange(0, BLOCK_DIM)[None, :]
    mask = inside[:, None] if DIM == BLOCK_DIM else inside[:, None] & (column < DIM)
    q = tl.load(q_ptr + query[:, None] * DIM + column, mask=mask, other=0.0)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, BLOCK_DIM], tl.float32)
    top, total, out = attend(
        q, top, total, out, k_ptr + head * k_head, v_ptr + head * v_head, table_ptr + group * columns, key0, end,
        k_page, k_slot, v_page, v_slot, scale, PAGE, DIM, BLOCK_DIM, KEYS,
    )  # fmt: skip
    state = query * slots + split
    tl.store(top_ptr + state, top, mask=inside)
    tl.store(total_ptr + state, total, mask=inside)
    tl.store(out_ptr + state[:, None] * DIM + column, out, mask=mask)


@triton.jit(do_not_specialize=["batch", "kv_heads", "columns", "slot0", "slots"])
def attend_own(
    q_ptr, k_ptr, v_ptr, table_ptr, lens_ptr, prefix_lens_ptr, group_of_ptr, out_ptr, top_ptr, total_ptr,
    batch, kv_heads, columns, slot0, slots, k_page, k_slot, k_head, v_page, v_slot, v_head, scale,
    HEADS: tl.constexpr, PAGE: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, SPLIT: tl.constexpr, CARRY: tl.constexpr,
):  # fmt: skip
    """Tile of heads (one but for very large groups), kv head, sequence, split. CARRY: on from the prefix's state."""
    TILES: tl.constexpr = (HEADS + ROWS - 1) // ROWS
    tile = tl.program_id(0) % TILES
    head = (tl.program_id(0) // TILES % kv_heads).to(tl.int64)
    b = (tl.program_id(0) // TILES // kv_heads % batch).to(tl.int64)
    split = tl.program_id(0) // TILES // kv_heads // batch
    length = tl.load(lens_ptr + b)
    key0 = split * SPLIT
    if key0 >= length:
        return
    end = length if SPLIT == 0 else key0 + tl.minimum(length - key0, SPLIT)
    row = tile * ROWS + tl.arange(0, ROWS)
    inside = row < HEADS
    query = (b * kv_heads + head) * HEADS + row
    column = tl.arange(0, BLOCK_DIM)[None, :]
    mask = inside[:, None] if DIM == BLOCK_DIM else inside[:, None] & (column < DIM)
    q = tl.load(q_ptr + query[:, None] * DIM + column, mask=mask, other=0.0)
    state = query * slots + slot0 + split
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, BLOCK_DIM], tl.float32)
    if CARRY:
        group = tl.load(group_of_ptr + b)
        there = row < tl.where(tl.load(prefix_lens_ptr + group) > 0, HEADS, 0)
        top = tl.load(top_ptr + state, mask=there, other=float("-inf"))
        total = tl.load(total_ptr + state, mask=there, other=0.0)
        out = tl.load(out_ptr + state[:, None] * DIM + column, mask=mask & there[:, None], other=0.0)
    top, total, out = attend(
        q, top, total, out, k_ptr + head * k_head, v_ptr + head * v_head, table_ptr + b * columns, key0, end,
        k_page, k_slot, v_page, v_slot, scale, PAGE, DIM, BLOCK_DIM, KEYS,
    )  # fmt: skip
    tl.store(top_ptr + state, top, mask=inside)
    tl.store(total_ptr + state, total, mask=inside)
    tl.store(out_ptr + state[:, None] * DIM + column, out, mask=mask)


@triton.jit(do_not_specialize=["heads", "slot0", "slots"])
def combine(
    out_ptr, top_ptr, total_ptr, lens_ptr, prefix_lens_ptr, group_of_ptr, y_ptr, heads, slot0, slots,
    HAS_PREFIX: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, ROWS: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """ROWS query heads of one sequence: the live splits, prefix first, under their common maximum, in order."""
    per_sequence = tl.cdiv(heads, ROWS)
    b = (tl.program_id(0) // per_sequence).to(tl.int64)
    row = tl.program_id(0) % per_sequence * ROWS + tl.arange(0, ROWS)
    inside = row < heads
    query = b * heads + row
    own, prefix = tl.load(lens_ptr + b), 0
    if HAS_PREFIX:
        group = tl.load(group_of_ptr + b)
        prefix = tl.load(prefix_lens_ptr + group)
    if SPLIT == 0:
        prefix_splits, splits = 0, ((own > 0) | (prefix > 0)).to(tl.int32)
    else:
        prefix_splits = tl.cdiv(prefix, SPLIT)
        splits = prefix_splits + tl.cdiv(own, SPLIT)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    for i in range(0, splits):
        state = query * slots + tl.where(i < prefix_splits, i, slot0 + i - prefix_splits)
        top = tl.maximum(top, tl.load(top_ptr + state, mask=inside, other=0.0))
    column = tl.arange(0, BLOCK_DIM)[None, :]
    mask = inside[:, None] if DIM == BLOCK_DIM else inside[:, None] & (column < DIM)
    total = tl.zeros([ROWS], tl.float32)
    y = tl.zeros([ROWS, BLOCK_DIM], tl.float32)
    for i in range(0, splits):
        state = query * slots + tl.where(i < prefix_splits, i, slot0 + i - prefix_splits)
        # all of them -inf: NaN, as softmax is
        factor = tl.exp2(tl.load(top_ptr + state, mask=inside, other=0.0) - top)
        total += factor * tl.load(total_ptr + state, mask=inside, other=0.0)
        y += factor[:, None] * tl.load(out_ptr + state[:, None] * DIM + column, mask=mask, other=0.0)
    share = tl.div_rn(1.0, tl.where(total == 0.0, 1.0, total))  # 0: no token
    tl.store(y_ptr + query[:, None] * DIM + column, y * share[:, None], mask=mask)


def keys_per_block(dim: int, dtype: torch.dtype) -> int:
    """Keys that a row takes in one step of its running softmax; part of what defines the bits of a sequential row."""
    if dtype == torch.float32:
        return 16 if dim > 128 else 32
    return 32 if dim > 128 else 64


def _config(dim: int, heads: int, dtype: torch.dtype) -> dict:
    """Rows of a prefix tile and of an own tile, keys, warps and stages; `heads` of a kv head."""
    fp32 = dtype == torch.float32  # no tensor cores: more rows would spill
    return {
        "prefix_rows": 16 if fp32 else 64,
        "own_rows": 16 if fp32 else min(max(16, triton.next_power_of_2(heads)), 64),
        "split": SPLIT,
        "keys": keys_per_block(dim, dtype),
        "num_warps": 8 if dim > (64 if fp32 else 128) else 4,
        "num_stages": 1 if fp32 else 3,
    }


def paged_attention(
    q, k_pages, v_pages, block_table, context_lens, prefix_table, prefix_lens, group_of, softmax_scale, sequential
):  # fmt: skip
    """(B, H, K); arguments as in hpsafety::paged_attention."""
    if (k_pages.stride(3), v_pages.stride(3)) != (1, 1) and q.shape[2] > 1:
        raise ValueError(
            "paged_attention: k_pages and v_pages must have last stride 1, got "
            f"{k_pages.stride(3)} and {v_pages.stride(3)}"
        )
    q, block_table, context_lens = q.contiguous(), block_table.contiguous(), context_lens.contiguous()
    (batch, heads, dim), (_, page_size, kv_heads, _) = q.shape, k_pages.shape
    config = _config(dim, heads // kv_heads, q.dtype)
    split = 0 if sequential else config["split"]

    def splits(table):
        covered = min(table.shape[1] * page_size, MAX_LENGTH)
        return min(covered, 1) if sequential else triton.cdiv(covered, split)

    has_prefix = prefix_table is not None
    if has_prefix:
        prefix_table, prefix_lens = prefix_table.contiguous(), prefix_lens.contiguous()
        group_of = group_of.contiguous()
    slot0 = splits(prefix_table) if has_prefix and not sequential else 0
    slots = 1 if sequential else slot0 + splits(block_table)
    out = q.new_empty((batch, heads, slots, dim), dtype=torch.float32)
    top, total = (q.new_empty((batch, heads, slots), dtype=torch.float32) for _ in range(2))
    strides = (*k_pages.stride()[:3], *v_pages.stride()[:3], softmax_scale * LOG2_E)
    block_dim = max(16, triton.next_power_of_2(dim))
    dims = {"DIM": dim, "BLOCK_DIM": block_dim, "SPLIT": split}
    shared = dims | {"HEADS": heads // kv_heads, "PAGE": page_size, "KEYS": config["keys"]}
    shared |= {"num_warps": config["num_warps"], "num_stages": config["num_stages"]}
    if has_prefix and splits(prefix_table) and batch:
        groups, rows = prefix_table.shape[0], config["prefix_rows"]
        tiles = batch * shared["HEADS"] // rows + groups
        order, bounds = group_of.new_empty(batch), group_of.new_empty((groups, 2))
        tile_group = group_of.new_empty(tiles)
        launch(
            plan_prefixes, groups, group_of, order, bounds, tile_group, batch, HEADS=shared["HEADS"], ROWS=rows,
            BLOCK=256,
        )  # fmt: skip
        launch(
            attend_prefixes, tiles * kv_heads * splits(prefix_table), q, k_pages, v_pages, prefix_table, prefix_lens,
            order, bounds, tile_group, out, top, total, tiles, kv_heads, prefix_table.shape[1], slots, *strides,
            ROWS=rows, **shared,
        )  # fmt: skip
    rows = config["own_rows"]
    programs = triton.cdiv(shared["HEADS"], rows) * kv_heads * batch * splits(block_table)
    launch(
        attend_own, programs, q, k_pages, v_pages, block_table, context_lens, prefix_lens, group_of, out, top, total,
        batch, kv_heads, block_table.shape[1], slot0, slots, *strides, ROWS=rows, CARRY=has_prefix and sequential,
        **shared,
    )  # fmt: skip
    y = torch.empty_like(q)
    rows = min(16, triton.next_power_of_2(heads))
    launch(
        combine, batch * triton.cdiv(heads, rows), out, top, total, context_lens, prefix_lens, group_of, y, heads,
        slot0, slots, HAS_PREFIX=has_prefix, ROWS=rows, **dims,
    )  # fmt: skip
    return y
