"""Decoding as a CUDA graph: a step is hundreds of small kernels, and launching them one by one costs more than they do.

A graph has fixed shapes and addresses. So a step's inputs are copied into buffers of a *bucket*, the next size up, and
the rows that are left over are sequences of no prompt whose single token goes to a page that nobody else holds. No
row's bits depend on the others, so a bucket changes none. Weights and pages are read where they stand, at every replay.

Legend: B sequences, P prompts, D width.
"""

import bisect
from collections.abc import Callable

import torch

from hpsafety.rollout import passes
from hpsafety.rollout.kv_cache import PageCache
from hpsafety.rollout.passes import Tables

# Sequences; a larger batch is not captured.
BUCKETS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)


def capture_cuda(step: Callable[[], torch.Tensor], pool) -> tuple[Callable[[], None], torch.Tensor]:
    """(replay, the tensor that each replay fills), after two runs on a side stream that warm up kernels and BLAS."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        out = step()
    return graph.replay, out


def bucket_of(sequences: int) -> int | None:
    """The smallest bucket with room for so many; None where there is none."""
    place = bisect.bisect_left(BUCKETS, sequences)
    return BUCKETS[place] if place < len(BUCKETS) else None


def prompt_pages_bucket(pages: int) -> int:
    """Pages of the longest prompt, up to the next power of two: few shapes, and at most twice the table."""
    return 1 << max(0, pages - 1).bit_length()


def _inputs(tokens: torch.Tensor, tables: Tables) -> list[torch.Tensor]:
    """What a step reads, by row of sequences but for the last two, which go by prompt."""
    table, lens, of = tables.prefix
    return [tokens, tables.made, tables.prompt_lens, tables.own, of, table, lens]


class _Captured:
    """Buffers of one bucket, and the graph that reads them."""

    def __init__(self, sequences: int, own_pages: int, prompt_pages: int, scratch: int, device):
        ints = {"dtype": torch.int32, "device": device}
        self.tokens = torch.zeros(sequences, dtype=torch.int64, device=device)
        self.tables = Tables(
            made=torch.ones(sequences, **ints),
            prompt_lens=torch.zeros(sequences, **ints),
            own=torch.full((sequences, own_pages), scratch, **ints),
            # One prompt more than sequences: the empty one of the rows that are left over.
            prefix=(
                torch.zeros(sequences + 1, prompt_pages, **ints),
                torch.zeros(sequences + 1, **ints),
                torch.full((sequences,), sequences, **ints),
            ),
            seeds=torch.zeros(sequences, dtype=torch.int64, device=device),
        )
        self.inputs = _inputs(self.tokens, self.tables)
        self.idle = [t.clone() for t in self.inputs]
        self.filled = 0
        self.replay = self.hidden = None

    def fill(self, tokens: torch.Tensor, tables: Tables) -> None:
        """Copies a step's inputs in; rows that an earlier, larger step left behind become idle again."""
        for buffer, idle, source in zip(self.inputs, self.idle, _inputs(tokens, tables), strict=True):
            rows = source.shape[0]
            if source.dim() == 2:
                buffer[:rows, : source.shape[1]].copy_(source)
            else:
                buffer[:rows].copy_(source)
            if rows < self.filled:
                buffer[rows : self.filled].copy_(idle[rows : self.filled])
        self.filled = len(tokens)


class DecodeGraphs:
    """Decode steps of one engine. capture(step, pool) -> (replay, output): capture_cuda, but for the tests.

    scratch  a page that belongs to no sequence
    """

    def __init__(self, model, cache: PageCache, own_pages: int, sequential: bool, scratch: int, capture):
        self.model, self.cache, self.own_pages = model, cache, own_pages
        self.sequential, self.scratch, self.capture = sequential, scratch, capture
        self.pool = torch.cuda.graph_pool_handle() if capture is capture_cuda else None
        self._captured: dict[tuple[int, int], _Captured] = {}

    def decode(self, tokens_B: torch.Tensor, tables: Tables) -> torch.Tensor:
        """As passes.decode: hidden (B, D), which holds until the next step."""
        sequences = bucket_of(len(tokens_B))
        if sequences is None:
            return passes.decode(self.model, tokens_B, tables, self.cache, self.sequential)
        key = sequences, prompt_pages_bucket(tables.prefix[0].shape[1])
        captured = self._captured.get(key)
        if captured is None:
            captured = _Captured(sequences, self.own_pages, key[1], self.scratch, tokens_B.device)
            self._captured[key] = captured
        captured.fill(tokens_B, tables)
        if captured.replay is None:

            def step():
                return passes.decode(
                    self.model, captured.tokens, captured.tables, self.cache, self.sequential
                )

            captured.replay, captured.hidden = self.capture(step, self.pool)
        captured.replay()
        return captured.hidden[: len(tokens_B)]
