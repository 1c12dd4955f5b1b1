"""distill_loss against plain torch, whole and chunked. Limit: the GEMMs.

The shape's KIND picks the divergence: 0 forward_kl, 1 reverse_kl, 2 jsd.
"""

import math

import torch

from bench.ops import _linear
from bench.ops.case import Case
from hpsafety import ops, reference
from hpsafety.ops.distill_loss import BACKENDS, KINDS

SHAPES = (
    *({"N": 4096, "D": 576, "D2": 576, "V": 49_152, "KIND": kind} for kind in range(3)),
    {
        "N": 512,
        "D": 2048,
        "D2": 4096,
        "V": 32_000,
        "KIND": 0,
    },  # a Llama 2 7B teaches a student of half its width
)
CHECK = {"N": 257, "D": 64, "D2": 33, "V": 507, "KIND": 2}
DIRECTIONS = _linear.DIRECTIONS


def _divergence(logq, logp, kind):
    """As a trainer writes it, with torch's kl_div: kl(a, b) is KL(b || a)."""

    def kl(a, b):
        return torch.nn.functional.kl_div(a, b, reduction="none", log_target=True).sum(-1)

    if kind == "jsd":
        logm = torch.logaddexp(logp, logq) - math.log(2)
        return (kl(logm, logp) + kl(logm, logq)) / 2
    return kl(logq, logp) if kind == "forward_kl" else kl(logp, logq)


def case(shape, dtype, device, direction, seed=0) -> Case:
    n, d, d2, v, kind = shape["N"], shape["D"], shape["D2"], shape["V"], KINDS[shape["KIND"]]
    g = torch.Generator().manual_seed(seed)
    hidden, weight = _linear.model(n, d, v, dtype, device, g)
    teacher_hidden, teacher_weight = _linear.model(n, d2, v, dtype, device, g)
    incoming = torch.rand(n, generator=g).to(device) / n
    args = hidden, weight, incoming, direction

    def ours(impl):
        return lambda h, w, rows: ops.distill_loss(
            h, w, teacher_hidden[rows], teacher_weight, kind, impl=impl
        )

    def plain(h, w, rows):
        with torch.no_grad():
            logp = (teacher_hidden[rows] @ teacher_weight.T).float().log_softmax(-1)
        return _divergence((h @ w.T).float().log_softmax(-1), logp, kind)

    def exact():
        def oracle(h, w, rows):
            return reference.distill_loss(h, w, teacher_hidden[rows].double(), teacher_weight.double(), kind)

        return _linear.contender(oracle, hidden.double(), weight.double(), incoming.double(), direction)()

    gemms = ((n, d2, v, 1), *_linear.gemms(n, d, v, direction))
    return Case(
        op="distill_loss",
        shape=shape,
        dtype=dtype,
        device=device,
        direction=direction,
        run=lambda impl: _linear.contender(ours(impl), *args)(),
        impls=BACKENDS,
        peers=_linear.peers(plain, *args),
        exact=exact,
        flops=_linear.flops(gemms),
        bytes=_linear.traffic(hidden, weight, direction) + teacher_hidden.nbytes + teacher_weight.nbytes,
        gemms=gemms,
        note=kind
        + ("; both logits are computed again in backward: 6 GEMMs where 4 are strictly needed"
           if direction == "both" else ""),
    )  # fmt: skip
