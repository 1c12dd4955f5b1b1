"""The count that a loss is divided by, in fp64: a tensor on the device, a number, or what the call counted itself."""

import triton
import triton.language as tl


@triton.jit
def inverse_count(count_ptr, number, counted, HAS_TENSOR: tl.constexpr, HAS_NUMBER: tl.constexpr):
    """1 / count; 0 for 0, so that nothing to average gives 0. `counted` is fp64."""
    count = counted
    if HAS_TENSOR:
        count = tl.load(count_ptr).to(tl.float64)
    elif HAS_NUMBER:
        count = counted * 0.0 + number
    return tl.where(count == 0.0, 0.0, 1.0 / count)
