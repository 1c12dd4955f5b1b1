"""attention in CUDA, forward: allocates the outputs of csrc/cuda/attention_forward.cuh and launches it."""

import math

import torch
from torch._subclasses.fake_tensor import FakeTensor

from hpsafety.cuda_kernels.library import launch
from hpsafety.triton_kernels.attention_tiles import query_tiles

ROWS = 128  # of a tile of scores
WARPS = 4  # of a block
BLOCKS_PER_SM = 2  # that are resident at a time; half of the registers each
HEAD_DIMS = (64, 128)


def refuses(dtype: torch.dtype | None, head_dim: int | None) -> str | None:
    """Why the kernels cannot serve these; None when they can."""
    if dtype not in (torch.bfloat16, None):
        return f"the CUDA attention kernels are for bfloat16, got {dtype}"
    if head_dim not in (*HEAD_DIMS, None):
        return (
            f"the CUDA attention kernels are for head dim {' and '.join(map(str, HEAD_DIMS))}, got {head_dim}"
        )
    return None


def in_chunks(x):
    """x (T, heads, K), or a copy whose rows are read in whole 16-byte chunks."""
    whole = x.stride(2) == 1 and x.stride(0) % 8 == 0 and x.stride(1) % 8 == 0
    at = x.storage_offset() * x.element_size() if isinstance(x, FakeTensor) else x.data_ptr()
    return x if whole and at % 16 == 0 else x.clone(memory_format=torch.contiguous_format)


def resident_blocks(device: torch.device) -> int:
    """Blocks that the GPU holds at a time."""
    there = device.type == "cuda" and torch.cuda.is_available()
    return BLOCKS_PER_SM * (torch.cuda.get_device_properties(device).multi_processor_count if there else 108)


def attention(q, k, v, segments, softmax_scale, deterministic):
    """(out (T, H, K), lse (T, H) fp32, base 2); always deterministic. q, k, v bf16, K 64 or 128."""
    tokens, heads, dim = q.shape
    kv_heads = k.shape[1]
    if not tokens or not segments.shape[0]:
        return q.new_zeros(q.shape), q.new_zeros(q.shape[:2], dtype=torch.float32)
    q, k, v, segments = in_chunks(q), in_chunks(k), in_chunks(v), segments.contiguous()
    ratio = heads // kv_heads
    pack = min(ratio, ROWS)
    tiles = query_tiles(segments, tokens, ROWS // pack)
    out, lse = q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)
    redo = q.new_empty(len(tiles) * kv_heads * -(-ratio // pack) * WARPS, dtype=torch.int32)
    launch(
        f"hps_attention_forward_d{dim}", "pppppppp llllll l iii f i", q, k, v, out, lse, segments, tiles, redo,
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1), len(tiles), kv_heads, ratio, pack,
        softmax_scale * math.log2(math.e), resident_blocks(q.device),
    )  # fmt: skip
    return out, lse
