"""grad_norm_sq over lists of tensors: a partial sum in fp64 for each chunk, then their sum. Limit: bytes."""

import torch
import triton
import triton.language as tl

from hpsafety.triton_kernels.launch import launch
from hpsafety.triton_kernels.tensor_list import addresses, by_dtype, chunks, locate, pointer

SHARED_BYTES = (64, 64)  # a block's at most, on sm_80 and on sm_90
CHUNK = 16384  # elements of a partial sum
BLOCK = 1024  # elements at a time: 8 a thread
PARTIALS = 1024  # at a time


@triton.jit
def squares_of_chunks(
    chunks_ptr, sizes_ptr, addresses_ptr, grad_ptr, partial_ptr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """partial[program] = its chunk's sum of squares."""
    tensor, first, size = locate(chunks_ptr, sizes_ptr, CHUNK)
    x_ptr = pointer(addresses_ptr, tensor, grad_ptr, ALIGNED) + first
    count = tl.minimum(size - first, CHUNK).to(tl.int32)
    whole = count // BLOCK * BLOCK
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, whole, BLOCK):
        x = tl.load(x_ptr + start + tl.arange(0, BLOCK)).to(tl.float32).to(tl.float64)
        total += x * x
    at = whole + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < count, other=0.0).to(tl.float32).to(tl.float64)
    tl.store(partial_ptr + tl.program_id(0), tl.sum(total + x * x, 0))


@triton.jit(do_not_specialize=["partials"])
def sum_of_partials(partial_ptr, out_ptr, partials, BLOCK: tl.constexpr):
    """In an order that nothing but `partials` decides."""
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, partials, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.load(partial_ptr + at, mask=at < partials, other=0.0)
    tl.store(out_ptr, tl.sum(total, 0))


def grad_norm_sq(grads):
    """The sum of squares over all tensors, 0-dim fp64."""
    grads = [x.contiguous() for x in grads]
    groups = [[grads[i] for i in group] for group in by_dtype(grads)]
    tables = [chunks(group, CHUNK) for group in groups]
    count = sum(of_chunk.shape[0] for of_chunk, _ in tables)
    partial = grads[0].new_empty(count, dtype=torch.float64)
    out = grads[0].new_empty((), dtype=torch.float64)
    first = 0
    for group, (of_chunk, sizes) in zip(groups, tables, strict=True):
        table, aligned = addresses([group])
        programs = of_chunk.shape[0]
        launch(
            squares_of_chunks, programs, of_chunk, sizes, table, group[0], partial.narrow(0, first, programs),
            ALIGNED=aligned, CHUNK=CHUNK, BLOCK=BLOCK,
        )  # fmt: skip
        first += programs
    launch(sum_of_partials, 1, partial, out, count, BLOCK=PARTIALS, num_warps=8)
    return out
