"""linear_cross_entropy against plain torch, whole and chunked. Limit: the GEMMs."""

import torch

from bench.ops import _linear
from bench.ops.case import Case
from hpsafety import ops, reference
from hpsafety.ops.linear_cross_entropy import BACKENDS

SHAPES, CHECK, DIRECTIONS = _linear.SHAPES, _linear.CHECK, _linear.DIRECTIONS


def case(shape, dtype, device, direction, seed=0) -> Case:
    n, d, v = shape["N"], shape["D"], shape["V"]
    g = torch.Generator().manual_seed(seed)
    hidden, weight = _linear.model(n, d, v, dtype, device, g)
    targets = torch.randint(0, v, (n,), generator=g).to(device)
    row_weights = torch.rand(n, generator=g).to(device) / n

    def whole(function, h, w, weights, **kwargs):
        """Loss and logprobs, then in direction "both" the gradients."""
        both = direction == "both"
        h, w = (t.detach().requires_grad_(both) for t in (h, w))
        with torch.set_grad_enabled(both):
            loss, logprobs = function(h, w, targets, weights, **kwargs)
        grads = torch.autograd.grad(loss, (h, w)) if both else ()
        return loss.detach(), logprobs.detach(), *grads

    def chunked(rows):
        def logprob(h, w, s):
            return (h @ w.T).float().log_softmax(-1).gather(-1, targets[s, None])[:, 0]

        logprobs, *grads = _linear.contender(logprob, hidden, weight, -row_weights, direction, rows)()
        return -(row_weights * logprobs).sum(), logprobs, *grads

    gemms = _linear.gemms(n, d, v, direction)
    return Case(
        op="linear_cross_entropy",
        shape=shape,
        dtype=dtype,
        device=device,
        direction=direction,
        run=lambda impl: whole(ops.linear_cross_entropy, hidden, weight, row_weights, impl=impl),
        impls=BACKENDS,
        peers={"torch": lambda: chunked(None), "torch chunked": lambda: chunked(256)},
        exact=lambda: whole(
            reference.linear_cross_entropy, hidden.double(), weight.double(), row_weights.double()
        ),
        flops=_linear.flops(gemms),
        bytes=_linear.traffic(hidden, weight, direction) + targets.nbytes + row_weights.nbytes,
        gemms=gemms,
        note="gradients made in the forward from the logits of 256 rows" if direction == "both" else "",
    )
