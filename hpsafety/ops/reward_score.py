"""reward_score: contract, checks and backends. The formula stands in hpsafety/reference/reward_score.py."""

import math

import torch

from hpsafety import reference
from hpsafety.ops import backends
from hpsafety.ops.registration import Op, check
from hpsafety.ops.rows import check_offsets, check_rows, values_readable
from hpsafety.reference.reward_score import RewardScore

BACKENDS = ("cpu", "triton", "cuda")


def _fake(hidden_safety, hidden_helpful, last_rows, head_safety, head_helpful, is_safety, cu_groups, *_):
    scores = [hidden_safety.new_empty(last_rows.shape, dtype=torch.float32) for _ in range(4)]
    return *scores, last_rows.new_empty(cu_groups.shape[0] - 1, dtype=torch.int64)


THRESHOLD = 0.15  # of R_s, below which it is the safety score that counts on any prompt (PPO-1)

_op = Op(
    "reward_score",
    "(Tensor hidden_safety, Tensor hidden_helpful, Tensor last_rows, Tensor head_safety, Tensor head_helpful,"
    " Tensor is_safety, Tensor cu_groups, Tensor? norm_safety, Tensor? norm_helpful, float eps, float threshold)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    {
        "cpu": lambda *args: backends.cpu().reward_score(*args),
        "triton": lambda *args: backends.triton("reward_score").reward_score(*args),
        "cuda": lambda *args: backends.cuda("reward_score").reward_score(*args),
    },
    _fake,
)


def _check_model(kind, hidden, head, norm, impl):
    check(
        hidden.dim() == 2 and hidden.shape[1] > 0,
        "reward_score: hidden_{} must be (T, D) with D > 0, got shape {}", kind, tuple(hidden.shape),
    )  # fmt: skip
    allowed = (torch.float32, torch.bfloat16, *((torch.float64,) if impl == "reference" else ()))
    check(
        hidden.dtype in allowed, "reward_score: hidden_{} must be float32 or bfloat16, got {}", kind, hidden.dtype
    )  # fmt: skip
    for name, weight in (("head", head), ("norm", norm)):
        if weight is None:
            continue
        check(
            weight.shape == hidden.shape[1:] and weight.dtype == hidden.dtype and weight.device == hidden.device,
            "reward_score: {}_{} must be ({},) {} on {}, got {} {} on {}", name, kind, hidden.shape[1], hidden.dtype,
            hidden.device, tuple(weight.shape), weight.dtype, weight.device,
        )  # fmt: skip


def _check_responses(hidden_safety, hidden_helpful, last_rows, is_safety, cu_groups):
    tokens, device = hidden_safety.shape[0], hidden_safety.device
    check(
        hidden_helpful.shape[0] == tokens and hidden_helpful.device == device,
        "reward_score: hidden_helpful must have hidden_safety's {} rows on {}, got {} on {}",
        tokens, device, hidden_helpful.shape[0], hidden_helpful.device,
    )  # fmt: skip
    check_rows("reward_score", {"last_rows": last_rows}, None, (torch.int64, torch.int32))
    check(
        last_rows.device == device, "reward_score: last_rows must be on {}, got {}", device, last_rows.device
    )
    check(
        is_safety.shape == last_rows.shape and is_safety.dtype == torch.bool and is_safety.device == device,
        "reward_score: is_safety must be {} bool on {}, got {} {} on {}",
        tuple(last_rows.shape), device, tuple(is_safety.shape), is_safety.dtype, is_safety.device,
    )  # fmt: skip
    if last_rows.numel() and values_readable(last_rows):
        low, high = (int(v) for v in last_rows.aminmax())
        check(
            0 <= low and high < tokens,
            "reward_score: last_rows must lie in [0, {}), got values from {} to {}", tokens, low, high,
        )  # fmt: skip
    check_offsets("reward_score", "cu_groups", cu_groups, last_rows.shape[0], device)


def reward_score(
    hidden_safety, hidden_helpful, last_rows, head_safety, head_helpful, is_safety, cu_groups, *,
    norm_safety=None, norm_helpful=None, eps=1e-5, threshold=THRESHOLD, impl=None,
):  # fmt: skip
    """Both reward models' scores of R responses, the one that counts, and the best response of each group.

    hidden_safety, hidden_helpful  (T, D1), (T, D2) fp32 or bf16; may be one tensor (two heads on one trunk)
    last_rows                      (R,) int64 in [0, T): the row of each response's last token; no other is read
    head_*                         (D,) like its hidden
    is_safety                      (R,) bool: the prompt's tag
    cu_groups                      (groups + 1,) int32: offsets of the groups in R, from 0 to R, rising strictly
    norm_*, eps                    weight (D,) of an RMSNorm between hidden and head, for hidden before the final norm
    threshold                      of the route, in [0, 1]
    returns RewardScore
      r_safety, r_helpful  (R,) fp32 logits
      combined             (R,) fp32 logits: r_safety where is_safety or sigmoid(r_safety) < threshold, else r_helpful.
                           The sigmoid is rounded to fp32 before it is compared: a score of exactly 0.15, that is the
                           fp32 logit log(0.15 / 0.85), goes to helpful
      whitened             (R,) fp32: (combined - mean) / (std + 1e-8) over these R rows, in fp64, population std;
                           exact zeros where all are equal
      best_of_group        (groups,) int64: the best response by combined, as its index in [0, R), not within the
                           group; the lowest index of equals
    Constants: no gradient flows. fp32 sums in a fixed order, the last steps in double: a response has the same bits
    alone, in any batch and in any place, for any number of threads.
    A NaN r_safety of an untagged response is its combined; a NaN in combined makes all of whitened NaN, and
    best_of_group passes over it unless the group has nothing else.
    Raises ValueError on shapes, dtypes, devices, rows out of range, and groups that are empty or do not cover R.
    """
    impl = backends.resolve("reward_score", impl, BACKENDS, hidden_safety.device.type)
    _check_model("safety", hidden_safety, head_safety, norm_safety, impl)
    _check_model("helpful", hidden_helpful, head_helpful, norm_helpful, impl)
    _check_responses(hidden_safety, hidden_helpful, last_rows, is_safety, cu_groups)
    check(0 <= threshold <= 1, "reward_score: threshold must lie in [0, 1], got {}", threshold)
    check(0 <= eps < math.inf, "reward_score: eps must be a finite number >= 0, got {}", eps)
    args = (hidden_safety, hidden_helpful, last_rows, head_safety, head_helpful, is_safety, cu_groups)
    if impl == "reference":
        return reference.reward_score(
            *args, norm_safety=norm_safety, norm_helpful=norm_helpful, eps=eps, threshold=threshold
        )
    tensors = [t if t is None else t.detach() for t in (*args, norm_safety, norm_helpful)]
    return RewardScore(*_op(*tensors, float(eps), float(threshold), impl))
