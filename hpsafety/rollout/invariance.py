"""Whether this machine can give sampled tokens the logprobs of the training pass to the bit (--batch-invariant).

Four things must hold: decoding attends in training's order (`paged_attention(sequential=True)`), a response is a
segment of its own in training too (`pack(join_single=False)`), the sampler takes its logprobs from `linear_logprob` as
training does, and a row of a product does not depend on the rows beside it. The first three are ours; the last is
measured here.
"""

import torch

from hpsafety import ops
from hpsafety.model.gemm import MIN_ROWS
from hpsafety.ops import backends
from hpsafety.ops.attention import BACKENDS as ATTENTION
from hpsafety.ops.linear_logprob import BACKENDS as LOGPROB
from hpsafety.ops.paged_attention import BACKENDS as PAGED
from hpsafety.rollout.passes import row_bound

_OPS = {"attention": ATTENTION, "paged_attention": PAGED, "linear_logprob": LOGPROB}


@torch.no_grad()
def logprob_difference(model) -> float:
    """The largest change of one row's logprob when other rows stand beside it, in nats; 0.0: not by a bit.

    Measured on the model's own head with 300 random rows.
    """
    rows, head = 300, model.head_weight
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, head.shape[1], generator=generator).to(head.device, head.dtype)
    targets = torch.arange(rows, device=head.device) % head.shape[0]
    whole = ops.linear_logprob(hidden, head, targets)
    parts = [ops.linear_logprob(hidden[:n], head, targets[:n]) for n in (1, MIN_ROWS, 33, 64, 257)]
    return max(float((part - whole[: len(part)]).abs().max()) for part in parts)


def fault(model) -> str | None:
    """Why sampled logprobs may differ from the training pass's here, as part of a sentence; None: bit for bit alike."""
    device, dtype = model.embed.device.type, model.embed.dtype
    for op, have in _OPS.items():
        served = backends.resolve(op, None, have, device, dtype)
        if served != "cpu":
            return f"{op} is served by {served} on {device}, which does not keep training's order of sums"
    if bound := row_bound(model):
        return f"products change by up to {bound:.1e} with the rows beside them"
    if change := logprob_difference(model):
        return f"logprobs change by up to {change:.1e} with the rows beside them"
    return None
