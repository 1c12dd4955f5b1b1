import torch

from hpsafety.triton_kernels import paged_attention as kernels

SEQUENCES, GROUPS, PAGE_SIZE = 64, 8, 16


def run(shapes, empty) -> None:
    """One decoding step with and without shared prefixes, and its sequential form."""
    heads, kv_heads, dim = shapes.heads, shapes.kv_heads, shapes.head_dim

    def ints(*shape):
        return empty(*shape, dtype=torch.int32)

    pages = [empty(4096, PAGE_SIZE, kv_heads, dim) for _ in range(2)]
    own = (ints(SEQUENCES, 64), ints(SEQUENCES))
    prefix = (ints(GROUPS, 64), ints(GROUPS), ints(SEQUENCES))
    for parts, sequential in ((prefix, False), (prefix, True), ((None,) * 3, False)):
        q = empty(SEQUENCES, heads, dim)
        kernels.paged_attention(q, *pages, *own, *parts, dim**-0.5, sequential)
