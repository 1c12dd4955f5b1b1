"""gae: N tokens in R responses. Limit: bytes, once the chain of dependent multiply-adds is cut."""

import torch

from bench.ops.case import Case
from hpsafety import ops, reference

SHAPES = [{"R": 512, "L": 32}, {"R": 4096, "L": 256}, {"R": 1, "L": 1_048_576}]
CHECK = {"R": 5, "L": 70}
DIRECTIONS = ("forward",)
LOOP_LIMIT = 20_000  # tokens up to which the loop in Python takes part


def _padded(rewards, values, cu_responses, gamma=1.0, lam=0.95):
    """The form trainers use: rows padded to the longest response, one torch step per position from the end."""
    lengths = cu_responses.diff()
    longest = int(lengths.max())
    real = torch.arange(longest, device=rewards.device) < lengths[:, None]
    r, v = (
        torch.zeros(real.shape, device=x.device).masked_scatter(real, x.float()) for x in (rewards, values)
    )
    following = torch.cat((v[:, 1:], torch.zeros_like(v[:, :1])), 1)
    delta = r + gamma * following - v
    advantage, out = torch.zeros_like(r[:, 0]), []
    for t in reversed(range(longest)):
        advantage = delta[:, t] + gamma * lam * advantage
        out.append(advantage)
    advantages = torch.stack(out[::-1], 1)[real]
    return advantages, advantages + values.float()


def _loop(rewards, values, cu_responses, gamma=1.0, lam=0.95):
    """One Python step per token."""
    r, v, cu = rewards.tolist(), values.tolist(), cu_responses.tolist()
    out = [0.0] * len(r)
    for start, end in zip(cu, cu[1:], strict=False):
        following = advantage = 0.0
        for t in range(end - 1, start - 1, -1):
            advantage = r[t] + gamma * following - v[t] + gamma * lam * advantage
            following, out[t] = v[t], advantage
    advantages = torch.tensor(out, device=rewards.device)
    return advantages, advantages + values.float()


def case(shape, dtype, device, direction, seed=0) -> Case:
    """L is the mean length; the responses are of L/2 to 3L/2 tokens where there are several."""
    g = torch.Generator().manual_seed(seed)
    r, mean = shape["R"], shape["L"]
    lengths = torch.full((r,), mean)
    if r > 1:
        lengths = torch.randint(max(1, mean // 2), mean + mean // 2 + 1, (r,), generator=g)
    n = int(lengths.sum())
    cu = torch.cat((torch.zeros(1, dtype=torch.int64), lengths.cumsum(0))).to(device, torch.int32)
    rewards, values = (torch.randn(n, generator=g).to(device, dtype) for _ in range(2))
    peers = {}
    if r > 1:  # at one long response it takes a torch step per token
        peers["torch, padded"] = lambda: _padded(rewards, values, cu)
    if n <= LOOP_LIMIT:
        peers["python loop"] = lambda: _loop(rewards, values, cu)
    return Case(
        op="gae", shape=shape, dtype=dtype, device=device, direction=direction,
        run=lambda impl: ops.gae(rewards, values, cu, impl=impl),
        impls=("cpu",), peers=peers, exact=lambda: reference.gae(rewards.double(), values.double(), cu),
        flops=7.0 * n, bytes=n * (2.0 * dtype.itemsize + 8) + 4 * (r + 1),
    )  # fmt: skip
