"""What the machine can do, measured in the same run as the ops: GEMM rates per shape, memory bandwidth per size.

The limit of a case is the time of its GEMMs, each at its best route's best rate, or of its bytes at the bandwidth that
plain reads, writes, copies and updates of just as many bytes reach under the same timing (cold or warm), whichever is
longer. Because bandwidth is measured at the case's own size, a working set that fits a cache is held against that
cache, and one that is dwarfed by the cost of a call against a call. Every figure is the best the machine has shown in
the run: measured before and after a case, and in turn with its contenders, so that a limit sees the moments they see.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from bench.harness.timing import Timer, last_level_cache_bytes
from bench.ops.case import Case
from hpsafety.train import gemm_rates

PEAK_SHAPE = (
    2048,
    576,
    1536,
)  # measured where a case names no GEMMs of its own; the best GEMM of the run counts
MAX_GEMM_FLOPS = 15e9  # a larger GEMM is measured on fewer of its rows, at least MIN_ROWS
MIN_ROWS = 256
MAX_PROBE_BYTES = 512 << 20
ROOF_CACHES, MIN_ROOF_BYTES = 8, 256 << 20  # "memory" is what lies beyond so many last-level caches
PROBES = 5


@dataclass(frozen=True)
class Limit:
    """seconds: the least that one call needs; by: "gemm", "memory", "cache" or "call"; told: how that was measured."""

    seconds: float
    by: str
    told: str


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def probe_calls(size: int, device: str) -> dict[str, Callable]:
    """Name -> a call that moves about `size` bytes in all, reads and writes counted alike.

    One core draws more from memory through several streams, and a line that is read before it is written is not fetched
    twice: "update" (fused SGD with momentum: three read, two of them written) beat plain copies by half.
    """

    def ones(parts):
        return torch.ones(max(1, size // 4 // parts), device=device)

    whole, source, target = ones(1), ones(2), ones(2)
    a, b, c, out = (ones(4) for _ in range(4))
    weight, grad, momentum = ([ones(5)] for _ in range(3))
    settings = {"weight_decay": 0.0, "momentum": 0.9, "lr": 1e-9, "dampening": 0.0}
    flags = {"nesterov": False, "maximize": False, "is_first_step": False}
    return {
        "read": lambda: torch.dot(whole, whole),
        "sum": lambda: whole.sum(),
        "write": lambda: whole.fill_(1.0),
        "copy": lambda: target.copy_(source),
        "addcmul": lambda: torch.addcmul(a, b, c, out=out),
        "update": lambda: torch._fused_sgd_(weight, grad, momentum, **settings, **flags),
    }


def gemm_rows(m: int, k: int, n: int) -> int:
    """Rows on which a GEMM of m rows is measured."""
    return min(m, max(MIN_ROWS, int(MAX_GEMM_FLOPS / (2 * k * n))))


class Limits:
    """The machine's best figures so far. measure(case, cold) is called before and after the case's own runs."""

    def __init__(self, device: str):
        self.device = device
        self.timers = {cold: Timer(device, cold) for cold in (False, True)}
        self.gemms: dict[tuple, dict[str, float]] = {}  # (m, k, n, dtype) -> route -> GFLOP/s
        self.probes: dict[tuple[bool, int], dict[str, float]] = {}  # (cold, bytes) -> probe -> seconds
        self.call_seconds = {False: math.inf, True: math.inf}  # cold -> of a torch call on one number
        self.cache_bytes = 0 if self.timers[False].cuda else last_level_cache_bytes()

    def measure(self, case: Case, cold: bool, again: bool = True) -> None:
        """again: also what the run has measured before."""
        for m, k, n, _ in case.gemms or ((*PEAK_SHAPE, 1),):
            if again or (m, k, n, name_of(case.dtype)) not in self.gemms:
                self.measure_gemm(m, k, n, case.dtype)
        if again or (cold, min(int(case.bytes), MAX_PROBE_BYTES)) not in self.probes:
            self.measure_bytes(int(case.bytes), cold)

    def measure_gemm(self, m: int, k: int, n: int, dtype: torch.dtype) -> None:
        """Always warm: a limit must not be slower than need be."""
        key = (m, k, n, name_of(dtype))
        found = gemm_rates.rates(
            gemm_rows(m, k, n), k, n, dtype, self.device, seconds=self.timers[False].seconds
        )
        best = self.gemms.setdefault(key, found)
        best.update({route: max(rate, best.get(route, 0.0)) for route, rate in found.items()})

    def measure_bytes(self, size: int, cold: bool) -> None:
        size, seconds = min(size, MAX_PROBE_BYTES), self.timers[cold].seconds
        best = self.probes.setdefault((cold, size), {})
        for name, call in probe_calls(size, self.device).items():
            call()
            found = min(seconds(call) for _ in range(PROBES))
            best[name] = min(found, best.get(name, found))
        one = torch.ones(1, device=self.device)
        found = min(seconds(lambda: one.fill_(1.0)) for _ in range(PROBES))
        self.call_seconds[cold] = min(self.call_seconds[cold], found)

    def rivals(self, case: Case, cold: bool) -> dict[tuple, Callable]:
        """Key -> call: the best probe, or the best route of each GEMM, to be timed in turn with the contenders."""
        if self.of(case, cold).by != "gemm":
            size = min(int(case.bytes), MAX_PROBE_BYTES)
            probe = self.bandwidth(size, cold)[1]
            return {("bytes", cold, size, probe): probe_calls(size, self.device)[probe]}
        found = {}
        for m, k, n, _ in case.gemms or ((*PEAK_SHAPE, 1),):
            route = self.gemm_rate(m, k, n, case.dtype)[1]
            key = ("gemm", (m, k, n, name_of(case.dtype)), gemm_rows(m, k, n), route)
            found[key] = gemm_rates.routes(gemm_rows(m, k, n), k, n, case.dtype, self.device)[route]
        return found

    def credit(self, key: tuple, seconds: list[float]) -> None:
        """Takes the times of a rival into account."""
        kind, first, second, name = key
        if kind == "bytes":
            best = self.probes[(first, second)]
            best[name] = min(best[name], *seconds)
        else:
            _, k, n, _ = first
            best = self.gemms[first]
            best[name] = max(best[name], 2e-9 * second * k * n / min(seconds))

    def gemm_rate(self, m: int, k: int, n: int, dtype: torch.dtype) -> tuple[float, str]:
        """(GFLOP/s, route) of the best route."""
        found = self.gemms[(m, k, n, name_of(dtype))]
        route = max(found, key=found.get)
        return found[route], route

    def peak(self, dtype: str) -> float:
        """The best GFLOP/s of any GEMM of this dtype measured in the run."""
        return max(max(found.values()) for key, found in self.gemms.items() if key[3] == dtype)

    def bandwidth(self, size: int, cold: bool) -> tuple[float, str]:
        """(bytes per second, probe) at this size."""
        size = min(size, MAX_PROBE_BYTES)
        found = self.probes[(cold, size)]
        probe = min(found, key=found.get)
        return size / found[probe], probe

    def of(self, case: Case, cold: bool) -> Limit:
        """The limit of one call of a measured case."""
        needs = [self._compute(case)] if case.flops or case.gemms else []
        if case.bytes:
            rate, probe = self.bandwidth(int(case.bytes), cold)
            seconds = case.bytes / rate
            told = f"{probe} {rate / 1e9:.1f} GB/s at {case.bytes / 1e6:.3g} MB"
            needs.append(Limit(seconds, self._byte_kind(case.bytes, seconds, cold), told))
        return max(needs, key=lambda need: need.seconds)

    def _compute(self, case: Case) -> Limit:
        if not case.gemms:
            peak = self.peak(name_of(case.dtype))
            return Limit(1e-9 * case.flops / peak, "gemm", f"best GEMM {peak:.0f} GFLOP/s")
        rates = [(m, k, n, count, *self.gemm_rate(m, k, n, case.dtype)) for m, k, n, count in case.gemms]
        seconds = sum(2e-9 * m * k * n * count / rate for m, k, n, count, rate, _ in rates)
        told = ", ".join(f"{m}x{k}x{n} {route} {rate:.0f} GFLOP/s" for m, k, n, _, rate, route in rates)
        return Limit(seconds, "gemm", told)

    def _byte_kind(self, size: float, seconds: float, cold: bool) -> str:
        if seconds < 2 * self.call_seconds[cold]:
            return "call"
        return "cache" if not cold and size < self.cache_bytes else "memory"

    def measure_roof(self) -> None:
        """Bandwidth of memory itself: over a buffer several times the last-level cache."""
        self.measure_bytes(self.roof_bytes(), cold=True)

    def roof_bytes(self) -> int:
        return min(MAX_PROBE_BYTES, max(ROOF_CACHES * self.cache_bytes, MIN_ROOF_BYTES))

    def record(self) -> dict:
        """All figures, for the result file."""
        roof = self.roof_bytes()
        measured = (True, roof) in self.probes
        return {
            "gemm_gflops": [
                {"m": m, "k": k, "n": n, "dtype": dtype, "routes": {r: round(x, 1) for r, x in found.items()}}
                for (m, k, n, dtype), found in self.gemms.items()
            ],
            "probes_ms": [
                {"bytes": size, "cache": "cold" if cold else "warm", "calls": {p: 1e3 * s for p, s in found.items()}}
                for (cold, size), found in self.probes.items()
            ],
            "memory_gb_per_s": self.bandwidth(roof, cold=True)[0] / 1e9 if measured else None,
            "last_level_cache_bytes": self.cache_bytes,
        }  # fmt: skip
