import torch

from hpsafety.triton_kernels import reward_score as kernels


def run(shapes, empty) -> None:
    hidden, weight = empty(shapes.tokens, shapes.width), empty(shapes.width)
    responses = shapes.prompts * shapes.responses
    rows, tags = empty(responses, dtype=torch.int64), empty(responses, dtype=torch.bool)
    groups = empty(shapes.prompts + 1, dtype=torch.int32)
    for norm in (None, weight):
        kernels.reward_score(hidden, hidden, rows, weight, weight, tags, groups, norm, norm, 1e-5, 0.15)
