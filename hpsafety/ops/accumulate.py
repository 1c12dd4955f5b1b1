"""accumulate_: contract, checks and backends. The formula stands in hpsafety/reference/accumulate.py.

It works outside of autograd, in a gradient's hook, and is never traced, so it goes to the backend directly.
"""

import torch

from hpsafety import reference
from hpsafety.ops import backends
from hpsafety.ops.registration import check

BACKENDS = ("cpu", "triton")


@torch.no_grad()
def accumulate_(total, grad, *, impl=None):
    """total += grad, in place.

    total  fp32, contiguous: the sum so far
    grad   fp32 or bf16 of total's shape and device; copied first where it is not contiguous
    Each element is one fp32 addition, so NaN and inf propagate and the number of threads changes no bit.
    Raises ValueError on a dtype, shape, device or stride that does not fit.
    """
    check(
        total.dtype == torch.float32 and total.is_contiguous(),
        "accumulate_: total must be contiguous float32, got {} with strides {}",
        total.dtype, total.stride(),
    )  # fmt: skip
    check(
        grad.shape == total.shape and grad.device == total.device
        and grad.dtype in (torch.float32, torch.bfloat16),
        "accumulate_: grad must be {} float32 or bfloat16 on {}, got {} {} on {}",
        tuple(total.shape), total.device, tuple(grad.shape), grad.dtype, grad.device,
    )  # fmt: skip
    impl = backends.resolve("accumulate_", impl, BACKENDS, total.device.type)
    if impl == "reference":
        total.copy_(reference.accumulate(total, grad))
        return
    run = backends.triton("accumulate") if impl == "triton" else backends.cpu()
    run.accumulate_(total, grad.contiguous())
