"""swiglu: contract, checks and backends. The formula stands in hpsafety/reference/swiglu.py."""

import torch

from hpsafety import reference
from hpsafety.ops import backends
from hpsafety.ops.registration import Op, check

BACKENDS = ("cpu", "triton")
DTYPES = (torch.float32, torch.bfloat16)


def _fake(gate_up):
    return gate_up.new_empty((gate_up.shape[0], gate_up.shape[1] // 2))


def _fake_backward(grad, gate_up):
    return gate_up.new_empty(gate_up.shape), grad.new_empty(grad.shape)


# Returns (grad_gate_up, y): a caller that did not keep y for the down projection's gradient gets it from this pass.
backward_op = Op(
    "swiglu_backward",
    "(Tensor grad, Tensor gate_up) -> (Tensor, Tensor)",
    {
        "cpu": lambda *args: backends.cpu().swiglu_backward(*args),
        "triton": lambda *args: backends.triton("swiglu").swiglu_backward(*args),
    },
    _fake_backward,
)


def _setup_context(ctx, inputs, output):
    gate_up, ctx.impl = inputs
    ctx.save_for_backward(gate_up)


def _backward(ctx, grad):
    return backward_op(grad, *ctx.saved_tensors, ctx.impl)[0], None


forward_op = Op(
    "swiglu",
    "(Tensor gate_up) -> Tensor",
    {
        "cpu": lambda *args: backends.cpu().swiglu(*args),
        "triton": lambda *args: backends.triton("swiglu").swiglu(*args),
    },
    _fake,
    _setup_context,
    _backward,
)


def swiglu(gate_up, *, impl=None):
    """y = silu(gate) * up.

    gate_up  (T, 2F) fp32 or bf16: the first F columns are the gate
    returns  (T, F) like gate_up; the arithmetic is fp32
    Saved for backward: gate_up only.
    NaN stays in its column pair; a gate of -inf gives NaN (-inf * 0), as in torch.
    Raises ValueError on a shape or dtype that does not fit.
    """
    check(
        gate_up.dim() == 2 and gate_up.shape[1] % 2 == 0,
        "swiglu: gate_up must be (T, 2F), got shape {}", tuple(gate_up.shape),
    )  # fmt: skip
    impl = backends.resolve("swiglu", impl, BACKENDS, gate_up.device.type)
    if impl == "reference":
        return reference.swiglu(gate_up)
    check(gate_up.dtype in DTYPES, "swiglu: gate_up must be float32 or bfloat16, got {}", gate_up.dtype)
    return forward_op(gate_up, impl)
