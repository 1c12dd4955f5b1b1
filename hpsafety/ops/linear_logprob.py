"""linear_logprob: contract, checks and backends. The formula stands in hpsafety/reference/linear_logprob.py."""

import math

import torch

from hpsafety import reference
from hpsafety.ops import backends
from hpsafety.ops.registration import Op, check
from hpsafety.ops.rows import values_readable

BACKENDS = ("cpu", "triton", "cuda")
DTYPES = (torch.float32, torch.bfloat16)


def _fake(hidden, weight, targets, temperature, entropy):
    n = hidden.shape[0]
    logprobs, norm = hidden.new_empty(n, dtype=torch.float32), hidden.new_empty(2, n, dtype=torch.float32)
    return logprobs, norm, hidden.new_empty(n if entropy else 0, dtype=torch.float32)


def _fake_backward(
    grad, grad_entropy, hidden, weight, targets, norm, entropy, temperature, need_hidden, need_weight
):  # fmt: skip
    return (
        hidden.new_empty(hidden.shape if need_hidden else (0,)),
        weight.new_empty(weight.shape if need_weight else (0,)),
    )


_backward_op = Op(
    "linear_logprob_backward",
    "(Tensor grad, Tensor? grad_entropy, Tensor hidden, Tensor weight, Tensor targets, Tensor norm, Tensor? entropy,"
    " float temperature, bool need_hidden, bool need_weight) -> (Tensor, Tensor)",
    {
        "cpu": lambda *args: backends.cpu().linear_logprob_backward(*args),
        "triton": lambda *args: backends.triton("linear_logprob").linear_logprob_backward(*args),
        "cuda": lambda *args: backends.cuda("linear_logprob").linear_logprob_backward(*args),
    },
    _fake_backward,
)


def _setup_context(ctx, inputs, output):
    hidden, weight, targets, temperature, entropy, impl = inputs
    _, norm, entropies = output
    ctx.save_for_backward(hidden, weight, targets, norm, entropies)
    ctx.mark_non_differentiable(*((norm,) if entropy else (norm, entropies)))
    ctx.temperature, ctx.impl = temperature, impl
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, _, grad_entropy):
    hidden, weight, targets, norm, entropies = ctx.saved_tensors
    if grad is None and grad_entropy is None:
        return None, None, None, None, None, None
    need_hidden, need_weight = ctx.needs_input_grad[:2]
    grad_hidden, grad_weight = _backward_op(
        norm.new_zeros(norm.shape[1]) if grad is None else grad, grad_entropy, hidden, weight, targets, norm,
        None if grad_entropy is None else entropies, ctx.temperature, need_hidden, need_weight, ctx.impl,
    )  # fmt: skip
    return grad_hidden if need_hidden else None, grad_weight if need_weight else None, None, None, None, None


_op = Op(
    "linear_logprob",
    "(Tensor hidden, Tensor weight, Tensor targets, float temperature, bool entropy) -> (Tensor, Tensor, Tensor)",
    {
        "cpu": lambda *args: backends.cpu().linear_logprob(*args),
        "triton": lambda *args: backends.triton("linear_logprob").linear_logprob(*args),
        "cuda": lambda *args: backends.cuda("linear_logprob").linear_logprob(*args),
    },
    _fake,
    _setup_context,
    _backward,
)


def check_linear_inputs(op: str, hidden, weight, targets) -> None:
    """Shapes, dtypes, devices, and on CPU (elsewhere with HPSAFETY_CHECK=1) that every target is a word; raises
    ValueError."""
    check(hidden.dim() == 2, "{}: hidden must be (N, D), got shape {}", op, tuple(hidden.shape))
    check(
        weight.dim() == 2 and weight.shape[1:] == hidden.shape[1:] and weight.shape[0] > 0
        and weight.dtype == hidden.dtype and weight.device == hidden.device,
        "{}: weight must be (V, {}) {} on {} with V > 0, got {} {} on {}",
        op, hidden.shape[1], hidden.dtype, hidden.device, tuple(weight.shape), weight.dtype, weight.device,
    )  # fmt: skip
    check(
        targets.shape == hidden.shape[:1] and targets.dtype in (torch.int64, torch.int32)
        and targets.device == hidden.device,
        "{}: targets must be ({},) int64 on {}, got {} {} on {}",
        op, hidden.shape[0], hidden.device, tuple(targets.shape), targets.dtype, targets.device,
    )  # fmt: skip
    if targets.numel() and values_readable(targets):
        low, high = (int(v) for v in targets.aminmax())
        check(
            0 <= low and high < weight.shape[0],
            "{}: targets must lie in [0, {}), got values from {} to {}; leave masked rows out instead of marking them",
            op, weight.shape[0], low, high,
        )  # fmt: skip


def linear_logprob(hidden, weight, targets, temperature=1.0, entropy=False, *, impl=None):
    """Log-probability of one word per row, log softmax(hidden @ weight^T / temperature); never holds (N, V).

    hidden       (N, D) fp32 or bf16; the rows that are scored or trained and no others. Logits are fp32 either way;
                 with bf16 their gradients are rounded to bf16 for the last two GEMMs where the CPU multiplies bf16
    weight       (V, D) same dtype
    targets      (N,) int64 in [0, V)
    temperature  > 0, divides the logits
    entropy      also return -sum p log p of each row (nats), with gradients
    returns      logprobs (N,) fp32, all <= 0, or (logprobs, entropy)
    Accumulates in fp32, the weight gradient over all rows too; rows whose incoming gradients are zero are left out of
    the backward. The number of threads changes no bit, and a row's logprob does not depend on the other rows where
    the BLAS rounds alike for every M >= 16 (MKL does). In Triton it never does, the backward holds 64 MB of logit
    gradients and, for bf16, fp32 sums (N, D) and (8192, D), and a target that is no word gives NaN. In CUDA likewise,
    but with a BLAS's products: a row depends on no other where cuBLAS rounds alike for every M, which it does not
    promise; and rows without gradient take part in the backward's products as zeros.
    A hidden row with NaN or inf gives NaN for that row alone; such a weight row gives NaN for every row, unless its
    logit is -inf, which counts as probability 0. Rows without incoming gradient may hold anything.
    Raises ValueError on shapes, dtypes, devices or targets that do not fit.
    """
    check_linear_inputs("linear_logprob", hidden, weight, targets)
    temperature = float(temperature)
    check(
        0 < temperature < math.inf, "linear_logprob: temperature must be a finite number > 0, got {}", temperature
    )  # fmt: skip
    impl = backends.resolve("linear_logprob", impl, BACKENDS, hidden.device.type)
    if impl == "reference":
        return reference.linear_logprob(hidden, weight, targets, temperature, entropy)
    check(hidden.dtype in DTYPES, "linear_logprob: hidden must be float32 or bfloat16, got {}", hidden.dtype)
    logprobs, _, entropies = _op(hidden, weight, targets, temperature, bool(entropy), impl)
    return (logprobs, entropies) if entropy else logprobs
