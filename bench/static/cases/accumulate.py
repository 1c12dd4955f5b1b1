import torch

from hpsafety.triton_kernels import accumulate as kernels


def run(shapes, empty) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        total, grad = (
            empty(shapes.mlp, shapes.width, dtype=torch.float32),
            empty(shapes.mlp, shapes.width, dtype=dtype),
        )
        kernels.accumulate_(total, grad)
