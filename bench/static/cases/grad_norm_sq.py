import torch

from hpsafety.triton_kernels import grad_norm_sq as kernels


def run(shapes, empty) -> None:
    """One layer's gradients, in fp32, in bf16 and mixed."""
    for kinds in ((torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.float32, torch.bfloat16)):
        sizes = ((shapes.width,), (2 * shapes.mlp, shapes.width))
        kernels.grad_norm_sq([empty(*size, dtype=dtype) for size, dtype in zip(sizes, kinds, strict=True)])
