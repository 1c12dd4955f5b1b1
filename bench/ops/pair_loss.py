"""pair_loss: P pairs of one batch. Limit: the call itself; P is hundreds."""

import torch
from torch.nn.functional import logsigmoid

from bench.ops.case import Case
from hpsafety import ops, reference

SHAPES = [{"P": 512}, {"P": 65_536}]
CHECK = {"P": 77}
DIRECTIONS = ("forward", "both")


def _plain(chosen, rejected, margin, safe_chosen, safe_rejected, aux_weight):
    c, r = chosen.float(), rejected.float()
    loss = -logsigmoid(c - r - margin.float())
    for score, safe in ((c, safe_chosen), (r, safe_rejected)):
        label = (safe == 1).float()
        terms = label * logsigmoid(score) + (1 - label) * logsigmoid(-score)
        loss = loss - aux_weight / 2 * terms * (safe >= 0)
    return loss.mean()


def case(shape, dtype, device, direction, seed=0) -> Case:
    g = torch.Generator().manual_seed(seed)
    p = shape["P"]
    scores = [torch.randn(p, generator=g).to(device, dtype) for _ in range(2)]
    margin = (torch.randint(0, 4, (p,), generator=g) / 3).to(device, dtype)
    bins = [torch.randint(-1, 2, (p,), generator=g).to(device, torch.int8) for _ in range(2)]

    def work(function, scores=scores, margin=margin, **kwargs):
        def call():
            if direction == "forward":
                with torch.no_grad():
                    return (function(*scores, margin, *bins, 1.0, **kwargs),)
            leaves = [x.detach().requires_grad_() for x in scores]
            loss = function(*leaves, margin, *bins, 1.0, **kwargs)
            return loss.detach(), *torch.autograd.grad(loss, leaves)

        return call

    size = dtype.itemsize
    return Case(
        op="pair_loss", shape=shape, dtype=dtype, device=device, direction=direction,
        run=lambda impl: work(ops.pair_loss, impl=impl)(),
        impls=("cpu",), peers={"torch": work(_plain)},
        exact=work(reference.pair_loss, [x.double() for x in scores], margin.double()),
        flops=90.0 * p, bytes=p * (3.0 * size + 2 + (2 * size if direction == "both" else 0)),
        note="forward makes the gradients too, in fp32; backward only scales them",
    )  # fmt: skip
