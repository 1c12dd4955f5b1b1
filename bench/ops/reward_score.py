"""reward_score: R responses in groups of 8, two reward models. Limit: bytes, the 2 R rows that are read."""

import torch

from bench.ops.case import Case
from hpsafety import ops, reference
from hpsafety.reference.reward_score import RewardScore

SHAPES = [{"R": 512, "D": 576, "T": 16_384}, {"R": 512, "D": 4096, "T": 16_384}]
CHECK = {"R": 40, "D": 77, "T": 300}
DIRECTIONS = ("forward",)
GROUP = 8


def _plain(
    hidden_safety, hidden_helpful, last_rows, head_safety, head_helpful, is_safety, cu_groups, **norms
):
    def logits(hidden, head, norm):
        x = hidden[last_rows].float()
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * norm.float()
        return x @ head.float()

    safety = logits(hidden_safety, head_safety, norms["norm_safety"])
    helpful = logits(hidden_helpful, head_helpful, norms["norm_helpful"])
    combined = torch.where(is_safety | (safety.sigmoid() < 0.15), safety, helpful)
    z = combined.double()
    whitened = ((z - z.mean()) / (z.std(correction=0) + 1e-8)).float()
    best = combined.view(-1, GROUP).argmax(1) + cu_groups[:-1]
    return RewardScore(safety, helpful, combined, whitened, best)


def case(shape, dtype, device, direction, seed=0) -> Case:
    g = torch.Generator().manual_seed(seed)
    r, d, t = shape["R"], shape["D"], shape["T"]

    def normal(*size, scale=1.0, mean=0.0):
        return (torch.randn(*size, generator=g) * scale + mean).to(device, dtype)

    args = {"hidden_safety": normal(t, d), "hidden_helpful": normal(t, d)}
    args["last_rows"] = torch.randperm(t, generator=g)[:r].to(device)
    args |= {"head_safety": normal(d, scale=d**-0.5), "head_helpful": normal(d, scale=d**-0.5)}
    args["is_safety"] = (torch.rand(r, generator=g) < 0.3).to(device)
    args["cu_groups"] = torch.arange(0, r + 1, GROUP, dtype=torch.int32).to(device)
    args |= {f"norm_{k}": normal(d, scale=0.1, mean=1.0) for k in ("safety", "helpful")}

    def exact():
        return tuple(
            reference.reward_score(**{k: v.double() if v.is_floating_point() else v for k, v in args.items()})
        )

    return Case(
        op="reward_score", shape=shape, dtype=dtype, device=device, direction=direction,
        run=lambda impl: tuple(ops.reward_score(**args, impl=impl)),
        impls=("cpu",), peers={"torch": lambda: tuple(_plain(**args))}, exact=exact,
        flops=12.0 * r * d, bytes=2.0 * dtype.itemsize * r * d,
        note="two models, an RMSNorm each",
    )  # fmt: skip
