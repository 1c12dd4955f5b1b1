"""K responses per prompt, hpsafety against transformers' generate: python -m bench.end_to_end.generate [--help].

Runs alternate (A B A B), each in a process of its own, so that peak memory is its own and noise hits both alike.
Nothing is reported unless the greedy texts agree. See bench/README.md for how to read the table.
"""

import argparse
import statistics
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from bench.end_to_end.alternate import bf16_is_pointless, child, model_directory
from bench.end_to_end.common import write_json
from bench.end_to_end.generate_run import CONTENDERS, Settings, make_prompts
from bench.machine import machine

MODES = ("greedy", "sampled")
# The share of greedy texts that must be equal to the end. bf16 rounds logits to 8 bits, where words tie often; there
# only the first AGREED_TOKENS of a text count.
AGREEMENT = {"fp32": 0.95, "bf16": 0.5}
AGREED_TOKENS = {"fp32": None, "bf16": 4}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; exits 2 with one line on bad values."""
    p = argparse.ArgumentParser(
        prog="python -m bench.end_to_end.generate", description=__doc__.split("\n")[0]
    )
    p.add_argument(
        "--model", default="smollm2", help="smollm2 or a Hugging Face directory (default: smollm2)"
    )
    p.add_argument("--prompts", type=int, default=16, help="of 60 to 139 tokens (default: 16)")
    p.add_argument("--k", type=int, default=4, help="responses per prompt (default: 4)")
    p.add_argument("--new-tokens", type=int, default=64, help="tokens per response (default: 64)")
    p.add_argument("--top-p", type=float, default=0.95, help="of the sampled mode (default: 0.95)")
    p.add_argument("--runs", type=int, default=3, help="runs of each contender (default: 3)")
    p.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="(default: fp32)")
    p.add_argument("--threads", type=int, default=2, help="(default: 2)")
    p.add_argument(
        "--json", type=Path, help="also write machine, versions, settings and all runs to this file"
    )
    options = p.parse_args(arguments)
    for name in ("prompts", "k", "new_tokens", "runs", "threads"):
        if getattr(options, name) < 1:
            p.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(options, name)}")
    if not 0 < options.top_p <= 1:
        p.error(f"--top-p must be greater than 0 and at most 1, got {options.top_p}")
    return options


def agreement(runs: list[dict], tokens: int | None) -> float:
    """The smallest share, over all runs, of greedy texts that equal the first run's, as far as `tokens` tokens."""
    first = runs[0]["texts"]
    shares = [
        sum(a[:tokens] == b[:tokens] for a, b in zip(run["texts"], first, strict=True)) / len(first)
        for run in runs
    ]
    return min(shares)


def check_texts(runs: list[dict], precision: str) -> float:
    """The agreement; exits 1 where it is too low."""
    share = agreement(runs, AGREED_TOKENS[precision])
    if not share >= AGREEMENT[precision]:
        sys.exit(
            f"only {100 * share:.0f} % of the greedy texts agree, at least {100 * AGREEMENT[precision]:.0f} % must; "
            "this is not the same work, so no timing counts"
        )
    return share


def summarise(runs: list[dict], tokens: int) -> dict:
    """Per contender and mode the sampled tokens per second; ratios say transformers / hpsafety."""
    rows = {}
    for name in dict.fromkeys(run["contender"] for run in runs):
        mine = [run for run in runs if run["contender"] == name]
        row = {"note": mine[0]["note"], "peak_rss_mb": max(run["peak_rss_mb"] for run in mine)}
        for mode in MODES:
            seconds = [run[mode]["seconds"] for run in mine]
            row[mode] = {
                "seconds_min": min(seconds), "tokens_per_s": tokens / min(seconds),
                "tokens_per_s_median": tokens / statistics.median(seconds),
                "cpu_seconds_min": min(run[mode]["cpu_seconds"] for run in mine),
            }  # fmt: skip
        rows[name] = row
    ours = rows["hpsafety"]
    for row in rows.values():
        row["hpsafety_memory_ratio"] = ours["peak_rss_mb"] / row["peak_rss_mb"]
        for mode in MODES:
            row[mode]["hpsafety_speedup"] = row[mode]["seconds_min"] / ours[mode]["seconds_min"]
            row[mode]["hpsafety_cpu_speedup"] = row[mode]["cpu_seconds_min"] / ours[mode]["cpu_seconds_min"]
    return rows


def print_table(settings: Settings, rows: dict, share: float, before: dict) -> None:
    from rich.console import Console
    from rich.table import Table

    title = f"{settings.prompts} prompts, K={settings.k}, {settings.new_tokens} new tokens, {settings.precision}, "
    table = Table(title=title + f"{settings.threads} threads")
    columns = ["", "", "tokens/s\nbest", "\nmedian", "hpsafety is\nfaster by", "by CPU\ntime", "peak RSS\nMB"]
    for column in [*columns, "hpsafety\nneeds"]:
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for name, row in rows.items():
        for mode in MODES:
            table.add_row(
                name, mode, f"{row[mode]['tokens_per_s']:.0f}", f"{row[mode]['tokens_per_s_median']:.0f}",
                f"{row[mode]['hpsafety_speedup']:.2f}x", f"{row[mode]['hpsafety_cpu_speedup']:.2f}x",
                f"{row['peak_rss_mb']:.0f}", f"{row['hpsafety_memory_ratio']:.2f}",
            )  # fmt: skip
    Console(width=max(110, Console().width)).print(table, justify="left")
    first = AGREED_TOKENS[settings.precision]
    print(f"greedy texts equal{f' in their first {first} tokens' if first else ''}: {100 * share:.0f} %")
    for name, row in rows.items():
        print(f"{name}: {row['note']}")
    versions = ", ".join(f"{name} {version}" for name, version in before["versions"].items())
    print(f"{before['cpu']}, {before['torch_capability']}, {before['cores']} cores; {versions}")
    print(f"load average at the start: {before['load_average'][0]:.1f}")


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    if bf16_is_pointless(options):
        return
    settings = Settings(
        model=model_directory(options.model), prompts=options.prompts, k=options.k, new_tokens=options.new_tokens,
        top_p=options.top_p, precision=options.precision, threads=options.threads,
    )  # fmt: skip
    before, runs = machine(settings.threads), []
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "settings.json")
        write_json(path, settings)
        for number in range(options.runs):
            for name in CONTENDERS:
                runs.append(child("generate_run", name, path, threads=settings.threads))
                times = ", ".join(f"{mode} {runs[-1][mode]['seconds']:.1f} s" for mode in MODES)
                print(f"run {number + 1}/{options.runs} {name}: {times}", file=sys.stderr, flush=True)
            share = check_texts(runs, settings.precision)
    rows = summarise(runs, settings.prompts * settings.k * settings.new_tokens)
    print_table(settings, rows, share, before)
    if options.json:
        record = {
            "machine": before,
            "settings": asdict(settings) | {"model": options.model},
            "agreement": share,
        }
        work = {"prompt_tokens": sum(map(len, make_prompts(settings)))}
        write_json(options.json, record | {"work": work, "summary": rows, "runs": runs})
        print(f"wrote {options.json}")


if __name__ == "__main__":
    main()
