"""Oracle of linear_cross_entropy: plain torch, any dtype; holds the whole (N, V)."""

from hpsafety.reference.linear_logprob import linear_logprob


def linear_cross_entropy(hidden, weight, targets, row_weights):
    """loss = -sum_n row_weights[n] * logprob[n]; row_weights and the returned logprobs carry no gradient.

    hidden       (N, D)
    weight       (V, D)
    targets      (N,) int64 in [0, V)
    row_weights  (N,)
    returns      loss (), logprobs (N,)
    """
    logprobs = linear_logprob(hidden, weight, targets)
    return -(row_weights.detach() * logprobs).sum(), logprobs.detach()
