import torch

from hpsafety.triton_kernels import linear_cross_entropy as kernels


def run(shapes, empty) -> None:
    n = shapes.trained
    hidden, weight = empty(n, shapes.width), empty(shapes.words, shapes.width)
    targets, row_weights = empty(n, dtype=torch.int64), empty(n, dtype=torch.float32)
    kernels.linear_cross_entropy(hidden, weight, targets, row_weights, True, True)
    kernels.linear_cross_entropy(hidden, weight, targets, row_weights, False, False)
