"""Oracle of attention: dense softmax per segment, plain torch, any dtype."""

import torch


def check_segments(segments, total):
    """Raises ValueError unless the segments are non-empty, sorted, disjoint, and prefixes lie before their rows."""
    previous_end = 0
    for i, (start, end, prefix_start, prefix_end) in enumerate(segments.tolist()):
        if start >= end:
            raise ValueError(f"attention: segments[{i}] is empty: start {start}, end {end}")
        if start < previous_end:
            raise ValueError(
                f"attention: segments must be sorted and must not overlap; segments[{i}] starts at {start}, "
                f"the one before ends at {previous_end}"
            )
        if end > total:
            raise ValueError(f"attention: segments[{i}] ends at {end}, but there are {total} rows")
        if prefix_start != prefix_end and not 0 <= prefix_start < prefix_end <= start:
            raise ValueError(
                f"attention: the prefix of segments[{i}] must lie in [0, {start}), before its own rows; "
                f"got {prefix_start} to {prefix_end}"
            )
        previous_end = end


def attention(q, k, v, segments, softmax_scale=None, deterministic=False):
    """softmax(q k^T * scale) v of each segment's rows over its prefix (all of it) and its own rows (causal).

    q         (T, H, K)
    k, v      (T, G, K); query head h reads kv head h // (H / G)
    segments  (S, 4) int32: start, end, prefix_start, prefix_end; equal prefix bounds mean no prefix
    returns   (T, H, K); rows of no segment are zero
    A NaN stays inside its segment and the segments whose prefix holds it.
    """
    check_segments(segments, q.shape[0])
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    group = q.shape[1] // k.shape[1]
    pieces, done = [], 0
    for start, end, prefix_start, prefix_end in segments.tolist():
        own, prefix = slice(start, end), slice(prefix_start, prefix_end)
        keys = torch.cat([k[prefix], k[own]]).repeat_interleave(group, dim=1)
        values = torch.cat([v[prefix], v[own]]).repeat_interleave(group, dim=1)
        scores = torch.einsum("ihk,jhk->hij", q[own], keys) * scale
        rows = torch.arange(end - start, device=q.device)[:, None] + (prefix_end - prefix_start)
        hidden = torch.arange(keys.shape[0], device=q.device) > rows
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        pieces += [torch.zeros_like(q[done:start]), torch.einsum("hij,jhk->ihk", weights, values)]
        done = end
    return torch.cat([*pieces, torch.zeros_like(q[done:])])
