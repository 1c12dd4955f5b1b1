import torch

from hpsafety.triton_kernels import rope as kernels

MAX_POSITION = 4096


def run(shapes, empty) -> None:
    t, size = shapes.tokens, shapes.head_dim
    cos, sin = (empty(MAX_POSITION, size // 2, dtype=torch.float32) for _ in range(2))
    positions = empty(t, dtype=torch.int32)
    q, k = empty(t, shapes.heads, size), empty(t, shapes.kv_heads, size)
    kernels.rope(q, k, positions, cos, sin, False)
    kernels.rope(q, k, positions, cos, sin, True)
    kernels.rope_(q, k, positions, cos, sin)
