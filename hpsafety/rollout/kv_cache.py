"""Keys and values in pages of a fixed number of tokens, with reference counts.

A page holds the same tokens of every layer. A prompt's pages are held by all of its samples and go back with the last
of them. `taken` and `returned` count pages over the cache's life, so that a test can prove that none is lost.

Legend: L layers, G kv heads, K head dim.
"""

import math
from collections.abc import Iterable
from pathlib import Path

import torch

from hpsafety.errors import InputError

DEFAULT_SHARE = 4  # of the memory that is free, one part in so many


class PageCache:
    """k, v  (L, pages, page_size, G, K) each. Memory that no page has used yet is not touched.

    spare  one page more, the last, which is nobody's: rows that stand for no sequence write there (rollout/graphs.py)
    """

    def __init__(
        self, config, num_pages: int, page_size: int, dtype: torch.dtype, device, spare: bool = False
    ):
        shape = (config.num_layers, num_pages + spare, page_size, config.num_kv_heads, config.head_dim)
        self.k, self.v = (torch.empty(shape, dtype=dtype, device=device) for _ in range(2))
        self.num_pages, self.page_size = num_pages, page_size
        self._free = list(range(num_pages - 1, -1, -1))  # the page freed last is taken first: it is warm
        self._holders = [0] * num_pages
        self.taken = self.returned = self.most_used = 0

    @property
    def num_free(self) -> int:
        return len(self._free)

    def pages_for(self, tokens: int) -> int:
        """Pages that so many tokens need."""
        return math.ceil(tokens / self.page_size)

    def take(self, count: int) -> list[int]:
        """`count` pages with one holder each. Raises IndexError when there are fewer; ask num_free first."""
        if count > len(self._free):
            raise IndexError(f"{count} pages were asked for and {len(self._free)} are free")
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._holders[page] = 1
        self.taken += count
        self.most_used = max(self.most_used, self.num_pages - len(self._free))
        return pages

    def hold(self, pages: Iterable[int]) -> None:
        """One more holder for each page."""
        for page in pages:
            assert self._holders[page] > 0, f"page {page} is held by nobody"
            self._holders[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """One holder less; a page without any is free again."""
        for page in pages:
            assert self._holders[page] > 0, f"page {page} is held by nobody"
            self._holders[page] -= 1
            if self._holders[page] == 0:
                self._free.append(page)
                self.returned += 1

    def slots(self, pages: list[int], tokens: int) -> torch.Tensor:
        """(tokens,) int64: where the first `tokens` tokens of these pages stand among all slots."""
        first = torch.tensor(pages, dtype=torch.int64)[:, None] * self.page_size
        return (first + torch.arange(self.page_size)).flatten()[:tokens]


def page_bytes(config, page_size: int, dtype: torch.dtype) -> int:
    """Bytes of one page: keys and values of all layers."""
    return 2 * config.num_layers * page_size * config.num_kv_heads * config.head_dim * dtype.itemsize


def free_memory(device: torch.device) -> int:
    """Bytes that are free on the device, for a CPU as the system or the container's own limit says."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = [_meminfo(), *_container()]
    return min([number for number in free if number is not None], default=2**32)


def _meminfo() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        return None


def _container() -> list[int]:
    """What a memory cgroup (v2) still allows; nothing where there is no limit."""
    folder = Path("/sys/fs/cgroup")
    try:
        limit, used = ((folder / f"memory.{name}").read_text().strip() for name in ("max", "current"))
        return [] if limit == "max" else [max(0, int(limit) - int(used))]
    except (OSError, ValueError):
        return []


def make_cache(model, settings, spare: bool = False) -> PageCache:
    """The pages that settings.kv_memory pays for, and no more than max_batch sequences of the whole context can use.

    spare  as of PageCache; paid for too
    Raises InputError when not a single page fits.
    """
    config, dtype, device = model.config, model.embed.dtype, model.embed.device
    each = page_bytes(config, settings.page_size, dtype)
    budget = free_memory(device) // DEFAULT_SHARE if settings.kv_memory is None else settings.kv_memory
    most = (settings.max_batch + 1) * (math.ceil(config.max_positions / settings.page_size) + 1)
    count = min(budget // each - spare, most)
    if count < 1:
        raise InputError(
            f"--kv-memory of {budget:,} bytes holds not one page of {settings.page_size} tokens ({each:,} bytes); "
            "raise it"
        )
    return PageCache(config, count, settings.page_size, dtype, device, spare)
