"""Forms of test that every op shares: repeated runs, thread counts, and storages past 2^31 elements."""

import mmap

import numpy as np
import pytest
import torch

from tests.ops.oracle import run_with_grads

PAST_INT32 = 2**31 + 64  # elements: every offset that is kept in 32 bits goes wrong before the end


def check_same_bits(op, args: dict, threads, repeats: int = 100, **kwargs) -> None:
    """`repeats` runs, forward and backward, on 1, 2 and 3 threads in turn: all bits as in the first run.

    threads  the fixture of that name
    """
    threads(1)
    first = run_with_grads(op, args, impl="cpu", **kwargs)
    for i in range(repeats):
        threads(1 + i % 3)
        for name, value in run_with_grads(op, args, impl="cpu", **kwargs).items():
            assert torch.equal(value, first[name]), f"{name} differs in run {i}, on {1 + i % 3} threads"


def lazy_zeros(elements: int, dtype=torch.float32) -> torch.Tensor:
    """A flat tensor of zeros whose pages take memory only once they are written; skips where it is refused."""
    size = torch.finfo(dtype).bits // 8
    try:
        return torch.from_numpy(np.zeros(elements * size, dtype=np.uint8)).view(dtype)
    except MemoryError:
        pytest.skip(f"cannot reserve {elements * size / 1e9:.0f} GB of address space")


def reserved(*shape: int) -> torch.Tensor:
    """fp32 zeros of any size: address space, whose pages take memory only once they are written."""
    size = torch.Size(shape).numel() * 4
    no_reserve = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Linux's, for a Python that does not name it
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve)
    return torch.frombuffer(memory, dtype=torch.float32).view(shape)


def need_memory(gigabytes: float) -> None:
    """Skips unless that much memory is free: for the tests whose outputs alone are past 2^31 elements."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            free = next(int(x.split()[1]) for x in lines if x.startswith("MemAvailable")) * 1024
    except OSError:
        pytest.skip("the free memory is not known")
    if free < gigabytes * 1e9:
        pytest.skip(f"needs {gigabytes} GB of free memory, here are {free / 1e9:.1f}")
