import torch

from hpsafety.triton_kernels import paged_attention as kernels

PAGE_SIZE = 16


def run(shapes, empty) -> None:
    """One decoding step of all responses, the prompts shared; and its sequential form."""
    heads, kv_heads, dim = shapes.heads, shapes.kv_heads, shapes.head_dim
    sequences = shapes.prompts * shapes.responses

    def ints(*shape):
        return empty(*shape, dtype=torch.int32)

    pages = [empty(4096, PAGE_SIZE, kv_heads, dim) for _ in range(2)]
    own = (ints(sequences, shapes.response_length // PAGE_SIZE), ints(sequences))
    prefix = (ints(shapes.prompts, shapes.prompt_length // PAGE_SIZE), ints(shapes.prompts), ints(sequences))
    for sequential in (False, True):
        q = empty(sequences, heads, dim)
        kernels.paged_attention(q, *pages, *own, *prefix, dim**-0.5, sequential)
