import torch

from hpsafety.triton_kernels import gae as kernels


def run(shapes, empty) -> None:
    offsets = empty(shapes.prompts * shapes.responses + 1, dtype=torch.int32)
    for dtype in (torch.float32, torch.bfloat16):
        rewards, values = empty(shapes.trained, dtype=torch.float32), empty(shapes.trained, dtype=dtype)
        kernels.gae(rewards, values, offsets, 1.0, 0.95)
