"""From runs to a summary and a table."""

import statistics

from bench.end_to_end.common import Settings
from bench.end_to_end.limit import best_of, combine


def summarise(settings: Settings, runs: list[dict], limits: list[dict], work: dict) -> dict:
    """Per contender rates, memory and fraction of the GEMM limit, from its runs; ratios say peer / hpsafety.

    gemm_gflops  the limit: per shape the best route's best rate over the session; spread: of single measurements
    """
    rates = [combine(settings, one) for one in limits]
    gflops = combine(settings, best_of(limits))
    rows = {}
    for name in dict.fromkeys(run["contender"] for run in runs):
        mine = [run for run in runs if run["contender"] == name]
        seconds = [run["seconds"] for run in mine]
        rows[name] = {
            "seconds_min": min(seconds), "seconds_median": statistics.median(seconds),
            "cpu_seconds_min": min(run["cpu_seconds"] for run in mine),
            "tokens_equiv_per_s": work["tokens_equiv"] / min(seconds),
            "tokens_equiv_per_s_median": work["tokens_equiv"] / statistics.median(seconds),
            "gemm_fraction": work["needed_flops"] / (min(seconds) * gflops * 1e9),
            "peak_rss_mb": max(run["peak_rss_mb"] for run in mine),
            "note": mine[0]["note"],
        }  # fmt: skip
        if settings.work == "score":
            rows[name]["responses_per_s"] = work["responses"] / min(seconds)
            rows[name]["largest_difference"] = _largest_difference(runs[0]["values"], mine)
        else:
            rows[name]["first_step_loss"] = mine[0]["values"][0]
            rows[name]["last_step_loss"] = mine[0]["values"][-1]
    ours = rows.get("hpsafety")
    if ours:
        for row in rows.values():
            row["hpsafety_speedup"] = row["seconds_min"] / ours["seconds_min"]
            row["hpsafety_speedup_median"] = row["seconds_median"] / ours["seconds_median"]
            row["hpsafety_cpu_speedup"] = row["cpu_seconds_min"] / ours["cpu_seconds_min"]
            row["hpsafety_memory_ratio"] = ours["peak_rss_mb"] / row["peak_rss_mb"]
    return {"contenders": rows, "gemm_gflops": gflops, "gemm_gflops_spread": [min(rates), max(rates)],
            "gemm_best": best_of(limits)}  # fmt: skip


def _largest_difference(values: list[float], runs: list[dict]) -> float:
    return max(abs(a - b) for run in runs for a, b in zip(values, run["values"], strict=True))


def _title(settings: Settings) -> str:
    """What was done, in the words of the work."""
    budget, peers = settings.tokens_per_batch, settings.peer_tokens_per_batch
    what = {
        "sft": f"SFT: {settings.groups} pairs, batch {settings.batch}",
        "distill": f"distillation: {settings.groups} prompts of {settings.k}, batch {settings.batch}",
        "reward": f"reward model: {settings.groups} preference pairs, batch {settings.batch}",
        "score": f"scores of {settings.groups} groups of {settings.k} by two reward models",
    }[settings.work]
    tokens = f"{budget} tokens a micro-batch" + (f" (peers {peers})" if peers != budget else "")
    return f"{what}, {settings.precision}, {settings.threads} threads; {tokens}"


def print_table(settings: Settings, summary: dict, machine: dict) -> None:
    from rich.console import Console
    from rich.table import Table

    agreement = "largest\ndifference" if settings.work == "score" else "first-step\nloss"
    table = Table(title=_title(settings))
    table.add_column("")
    for column in ("tokens/s\nbest", "\nmedian", "hpsafety is\nfaster by", "by CPU\ntime", "peak RSS\nMB",
                   "hpsafety\nneeds", "of GEMM\nlimit", agreement):  # fmt: skip
        table.add_column(column, justify="right", no_wrap=True)
    ratio = lambda row, key, form: form.format(row[key]) if key in row else "-"  # noqa: E731
    for name, row in summary["contenders"].items():
        table.add_row(
            name, f"{row['tokens_equiv_per_s']:.0f}", f"{row['tokens_equiv_per_s_median']:.0f}",
            ratio(row, "hpsafety_speedup", "{:.2f}x"), ratio(row, "hpsafety_cpu_speedup", "{:.2f}x"),
            f"{row['peak_rss_mb']:.0f}", ratio(row, "hpsafety_memory_ratio", "{:.2f}"),
            f"{100 * row['gemm_fraction']:.0f} %",
            f"{row['largest_difference']:.1e}" if settings.work == "score" else f"{row['first_step_loss']:.5f}",
        )  # fmt: skip
    Console(width=max(110, Console().width)).print(table, justify="left")
    _print_context(summary, machine)


def _print_context(summary: dict, machine: dict) -> None:
    """What stands below the table: the limit, what each contender did, and on which machine."""
    low, high = summary["gemm_gflops_spread"]
    best = [f"{shape} {max(r, key=r.get)} {max(r.values()):.0f}" for shape, r in summary["gemm_best"].items()]
    print(f"GEMM limit {summary['gemm_gflops']:.0f} GFLOP/s (single measurements {low:.0f} to {high:.0f})")
    print("best routes: " + ", ".join(best))
    for name, row in summary["contenders"].items():
        print(f"{name}: {row['note']}")
    print_machine(machine)


def print_machine(machine: dict) -> None:
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    print(f"{machine['cpu']}, {machine['torch_capability']}, {machine['cores']} cores; {versions}")
    print(f"load average at the start: {machine['load_average'][0]:.1f}")
