import torch

from hpsafety.triton_kernels import ppo_loss as kernels


def run(shapes, empty) -> None:
    """In fp32 without entropy, and in bf16 with it; the count from the mask, as a number and as a tensor."""
    mask = empty(shapes.trained, dtype=torch.bool)
    for dtype, number, tensor in (
        (torch.float32, None, None),
        (torch.bfloat16, 1e5, None),
        (torch.float32, None, empty(dtype=torch.int64)),
    ):
        rows = [empty(shapes.trained, dtype=dtype) for _ in range(6)]
        entropy = rows[0] if number is not None else None
        kernels.ppo_loss(*rows, mask, entropy, 0.2, 0.2, 0.5, 0.01, number, tensor)
