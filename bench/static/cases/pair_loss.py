import torch

from hpsafety.triton_kernels import pair_loss as kernels


def run(shapes, empty) -> None:
    pairs = shapes.prompts * shapes.responses
    safe = empty(pairs, dtype=torch.int8)
    for dtype in (torch.float32, torch.bfloat16):
        row = empty(pairs, dtype=dtype)
        kernels.pair_loss(row, row, None, 1.0, None, None, 0.0, None, None)
        kernels.pair_loss(row, row, row, 0.0, safe, safe, 0.5, None, empty(dtype=torch.int64))
