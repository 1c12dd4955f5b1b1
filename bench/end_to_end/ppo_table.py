"""From PPO's runs to summaries and tables: a line per contender, below it one per phase."""

import statistics

from bench.end_to_end.common import Settings
from bench.end_to_end.limit import best_of, combine
from bench.end_to_end.table import print_machine


def summarise(settings: Settings, runs: list[dict], limits: list[dict], work: dict) -> dict:
    """Per contender times, rates, memory and fraction of the GEMM limit, in all and per phase; ratios say
    peer / hpsafety. A phase's seconds are the best of all runs, as those of the whole are.
    """
    gflops, rates = combine(settings, best_of(limits)), [combine(settings, one) for one in limits]
    rows = {}
    for name in dict.fromkeys(run["contender"] for run in runs):
        mine = [run for run in runs if run["contender"] == name]
        needed, phases = work["needed_flops"][name], mine[0]["phases"]
        seconds = [run["seconds"] for run in mine]
        total = sum(needed.values()) if phases else needed[settings.part]
        best = {phase: min(run["phases"][phase] for run in mine) for phase in phases}
        rows[name] = {
            "seconds_min": min(seconds), "seconds_median": statistics.median(seconds),
            "cpu_seconds_min": min(run["cpu_seconds"] for run in mine),
            "tokens_equiv_per_s": work["tokens_equiv"] / min(seconds),
            "gemm_fraction": total / (min(seconds) * gflops * 1e9),
            "peak_rss_mb": max(run["peak_rss_mb"] for run in mine),
            "largest_difference": max(run["difference"] for run in mine), "note": mine[0]["note"],
            "phases": {
                phase: {"seconds_min": took, "gemm_fraction": needed[phase] / (took * gflops * 1e9)}
                for phase, took in best.items()
            },
        }  # fmt: skip
    ours = rows["hpsafety"]
    for row in rows.values():
        row["hpsafety_speedup"] = row["seconds_min"] / ours["seconds_min"]
        row["hpsafety_cpu_speedup"] = row["cpu_seconds_min"] / ours["cpu_seconds_min"]
        row["hpsafety_memory_ratio"] = ours["peak_rss_mb"] / row["peak_rss_mb"]
        for phase, one in row["phases"].items():
            one["hpsafety_speedup"] = one["seconds_min"] / ours["phases"][phase]["seconds_min"]
    return {"contenders": rows, "gemm_gflops": gflops, "gemm_gflops_spread": [min(rates), max(rates)]}


def print_tables(parts: dict[str, dict], gradients: dict, machine: dict) -> None:
    for name, part in parts.items():
        _print_part(name, part)
    for peer, found in gradients.items():
        print(f"gradients beside {peer}: {found}")
    print_machine(machine)


def _print_part(name: str, part: dict) -> None:
    from rich.console import Console
    from rich.table import Table

    settings, work, summary = part["settings"], part["work"], part["summary"]
    what = f"PPO, {name}: {settings['groups']} prompts x {settings['k']} samples x {settings['response_tokens']} tokens"
    budget, peers = settings["tokens_per_batch"], settings["peer_tokens_per_batch"]
    told = f"{settings['precision']}, {settings['threads']} threads, {budget} tokens a micro-batch (peers {peers})"
    table = Table(title=f"{what}, {work['optimiser_steps']} optimiser steps; {told}")
    for column in ("", "", "seconds\nbest", "tokens/s", "hpsafety is\nfaster by", "by CPU\ntime", "peak RSS\nMB",
                   "hpsafety\nneeds", "of GEMM\nlimit"):  # fmt: skip
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for contender, row in summary["contenders"].items():
        table.add_row(
            contender, "", f"{row['seconds_min']:.1f}", f"{row['tokens_equiv_per_s']:.0f}",
            f"{row['hpsafety_speedup']:.2f}x", f"{row['hpsafety_cpu_speedup']:.2f}x", f"{row['peak_rss_mb']:.0f}",
            f"{row['hpsafety_memory_ratio']:.2f}", f"{100 * row['gemm_fraction']:.0f} %",
        )  # fmt: skip
        for phase, one in row["phases"].items():
            fraction = f"{100 * one['gemm_fraction']:.0f} %"
            cells = (f"{one['seconds_min']:.1f}", "", f"{one['hpsafety_speedup']:.2f}x", "", "", "", fraction)
            table.add_row("", phase, *cells)
    Console(width=max(118, Console().width)).print(table, justify="left")
    low, high = summary["gemm_gflops_spread"]
    limit = f"{summary['gemm_gflops']:.0f} GFLOP/s ({low:.0f} to {high:.0f})"
    print(f"tokens_equiv {work['tokens_equiv']}; GEMM limit {limit}")
    for contender, row in summary["contenders"].items():
        print(f"{contender}: {row['note']}; largest difference {row['largest_difference']:.1e}")
    if "python_share" in summary:
        shares = ", ".join(f"{phase} {100 * share:.1f} %" for phase, share in summary["python_share"].items())
        print(f"hpsafety's time in Python outside of ops, while recorded: {shares}")
