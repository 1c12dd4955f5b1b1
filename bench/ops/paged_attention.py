"""paged_attention: one decoding step of attention over a paged cache, with and without shared prompts.

peers
    own copies      our op, the prompt's pages in every sequence's own table: what sharing the prefix saves
    gather + sdpa   per sequence: its pages gathered into a dense matrix, then torch's SDPA
    dense sdpa      one SDPA call on a cache that lies ready as a dense, padded (B, G, tokens, K), prompts copied: no
                    gathering and no pages, but memory for the longest sequence times B
"""

import torch
import torch.nn.functional as nnf

from bench.ops.case import Case
from hpsafety import ops, reference
from hpsafety.ops.paged_attention import BACKENDS

# B sequences in `groups` groups (0: no prefix) of `prefix` tokens, with `own` tokens each, +- a quarter
SHAPES = (
    {"B": 32, "groups": 4, "prefix": 512, "own": 64, "page": 16, "H": 9, "G": 3, "K": 64},
    {"B": 64, "groups": 1, "prefix": 512, "own": 64, "page": 16, "H": 9, "G": 3, "K": 64},
    {"B": 64, "groups": 0, "prefix": 0, "own": 256, "page": 16, "H": 9, "G": 3, "K": 64},
    {"B": 1, "groups": 0, "prefix": 0, "own": 8192, "page": 16, "H": 9, "G": 3, "K": 64},
    {"B": 16, "groups": 2, "prefix": 1024, "own": 256, "page": 32, "H": 32, "G": 8, "K": 128},
)
CHECK = {"B": 5, "groups": 2, "prefix": 37, "own": 11, "page": 3, "H": 6, "G": 2, "K": 20}
DIRECTIONS = ("forward",)


class Cache:
    """Shuffled pages, tables and lengths of one case."""

    def __init__(self, shape, dtype, device, seed):
        g = torch.Generator().manual_seed(seed)
        page, b, groups = shape["page"], shape["B"], shape["groups"]
        low, high = shape["own"] * 3 // 4, shape["own"] * 5 // 4
        own = torch.randint(low, high + 1, (b,), generator=g) if b > 1 else torch.tensor([shape["own"]])
        per_own, per_prefix = -(-int(own.max()) // page), -(-shape["prefix"] // page)
        pages = torch.randperm(b * per_own + groups * per_prefix, generator=g).to(torch.int32)
        size = (len(pages), page, shape["G"], shape["K"])
        self.k, self.v = (torch.randn(size, generator=g).to(device, dtype) for _ in range(2))
        self.q = torch.randn((b, shape["H"], shape["K"]), generator=g).to(device, dtype)
        self.table = pages[: b * per_own].view(b, per_own).to(device)
        self.lens = own.to(device, torch.int32)
        self.prefix = None
        if groups:
            lens = torch.full((groups,), shape["prefix"], dtype=torch.int32)
            group_of = torch.arange(b, dtype=torch.int32) % groups
            self.prefix = tuple(
                x.to(device) for x in (pages[b * per_own :].view(groups, per_prefix), lens, group_of)
            )

    def tokens(self) -> int:
        """Read once each."""
        return int(self.lens.sum()) + (int(self.prefix[1].sum()) if self.prefix else 0)

    def seen(self) -> int:
        """Summed over the sequences."""
        return int(self.lens.sum()) + (int(self.prefix[1][self.prefix[2].long()].sum()) if self.prefix else 0)

    def rows(self, pages, b):
        """The dense keys or values (tokens, G, K) of a sequence."""
        size = self.k.shape[1]
        parts = [(self.table[b], int(self.lens[b]))]
        if self.prefix:
            group = int(self.prefix[2][b])
            parts.insert(0, (self.prefix[0][group], int(self.prefix[1][group])))
        return torch.cat([pages[t[: -(-n // size)].long()].flatten(0, 1)[:n] for t, n in parts])


def _sdpa(q, k, v, mask=None):
    return nnf.scaled_dot_product_attention(q[:, :, None], k, v, attn_mask=mask, enable_gqa=True)[:, :, 0]


def _peers(cache):
    def gathered():
        outs = []
        for b in range(len(cache.q)):
            k, v = (cache.rows(x, b).transpose(0, 1)[None] for x in (cache.k, cache.v))
            outs.append(_sdpa(cache.q[b : b + 1], k, v))
        return (torch.cat(outs),)

    keys, values = ([cache.rows(x, b) for b in range(len(cache.q))] for x in (cache.k, cache.v))
    lens = torch.tensor([len(x) for x in keys])
    mask = (torch.arange(int(lens.max())) < lens[:, None])[:, None, None].to(cache.q.device)
    mask = None if mask.all() else mask
    k, v = (
        torch.nn.utils.rnn.pad_sequence(x, batch_first=True).transpose(1, 2).contiguous()
        for x in (keys, values)
    )
    peers = {"gather + sdpa": gathered, "dense sdpa": lambda: (_sdpa(cache.q, k, v, mask),)}
    size = cache.k.shape[1]
    if cache.prefix and not (cache.prefix[1] % size).any():
        table = torch.cat([cache.prefix[0][cache.prefix[2].long()], cache.table], 1)
        whole = (lens.to(cache.q.device, torch.int32),)
        peers["own copies"] = lambda: (ops.paged_attention(cache.q, cache.k, cache.v, table, *whole),)
    return peers


def case(shape, dtype, device, direction, seed=0) -> Case:
    if direction not in DIRECTIONS:
        raise ValueError(f"paged_attention has no backward; got direction {direction!r}")
    cache = Cache(shape, dtype, device, seed)
    inputs = (cache.table, cache.lens, cache.prefix)
    exact = [x.double() for x in (cache.q, cache.k, cache.v)]
    megabytes = 2 * cache.tokens() * shape["G"] * shape["K"] * dtype.itemsize / 1e6
    unshared = megabytes * cache.seen() / max(1, cache.tokens())
    return Case(
        op="paged_attention", shape=shape, dtype=dtype, device=device, direction=direction, impls=BACKENDS,
        run=lambda impl: (ops.paged_attention(cache.q, cache.k, cache.v, *inputs, impl=impl),),
        peers=_peers(cache), exact=lambda: (reference.paged_attention(*exact, *inputs),),
        flops=4 * shape["H"] * shape["K"] * cache.seen(),
        bytes=megabytes * 1e6 + 2 * cache.q.numel() * dtype.itemsize,
        note=f"keys and values {megabytes:.1f} MB, {unshared:.1f} MB if each sequence read the prompt for itself; "
        "one call after another finds in the caches of the CPU what fits there",
    )  # fmt: skip
