import torch

from hpsafety.triton_kernels import adamw as kernels


def run(shapes, empty) -> None:
    """One layer's weights, with gradients in fp32 and in bf16, and with copies."""
    d, kv = shapes.width, shapes.kv_heads * shapes.head_dim
    sizes = [(d,), (d + 2 * kv, d), (d, d), (2 * shapes.mlp, d), (d, shapes.mlp)]
    params, m, v = ([empty(*size, dtype=torch.float32) for size in sizes] for _ in range(3))
    step, norm = empty(dtype=torch.int64), empty(dtype=torch.float64)
    settings = (1e-3, 0.9, 0.95, 1e-8, 0.1, step, norm, 1.0)
    for dtype in (torch.float32, torch.bfloat16):
        grads = [empty(*size, dtype=dtype) for size in sizes]
        kernels.adamw_(params, grads, m, v, *settings, [])
        kernels.adamw_(params, grads, m, v, *settings, [empty(*size) for size in sizes])
