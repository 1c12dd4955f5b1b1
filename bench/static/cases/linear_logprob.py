import torch

from hpsafety.triton_kernels import linear_logprob as kernels


def run(shapes, empty) -> None:
    n, fp32 = shapes.trained, torch.float32
    hidden, weight = empty(n, shapes.width), empty(shapes.words, shapes.width)
    targets = empty(n, dtype=torch.int64)
    for with_entropy in (False, True):
        logprobs, norm, entropy = kernels.linear_logprob(hidden, weight, targets, 1.0, with_entropy)
        grad_entropy = empty(n, dtype=fp32) if with_entropy else None
        kernels.linear_logprob_backward(
            logprobs, grad_entropy, hidden, weight, targets, norm, entropy, 1.0, True, True
        )
