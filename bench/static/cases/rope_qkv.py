import torch

from hpsafety.triton_kernels import rope_qkv as kernels

MAX_POSITION = 4096


def run(shapes, empty) -> None:
    t, g, j, size = shapes.tokens, shapes.kv_heads, shapes.heads // shapes.kv_heads, shapes.head_dim
    cos, sin = (empty(MAX_POSITION, size // 2, dtype=torch.float32) for _ in range(2))
    positions = empty(t, dtype=torch.int32)
    q, k, v = kernels.rope_qkv(empty(t, g, j + 2, size), positions, cos, sin)
    kernels.rope_qkv_backward(q, k, v, positions, cos, sin)
