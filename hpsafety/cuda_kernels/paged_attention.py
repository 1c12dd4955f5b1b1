"""paged_attention in CUDA: allocates the result and the splits' partial results, launches csrc/cuda/paged_attention*.

bf16, head dim 64 or 128. All grids follow from what the host knows, the widths of the tables; blocks past the live
lengths leave at once. So a CUDA graph can replay the launches.
"""

import torch

from hpsafety.cuda_kernels.library import launch

HEAD_DIMS = (64, 128)
SPLIT, TILE_ROWS = 512, 64  # of csrc/cuda/paged_attention.cuh and paged_attention_pages.cuh
SEQUENTIAL = "the CUDA kernels have no sequential form; the triton backend has one"
LOG2_E = 1.4426950408889634
MAX_LENGTH = 2**31 - 1


def refuses(dtype: torch.dtype | None, head_dim: int | None) -> str | None:
    """Why the kernels cannot serve these; None when they can, or where they are not known."""
    if dtype not in (None, torch.bfloat16):
        return f"the CUDA kernels take bfloat16, got {str(dtype).removeprefix('torch.')}"
    if head_dim not in (None, *HEAD_DIMS):
        return f"the CUDA kernels are made for head dim {' and '.join(map(str, HEAD_DIMS))}, got {head_dim}"
    return None


def _splits(table, page_size: int) -> int:
    return -(-min(table.shape[1] * page_size, MAX_LENGTH) // SPLIT)


def _words(x):
    """x contiguous and at an address from which 4 bytes can be read."""
    x = x.contiguous()
    return x if x.storage_offset() % 2 == 0 else x.clone()


def paged_attention(
    q, k_pages, v_pages, block_table, context_lens, prefix_table, prefix_lens, group_of, softmax_scale, sequential
):  # fmt: skip
    """(B, H, K); arguments as in hpsafety::paged_attention."""
    if k_pages.stride(3) != 1 or v_pages.stride(3) != 1:
        raise ValueError(
            "paged_attention: k_pages and v_pages must have last stride 1, got "
            f"{k_pages.stride(3)} and {v_pages.stride(3)}"
        )
    (batch, heads, dim), (_, page_size, kv_heads, _) = q.shape, k_pages.shape
    reason = refuses(q.dtype, dim)
    if reason or sequential:
        raise ValueError(f"paged_attention: {reason or SEQUENTIAL}")
    q, block_table, context_lens = _words(q), block_table.contiguous(), context_lens.contiguous()
    if prefix_table is not None:
        prefix_table, prefix_lens = prefix_table.contiguous(), prefix_lens.contiguous()
        group_of = group_of.contiguous()
    y = torch.empty_like(q)
    if batch == 0:
        return y
    group_heads, own = heads // kv_heads, _splits(block_table, page_size)
    slot0 = _splits(prefix_table, page_size) if prefix_table is not None else 0
    slots = slot0 + own
    out = q.new_empty((batch, heads, slots, dim), dtype=torch.float32)
    top, total = (q.new_empty((batch, heads, slots), dtype=torch.float32) for _ in range(2))
    strides = (*k_pages.stride()[:3], *v_pages.stride()[:3], softmax_scale * LOG2_E)

    def on(table, lens, splits):
        return (
            q, k_pages, v_pages, table, lens, out, top, total, group_heads, kv_heads, table.shape[1], page_size, slots,
            splits, *strides,
        )  # fmt: skip

    if slot0:
        groups = prefix_table.shape[0]
        tiles = batch * group_heads // TILE_ROWS + groups
        order, bounds = group_of.new_empty(batch), group_of.new_empty((groups, 2))
        group_of_tile = group_of.new_empty(tiles)
        launch(
            "hps_paged_plan", "pppp lll", group_of, order, bounds, group_of_tile, batch, groups, group_heads,
        )  # fmt: skip
        launch(
            f"hps_paged_prefixes_{dim}", "ppppp ppp llllll llllll f ppp l", *on(prefix_table, prefix_lens, slot0),
            order, bounds, group_of_tile, tiles,
        )  # fmt: skip
    if own:
        launch(
            f"hps_paged_own_{dim}", "ppppp ppp llllll llllll f ll", *on(block_table, context_lens, own), batch, slot0,
        )  # fmt: skip
    launch(
        "hps_paged_merge", "pppppp p lllll", out, top, total, context_lens, prefix_lens, group_of, y, batch, heads, dim,
        slots, slot0,
    )  # fmt: skip
    return y
