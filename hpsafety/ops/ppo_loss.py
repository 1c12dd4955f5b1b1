"""ppo_loss: contract, checks and backends. The formula stands in hpsafety/reference/ppo_loss.py."""

import math

import torch

from hpsafety import reference
from hpsafety.ops import backends
from hpsafety.ops.registration import Op, check
from hpsafety.ops.rows import check_rows, denominator
from hpsafety.reference.ppo_loss import PPOLoss

BACKENDS = ("cpu", "triton", "cuda")
_NUM_INPUTS = 15  # of the custom op, impl included
_VALUES, _ENTROPY = 3, 7  # positions of these inputs


def _fake(logprobs, old_logprobs, advantages, values, old_values, returns, mask, entropy, *_):
    fp32 = {"dtype": torch.float32}
    grads = logprobs.new_empty((2 if entropy is None else 3, logprobs.shape[0]), **fp32)
    return logprobs.new_empty((), **fp32), logprobs.new_empty(6, **fp32), grads


def _setup_context(ctx, inputs, output):
    _, stats, grads = output
    ctx.save_for_backward(stats, grads)
    ctx.mark_non_differentiable(stats, grads)
    ctx.dtypes = {i: inputs[i].dtype for i in (0, _VALUES, _ENTROPY) if inputs[i] is not None}
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, *_):
    result = [None] * _NUM_INPUTS
    if grad is None:
        return tuple(result)
    stats, grads = ctx.saved_tensors
    scale = grad * stats[5]
    for row, (i, dtype) in enumerate(ctx.dtypes.items()):
        if ctx.needs_input_grad[i]:
            result[i] = (grads[row] * scale).to(dtype)
    return tuple(result)


_op = Op(
    "ppo_loss",
    "(Tensor logprobs, Tensor old_logprobs, Tensor advantages, Tensor values, Tensor old_values, Tensor returns,"
    " Tensor mask, Tensor? entropy, float clip_ratio, float value_clip, float value_coef, float entropy_coef,"
    " float? num_tokens, Tensor? num_tokens_tensor) -> (Tensor, Tensor, Tensor)",
    {
        "cpu": lambda *args: backends.cpu().ppo_loss(*args),
        "triton": lambda *args: backends.triton("ppo_loss").ppo_loss(*args),
        "cuda": lambda *args: backends.cuda("ppo_loss").ppo_loss(*args),
    },
    _fake,
    _setup_context,
    _backward,
)


def _check(rows, mask, settings, impl):
    check_rows("ppo_loss", rows, impl)
    logprobs = rows["logprobs"]
    check(
        mask.shape == logprobs.shape and mask.dtype == torch.bool and mask.device == logprobs.device,
        "ppo_loss: mask must be {} bool on {}, got {} {} on {}",
        tuple(logprobs.shape), logprobs.device, tuple(mask.shape), mask.dtype, mask.device,
    )  # fmt: skip
    for name, value in settings.items():
        check(0 <= value < math.inf, "ppo_loss: {} must be a finite number >= 0, got {}", name, value)


def ppo_loss(
    logprobs, old_logprobs, advantages, values, old_values, returns, mask, *,
    entropy=None, clip_ratio=0.2, value_clip=0.2, value_coef=0.5, entropy_coef=0.0, num_tokens=None, impl=None,
):  # fmt: skip
    """PPO's clipped policy and value losses, the entropy bonus and the step's metrics, in one pass.

    With m the mask, n = num_tokens, d = logprobs - old_logprobs and rho = exp(d):
    policy_loss    -sum m min(rho A, clip(rho) A) / n, rho clipped to [1 - clip_ratio, 1 + clip_ratio]
    value_loss     1/2 sum m max((v - R)^2, (v_old + clip(v - v_old) - R)^2) / n, clipped to +- value_clip
    loss           policy_loss + value_coef value_loss - entropy_coef sum m entropy / n
    clip_fraction  tokens with m = 1 and |rho - 1| > clip_ratio, divided by n
    approx_kl      sum m (exp(d) - 1 - d) / n; never negative, and exact for small d
    ratio_max      max of rho over m = 1; 0 where there is none

    logprobs, old_logprobs, advantages (A), values (v), old_values (v_old), returns (R), entropy
                 (N,) fp32 or bf16, in any mix
    mask         (N,) bool; what it leaves out adds nothing, even NaN or inf
    num_tokens   None (sum of the mask), a number or a 0-dim tensor: the count over all micro-batches and ranks.
                 All fields but ratio_max then add up over micro-batches to those of the whole; ratio_max is maximised
    returns      PPOLoss of 0-dim fp32 tensors. Gradients flow through `loss` alone, to logprobs, values and entropy;
                 the other arguments are constants
    Where both branches are equal, the unclipped one's gradient holds. n = 0 gives zeros.
    Saved for backward: the gradients of n loss, made in the same pass (fp32, 8 bytes a token, 12 with entropy), and
    1/n.
    Sums are in double in a fixed order: the number of threads changes no bit.
    NaN and inf where m = 1 propagate as in the formula: rho = inf is clipped where A > 0 (gradient 0) and gives an
    infinite loss and gradient where A < 0; where A = 0 it adds 0.
    Raises ValueError on shapes, dtypes, devices, negative or non-finite settings, and entropy_coef without entropy.
    """
    rows = {
        "logprobs": logprobs, "old_logprobs": old_logprobs, "advantages": advantages,
        "values": values, "old_values": old_values, "returns": returns,
    }  # fmt: skip
    settings = {"clip_ratio": clip_ratio, "value_clip": value_clip, "value_coef": value_coef}
    settings["entropy_coef"] = entropy_coef
    check(
        entropy is not None or entropy_coef == 0, "ppo_loss: entropy_coef is {}, but entropy is None", entropy_coef
    )  # fmt: skip
    impl = backends.resolve("ppo_loss", impl, BACKENDS, mask.device.type)
    _check(rows if entropy is None else rows | {"entropy": entropy}, mask, settings, impl)
    number, tensor = denominator("ppo_loss", "num_tokens", num_tokens, logprobs.device)
    if impl == "reference":
        return reference.ppo_loss(*rows.values(), mask, entropy=entropy, num_tokens=num_tokens, **settings)
    loss, stats, _ = _op(*rows.values(), mask, entropy, *map(float, settings.values()), number, tensor, impl)
    return PPOLoss(loss, *stats.unbind()[:5])
