"""linear_logprob against plain torch, whole and chunked. Limit: the GEMMs."""

import torch

from bench.ops import _linear
from bench.ops.case import Case
from hpsafety import ops, reference
from hpsafety.ops.linear_logprob import BACKENDS

SHAPES, CHECK, DIRECTIONS = _linear.SHAPES, _linear.CHECK, _linear.DIRECTIONS


def case(shape, dtype, device, direction, seed=0) -> Case:
    n, d, v = shape["N"], shape["D"], shape["V"]
    g = torch.Generator().manual_seed(seed)
    hidden, weight = _linear.model(n, d, v, dtype, device, g)
    targets = torch.randint(0, v, (n,), generator=g).to(device)
    incoming = torch.rand(n, generator=g).to(device) / n
    args = hidden, weight, incoming, direction

    def ours(impl):
        return lambda h, w, rows: ops.linear_logprob(h, w, targets[rows], impl=impl)

    def plain(h, w, rows):
        return (h @ w.T).float().log_softmax(-1).gather(-1, targets[rows, None])[:, 0]

    def exact():
        def oracle(h, w, rows):
            return reference.linear_logprob(h, w, targets[rows])

        return _linear.contender(oracle, hidden.double(), weight.double(), incoming.double(), direction)()

    gemms = _linear.gemms(n, d, v, direction)
    return Case(
        op="linear_logprob",
        shape=shape,
        dtype=dtype,
        device=device,
        direction=direction,
        run=lambda impl: _linear.contender(ours(impl), *args)(),
        impls=BACKENDS,
        peers=_linear.peers(plain, *args),
        exact=exact,
        flops=_linear.flops(gemms),
        bytes=_linear.traffic(hidden, weight, direction) + targets.nbytes,
        gemms=gemms,
        note="the logits are computed again in backward: 4 GEMMs where 3 are strictly needed"
        if direction == "both"
        else "",
    )
