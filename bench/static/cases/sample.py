import torch

from hpsafety.triton_kernels import sample as kernels

SEQUENCES = 64


def run(shapes, empty) -> None:
    """Greedy, plain, and with both borders; logits in the compute dtype and in fp32."""
    numbers = empty(SEQUENCES, dtype=torch.int64)
    for dtype in (torch.bfloat16, torch.float32):
        logits = empty(SEQUENCES, shapes.vocabulary, dtype=dtype)
        for temperature, top_p, top_k in ((0.0, 1.0, 0), (1.0, 1.0, 0), (1.0, 0.9, 50)):
            kernels.sample(logits, temperature, top_p, top_k, numbers, numbers)
