"""distill_loss: contract, checks and backends. The formula stands in hpsafety/reference/distill_loss.py."""

import math

import torch

from hpsafety import reference
from hpsafety.ops import backends
from hpsafety.ops.registration import Op, check

BACKENDS = ("cpu", "triton")
KINDS = ("forward_kl", "reverse_kl", "jsd")


def _fake(student_hidden, student_weight, teacher_hidden, teacher_weight, kind, temperature):
    n = student_hidden.shape[0]
    return student_hidden.new_empty(n, dtype=torch.float32), student_hidden.new_empty(
        5, n, dtype=torch.float64
    )


def _fake_backward(
    grad, student_hidden, student_weight, teacher_hidden, teacher_weight, norm, kind, temperature, need_hidden,
    need_weight,
):  # fmt: skip
    return (
        student_hidden.new_empty(student_hidden.shape if need_hidden else (0,)),
        student_weight.new_empty(student_weight.shape if need_weight else (0,)),
    )


_backward_op = Op(
    "distill_loss_backward",
    "(Tensor grad, Tensor student_hidden, Tensor student_weight, Tensor teacher_hidden, Tensor teacher_weight,"
    " Tensor norm, str kind, float temperature, bool need_hidden, bool need_weight) -> (Tensor, Tensor)",
    {
        "cpu": lambda *args: backends.cpu().distill_loss_backward(*args),
        "triton": lambda *args: backends.triton("distill_loss").distill_loss_backward(*args),
    },
    _fake_backward,
)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.kind, ctx.temperature, ctx.impl = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, _):
    if grad is None:
        return (None,) * 7
    need_hidden, need_weight = ctx.needs_input_grad[:2]
    grad_hidden, grad_weight = _backward_op(
        grad, *ctx.saved_tensors, ctx.kind, ctx.temperature, need_hidden, need_weight, ctx.impl
    )
    return grad_hidden if need_hidden else None, grad_weight if need_weight else None, *(None,) * 5


_op = Op(
    "distill_loss",
    "(Tensor student_hidden, Tensor student_weight, Tensor teacher_hidden, Tensor teacher_weight, str kind,"
    " float temperature) -> (Tensor, Tensor)",
    {
        "cpu": lambda *args: backends.cpu().distill_loss(*args),
        "triton": lambda *args: backends.triton("distill_loss").distill_loss(*args),
    },
    _fake,
    _setup_context,
    _backward,
)


def _check_side(side: str, hidden, weight) -> None:
    check(
        hidden.dim() == 2 and hidden.dtype in (torch.float32, torch.bfloat16),
        "distill_loss: {}_hidden must be (N, D) float32 or bfloat16, got {} {}",
        side, tuple(hidden.shape), hidden.dtype,
    )  # fmt: skip
    check(
        weight.dim() == 2 and weight.shape[1:] == hidden.shape[1:] and weight.shape[0] > 0
        and weight.dtype == hidden.dtype and weight.device == hidden.device,
        "distill_loss: {}_weight must be (V, {}) {} on {} with V > 0, got {} {} on {}",
        side, hidden.shape[1], hidden.dtype, hidden.device, tuple(weight.shape), weight.dtype, weight.device,
    )  # fmt: skip


def distill_loss(
    student_hidden,
    student_weight,
    teacher_hidden,
    teacher_weight,
    kind="forward_kl",
    temperature=1.0,
    *,
    impl=None,
):
    """Divergence of each row between teacher p and student q, softmax(hidden @ weight^T / temperature); no T^2 factor.

    student_hidden  (N, D) fp32 or bf16; the rows that are distilled and no others
    student_weight  (V, D) same dtype
    teacher_hidden  (N, D2) fp32 or bf16, its own dtype and width; gets no gradient, whether it requires one or not
    teacher_weight  (V, D2) same dtype as teacher_hidden; likewise
    kind            "forward_kl": KL(p||q) = sum p (log p - log q); "reverse_kl": KL(q||p);
                    "jsd": KL(p||m) / 2 + KL(q||m) / 2 with m = (p + q) / 2, at most log 2
    temperature     > 0, divides the logits of both
    returns         (N,) fp32, nats, all >= 0
    Never holds (N, V): saved are five fp64 numbers per row (largest logit and log-sum of both models, the divergence
    that the gradient subtracts), and backward computes the logits again tile by tile. "jsd" holds the logits of 128
    rows of both models over the vocabulary (50 MB at 49,152 words); in Triton it holds none and computes them twice.
    Accumulates in fp32 and merges in fp64, the weight gradient in fp32 over all rows; rows whose incoming gradient is
    zero are left out of the backward. A probability that underflows contributes its limit 0. A row of NaN or infinite
    hidden gives NaN in that row alone. The number of threads changes no bit.
    Raises ValueError on shapes, dtypes, devices, a kind or a temperature that do not fit.
    """
    _check_side("student", student_hidden, student_weight)
    _check_side("teacher", teacher_hidden, teacher_weight)
    check(
        teacher_hidden.shape[0] == student_hidden.shape[0] and teacher_hidden.device == student_hidden.device,
        "distill_loss: teacher_hidden must have {} rows on {} like student_hidden, got {} on {}",
        student_hidden.shape[0], student_hidden.device, teacher_hidden.shape[0], teacher_hidden.device,
    )  # fmt: skip
    check(
        teacher_weight.shape[0] == student_weight.shape[0],
        "distill_loss: teacher_weight must have {} words like student_weight, got {}; both models need one vocabulary",
        student_weight.shape[0], teacher_weight.shape[0],
    )  # fmt: skip
    check(kind in KINDS, "distill_loss: kind must be one of {}, got {!r}", ", ".join(KINDS), kind)
    temperature = float(temperature)
    check(
        0 < temperature < math.inf,
        "distill_loss: temperature must be a finite number > 0, got {}",
        temperature,
    )
    impl = backends.resolve("distill_loss", impl, BACKENDS, student_hidden.device.type)
    args = student_hidden, student_weight, teacher_hidden.detach(), teacher_weight.detach(), kind, temperature
    return reference.distill_loss(*args) if impl == "reference" else _op(*args, impl)[0]
