"""Packed attention with shared prefixes against torch's SDPA and FlexAttention, on prompts with several responses each.

peers
    sdpa             one causal call per response with a prompt copy of its own: what a trainer without padding and
                     without sharing computes; operands lie ready in that layout
    sdpa padded      one causal call on all of them, padded to the longest; operands lie ready in that layout
    sdpa block mask  one call on the packed row with a (T, T) boolean mask; small rows only: it computes T^2 scores
    flex             FlexAttention compiled, with the block mask of the very same segments. Forward only: torch 2.13
                     has no backward for CPUs. On request: compiling takes half a minute

All are given the same random q, k, v and gradients; the copies of a prompt get theirs, with the upstream gradient on
the first copy only, so that gradients summed over copies are those of the packed row.
"""

import functools
import math

import torch
import torch.nn.functional as nnf

from bench.ops.case import Case
from hpsafety import ops, reference
from hpsafety.ops.attention import BACKENDS

# prompts x responses; lengths are drawn from a quarter around P and R
SHAPES = [
    {"prompts": 32, "responses": 8, "P": 256, "R": 64, "H": 9, "G": 3, "K": 64},
    {"prompts": 4, "responses": 4, "P": 512, "R": 256, "H": 32, "G": 8, "K": 128},
]
CHECK = {"prompts": 2, "responses": 3, "P": 20, "R": 9, "H": 6, "G": 2, "K": 16}
DIRECTIONS = ("forward", "both")
MAX_MASK_ROWS, FLEX_BLOCK = 4096, 128


def _segments(shape, generator) -> list[tuple[int, int, int, int]]:
    """(start, end, prefix_start, prefix_end) of every prompt and response, as pack() lays them out."""

    def length(mean):
        return int(torch.randint(max(1, mean * 3 // 4), mean * 5 // 4 + 1, (1,), generator=generator))

    found, row = [], 0
    for _ in range(shape["prompts"]):
        prompt = row, row + length(shape["P"])
        found.append((*prompt, prompt[0], prompt[0]))
        row = prompt[1]
        for _ in range(shape["responses"]):
            found.append((row, row + length(shape["R"]), *prompt))
            row = found[-1][1]
    return found


def _pairs(segments) -> int:
    """Scores that are strictly needed: each row with its prefix and with its own rows up to itself."""
    return sum((e - s) * (pe - ps) + (e - s) * (e - s + 1) // 2 for s, e, ps, pe in segments)


def _copies(segments) -> list[torch.Tensor]:
    """Per response the packed rows of its prompt and its own: the sequences of a trainer that does not share."""
    return [torch.cat([torch.arange(ps, pe), torch.arange(s, e)]) for s, e, ps, pe in segments if pe > ps]


def _sdpa(q, k, v, **how):
    return nnf.scaled_dot_product_attention(q, k, v, enable_gqa=True, **how)


class Unshared:
    """q, k, v and the upstream gradient, laid out sequence after sequence; the two peers that work on copies."""

    def __init__(self, packed, upstream, segments, both):
        self.rows, self.both, self.total = _copies(segments), both, len(upstream)
        flat = torch.cat(self.rows)
        self.seen = torch.zeros(
            len(flat), dtype=torch.bool
        )  # places that hold a packed row for the first time
        first, self.places = {}, []
        for place, row in enumerate(flat.tolist()):
            if first.setdefault(row, place) == place:
                self.seen[place] = True
        self.flat = flat
        grad = upstream[flat] * self.seen[:, None, None].to(upstream.dtype)
        sizes = [len(rows) for rows in self.rows]
        self.x = [
            [y[None].transpose(1, 2).requires_grad_(both) for y in x.detach()[flat].split(sizes)]
            for x in packed
        ]
        self.grads = [g[None].transpose(1, 2) for g in grad.split(sizes)]
        width = max(sizes)
        self.mask = torch.arange(width)[None] < torch.tensor(sizes)[:, None]  # (B, width), True on tokens

        def padded(x):
            out = x.new_zeros((len(sizes), width, *x.shape[1:]))
            out[self.mask] = x
            return out.transpose(1, 2)

        self.padded = [padded(x.detach()[flat]).requires_grad_(both) for x in packed]
        self.padded_grad = padded(grad)

    def each(self):
        outs = [_sdpa(q, k, v, is_causal=True) for q, k, v in zip(*self.x, strict=True)]
        if not self.both:
            return outs
        return outs, torch.autograd.grad(outs, [y for x in self.x for y in x], self.grads)

    def each_unpacked(self, result):
        n = len(self.rows)
        outs, grads = result if self.both else (result, ())
        lists = [outs, *(grads[i * n : (i + 1) * n] for i in range(3 if self.both else 0))]
        return self._unpack([torch.cat([y[0].transpose(0, 1) for y in ys]) for ys in lists])

    def batched(self):
        out = _sdpa(*self.padded, is_causal=True)  # rows after a sequence's end see it, nobody sees them
        return (out, *torch.autograd.grad(out, self.padded, self.padded_grad)) if self.both else (out,)

    def batched_unpacked(self, result):
        return self._unpack([x.transpose(1, 2)[self.mask] for x in result])

    def _unpack(self, tensors):
        """Back on the packed rows: the output of a row's first copy, gradients summed over its copies."""
        out, *grads = (x.detach() for x in tensors)
        packed = torch.empty((self.total, *out.shape[1:]), dtype=out.dtype)
        packed[self.flat[self.seen]] = out[self.seen]
        zeros = (torch.zeros((self.total, *g.shape[1:])) for g in grads)
        summed = (z.index_add(0, self.flat, g.float()).to(g.dtype) for z, g in zip(zeros, grads, strict=True))
        return packed, *summed


def _visible(segments, rows: int):
    """(owner, prefix_start, prefix_end) of each row: enough to tell whether row i sees row j."""
    owner, start, end = (torch.empty(rows, dtype=torch.int64) for _ in range(3))
    for number, (s, e, ps, pe) in enumerate(segments):
        owner[s:e], start[s:e], end[s:e] = number, ps, pe
    return owner, start, end


def _sees(i, j, owner, start, end):
    return ((owner[i] == owner[j]) & (i >= j)) | ((j >= start[i]) & (j < end[i]))


def _flex(x, segments):
    """A call of compiled FlexAttention on the packed row; its block mask is made here, block row by block row."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    rows = len(x[0])
    tables = _visible(segments, rows)
    blocks = math.ceil(rows / FLEX_BLOCK)
    some, full = (torch.zeros(blocks, blocks, dtype=torch.bool) for _ in range(2))
    for number in range(blocks):
        i = torch.arange(number * FLEX_BLOCK, min(rows, (number + 1) * FLEX_BLOCK))[:, None]
        tile = nnf.pad(_sees(i, torch.arange(rows)[None], *tables), (0, blocks * FLEX_BLOCK - rows))
        tile = tile.view(len(i), blocks, FLEX_BLOCK)
        some[number] = tile.any(2).any(0)
        full[number] = tile.all(2).all(0) & (len(i) == FLEX_BLOCK)
    partial = some & ~full

    def listed(table):
        """(counts, indices of the True columns first), as BlockMask wants them."""
        order = table.int().argsort(dim=1, descending=True, stable=True).int()
        return table.sum(1).int()[None, None], order[None, None]

    mask = BlockMask.from_kv_blocks(
        *listed(partial), *listed(full), BLOCK_SIZE=FLEX_BLOCK, seq_lengths=(rows, rows),
        mask_mod=lambda b, h, i, j: _sees(i, j, *tables), compute_q_blocks=False,
    )  # fmt: skip
    compiled = torch.compile(flex_attention, dynamic=False)
    q, k, v = (y.detach()[None].transpose(1, 2) for y in x)

    def call():
        with torch.no_grad():
            return (compiled(q, k, v, block_mask=mask, enable_gqa=True)[0].transpose(0, 1),)

    return call


def _peers(x, upstream, segments, call, both):
    """(peers, unpack) for this case."""
    unshared = Unshared(x, upstream, segments, both)
    peers = {"sdpa": unshared.each, "sdpa padded": unshared.batched}
    if len(upstream) <= MAX_MASK_ROWS:
        tables = _visible(segments, len(upstream))
        rows = torch.arange(len(upstream))
        mask = _sees(rows[:, None], rows[None], *tables)
        heads = lambda y: y[None].transpose(1, 2)  # noqa: E731
        peers["sdpa block mask"] = lambda: call(
            lambda q, k, v: _sdpa(heads(q), heads(k), heads(v), attn_mask=mask)[0].transpose(0, 1)
        )
    if not both:
        lazily = functools.cache(lambda: _flex(x, segments))
        peers["flex"] = lambda: lazily()()
    return peers, {"sdpa": unshared.each_unpacked, "sdpa padded": unshared.batched_unpacked}


def case(shape, dtype, device, direction, seed=0) -> Case:
    h, g, k = (shape[name] for name in "HGK")
    if min(h, g, k, shape["prompts"], shape["P"], shape["R"]) < 1 or h % g:
        raise ValueError("every size must be at least 1 (responses: 0), and H a multiple of G")
    both = direction == "both"
    generator = torch.Generator().manual_seed(seed)
    segments = _segments(shape, generator)
    total, table = segments[-1][1], torch.tensor(segments, dtype=torch.int32, device=device)

    def draw(heads):
        return torch.randn(total, heads, k, generator=generator).to(device, dtype)

    x, upstream = [draw(n).requires_grad_(both) for n in (h, g, g)], draw(h)

    def call(function, x=x, upstream=upstream):
        with torch.set_grad_enabled(both):
            out = function(*x)
        return (out.detach(), *torch.autograd.grad(out, x, upstream)) if both else (out,)

    def exact():
        wide = [y.detach().double().requires_grad_(both) for y in x]
        return call(lambda *x: reference.attention(*x, table), wide, upstream.double())

    peers, unpack = {}, {}
    if device == "cpu" and shape["responses"]:
        peers, unpack = _peers(x, upstream, segments, call, both)
    pairs, sequences = _pairs(segments), shape["prompts"] * shape["responses"]
    return Case(
        op="attention", shape=shape, dtype=dtype, device=device, direction=direction, impls=BACKENDS,
        run=lambda impl: call(lambda *x: ops.attention(*x, table, impl=impl)), peers=peers, unpack=unpack,
        on_request=("flex",), exact=exact,
        # two products forward; backward five, of which one makes the scores anew
        flops=4 * h * k * pairs * (3.5 if both else 1),
        bytes=(2 * h + 2 * g) * total * k * dtype.itemsize * (2 if both else 1),
        note=f"{sequences} responses, {total} packed tokens, {pairs / 1e6:.1f} M pairs; exp is not counted",
    )  # fmt: skip
