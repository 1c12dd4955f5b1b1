"""adamw_ over lists of tensors. Limit: bytes, 28 a parameter; and launches, which do not grow with the number of
tensors: one makes the step's factors, and one updates what has gradients of one dtype."""

import math

import torch
import triton
import triton.language as tl

from hpsafety.triton_kernels.launch import launch
from hpsafety.triton_kernels.tensor_list import addresses, by_dtype, chunks, locate, pointer

SHARED_BYTES = (4096, 4096)  # a block's at most, on sm_80 and on sm_90
CHUNK = 16384  # elements of a program
BLOCK = 1024  # elements at a time: 8 a thread


@triton.jit
def adamw_factors(
    step_ptr, norm_ptr, factors_ptr, lr: tl.float64, log_beta1: tl.float64, log_beta2: tl.float64,
    max_norm: tl.float64, CLIPPING: tl.constexpr,
):  # fmt: skip
    """Counts the step and writes what depends on it and on the norm, made in fp64: [clip, step size, 1 / root, go].
    Where the norm is not finite, go is 0 and the count stays."""
    norm = tl.load(norm_ptr).to(tl.float64)
    go = (norm - norm == 0.0).to(tl.int32)
    step = tl.load(step_ptr) + go
    tl.store(step_ptr, step)
    t = step.to(tl.float64)
    clip = tl.full([], 1.0, tl.float64)
    if CLIPPING:
        clip = tl.minimum(clip, max_norm / (norm + 1e-6))
    tl.store(factors_ptr, clip.to(tl.float32))
    tl.store(factors_ptr + 1, (lr / (1.0 - tl.exp(t * log_beta1))).to(tl.float32))
    tl.store(factors_ptr + 2, (1.0 / tl.sqrt(1.0 - tl.exp(t * log_beta2))).to(tl.float32))
    tl.store(factors_ptr + 3, go.to(tl.float32))


@triton.jit
def _update(
    p_ptr, g_ptr, m_ptr, v_ptr, c_ptr, at, mask, clip, step_size, inverse_root, decay, beta1, one_minus_beta1, beta2,
    one_minus_beta2, eps, HAS_COPY: tl.constexpr,
):  # fmt: skip
    g = tl.load(g_ptr + at, mask=mask).to(tl.float32) * clip
    m = tl.load(m_ptr + at, mask=mask) * beta1 + g * one_minus_beta1
    v = tl.load(v_ptr + at, mask=mask) * beta2 + g * g * one_minus_beta2
    p = tl.load(p_ptr + at, mask=mask) * decay
    p -= tl.div_rn(step_size * m, tl.sqrt_rn(v) * inverse_root + eps)
    tl.store(m_ptr + at, m, mask=mask)
    tl.store(v_ptr + at, v, mask=mask)
    tl.store(p_ptr + at, p, mask=mask)
    if HAS_COPY:
        tl.store(c_ptr + at, p.to(c_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tensors"])
def adamw_update(
    chunks_ptr, sizes_ptr, addresses_ptr, factors_ptr, grad_ptr, copy_ptr, tensors, decay, beta1, one_minus_beta1,
    beta2, one_minus_beta2, eps, HAS_COPY: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """addresses (4 or 5, tensors): params, grads, exp_avg, exp_avg_sq, copies; grad_ptr and copy_ptr tell the types."""
    if tl.load(factors_ptr + 3) != 0.0:
        clip, step_size, inverse_root = (
            tl.load(factors_ptr),
            tl.load(factors_ptr + 1),
            tl.load(factors_ptr + 2),
        )
        tensor, first, size = locate(chunks_ptr, sizes_ptr, CHUNK)
        p_ptr = pointer(addresses_ptr, tensor, factors_ptr, ALIGNED) + first
        g_ptr = pointer(addresses_ptr, tensors + tensor, grad_ptr, ALIGNED) + first
        m_ptr = pointer(addresses_ptr, 2 * tensors + tensor, factors_ptr, ALIGNED) + first
        v_ptr = pointer(addresses_ptr, 3 * tensors + tensor, factors_ptr, ALIGNED) + first
        c_ptr = p_ptr
        if HAS_COPY:
            c_ptr = pointer(addresses_ptr, 4 * tensors + tensor, copy_ptr, ALIGNED) + first
        count = tl.minimum(size - first, CHUNK).to(tl.int32)
        whole = count // BLOCK * BLOCK  # a mask that the compiler cannot see through would make narrow loads
        for start in range(0, whole, BLOCK):
            _update(
                p_ptr, g_ptr, m_ptr, v_ptr, c_ptr, start + tl.arange(0, BLOCK), None, clip, step_size, inverse_root,
                decay, beta1, one_minus_beta1, beta2, one_minus_beta2, eps, HAS_COPY,
            )  # fmt: skip
        if whole < count:
            at = whole + tl.arange(0, BLOCK)
            _update(
                p_ptr, g_ptr, m_ptr, v_ptr, c_ptr, at, at < count, clip, step_size, inverse_root, decay, beta1,
                one_minus_beta1, beta2, one_minus_beta2, eps, HAS_COPY,
            )  # fmt: skip


def _log(beta: float) -> float:
    return math.log(beta) if beta > 0 else -math.inf


def adamw_(
    params, grads, exp_avg, exp_avg_sq, lr, beta1, beta2, eps, weight_decay, step, grad_norm, max_norm, copies
) -> None:  # fmt: skip
    """One step in place; `copies` may be empty."""
    factors = step.new_empty(4, dtype=torch.float32)
    clipping = 0 < max_norm < math.inf
    launch(
        adamw_factors, 1, step, grad_norm, factors, float(lr), _log(beta1), _log(beta2), float(max_norm),
        CLIPPING=clipping, num_warps=1,
    )  # fmt: skip
    for group in by_dtype(grads):
        lists = [[x[i] for i in group] for x in (params, grads, exp_avg, exp_avg_sq, copies) if x]
        table, aligned = addresses(lists)
        of_chunk, sizes = chunks(lists[0], CHUNK)
        launch(
            adamw_update, of_chunk.shape[0], of_chunk, sizes, table, factors, lists[1][0],
            lists[4][0] if copies else None, len(group), 1.0 - lr * weight_decay, beta1, 1.0 - beta1, beta2,
            1.0 - beta2, eps, HAS_COPY=bool(copies), ALIGNED=aligned, CHUNK=CHUNK, BLOCK=BLOCK,
        )  # fmt: skip
