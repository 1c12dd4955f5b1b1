import torch

from hpsafety.triton_kernels import attention as forward
from hpsafety.triton_kernels import attention_backward as backward


def run(shapes, empty) -> None:
    tokens, dim = shapes.tokens, shapes.head_dim
    q, grad = (empty(tokens, shapes.heads, dim) for _ in range(2))
    k, v = (empty(tokens, shapes.kv_heads, dim) for _ in range(2))
    segments = empty(shapes.prompts * (1 + shapes.responses), 4, dtype=torch.int32)
    out, lse = forward.attention(q, k, v, segments, dim**-0.5, False)
    backward.attention_backward(grad, q, k, v, out, lse, segments, dim**-0.5, False)
