"""profile.json and profile.txt: what the ranks recorded, as numbers and as tables."""

import json
from collections import defaultdict
from pathlib import Path

from hpsafety.files import atomic_write
from hpsafety.profile.account import NO_PHASE, OURS, PYTHON

PHASES = (
    "data",
    "rollout",
    "scoring",
    "forward",
    "backward",
    "optimiser",
    "communication",
    "validation",
    "metrics",
)
GEMM_INSIDE = ("linear_cross_entropy", "linear_logprob", "distill_loss")  # and their backwards
NOISY = 1.1  # two measurements of the limit further apart than this say so
MIN_SHARE = 0.002  # of the step: rows below it are added up in one line


def totals(rank: dict) -> dict:
    """A rank's rates: per step and per second, and what they are of the GEMM limit."""
    steps, account = rank["steps"], rank["account"]
    seconds = sum(s["seconds"] for s in steps)
    sums = {k: sum(s.get(k, 0) for s in steps) for k in ("tokens", "tokens_equiv", "flops")}
    exposed = account["communication_us"]
    if account["device"]:
        exposed = account["device"]["exposed_us"]
    limit = rank["gemm"] and rank["gemm"]["gflops"] * 1e9
    return {
        "step_s": seconds / len(steps), "tokens_per_s": sums["tokens_equiv"] / seconds,
        "tokens_computed_per_s": sums["tokens"] / seconds, "needed_flops_per_step": sums["flops"] / len(steps),
        "limit_share": sums["flops"] / (seconds * limit) if limit else None,
        "exposed_communication_share": exposed / account["steps_us"],
    }  # fmt: skip


def slowest(ranks: list[dict]) -> int:
    """The rank whose own work takes longest: steps end together, so the others wait for it in collectives."""
    own = [r["totals"]["step_s"] * (1 - r["totals"]["exposed_communication_share"]) for r in ranks]
    return ranks[own.index(max(own))]["rank"]


def write(out: Path, stage: str, ranks: list[dict]) -> str:
    """Writes OUT/profile.json and OUT/profile.txt; returns the text."""
    for rank in ranks:
        rank["totals"] = totals(rank)
    text = render(stage, ranks)
    with atomic_write(out / "profile.txt") as handle:
        handle.write(text + "\n")
    with atomic_write(out / "profile.json") as handle:
        json.dump({"stage": stage, "slowest_rank": slowest(ranks), "ranks": ranks}, handle, indent=1)
    return text


def render(stage: str, ranks: list[dict]) -> str:
    first = ranks[0]
    lines = [*_head(stage, first, len(ranks)), ""]
    if len(ranks) > 1:
        lines += [*_rank_table(ranks), ""]
    lines += [*_host_table(first), ""]
    if first["account"]["device"]:
        lines += [*_device_table(first), ""]
    lines += [*_gemm_table(first), *_notes(first, ranks)]
    return "\n".join(lines).rstrip()


def _head(stage: str, rank: dict, size: int) -> list[str]:
    total, gemm = rank["totals"], rank["gemm"]
    times = ", ".join(f"{s['seconds']:.3f}" for s in rank["steps"])
    where = f"rank 0 of {size}; " if size > 1 else ""
    lines = [
        f"hpsafety profile {stage}: {len(rank['steps'])} steps after {rank['warmup_steps']} of warm-up; "
        f"{where}{rank['device']}, {rank['dtype']}, {rank['threads']} threads",
        f"step {total['step_s']:.3f} s ({times}); {total['tokens_per_s']:.1f} tokens/s (tokens_equiv), "
        f"{total['tokens_computed_per_s']:.1f} computed",
    ]
    if gemm:
        best = ", ".join(
            f"{name} {route} {gemm['rates'][name][route]:.0f}" for name, route in gemm["best_route"].items()
        )
        lines += [
            f"needed {total['needed_flops_per_step'] / 1e9:.1f} GFLOP a step; GEMM limit {gemm['gflops']:.1f} GFLOP/s "
            f"at {gemm['rows']} rows ({best})",
            f"share of the limit (MFU against measured GEMMs): {100 * total['limit_share']:.1f} %",
        ]
        if max(gemm["single_gflops"]) > NOISY * min(gemm["single_gflops"]) or total["limit_share"] > 1:
            low, high = min(gemm["single_gflops"]), max(gemm["single_gflops"])
            lines.append(
                f"NOISY: the limit was {low:.1f} to {high:.1f} GFLOP/s before and after the steps; other programs ran, "
                "and the share means little"
            )
    return lines


def _rank_table(ranks: list[dict]) -> list[str]:
    lines = ["rank    step s   tokens/s   of limit   exposed communication"]
    for rank in ranks:
        total = rank["totals"]
        share = f"{100 * total['limit_share']:.1f} %" if total["limit_share"] is not None else "-"
        exposed = f"{100 * total['exposed_communication_share']:.1f} %"
        lines.append(
            f"{rank['rank']:>4} {total['step_s']:>9.3f} {total['tokens_per_s']:>10.1f} {share:>10} {exposed:>23}"
        )
    return [*lines, f"slowest: rank {slowest(ranks)} (least time in collectives; the others wait for it)"]


def _table(title: str, rows: list[dict], scale: float, whole: float, count: int) -> list[str]:
    """ms per step of (kind, name) over phases, by kind. scale: ms per step of a microsecond; whole: us in all."""
    kinds, cells, calls = defaultdict(float), defaultdict(lambda: defaultdict(float)), defaultdict(int)
    large = defaultdict(float)
    for row in rows:
        large[row["kind"], row["name"]] += row["us"]
    for row in rows:
        kept = row["kind"] in (OURS, row["name"]) or large[row["kind"], row["name"]] >= MIN_SHARE * whole
        name = row["name"] if kept else "the rest"
        kinds[row["kind"]] += row["us"]
        cells[row["kind"], name][row["phase"]] += row["us"]
        calls[row["kind"], name] += row["calls"]
    found = {phase for entry in cells.values() for phase in entry}
    phases = [p for p in (*PHASES, *sorted(found - {*PHASES, NO_PHASE}), NO_PHASE) if p in found]
    head = f"{title:<38}{'%':>6}{'ms':>11}{'calls':>8}" + "".join(f"{p[:10]:>11}" for p in phases)
    lines = [head, "-" * len(head)]

    def line(label: str, entry: dict, number: str = "") -> str:
        us = sum(entry.values())
        parts = "".join(f"{entry[p] * scale:>11.1f}" if p in entry else " " * 11 for p in phases)
        return f"{label[:37]:<38}{100 * us / whole:>6.1f}{us * scale:>11.1f}{number:>8}{parts}"

    for kind, us in sorted(kinds.items(), key=lambda item: -item[1]):
        mine = {name: entry for (k, name), entry in cells.items() if k == kind}
        if set(mine) == {kind}:
            lines.append(line(kind, mine[kind]))
            continue
        lines.append(f"{kind:<38}{100 * us / whole:>6.1f}{us * scale:>11.1f}")
        for name, entry in sorted(mine.items(), key=lambda item: -sum(item[1].values())):
            lines.append(line("  " + name, entry, f"{calls[kind, name] / count:.0f}"))
    overall = defaultdict(float)
    for entry in cells.values():
        for phase, us in entry.items():
            overall[phase] += us
    return [*lines, "-" * len(head), line("sum", overall)]


def _host_table(rank: dict) -> list[str]:
    account, count = rank["account"], len(rank["steps"])
    return _table("host, per step", account["host"], 1e-3 / count, account["steps_us"], count)


def _device_table(rank: dict) -> list[str]:
    account, count = rank["account"], len(rank["steps"])
    device, whole = account["device"], account["steps_us"]
    lines = _table("device, per step", device["kernels"], 1e-3 / count, whole, count)
    return [
        *lines,
        f"device busy {100 * device['busy_us'] / whole:.1f} %, idle {100 * device['idle_us'] / whole:.1f} %, exposed "
        f"communication {100 * device['exposed_us'] / whole:.1f} %",
    ]


def _gemm_table(rank: dict, most: int = 12) -> list[str]:
    rows, count = rank["account"]["gemms"], len(rank["steps"])
    if not rows or rank["account"]["device"]:  # on a device the host's time of a product is its launch
        return []
    lines = ["GEMMs outside of our ops          M       K       N   calls         ms   GFLOP/s"]
    for row in rows[:most]:
        rate = 2e-3 * row["m"] * row["k"] * row["n"] * row["calls"] / max(row["us"], 1e-9)
        sizes = "".join(f"{row[x]:>8}" for x in "mkn")
        lines.append(
            f"  {row['phase']:<25}{sizes}{row['calls'] / count:>8.0f}{row['us'] / 1e3 / count:>11.1f}{rate:>10.1f}"
        )
    return [*lines, ""]


def _notes(rank: dict, ranks: list[dict]) -> list[str]:
    steps, account = rank["steps"], rank["account"]
    mean = {name: sum(s[name] for s in steps) / len(steps) for name in
            ("seconds", "main_thread_s", "user_s", "system_s", "page_faults")}  # fmt: skip
    names = {row["name"] for row in account["host"]}
    lines = [
        f"processor time a step: user {mean['user_s']:.2f} s, system {mean['system_s']:.2f} s; the main thread was off "
        f"the processor for {max(0.0, mean['seconds'] - mean['main_thread_s']):.2f} s",
        f"page faults a step: {mean['page_faults']:.0f} ({mean['page_faults'] * 4 / 1024:.0f} MiB at 4 KiB); "
        f"peak memory {rank['peak_rss_mb']:.0f} MiB; {account['events'] / len(steps):.0f} events a step recorded",
    ]
    inside = [name for name in GEMM_INSIDE if names & {name, f"{name}_backward"}]
    if inside:
        lines.append(f"GEMMs also run inside of {', '.join(inside)}: their time counts as the op's")
    if any(row["kind"] == PYTHON for row in account["host"]):
        lines.append("Python between ops: moments of the main thread that no op covers")
    files = ", ".join(r["trace"] for r in ranks)
    return [*lines, f"{files}: open in https://ui.perfetto.dev or chrome://tracing"]
