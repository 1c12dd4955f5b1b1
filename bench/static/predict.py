"""A MODEL of kernels' time on an A100 and an H100, from their code and their launches; nothing here is a measurement.

A launch takes LAUNCH seconds and the longest of these:
  tensor   its operations at TENSOR_SHARE of the chip's dense bf16 rate, times the tensor pipe's best share by the
           hot loop's instructions (sass.pipes), in whole waves of programs
  pipes    its hot code's cycles on the fullest pipe, as often as its bytes need it, or once per warp without a loop
  memory   its bytes at DRAM_SHARE of the bandwidth, or slower where the resident warps keep too few bytes in flight
Left out: caches, bank conflicts, waiting within a warp, unequal programs, clocks below boost. It ranks, and it says
which limit is near; it cannot replace bench/gpu_check.sh.
"""

import collections
import dataclasses
import math

from bench.static.cases import LLAMA
from bench.static.record import hot
from bench.static.work import PARTIAL, SHARES, idle, work

LAUNCH = 3e-6  # seconds from start to end of an empty kernel in a queue
LATENCY = 0.6e-6  # seconds of a load from memory under load
DRAM_SHARE = 0.92
TENSOR_SHARE = 0.75  # what FlashAttention-2 and -3 report of an A100's and an H100's peak: 73 and 75 %
# Ops without a prediction: their main work is a product of the BLAS, of which there is no row.
UNSEEN = {"cuda linear_logprob"}


@dataclasses.dataclass(frozen=True, slots=True)
class Chip:
    name: str
    arch: str
    processors: int
    clock: float  # Hz
    flops: float  # dense bf16, a second
    bandwidth: float  # bytes a second


CHIPS = (
    Chip("A100-80", "sm_80", 108, 1.41e9, 312e12, 2.0e12),
    Chip("H100 SXM", "sm_90", 132, 1.83e9, 989e12, 3.35e12),
)


def assumptions() -> list[str]:
    chips = [
        f"{c.name}: {c.flops / 1e12:g} TFLOP/s bf16, {c.bandwidth / 1e12:g} TB/s, {c.processors} SMs"
        for c in CHIPS
    ]
    return [
        "a model from the compiler's code, not a measurement: it ranks kernels and names their limit",
        "; ".join(chips),
        f"at most {TENSOR_SHARE:.0%} of the operations and {DRAM_SHARE:.0%} of the bandwidth, "
        f"{LATENCY * 1e6:g} us of latency, {LAUNCH * 1e6:g} us per launch, "
        "each byte moved once, no bank conflicts",
    ]


def _moved(code: dict, kinds: tuple[str, ...]) -> int:
    """Bytes a warp moves between memory and chip by one pass of the code."""
    widths = code.get("widths", {})
    return sum(int(bits) // 8 * 32 * n for kind in kinds for bits, n in widths.get(kind, {}).items())


def launch_time(row: dict, chip: Chip, programs: int, moved: float, flops: float = 0.0) -> dict:
    """{"seconds", "bound"} of one launch of a row of static.json that moves `moved` bytes and does `flops`."""
    blocks, warps_held, _ = row["occupancy"]
    if not blocks or not programs:
        return {"seconds": math.inf if programs else 0.0, "bound": "does not fit"}
    code, warps, model = hot(row), row["warps"], row["model"]
    wave = programs / (chip.processors * blocks)
    busy = min(1.0, programs / chip.processors)  # share of the processors with a program
    times = {}
    if flops:
        rate = chip.flops * TENSOR_SHARE * max(model.get("tensor_use", 0), 0.01)
        times["tensor"] = flops / rate * math.ceil(wave) / wave
    else:
        each = _moved(code, ("ldg", "ldgsts", "stg"))
        passes = moved / each if "hot" in row and each else programs * warps
        cycles = max(model.get(pipe, 0) for pipe in ("issue", "mufu", "fp32", "shared"))
        times["pipes"] = passes * cycles / (4 * chip.processors * busy * chip.clock)
    resident = min(warps_held, math.ceil(wave * blocks) * warps)
    flight = _moved(code, ("ldg",)) + _moved(code, ("ldgsts",)) * max(1, _stages(row) - 1)
    rate = chip.bandwidth * DRAM_SHARE
    if flight:
        rate = min(rate, flight * resident * chip.processors * busy / LATENCY)
    times["memory"] = moved / rate
    bound = max(times, key=times.get)
    return {"seconds": times[bound] + LAUNCH, "bound": bound if times[bound] > LAUNCH else "launch"}


def _stages(row: dict) -> int:
    return next((int(word[7:]) for word in row["config"].split() if word.startswith("stages=")), 1)


def _shares(function: str, rows: list[tuple]) -> dict[int, float]:
    """Of a function's operations, the share of each of its launches (row, programs, bytes, times), by position."""
    tensor = [index for index, (row, *_) in enumerate(rows) if row["whole"]["mma"] and not idle(row)]
    programs = collections.Counter()
    for index in tensor:
        row, number, _, times = rows[index]
        programs[row["kernel"]] += number * times
    known = SHARES.get(function, {})
    known = known if known.keys() == programs.keys() else dict.fromkeys(programs, 1 / max(1, len(programs)))
    return {
        index: known[rows[index][0]["kernel"]] * rows[index][1] / programs[rows[index][0]["kernel"]]
        for index in tensor
    }


def predict(rows: list[dict], chip: Chip, sizes: list[str] | None = None) -> list[dict]:
    """Predictions for each launch of static.json's rows on a chip, and one of each launch function over its launches.

    Each has op, function, call, shapes, kernel (None for the function), seconds, bound, share (of the nearer of the
    chip's two peaks), flops and bytes. A function's work is that of bench/static/work.py; without a formula, none.
    """
    groups = collections.defaultdict(list)
    for row in rows:
        if row["arch"] == chip.arch:
            for size, calls in row["calls"].items():
                for function, call, *launched in calls:
                    groups[row["op"], function, call, size].append((row, *launched))
    shapes = {one.name: one for one in LLAMA}
    out, order = [], [*shapes]
    for op, function, call, size in sorted(groups, key=lambda key: (*key[:3], order.index(key[3]))):
        launches = groups[op, function, call, size]
        if sizes and size not in sizes:
            continue
        needed = None if op in UNSEEN else work(function, shapes[size], call)
        shares = _shares(function, launches)
        # operands behind a table of addresses are not seen in the launch: their bytes go to where the programs are
        seen = sum(moved * times for _, _, moved, times in launches)
        hidden = max(0, needed.bytes - seen) if needed else 0
        part = min(1.0, needed.bytes / seen) if needed and seen and function in PARTIAL else 1.0
        some = max(programs for _, programs, _, _ in launches) / 100  # fewer: a kernel that prepares
        each = hidden / sum(programs * times for _, programs, _, times in launches if programs >= some)
        head = {"op": op, "function": function, "call": call, "shapes": size}
        parts = []
        for index, (row, programs, moved, times) in enumerate(launches):
            flops = needed.flops * shares.get(index, 0.0) if needed else 0.0
            moved = 0.0 if idle(row) else moved * part + each * programs * (programs >= some)
            one = launch_time(row, chip, programs, moved, flops)
            seconds = one["seconds"] * times
            what = {"kernel": row["kernel"], "config": row["config"], "times": times, "bound": one["bound"]}
            parts.append(head | what | _summed(chip, seconds, flops * times, moved * times))
        out += parts
        if needed:
            slowest = max(parts, key=lambda part: part["seconds"])
            whole = _summed(chip, sum(part["seconds"] for part in parts), *needed)
            out.append(head | {"kernel": None, "config": "", "times": 1, "bound": slowest["bound"]} | whole)
    return out


def _summed(chip: Chip, seconds: float, flops: float, moved: float) -> dict:
    compute, memory = flops / chip.flops, moved / chip.bandwidth
    peak = "flops" if compute > memory else "bandwidth"
    share = max(compute, memory) / seconds if seconds else 0.0
    return {"seconds": seconds, "share": round(share, 4), "peak": peak, "flops": flops, "bytes": moved}


MARGIN = 1.02  # a model's difference of less is none


def cuda_first(rows: list[dict]) -> dict[tuple[str, int], float]:
    """(op, major compute capability) -> how many times faster CUDA is than Triton at the least, by the model: those
    where it is so by MARGIN in every call and at every model's shapes that both serve."""
    ratios: dict[tuple[str, int], float] = {}
    for chip in CHIPS:
        times: dict[tuple, dict[str, float]] = collections.defaultdict(lambda: collections.defaultdict(float))
        for row in predict(rows, chip):
            if row["kernel"] is not None:
                backend, _, op = row["op"].rpartition(" ")
                times[op, row["function"], row["call"], row["shapes"]][backend or "triton"] += row["seconds"]
        for (op, *_), seconds in times.items():
            if len(seconds) == 2 and f"cuda {op}" not in UNSEEN:
                key = (op, int(chip.arch[3:]) // 10)
                ratios[key] = min(ratios.get(key, math.inf), seconds["triton"] / seconds["cuda"])
    return {key: round(ratio, 3) for key, ratio in ratios.items() if ratio > MARGIN}
