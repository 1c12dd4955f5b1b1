"""accumulate_: total += grad, fp32 += fp32 or bf16. Limit: bytes, 10 an element for bf16."""

import triton
import triton.language as tl

from hpsafety.triton_kernels.launch import launch

SHARED_BYTES = (4096, 4096)  # a block's at most, on sm_80 and on sm_90
BLOCK = 1024  # elements of a program: 8 a thread


@triton.jit
def add(total_ptr, grad_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < n  # n is a parameter's size: it is specialised, so that where 16 divides it loads are wide
    total = tl.load(total_ptr + at, mask=mask)
    tl.store(total_ptr + at, total + tl.load(grad_ptr + at, mask=mask).to(tl.float32), mask=mask)


def accumulate_(total, grad) -> None:
    """Adds grad to total, in place; both contiguous."""
    n = total.numel()
    launch(add, triton.cdiv(n, BLOCK), total, grad, n, BLOCK=BLOCK)
