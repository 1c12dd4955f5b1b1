"""Timing one call, and several contenders in turn.

A cold call starts with the caches swept: in training and in decoding alike, tens of megabytes of weights and
activations pass between two calls of the same op, so large inputs come from memory. The sweep reads and does not write,
so that the op is not charged for writing back somebody else's lines. It evicts code too, which costs the next call some
15 us on a 2024 server CPU and is not what a real loop sees; small cases, whose inputs the op in front has just written,
are therefore timed warm by default.
"""

import ctypes
import gc
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch

MAX_SWEEP_BYTES, GUESSED_CACHE_BYTES = 1 << 30, 32 << 20
SWEEP_CACHES = 4  # virtual machines report a share of the cache they use
COLD_BYTES = 4 << 20  # a case that moves less is timed warm unless told otherwise
MAX_REPEATS = 300
LONG_SECONDS = 2.0  # what a first call does beside the work is small against this


def last_level_cache_bytes() -> int:
    """All last-level caches of this machine together; a guess where the system does not tell."""
    sizes: dict[tuple[int, str], int] = {}
    try:
        for index in Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cache/index*"):
            text = (index / "size").read_text().strip()
            number = int(text.rstrip("KMG")) << {"K": 10, "M": 20, "G": 30}.get(text[-1], 0)
            key = int((index / "level").read_text()), (index / "shared_cpu_list").read_text().strip()
            sizes[key] = max(sizes.get(key, 0), number)
    except (OSError, ValueError):
        pass
    last = max((level for level, _ in sizes), default=0)
    return sum(size for (level, _), size in sizes.items() if level == last) or GUESSED_CACHE_BYTES


def is_cold(cache: str, size: float) -> bool:
    """Whether a case that moves `size` bytes is timed cold. cache: "auto", "cold" or "warm"."""
    return cache == "cold" or (cache == "auto" and size >= COLD_BYTES)


class Timer:
    """seconds(call) on one device. On a CPU no CUDA call is ever made."""

    def __init__(self, device: str, cold: bool):
        self.device, self.cold = device, cold
        self.cuda = device.startswith("cuda")
        if self.cuda:
            size = 2 * torch.cuda.get_device_properties(device).L2_cache_size or 256 << 20
            self.begin, self.end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        else:
            size = SWEEP_CACHES * last_level_cache_bytes()
        self.sweeper = torch.zeros(min(size, MAX_SWEEP_BYTES) // 4, device=device) if cold else None

    def seconds(self, call: Callable) -> float:
        """One call. What it returns is freed after the clock has stopped."""
        if self.cuda:
            return self._cuda_seconds(call)
        if self.cold:
            self.sweeper.sum()
        start = time.perf_counter()
        result = call()
        taken = time.perf_counter() - start
        del result
        return taken

    def _cuda_seconds(self, call: Callable) -> float:
        """Device time between two events; the sweep ahead of them also hides the launch of a short kernel."""
        if self.cold:
            self.sweeper.zero_()
        self.begin.record()
        result = call()
        self.end.record()
        self.end.synchronize()
        del result
        return self.begin.elapsed_time(self.end) / 1e3


def counts(estimates: dict[str, float], seconds: float, at_least: int) -> dict[str, int]:
    """Repeats of each contender: what fits `seconds` of its own time, at least `at_least`, at most MAX_REPEATS.

    estimates  contender -> wall seconds of a call with all that goes with it
    """
    return {
        name: max(at_least, min(MAX_REPEATS, int(seconds / max(one, 1e-9))))
        for name, one in estimates.items()
    }


def order(repeats: dict[str, int]) -> list[str]:
    """A B C A B C ...: a contender with fewer repeats is spread evenly over the whole run, so noise hits all alike."""
    rounds = max(repeats.values(), default=0)
    return [
        name
        for turn in range(rounds)
        for name, n in repeats.items()
        if (turn + 1) * n // rounds > turn * n // rounds
    ]


def alternate(
    calls: dict[str, Callable], timers: dict[str, Timer], seconds: float, at_least: int
) -> dict[str, list[float]]:
    """Contender -> seconds of each of its calls; about `seconds` a contender.

    The first call of each is not counted, but where one call is enough (at_least 1) and takes over LONG_SECONDS.
    """
    estimates: dict[str, float] = {}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for name, call in calls.items():
        for _ in range(2):  # the first call allocates and warms up; ask again where it is cheap
            start = time.perf_counter()
            taken = timers[name].seconds(call)
            estimates[name] = time.perf_counter() - start
            if estimates[name] > seconds / 4:
                break
        if at_least == 1 and taken > max(seconds, LONG_SECONDS):
            samples[name].append(taken)
            del estimates[name]
    gc.collect()
    gc.disable()
    try:
        for name in order(counts(estimates, seconds, at_least)):
            samples[name].append(timers[name].seconds(calls[name]))
    finally:
        gc.enable()
    return samples


def keep_freed_memory() -> None:
    """Tells glibc to keep what is freed: a new tensor over 32 MB would else be fresh pages from the kernel each time.

    Their faults took up to ten times as long as rms_norm itself (33 MB, virtual machine). Real runs pay them for such
    tensors; a comparison of kernels should not, and the peers, which make more of them, gain more from this.
    """
    m_trim_threshold, m_mmap_max = -1, -4
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # another C library
        return
    mallopt(m_mmap_max, 0)
    mallopt(m_trim_threshold, 2**31 - 1)


def percentile(samples: list[float], percent: float) -> float:
    """Linear between order statistics, as numpy's default."""
    ordered = sorted(samples)
    place = (len(ordered) - 1) * percent / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def load_average() -> float | None:
    """Of the last minute; None where the system has none."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
