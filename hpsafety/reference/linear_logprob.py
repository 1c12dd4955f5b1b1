"""Oracle of linear_logprob: plain torch, any dtype; holds the whole (N, V)."""

import torch


def linear_logprob(hidden, weight, targets, temperature=1.0, entropy=False):
    """log softmax(hidden @ weight^T / temperature)[n, targets[n]], and the entropy -sum p log p of each row.

    hidden    (N, D)
    weight    (V, D)
    targets   (N,) int64 in [0, V)
    returns   logprobs (N,) fp32 (fp64 for fp64 inputs), or (logprobs, entropy)
    """
    logits = hidden @ weight.T / temperature
    logp = logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    chosen = logp.gather(-1, targets.long()[:, None])[:, 0]
    return (chosen, -(logp.exp() * logp).sum(-1)) if entropy else chosen
