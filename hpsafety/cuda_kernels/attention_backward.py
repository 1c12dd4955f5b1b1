"""attention, backward, in CUDA: csrc/cuda/attention_delta.cu, then attention_backward_keys and _rows of the head dim.

Their order of sums is that of the Triton kernels, and so are the promises: one writer for every sum, no atomics, the
same bits at every run, whatever else is in the batch. A NaN of a row also reaches the gradients of the others that
share its tile.
"""

from hpsafety.cuda_kernels.attention import in_chunks
from hpsafety.cuda_kernels.library import launch
from hpsafety.triton_kernels.attention_tiles import key_tiles, query_tiles

KEYS = {64: 96, 128: 128}  # of a tile, by head dim: attention_backward_keys_*.cu
ROWS = 128  # of a tile: attention_backward_rows_*.cu
MOST_PACKED = 16  # query heads of a kv head that are rows of one tile


def log_pack(ratio: int) -> int:
    """Log2 of the largest power of two that divides the query heads of a kv head, up to MOST_PACKED."""
    return min(ratio & -ratio, MOST_PACKED).bit_length() - 1


def attention_backward(grad, q, k, v, out, lse, segments, softmax_scale, deterministic):
    """(dq, dk, dv); deterministic always. bf16, head dim 64 or 128."""
    tokens, heads, dim = q.shape
    kv_heads = k.shape[1]
    if not tokens or not segments.shape[0]:
        return q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    grad, q, k, v, out = map(in_chunks, (grad, q, k, v, out.contiguous()))
    lse, segments = lse.contiguous(), segments.contiguous()
    dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    # In the order of the blocks' rows.
    lse_of_rows, delta = lse.new_empty(lse.shape), lse.new_empty(lse.shape)
    packed = log_pack(heads // kv_heads)
    group = (tokens, kv_heads, heads // kv_heads >> packed, packed)
    launch(
        "hps_attention_delta", "ppp ll liii i pp", grad, out, lse, *grad.stride()[:2], *group, dim, lse_of_rows, delta,
    )  # fmt: skip
    views = (grad, q, k, v, *(stride for x in (grad, q, k, v) for stride in x.stride()[:2]))
    tables = key_tiles(segments, tokens, KEYS[dim])
    launch(
        f"hps_attention_backward_keys_d{dim}", "pppp ll ll ll ll pp ppp l liii d pp", *views, lse_of_rows, delta,
        segments, tables.tiles, tables.parts, len(tables.tiles), *group, softmax_scale, dk, dv,
    )  # fmt: skip
    tiles = query_tiles(segments, tokens, ROWS >> packed)
    launch(
        f"hps_attention_backward_rows_d{dim}", "pppp ll ll ll ll pp pp l liii d p", *views, lse_of_rows, delta,
        segments, tiles, len(tiles), *group, softmax_scale, dq,
    )  # fmt: skip
    return dq, dk, dv
