"""pair_loss: contract, checks and backends. The formula stands in hpsafety/reference/pair_loss.py."""

import math

import torch

from hpsafety import reference
from hpsafety.ops import backends
from hpsafety.ops.registration import Op, check
from hpsafety.ops.rows import check_rows, denominator, values_readable

BACKENDS = ("cpu", "triton")


def _fake(chosen, rejected, *_):
    fp32 = {"dtype": torch.float32}
    grads = chosen.new_empty((2, chosen.shape[0]), **fp32)
    return chosen.new_empty((), **fp32), chosen.new_empty((), **fp32), grads


def _setup_context(ctx, inputs, output):
    _, per_pair, grads = output
    ctx.save_for_backward(per_pair, grads)
    ctx.mark_non_differentiable(per_pair, grads)
    ctx.dtypes = [row.dtype for row in inputs[:2]]
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, *_):
    result = [None] * 10
    if grad is None:
        return tuple(result)
    per_pair, grads = ctx.saved_tensors
    scale = grad * per_pair
    for i, dtype in enumerate(ctx.dtypes):
        if ctx.needs_input_grad[i]:
            result[i] = (grads[i] * scale).to(dtype)
    return tuple(result)


_op = Op(
    "pair_loss",
    "(Tensor chosen, Tensor rejected, Tensor? margin, float margin_value, Tensor? safe_chosen, Tensor? safe_rejected,"
    " float aux_weight, float? num_pairs, Tensor? num_pairs_tensor) -> (Tensor, Tensor, Tensor)",
    {
        "cpu": lambda *args: backends.cpu().pair_loss(*args),
        "triton": lambda *args: backends.triton("pair_loss").pair_loss(*args),
    },
    _fake,
    _setup_context,
    _backward,
)


def _check_bins(name, safe, chosen):
    check(
        safe.shape == chosen.shape and safe.dtype == torch.int8 and safe.device == chosen.device,
        "pair_loss: {} must be {} int8 on {}, got {} {} on {}",
        name, tuple(chosen.shape), chosen.device, tuple(safe.shape), safe.dtype, safe.device,
    )  # fmt: skip
    if safe.numel() and values_readable(safe):
        low, high = (int(v) for v in safe.aminmax())
        check(
            -1 <= low and high <= 1,
            "pair_loss: {} must hold 1 (safe), 0 (unsafe) or -1 (no bin), got values from {} to {}", name, low, high,
        )  # fmt: skip


def pair_loss(
    chosen, rejected, margin, safe_chosen=None, safe_rejected=None, aux_weight=0.0, num_pairs=None, *, impl=None
):  # fmt: skip
    """Ranking loss of reward models with a margin, and the safety bins' auxiliary loss:

    sum over pairs of [-log sigmoid(chosen - rejected - margin) + aux_weight L_aux] / num_pairs
    L_aux = -1/2 sum over both responses of [s log sigmoid(r) + (1 - s) log(1 - sigmoid(r))]

    chosen, rejected            (P,) fp32 or bf16: scores (logits)
    margin                      (P,) fp32 or bf16, or a number; a constant
    safe_chosen, safe_rejected  (P,) int8: s = 1 safe, 0 unsafe, -1 no bin (adds 0); None is -1 throughout
    aux_weight                  >= 0; at 0 safe_* is not read: the same bits as without
    num_pairs                   None (P), a number or a 0-dim tensor: the count over all micro-batches and ranks
    returns                     scalar fp32; gradients to chosen and rejected. P = 0 or num_pairs = 0 gives 0
    Saved for backward: both gradients, made in the same pass (fp32), and 1 / num_pairs. Finite for every finite gap;
    sums in double in a fixed order. NaN propagates; a gap of -inf gives an infinite loss.
    Raises ValueError on shapes, dtypes, devices, bins other than 1, 0, -1, or a negative weight or count.
    """
    impl = backends.resolve("pair_loss", impl, BACKENDS, chosen.device.type)
    with_margin = isinstance(margin, torch.Tensor)
    check_rows(
        "pair_loss", {"chosen": chosen, "rejected": rejected} | ({"margin": margin} if with_margin else {}), impl
    )  # fmt: skip
    check(with_margin or math.isfinite(margin), "pair_loss: margin must be finite, got {}", margin)
    check(
        0 <= aux_weight < math.inf, "pair_loss: aux_weight must be a finite number >= 0, got {}", aux_weight
    )
    for name, safe in (("safe_chosen", safe_chosen), ("safe_rejected", safe_rejected)):
        if safe is not None:
            _check_bins(name, safe, chosen)
    number, tensor = denominator("pair_loss", "num_pairs", num_pairs, chosen.device)
    if impl == "reference":
        return reference.pair_loss(
            chosen, rejected, margin, safe_chosen, safe_rejected, aux_weight, num_pairs
        )
    row, value = (margin, 0.0) if with_margin else (None, float(margin))
    return _op(
        chosen, rejected, row, value, safe_chosen, safe_rejected, float(aux_weight), number, tensor, impl
    )[0]  # fmt: skip
