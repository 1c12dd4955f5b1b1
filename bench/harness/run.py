"""`hpsafety bench`: check, measure the limit, time the contenders in turn, measure the limit again, report.

The result file (results.py) is rewritten after every case, so an interrupted run leaves what it has.
"""

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType

import torch

from bench import machine
from bench.harness import contenders, memory, results, table
from bench.harness.limits import Limit, Limits, name_of
from bench.harness.timing import alternate, is_cold, keep_freed_memory, load_average, percentile
from bench.ops.case import Case
from hpsafety.errors import InputError

SECONDS, REPEATS = 2.0, 5  # of each contender: about so long, at least so many calls
# `all`: so long in all; one call of a contender that is too slow for its share
ALL_SECONDS, ALL_REPEATS = 120.0, 1
LEAST_SECONDS = 0.3  # of a contender's share in `all`


@dataclass(frozen=True)
class Work:
    """One case to be built and timed, by name."""

    op: str
    module: ModuleType
    shape: dict[str, int]
    dtype: str
    direction: str


def works(cfg) -> list[Work]:
    """What the command line asks for. InputError on a name or value that some op does not have."""
    every = "all" in cfg.ops
    names = contenders.op_names() if every else list(dict.fromkeys(op.rstrip("_") for op in cfg.ops))
    found = []
    for op in names:
        module = contenders.load(op)
        if cfg.shape:
            shapes = [contenders.read_shape(text, op, module) for text in cfg.shape]
        else:
            shapes = module.SHAPES[:1] if every else module.SHAPES
        wanted = cfg.directions or module.DIRECTIONS
        unknown = [direction for direction in wanted if direction not in module.DIRECTIONS]
        if unknown and not every:
            raise InputError(f"--direction {unknown[0]}: {op} has {', '.join(module.DIRECTIONS)}")
        found += [
            Work(op, module, dict(shape), dtype, direction)
            for dtype in cfg.dtypes
            for shape in shapes
            for direction in wanted
            if direction in module.DIRECTIONS
        ]
    return found


def make_row(case: Case, impl: str, samples: list[float], limit: Limit, **more) -> dict:
    """One contender's result; times in ms. pct_of_limit is of the median, pct_of_limit_best of the fastest call."""
    p20, p50, p80 = (percentile(samples, q) for q in (20, 50, 80))
    return {
        "op": case.op, "impl": impl, "shape": case.shape, "dtype": name_of(case.dtype), "device": case.device,
        "direction": case.direction, "ms_p20": 1e3 * p20, "ms_p50": 1e3 * p50, "ms_p80": 1e3 * p80,
        "ms_min": 1e3 * min(samples), "bytes": case.bytes, "flops": case.flops,
        "pct_of_limit": 100 * limit.seconds / p50, "pct_of_limit_best": 100 * limit.seconds / min(samples),
        "limit_ms": 1e3 * limit.seconds, "limit_by": limit.by, "limit": limit.told, "peak_mb": None,
        "peer": impl in case.peers, "repeats": len(samples), "note": case.note, **more,
        "samples_ms": [round(1e3 * one, 6) for one in samples],
    }  # fmt: skip


class Session:
    """One run of the command: its limits, its rows, and what it found wrong."""

    def __init__(self, cfg, say: Callable[[str], None]):
        self.cfg, self.say, self.every = cfg, say, "all" in cfg.ops
        self.device = cfg.device if cfg.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
        self.limits = Limits(self.device)
        self.rows: list[dict] = []
        self.wrong: list[dict] = []
        self.machine = machine.machine(torch.get_num_threads()) | machine.gpu(self.device)

    def check(self, work: Work) -> dict[str, str]:
        """Contender -> what is wrong with it at the CHECK shape; tells of backends that are not here."""
        case = contenders.build(
            work.module, dict(work.module.CHECK), work.dtype, self.device, work.direction, self.cfg.seed
        )
        calls, missing = contenders.contenders(case, self.cfg.impls, self.every)
        for line in missing:
            self.say(line)
        faults = contenders.faults(case, calls)
        for impl, fault in faults.items():
            self.say(f"{case.op} {work.direction} {work.dtype} {impl}: {fault}; not timed")
            self.wrong.append({"op": case.op, "impl": impl, "dtype": work.dtype, "direction": work.direction,
                               "shape": case.shape, "fault": fault})  # fmt: skip
        return faults

    def time(self, work: Work, faults: dict[str, str], share: float | None) -> list[dict]:
        """The rows of one case. share: seconds for the whole case in a run of `all`, else None."""
        cfg, start = self.cfg, time.perf_counter()
        case = contenders.build(work.module, work.shape, work.dtype, self.device, work.direction, cfg.seed)
        calls = {
            n: c for n, c in contenders.contenders(case, cfg.impls, self.every)[0].items() if n not in faults
        }
        if not calls:
            return []
        cold = is_cold(cfg.cache, case.bytes)
        self.limits.measure(case, cold, again=not self.every)
        load = load_average()
        seconds, repeats = cfg.seconds or SECONDS, REPEATS
        if share is not None and cfg.seconds is None:
            seconds = min(SECONDS, max(LEAST_SECONDS, (share - (time.perf_counter() - start)) / len(calls)))
            repeats = ALL_REPEATS
        samples = self.alternate(case, calls, cold, seconds, repeats)
        self.limits.measure(case, cold, again=not self.every)
        more = {"cache": "cold" if cold else "warm", "threads": torch.get_num_threads(), "load_average": load}
        limit = self.limits.of(case, cold)
        rows = [make_row(case, impl, taken, limit, **more) for impl, taken in samples.items()]
        if cfg.memory:
            for row in rows:
                row["peak_mb"] = memory.in_child(self.job(work, row["impl"]))
        return rows

    def alternate(self, case: Case, calls: dict, cold: bool, seconds: float, repeats: int) -> dict:
        """Samples of the contenders; what bounds the case is timed in turn with them and goes to the limits."""
        rivals = self.limits.rivals(case, cold)
        timers = dict.fromkeys(calls, self.limits.timers[cold])
        timers |= {key: self.limits.timers[cold and key[0] == "bytes"] for key in rivals}
        samples = alternate(calls | rivals, timers, seconds, repeats)
        for key in rivals:
            self.limits.credit(key, samples.pop(key))
        return samples

    def job(self, work: Work, impl: str) -> dict:
        return {"op": work.op, "shape": work.shape, "dtype": work.dtype, "device": self.device, "impl": impl,
                "direction": work.direction, "seed": self.cfg.seed, "threads": torch.get_num_threads()}  # fmt: skip

    def run(self, asked: list[Work]) -> Iterator[list[dict]]:
        """Checks every contender of every case, then yields the rows of each case as it is timed."""
        faults = {}
        for work in asked:
            key = (work.op, work.dtype, work.direction)
            if key not in faults:
                faults[key] = self.check(work)
        begin = time.perf_counter()
        for number, work in enumerate(asked):
            left = ALL_SECONDS - (time.perf_counter() - begin)
            share = max(left, 0.0) / (len(asked) - number) if self.every else None
            self.say_progress(number, len(asked), work)
            rows = self.time(work, faults[(work.op, work.dtype, work.direction)], share)
            self.rows += rows
            yield rows

    def say_progress(self, number: int, total: int, work: Work) -> None:
        if sys.stderr.isatty():
            shape = contenders.show(work.shape)
            self.say(f"{number + 1}/{total} {work.op} {work.direction} {work.dtype} {shape}")

    def record(self) -> dict:
        return {
            "form": results.FORM,
            "machine": self.machine | machine.gpu(self.device),
            "limits": self.limits.record(),
            "rows": self.rows,
            "wrong": self.wrong,
        }


def main(cfg) -> int:
    """Runs the benchmark of a BenchConfig; 0, or 1 when a contender was wrong."""
    results.require_writable(cfg.json, "--json")
    results.require_writable(cfg.plot, "--plot")
    if cfg.device.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(
            f"--device {cfg.device}: this torch sees no GPU; take --device cpu, or see hpsafety doctor"
        )
    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)
    asked = works(cfg)  # names and values are judged before anything is measured
    keep_freed_memory()
    session = Session(cfg, lambda line: print(line, file=sys.stderr, flush=True))
    out = table.Writer()
    keep = cfg.json or cfg.plot
    if keep:
        session.limits.measure_roof()
    for rows in session.run(asked):
        out.rows(rows)
        if cfg.json:
            results.write(cfg.json, session.record())
    if not session.rows and not session.wrong:
        raise InputError(
            f"nothing to time: no op here has the contenders {', '.join(cfg.impls or ('at all',))}"
        )
    if keep:
        session.limits.measure_roof()
    record = session.record()
    if cfg.json:
        results.write(cfg.json, record)
    if cfg.plot:
        from bench.harness import roofline

        roofline.write(record, cfg.plot)
    out.end(record)
    return 1 if session.wrong else 0
