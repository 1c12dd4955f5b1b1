import torch

from hpsafety.triton_kernels import sample as kernels


def run(shapes, empty) -> None:
    """Greedy, plain, top-p, and both borders."""
    rows = shapes.prompts * shapes.responses
    logits, numbers = empty(rows, shapes.words), empty(rows, dtype=torch.int64)
    for temperature, top_p, top_k in ((0.0, 1.0, 0), (1.0, 1.0, 0), (1.0, 0.9, 0), (1.0, 0.9, 50)):
        kernels.sample(logits, temperature, top_p, top_k, numbers, numbers)
