"""ppo_loss: N tokens of one micro-batch. Limit: bytes. The oracle is itself the plain composite of some forty torch
calls; the peer is the composite that trainers use, with 0/1 masks."""

import torch

from bench.ops.case import Case
from hpsafety import ops, reference

SHAPES = [{"N": 16_384}, {"N": 1_048_576}]
CHECK = {"N": 4_099}
DIRECTIONS = ("forward", "both")
GRADS = ("logprobs", "values", "entropy")


def _plain(logprobs, old_logprobs, advantages, values, old_values, returns, mask, entropy):
    """clip_ratio 0.2, value_clip 0.2, value_coef 0.5, entropy_coef 0.01; in fp32, as trainers do."""
    rows = (logprobs, old_logprobs, advantages, values, old_values, returns, entropy)
    logprobs, old_logprobs, advantages, values, old_values, returns, entropy = (x.float() for x in rows)
    m = mask.float()
    n = m.sum()
    d = logprobs - old_logprobs
    ratio = d.exp()
    policy = -(torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages) * m).sum() / n
    clipped = old_values + (values - old_values).clamp(-0.2, 0.2)
    value = 0.5 * (torch.max((values - returns) ** 2, (clipped - returns) ** 2) * m).sum() / n
    loss = policy + 0.5 * value - 0.01 * (entropy * m).sum() / n
    with torch.no_grad():
        clip_fraction = (((ratio - 1).abs() > 0.2) * m).sum() / n
        approx_kl = ((ratio - 1 - d) * m).sum() / n
        return loss, policy, value, clip_fraction, approx_kl, (ratio * m).max()


def _inputs(n, dtype, device, seed):
    g = torch.Generator().manual_seed(seed)
    args = {
        k: torch.randn(n, generator=g) for k in ("logprobs", "advantages", "returns", "values", "entropy")
    }
    args["old_logprobs"] = args["logprobs"] + torch.randn(n, generator=g) * 0.2
    args["old_values"] = args["values"] + torch.randn(n, generator=g) * 0.3
    args = {k: v.to(device, dtype) for k, v in args.items()}
    return args | {"mask": (torch.rand(n, generator=g) < 0.9).to(device)}


def case(shape, dtype, device, direction, seed=0) -> Case:
    args = _inputs(shape["N"], dtype, device, seed)

    def work(function, args=args, **kwargs):
        def call():
            if direction == "forward":
                with torch.no_grad():
                    return tuple(function(**args, **kwargs))
            leaves = args | {k: args[k].detach().requires_grad_() for k in GRADS}
            out = function(**leaves, **kwargs)
            return *(x.detach() for x in out), *torch.autograd.grad(out[0], [leaves[k] for k in GRADS])

        return call

    doubles = {k: v.double() if v.is_floating_point() else v for k, v in args.items()}
    size, rows = dtype.itemsize, len(args) - 1
    moved = shape["N"] * (rows * size + 1 + (3 * size if direction == "both" else 0))
    return Case(
        op="ppo_loss", shape=shape, dtype=dtype, device=device, direction=direction,
        run=lambda impl: work(ops.ppo_loss, entropy_coef=0.01, impl=impl)(),
        impls=("cpu",), peers={"torch": work(_plain)},
        exact=work(reference.ppo_loss, doubles, entropy_coef=0.01),
        flops=60.0 * shape["N"], bytes=float(moved),
        note="forward makes the gradients too, in fp32; backward only scales them",
    )  # fmt: skip
