"""Oracle of paged_attention: the context gathered into one dense matrix per sequence, plain torch, any dtype."""

import torch


def _check_lengths(name, lens, table, page_size):
    covered = table.shape[1] * page_size
    for i, length in enumerate(lens.tolist()):
        if not 0 <= length <= covered:
            raise ValueError(
                f"paged_attention: {name}[{i}] must lie in [0, {covered}], which {table.shape[1]} pages of "
                f"{page_size} tokens cover, got {length}"
            )


def _tokens(pages, name, table, row, length):
    """The first `length` keys or values (length, G, K) of a row of a table."""
    used = table[row, : -(-length // pages.shape[1])].tolist()
    for i, page in enumerate(used):
        if not 0 <= page < pages.shape[0]:
            raise ValueError(
                f"paged_attention: {name}[{row}][{i}] must lie in [0, {pages.shape[0]}), got {page}"
            )
    return pages[used].flatten(0, 1)[:length]


def paged_attention(q, k_pages, v_pages, block_table, context_lens, prefix=None, softmax_scale=None):
    """softmax(q k^T * scale) v of one query per sequence over its prefix and its own tokens.

    q                 (B, H, K)
    k_pages, v_pages  (pages, page_size, G, K); query head h reads kv head h // (H / G)
    block_table       (B, max_blocks) int32: token t of sequence b stands in slot t % page_size of page
                      block_table[b, t // page_size]
    context_lens      (B,) int32
    prefix            None, or (table (groups, pages), lens (groups,), group_of (B,)), int32: the tokens that come
                      before those of each sequence of the group
    returns           (B, H, K); zeros for a sequence without any token
    """
    size = k_pages.shape[1]
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    repeats = q.shape[1] // k_pages.shape[2]
    _check_lengths("context_lens", context_lens, block_table, size)
    if prefix is not None:
        _check_lengths("prefix lens", prefix[1], prefix[0], size)
    rows = []
    for b, own in enumerate(context_lens.tolist()):
        parts = [("block_table", block_table, b, own)]
        if prefix is not None:
            table, lens, group_of = prefix
            group = int(group_of[b])
            if not 0 <= group < len(lens):
                raise ValueError(f"paged_attention: group_of[{b}] must lie in [0, {len(lens)}), got {group}")
            parts.insert(0, ("prefix table", table, group, int(lens[group])))
        keys = torch.cat([_tokens(k_pages, *part) for part in parts]).repeat_interleave(repeats, dim=1)
        values = torch.cat([_tokens(v_pages, *part) for part in parts]).repeat_interleave(repeats, dim=1)
        weights = (torch.einsum("hk,jhk->hj", q[b], keys) * scale).softmax(-1)
        rows.append(torch.einsum("hj,jhk->hk", weights, values))
    return torch.stack(rows) if rows else torch.zeros_like(q)
