"""gae: contract, checks and backends. The formula stands in hpsafety/reference/gae.py."""

import torch

from hpsafety import reference
from hpsafety.ops import backends
from hpsafety.ops.registration import Op, check
from hpsafety.ops.rows import check_offsets, check_rows

BACKENDS = ("cpu", "triton", "cuda")


def _fake(rewards, values, cu_responses, gamma, lam):
    return rewards.new_empty(rewards.shape, dtype=torch.float32), values.new_empty(
        values.shape, dtype=torch.float32
    )


_op = Op(
    "gae",
    "(Tensor rewards, Tensor values, Tensor cu_responses, float gamma, float lam) -> (Tensor, Tensor)",
    {
        "cpu": lambda *args: backends.cpu().gae(*args),
        "triton": lambda *args: backends.triton("gae").gae(*args),
        "cuda": lambda *args: backends.cuda("gae").gae(*args),
    },
    _fake,
)


def gae(rewards, values, cu_responses, gamma=1.0, lam=0.95, *, impl=None):
    """Generalised advantage estimation over packed responses, each for itself, from its last token back:

    A_t = delta_t + gamma lam A_{t+1},  delta_t = rewards_t + gamma values_{t+1} - values_t
    with values and A past a response's end = 0

    rewards, values  (N,) fp32 or bf16
    cu_responses     (R+1,) int32 (int64 is taken too): offsets of the responses in N, from 0 to N, rising strictly
    gamma, lam       in [0, 1]
    returns          advantages (N,) fp32, returns = advantages + values (N,) fp32; constants: no gradient flows
    Accumulates in double, and rounds once. A response has the same bits alone and in any batch, for any number of
    threads. NaN and inf spread to the earlier tokens of their own response and no further.
    Raises ValueError on shapes, dtypes, devices, gamma or lam out of range, and offsets that do not fit.
    """
    impl = backends.resolve("gae", impl, BACKENDS, rewards.device.type)
    check_rows("gae", {"rewards": rewards, "values": values}, impl)
    for name, value in (("gamma", gamma), ("lam", lam)):
        check(0 <= value <= 1, "gae: {} must lie in [0, 1], got {}", name, value)
    check_offsets("gae", "cu_responses", cu_responses, rewards.shape[0], rewards.device)
    if impl == "reference":
        return reference.gae(rewards, values, cu_responses, gamma, lam)
    return _op(rewards.detach(), values.detach(), cu_responses, float(gamma), float(lam), impl)
