"""linear_cross_entropy: contract, checks and backends. The formula stands in
hpsafety/reference/linear_cross_entropy.py."""

import torch

from hpsafety import reference
from hpsafety.ops import backends
from hpsafety.ops.linear_logprob import DTYPES, check_linear_inputs
from hpsafety.ops.registration import Op, check

BACKENDS = ("cpu", "triton")


def _fake(hidden, weight, targets, row_weights, need_hidden, need_weight):
    return (
        hidden.new_empty((), dtype=torch.float32),
        hidden.new_empty(hidden.shape[0], dtype=torch.float32),
        hidden.new_empty(hidden.shape if need_hidden else (0,)),
        weight.new_empty(weight.shape if need_weight else (0,)),
    )


def _setup_context(ctx, inputs, output):
    # Not save_for_backward: backward must give away the only reference, or autograd copies the gradient of the
    # whole vocabulary into .grad instead of keeping it.
    ctx.grads = [g if need else None for g, need in zip(output[2:], inputs[4:6], strict=True)]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, *_):
    if grad is None:
        return (None,) * 7
    if ctx.grads is None:
        raise RuntimeError(
            "linear_cross_entropy: backward runs once, it gives its gradients away; call the op again"
        )
    grads, ctx.grads = ctx.grads, None
    if not (
        type(grad) is torch.Tensor and grad.device.type == "cpu" and float(grad) == 1
    ):  # else: nothing to scale
        grads = [None if g is None else (g * grad).to(g.dtype) for g in grads]
    return (*grads, None, None, None, None, None)


_op = Op(
    "linear_cross_entropy",
    "(Tensor hidden, Tensor weight, Tensor targets, Tensor row_weights, bool need_hidden, bool need_weight)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    {
        "cpu": lambda *args: backends.cpu().linear_cross_entropy(*args),
        "triton": lambda *args: backends.triton("linear_cross_entropy").linear_cross_entropy(*args),
    },
    _fake,
    _setup_context,
    _backward,
)


def linear_cross_entropy(hidden, weight, targets, row_weights, *, impl=None):
    """-sum_n row_weights[n] * log softmax(hidden @ weight^T)[n, targets[n]], gradients made in the forward.

    hidden       (N, D) fp32 or bf16; the rows that are trained. Logits are fp32 either way
    weight       (V, D) same dtype
    targets      (N,) int64 in [0, V)
    row_weights  (N,) fp32, no gradient; the loss's denominator goes in here. Rows of weight 0 do not count at all
    returns      loss () fp32, logprobs (N,) fp32 without gradient
    Three GEMMs for loss and both gradients, where linear_logprob needs four; it holds the logits of 256 rows (50 MB
    at 49,152 words), for bf16 also the weight gradient in fp32; in Triton as many rows as 256 MB take, at least 256,
    and the fp32 weight gradient only where N is more than that. Backward scales what the forward made, and does not
    when the incoming gradient is exactly 1. The number of threads changes no bit.
    A hidden row with NaN or inf gives NaN for its logprob and, unless its weight is 0, for the loss.
    Raises ValueError on shapes, dtypes, devices or targets that do not fit.
    """
    check_linear_inputs("linear_cross_entropy", hidden, weight, targets)
    check(
        row_weights.shape == targets.shape and row_weights.dtype == torch.float32
        and row_weights.device == hidden.device,
        "linear_cross_entropy: row_weights must be ({},) float32 on {}, got {} {} on {}",
        targets.shape[0], hidden.device, tuple(row_weights.shape), row_weights.dtype, row_weights.device,
    )  # fmt: skip
    impl = backends.resolve("linear_cross_entropy", impl, BACKENDS, hidden.device.type)
    if impl == "reference":
        return reference.linear_cross_entropy(hidden, weight, targets, row_weights)
    check(
        hidden.dtype in DTYPES, "linear_cross_entropy: hidden must be float32 or bfloat16, got {}", hidden.dtype
    )  # fmt: skip
    training = torch.is_grad_enabled()
    needs = training and hidden.requires_grad, training and weight.requires_grad
    return _op(hidden, weight, targets, row_weights, *needs, impl)[:2]
