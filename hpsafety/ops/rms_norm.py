"""rms_norm: contract, checks and backends. The formula stands in hpsafety/reference/rms_norm.py."""

import torch

from hpsafety import reference
from hpsafety.ops import apex_backend, backends
from hpsafety.ops.registration import Op, check

BACKENDS = ("cpu", "triton", "apex")
DTYPES = (torch.float32, torch.bfloat16)


def _fake(x, weight, eps, residual):
    summed = x.new_empty(x.shape if residual is not None else (0,))
    return x.new_empty(x.shape), summed, x.new_empty(x.shape[:1], dtype=torch.float32)


def _fake_backward(grad_y, grad_sum, x, weight, rstd):
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


backward_op = Op(
    "rms_norm_backward",
    "(Tensor grad_y, Tensor? grad_sum, Tensor x, Tensor weight, Tensor rstd) -> (Tensor, Tensor)",
    {
        "cpu": lambda *args: backends.cpu().rms_norm_backward(*args),
        "triton": lambda *args: backends.triton("rms_norm").rms_norm_backward(*args),
        "apex": apex_backend.rms_norm_backward,
    },
    _fake_backward,
)


def _setup_context(ctx, inputs, output):
    x, weight, _, residual, impl = inputs
    _, summed, rstd = output
    ctx.save_for_backward(x if residual is None else summed, weight, rstd)
    ctx.mark_non_differentiable(rstd)
    ctx.impl, ctx.has_residual = impl, residual is not None
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_y, grad_sum, _):
    x, weight, rstd = ctx.saved_tensors
    if grad_y is None:
        return grad_sum, None, None, grad_sum, None
    grad_sum = grad_sum if ctx.has_residual else None
    grad_x, grad_weight = backward_op(grad_y, grad_sum, x, weight, rstd, ctx.impl)
    return grad_x, grad_weight, None, (grad_x if ctx.has_residual else None), None


forward_op = Op(
    "rms_norm",
    "(Tensor x, Tensor weight, float eps, Tensor? residual) -> (Tensor, Tensor, Tensor)",
    {
        "cpu": lambda *args: backends.cpu().rms_norm(*args),
        "triton": lambda *args: backends.triton("rms_norm").rms_norm(*args),
        "apex": apex_backend.rms_norm,
    },
    _fake,
    _setup_context,
    _backward,
)


def rms_norm(x, weight, eps, residual=None, *, impl=None):
    """y = x / sqrt(mean(x^2) + eps) * weight; with a residual, of x + residual, which is returned too.

    x         (T, D) fp32 or bf16
    weight    (D,) same dtype as x
    eps       added to the mean square
    residual  (T, D) like x, or None
    returns   y (T, D) like x, or (y, residual_out) with residual_out = x + residual
    Saved for backward: the normalised input and rstd (T,) fp32; grad_weight is summed in fp32, in a fixed order.
    A row with a NaN gives a row of NaN, one with an inf gives NaN there and zeros beside it, as torch does; no other
    row changes, but grad_weight sums over rows and is NaN then.
    Raises ValueError on shapes, dtypes or devices that do not fit.
    """
    check(x.dim() == 2, "rms_norm: x must be (T, D), got shape {}", tuple(x.shape))
    check(
        weight.shape == x.shape[1:] and weight.dtype == x.dtype and weight.device == x.device,
        "rms_norm: weight must be ({},) {} on {}, got {} {} on {}",
        x.shape[1], x.dtype, x.device, tuple(weight.shape), weight.dtype, weight.device,
    )  # fmt: skip
    if residual is not None:
        check(
            residual.shape == x.shape and residual.dtype == x.dtype and residual.device == x.device,
            "rms_norm: residual must be like x {} {} on {}, got {} {} on {}",
            tuple(x.shape), x.dtype, x.device, tuple(residual.shape), residual.dtype, residual.device,
        )  # fmt: skip
    impl = backends.resolve("rms_norm", impl, BACKENDS, x.device.type)
    if impl == "reference":
        return reference.rms_norm(x, weight, eps, residual)
    check(x.dtype in DTYPES, "rms_norm: x must be float32 or bfloat16, got {}", x.dtype)
    y, summed, _ = forward_op(x, weight, float(eps), residual, impl)
    return y if residual is None else (y, summed)
