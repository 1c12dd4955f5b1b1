"""Who works on which rows of a packed batch, for attention: tables that its kernels read, made on the device.

A run is a stretch of adjacent segments with one and the same prefix, or one segment without a prefix. Tables hold one
row for every program that a batch of this size could need, as the host does not know how many it needs: the longest
work comes first, and programs without any come last. Nothing is read on the host, so that fake tensors work and a CUDA
graph may be captured. The tables of a segments tensor are made once and shared by all layers, forward and backward.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as nnf
from torch.utils.weak import WeakTensorKeyDictionary

NO_KEY = 2**31 - 1


class KeyTiles(NamedTuple):
    """Of the backward over keys. A part is rows that see keys: a segment its own, a run those of its prefix."""

    tiles: (
        torch.Tensor
    )  # (tiles, 5) int32: index; parts [from, to) that are segments, and [from, to) that are runs
    parts: (
        torch.Tensor
    )  # (2 S, 5) int32: keys [from, to), rows [from, to), a key that its row sees alone or -1


# Below, index_select and narrow stand for [...], which asks for the CUDA driver even where all tensors are fake.


def _runs(segments):
    """(starts, ends, prefix starts, prefix ends), each (S,), of the runs in order; the rest are empty, at the end.

    segments  (4, S) int64: start, end, prefix_start, prefix_end
    """
    start, end, prefix0, prefix1 = segments.unbind(0)
    count = len(start)
    before, after = segments.narrow(1, 0, count - 1).unbind(0), segments.narrow(1, 1, count - 1).unbind(0)
    joined = (
        (before[2] == after[2]) & (before[3] == after[3]) & (before[1] == after[0]) & (after[2] < after[3])
    )
    run = nnf.pad(joined.logical_not(), (1, 0)).cumsum(0)
    rest = end.narrow(0, count - 1, 1).expand(count)
    starts = rest.scatter_reduce(0, run, start, "amin", include_self=False)
    ends = rest.scatter_reduce(0, run, end, "amax", include_self=False)
    shared = prefix0 < prefix1
    none = torch.full_like(start, NO_KEY)
    prefix_starts = none.scatter_reduce(0, run, torch.where(shared, prefix0, NO_KEY), "amin")
    prefix_ends = torch.zeros_like(start).scatter_reduce(0, run, torch.where(shared, prefix1, 0), "amax")
    return starts, ends, prefix_starts, prefix_ends


def _longest_first(columns, work):
    return torch.stack(columns, 1).index_select(0, work.argsort(descending=True, stable=True)).to(torch.int32)


def make_query_tiles(segments, total: int, tokens: int):
    """(tiles, 4) int32: first token, last + 1, first segment, last + 1. Tiles of at most `tokens` tokens of one run.

    Rows of no segment get tiles too, with no segment, so that every row of the output is written.
    """
    start, _, prefix0, prefix1 = segments.unbind(0)
    starts, ends, _, _ = _runs(segments)
    edges = nnf.pad(torch.stack([starts, ends], 1).flatten(), (1, 0))  # of gap, run, gap, run, ..., gap
    edges = nnf.pad(edges, (0, 1), value=total)
    tiles = (edges.diff() + (tokens - 1)) // tokens
    upto = tiles.cumsum(0)
    tile = torch.arange(min(total, total // tokens + len(tiles)), device=segments.device)
    piece = torch.searchsorted(upto, tile, right=True)
    there = piece < len(tiles)
    piece = torch.where(there, piece, 0)
    first = edges.index_select(0, piece) + (tile - (upto - tiles).index_select(0, piece)) * tokens
    last = torch.minimum(first + tokens, edges.index_select(0, piece + 1))
    of_run = there & (piece % 2 == 1)
    segment0 = torch.where(of_run, torch.searchsorted(start, first, right=True) - 1, 0)
    segment1 = torch.where(of_run, torch.searchsorted(start, last), 0)
    seen = last + (prefix1 - prefix0 - start).index_select(0, segment0)
    columns = [torch.where(there, x, 0) for x in (first, last, segment0, segment1)]
    return _longest_first(columns, torch.where(of_run, seen, there.long() - 1))


def make_key_tiles(segments, total: int, keys: int) -> KeyTiles:
    """Tiles of `keys` rows each, from row 0 on, and who sees them."""
    start, end, prefix0, prefix1 = segments.unbind(0)
    starts, ends, prefix_starts, prefix_ends = _runs(segments)
    order = prefix_starts.argsort(stable=True)
    runs = torch.stack([prefix_starts, prefix_ends, starts, ends]).index_select(1, order).unbind(0)
    prefix_starts, prefix_ends, starts, ends = runs
    rows = nnf.pad((ends - starts).cumsum(0), (1, 0))
    tile = torch.arange((total + keys - 1) // keys, device=segments.device)
    key0 = tile * keys
    key1 = (key0 + keys).clamp(max=total)
    segment0 = torch.searchsorted(end, key0, right=True)
    segment1 = torch.searchsorted(start, key1)
    run1 = torch.searchsorted(prefix_starts, key1)
    run0 = torch.minimum(torch.searchsorted(prefix_ends.cummax(0).values, key0, right=True), run1)
    own = torch.where(segment1 > segment0, end.index_select(0, (segment1 - 1).clamp(min=0)) - key0, 0)
    seen = own + rows.index_select(0, run1) - rows.index_select(0, run0)
    first_run = segments.shape[1]
    tiles = _longest_first([tile, segment0, segment1, run0 + first_run, run1 + first_run], seen)
    own = torch.stack([start, end, start, end, torch.where(prefix0 < prefix1, -1, start)], 1)
    shared = torch.stack([*runs, torch.full_like(start, -1)], 1)
    return KeyTiles(tiles, torch.cat([own, shared]).to(torch.int32))


_made = WeakTensorKeyDictionary()  # segments -> (its version, {arguments: tables})


def _shared(make, segments, *sizes):
    """make(segments, *sizes), kept for as long as the segments live and stay as they are."""
    in_graph = segments.is_cuda and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
    if (
        segments.is_inference() or in_graph
    ):  # without a version that would show a change; replayed with other segments
        return make(torch.stack(segments.to(torch.int64).unbind(1)), *sizes)
    version = segments._version
    found = _made.get(segments)
    if found is None or found[0] != version:
        found = _made[segments] = (version, {})
    tables = found[1]
    if (make, *sizes) not in tables:
        tables[make, *sizes] = make(torch.stack(segments.to(torch.int64).unbind(1)), *sizes)
    return tables[make, *sizes]


def query_tiles(segments, total: int, tokens: int):
    return _shared(make_query_tiles, segments, total, tokens)


def key_tiles(segments, total: int, keys: int) -> KeyTiles:
    return _shared(make_key_tiles, segments, total, keys)
