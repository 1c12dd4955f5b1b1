"""`hpsafety plan --kernels`: each GPU kernel's time on paper, from the compiler's code (bench/static/predict.py)."""

import json
import sys
from pathlib import Path

from hpsafety.bench_command import load
from hpsafety.errors import InputError
from hpsafety.files import atomic_write

PLAIN = (
    "op",
    "function",
    "call",
    "kernel",
    "times",
    "config",
    "size",
    "chip",
    "us",
    "limit",
    "pct_of_peak",
    "peak",
)


def run(cfg) -> None:
    """cfg: a PlanConfig."""
    if not cfg.kernels:
        raise InputError(
            "only --kernels so far; for the time and memory of stages see hpsafety pipeline FILE.toml --plan"
        )
    if cfg.json is not None and not Path(cfg.json).resolve().parent.is_dir():
        raise InputError(f"--json {cfg.json}: {Path(cfg.json).resolve().parent} is no directory")
    predict, record = load("predict", "static"), load("record", "static")
    rows = record.read()
    known = sorted({row["op"] for row in rows})
    for op in cfg.op:
        if op not in known:
            raise InputError(f"--op {op}: no compiled kernels of it on record; ops: {', '.join(known)}")
    chips = [chip.name for chip in predict.CHIPS]
    found = [{"chip": chip.name, **one} for chip in predict.CHIPS for one in predict.predict(rows, chip)]
    shown = [one for one in found if one["shapes"] in cfg.size and (not cfg.op or one["op"] in cfg.op)]
    if sys.stdout.isatty():
        show(shown, chips, predict.assumptions())
    else:
        print("\n".join("\t".join(cells) for cells in [PLAIN, *map(plain, shown)]))
        print("\n".join(f"model: {text}" for text in predict.assumptions()), file=sys.stderr)
    if cfg.json is not None:
        with atomic_write(cfg.json) as handle:
            json.dump({"model": predict.assumptions(), "predictions": found}, handle, indent=1)


def plain(one: dict) -> tuple[str, ...]:
    numbers = f"{one['seconds'] * 1e6:.1f}", one["bound"], f"{one['share'] * 100:.1f}", one["peak"]
    kernel = one["kernel"] or "all", str(one["times"]), one["config"]
    return one["op"], one["function"], str(one["call"]), *kernel, one["shapes"], one["chip"], *numbers


def together(launches: list[dict]) -> tuple[str, str, str]:
    """Cells of one kernel's launches on a chip: in several configurations, the share weighs by their time."""
    seconds = sum(one["seconds"] for one in launches)
    if not seconds:
        return "", "", ""
    slowest = max(launches, key=lambda one: one["seconds"])
    share = sum(one["share"] * one["seconds"] for one in launches) / seconds
    mark = " F" if slowest["peak"] == "flops" else ""
    return f"{seconds * 1e6:.1f}", f"{share * 100:.0f}{mark}", slowest["bound"]


def show(found: list[dict], chips: list[str], assumptions: list[str]) -> None:
    """A line per call, its kernels below it, the chips side by side."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    cells: dict[tuple, dict[str, list]] = {}
    for one in sorted(found, key=lambda one: one["kernel"] is not None):  # a call before its kernels
        key = (one["op"], one["function"], one["call"], one["shapes"], one["kernel"] or "")
        cells.setdefault(key, {}).setdefault(one["chip"], []).append(one)
    sizes = dict.fromkeys(one["shapes"] for one in found)
    title = f"Llama {', '.join(sizes)}: a model, not a measurement"
    legend = [*assumptions, "% of the peak bandwidth, or with F of bf16 operations"]
    table = Table(
        "call, kernels", title=title, caption="\n".join(legend), title_justify="left", caption_justify="left",
        box=box.SIMPLE, pad_edge=False,
    )  # fmt: skip
    for chip in chips:
        table.add_column(chip.split()[0] + " us", justify="right", no_wrap=True)
        table.add_column("%", justify="right", no_wrap=True)
        table.add_column("limit", no_wrap=True)
    order = list(dict.fromkeys(key[:4] for key in cells))
    for key in sorted(cells, key=lambda key: order.index(key[:4])):
        _, function, call, size, kernel = key
        words = (function, f"#{call + 1}" if call else "", size if len(sizes) > 1 else "")
        name = f"  {kernel}" if kernel else " ".join(filter(None, words))
        line = [text for chip in chips for text in together(cells[key].get(chip, []))]
        table.add_row(name, *line, style=None if kernel else "bold")
    Console().print(table)
