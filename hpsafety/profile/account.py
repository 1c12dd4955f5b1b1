"""From a Chrome trace of torch.profiler to sums: whose time is it, and in which phase of the step.

Host: each moment of a recorded step belongs to the innermost event on the main thread (in backward also on autograd's
own thread, for which the main one waits); a moment of no event is Python between ops. What runs inside one of our ops
counts as that op. So the entries of `host` sum up to the steps' time. Times are microseconds, summed over the steps.
Device: the same for kernels, each under the op that launched it; they overlap where streams do.
"""

import bisect
import gzip
import json
from collections import defaultdict
from pathlib import Path

STEP, PHASE = "hpsafety step", "hpsafety phase: "
HOST = ("cpu_op", "user_annotation", "cuda_runtime", "cuda_driver", "Runtime")
DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
GEMMS = ("mm", "addmm", "bmm", "baddbmm", "linear", "matmul", "_addmm_activation", "_linear_pointwise")
COPIES = ("copy_", "clone", "contiguous", "to", "_to_copy", "cat", "stack", "fill_", "zero_", "zeros", "zeros_like",
          "ones_like", "full", "_foreach_copy_", "split_with_sizes_copy", "_chunk_cat")  # fmt: skip
INDEXING = ("index", "gather", "scatter", "embedding", "masked_", "nonzero", "take")
VIEWS = ("empty", "view", "_unsafe_view", "reshape", "_reshape", "t", "transpose", "permute", "as_strided", "slice",
         "select", "unflatten", "flatten", "expand", "detach", "alias", "split", "chunk", "narrow", "unsqueeze",
         "squeeze", "new_empty", "resize_", "lift_fresh", "set_", "result_type")  # fmt: skip
COLLECTIVES = ("c10d::", "_c10d_functional::", "gloo:", "nccl:", "record_param_comms", "FSDP::")
OURS, GEMM, COPY, INDEX = "ops of hpsafety", "GEMM", "copies and fills", "indexing"
VIEW, OTHER, ACCUMULATE = "views and allocation", "other aten", "gradient accumulation"
AUTOGRAD, COMMUNICATION = "autograd and Python in it", "communication"
LAUNCH, PYTHON, NO_PHASE = "launches (CUDA runtime)", "Python between ops", "other"

Span = tuple[float, float]


def kind_of(event: dict) -> str:
    """The kind that an event's own time belongs to."""
    name = event["name"]
    space, _, op = name.rpartition("::")
    if name.startswith(COLLECTIVES):
        return COMMUNICATION
    if space in ("hpsafety", "hpsafety_cpu"):
        return OURS
    if "AccumulateGrad" in name:
        return ACCUMULATE
    if event["cat"] in ("cuda_runtime", "cuda_driver", "Runtime"):
        return LAUNCH
    if space in ("aten", "mkldnn", "mkl", "quantized"):
        if op in GEMMS:
            return GEMM
        if op in COPIES:
            return COPY
        if op.startswith(INDEXING):
            return INDEX
        return VIEW if op in VIEWS or op.startswith("empty") else OTHER
    return AUTOGRAD


def union(spans: list[Span]) -> list[Span]:
    """Sorted spans that do not overlap and cover the same moments."""
    out: list[Span] = []
    for start, end in sorted(spans):
        if out and start <= out[-1][1]:
            out[-1] = (out[-1][0], max(end, out[-1][1]))
        elif end > start:
            out.append((start, end))
    return out


def intersect(a: list[Span], b: list[Span]) -> list[Span]:
    """The moments in both; a and b as union() makes them."""
    out, j = [], 0
    for start, end in a:
        while j < len(b) and b[j][1] <= start:
            j += 1
        k = j
        while k < len(b) and b[k][0] < end:
            out.append((max(start, b[k][0]), min(end, b[k][1])))
            k += 1
    return out


def subtract(a: list[Span], b: list[Span]) -> list[Span]:
    """The moments of a that are not in b; both as union() makes them."""
    out = []
    for start, end in a:
        for low, high in intersect([(start, end)], b):
            if low > start:
                out.append((start, low))
            start = high
        if end > start:
            out.append((start, end))
    return out


def length(spans: list[Span]) -> float:
    return sum(end - start for start, end in spans)


def segments(events: list[dict]) -> list[tuple[float, float, str]]:
    """(start, end, phase) that cover the recorded steps without overlap; an inner phase cuts its outer one."""
    marks = [e for e in events if e["name"] == STEP or e["name"].startswith(PHASE)]
    out, stack, at = [], [], 0.0  # stack: (end, phase)

    def advance(to: float) -> None:
        nonlocal at
        if stack and to > at:
            out.append((at, to, stack[-1][1]))
        at = max(at, to)

    for mark in sorted(marks, key=lambda e: (e["ts"], -e["dur"])):
        while stack and stack[-1][0] <= mark["ts"]:
            advance(stack[-1][0])
            stack.pop()
        advance(mark["ts"])
        if stack or mark["name"] == STEP:  # a phase outside of the steps is not theirs
            stack.append((mark["ts"] + mark["dur"], mark["name"].removeprefix(PHASE)))
    while stack:
        advance(stack[-1][0])
        stack.pop()
    return [(a, b, NO_PHASE if name == STEP else name) for a, b, name in out]


def owners(events: list[dict]) -> list[tuple[dict, float, str, str, bool]]:
    """(event, its own time, kind, name, is it what that name counts) of one thread's events.

    Inside an op of ours all time is that op's; inside the accumulation of a gradient all but collectives.
    """
    out, stack = [], []  # stack: [event, end, time of children, kind, name, counted]

    def close() -> None:
        event, _, inner, *owner = stack.pop()
        out.append((event, max(0.0, event["dur"] - inner), *owner))

    for event in sorted(events, key=lambda e: (e["ts"], -e["dur"])):
        while stack and stack[-1][1] <= event["ts"]:
            close()
        kind, counted = kind_of(event), True
        name = (
            event["name"].removeprefix("hpsafety_cpu::").removeprefix("autograd::engine::evaluate_function: ")
        )
        name = name.split(" (")[0] if kind == COMMUNICATION else name  # FSDP::all_gather (blocks.0)
        if stack:
            stack[-1][2] += event["dur"]
            outer = stack[-1][3]
            if outer == OURS or (outer == ACCUMULATE and kind != COMMUNICATION):
                kind, name, counted = outer, stack[-1][4], False
        stack.append([event, event["ts"] + event["dur"], 0.0, kind, name, counted])
    while stack:
        close()
    return out


def gemm_size(event: dict) -> tuple[int, int, int] | None:
    """(M, K, N) of a matrix product, from its recorded shapes."""
    dims = [d for d in event.get("args", {}).get("Input Dims", []) if isinstance(d, list) and len(d) == 2]
    if event["name"] not in ("aten::mm", "aten::addmm", "aten::addmm_") or len(dims) < 2:
        return None
    (m, k), (k2, n) = dims[-2:]
    return (m, k, n) if k == k2 else None


def read(path: Path) -> dict:
    """account() of a trace file, gzipped or not."""
    opened = gzip.open(path, "rt") if path.suffix == ".gz" else open(path)
    with opened as handle:
        return account(json.load(handle)["traceEvents"])


def account(trace: list[dict]) -> dict:
    """Sums over the recorded steps of a trace.

    steps_us, events   time of the recorded steps; recorded host events in them
    host         [{kind, name, phase, us, calls}]; `us` sums up to steps_us
    gemms        [{m, k, n, phase, us, calls}] of the products that are not inside an op of ours
    communication_us   the part of `host` that collectives take or are waited for: exposed communication
    device       None without one, or {kernels: [{kind, name, phase, us, calls}], busy_us, exposed_us, idle_us}
    """
    events = [e for e in trace if e.get("ph") == "X"]
    steps = [e for e in events if e["name"] == STEP and e.get("cat") == "user_annotation"]
    if not steps:
        raise ValueError("the trace holds no step of hpsafety")
    main = steps[0]["tid"]
    parts = segments([e for e in events if e["tid"] == main and e.get("cat") == "user_annotation"])
    starts = [start for start, _, _ in parts]

    def phase_at(ts: float) -> str | None:
        index = bisect.bisect_right(starts, ts) - 1
        return parts[index][2] if index >= 0 and ts < parts[index][1] else None

    threads = defaultdict(list)
    for e in events:
        marked = e["name"] == STEP or e["name"].startswith(PHASE) or e["name"].startswith("ProfilerStep")
        if e.get("cat") in HOST and not marked:
            threads[e["tid"]].append(e)
    working = {main} | {
        tid for tid, own in threads.items() if any(e["name"].startswith("autograd::engine") for e in own)
    }
    sums, gemms, launched, covered = defaultdict(_zero), defaultdict(_zero), {}, []
    for tid in working:
        for event, own, kind, name, counted in owners(threads[tid]):
            phase = phase_at(event["ts"])
            if phase is None:
                continue
            _add(sums[kind, name, phase], own, counted)
            launched.setdefault(event.get("args", {}).get("External id"), (kind, name, phase))
            covered.append((event["ts"], event["ts"] + event["dur"]))
            if kind == GEMM and gemm_size(event):
                _add(gemms[(*gemm_size(event), phase)], event["dur"])
    foreign = [e for tid in threads.keys() - working for e in threads[tid] if kind_of(e) == COMMUNICATION]
    _gaps(parts, union(covered), union([(e["ts"], e["ts"] + e["dur"]) for e in foreign]), sums)
    return {
        "steps_us": sum(end - start for start, end, _ in parts), "events": len(covered),
        "host": _rows(sums, "kind", "name", "phase"), "gemms": _rows(gemms, "m", "k", "n", "phase"),
        "communication_us": sum(v["us"] for k, v in sums.items() if COMMUNICATION in (k[0], k[2])),
        "device": _device(events, parts, launched),
    }  # fmt: skip


def _zero() -> dict:
    return {"us": 0.0, "calls": 0}


def _add(entry: dict, us: float, calls: int = 1) -> None:
    entry["us"] += us
    entry["calls"] += int(calls)


def _rows(sums: dict, *names: str) -> list[dict]:
    rows = [dict(zip(names, key, strict=True)) | value for key, value in sums.items()]
    return sorted(rows, key=lambda row: -row["us"])


def _gaps(parts, covered: list[Span], collectives: list[Span], sums) -> None:
    """Adds the moments of no event: waiting while another thread runs a collective, else Python."""
    for start, end, phase in parts:
        near = covered[max(0, bisect.bisect(covered, (start,)) - 1) : bisect.bisect(covered, (end,))]
        gaps = subtract([(start, end)], near)
        waiting = length(intersect(gaps, collectives))
        if waiting:
            _add(sums[COMMUNICATION, "waiting for collectives", phase], waiting)
        _add(sums[PYTHON, PYTHON, phase], length(gaps) - waiting, 0)


def _device(events: list[dict], parts, launched: dict) -> dict | None:
    kernels = [e for e in events if e.get("cat") in DEVICE]
    if not kernels:
        return None
    whole = union([(start, end) for start, end, _ in parts])
    sums, spans = defaultdict(_zero), {"communication": [], "work": []}
    for e in kernels:
        own = length(intersect([(e["ts"], e["ts"] + e["dur"])], whole))
        if not own:
            continue
        kind, name, phase = launched.get(e.get("args", {}).get("External id"), (OTHER, e["name"], NO_PHASE))
        nccl = "nccl" in e["name"].lower()
        _add(sums[COMMUNICATION if nccl else kind, e["name"] if nccl else name, phase], own)
        spans["communication" if nccl else "work"].append((e["ts"], e["ts"] + e["dur"]))
    work, talk = (intersect(union(spans[name]), whole) for name in ("work", "communication"))
    busy = length(union(work + talk))
    return {
        "kernels": _rows(sums, "kind", "name", "phase"), "busy_us": busy,
        "exposed_us": length(subtract(union(talk), union(work))), "idle_us": length(whole) - busy,
    }  # fmt: skip
