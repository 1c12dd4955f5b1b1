"""`hpsafety bench compare OLD NEW`: per row the ratio of median times NEW / OLD, with an interval.

The interval is a block bootstrap of both medians: runs of neighbouring samples are drawn together, because a busy
neighbour or a lower clock hits neighbours alike, and drawing them one by one would make the interval too narrow.
What hits a whole run alike no interval from inside the runs can show; the limits of the two runs say how far the
machine itself differed.
"""

import json
import sys

import numpy as np

from bench.harness import results
from bench.harness.contenders import show
from hpsafety.errors import InputError

CONFIDENCE, DRAWS, SEED = 0.99, 2000, 0  # many rows are compared at once, hence 99 %
LEAST_CHANGE = (
    0.03  # a smaller change of the median is called none: two runs of one program differ by as much
)
MACHINE_CHANGE = 0.05
LEAST_CALLS = 5  # fewer samples have no interval worth the name
VERDICTS = ("faster", "slower", "no difference", "too few calls")


def key(row: dict) -> str:
    return json.dumps([row[name] for name in results.KEY], sort_keys=True)


def medians(samples: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Medians of DRAWS resamples in circular blocks of sqrt(n) neighbours."""
    n = len(samples)
    block = max(1, round(n**0.5))
    starts = rng.integers(0, n, (DRAWS, -(-n // block)))
    places = (starts[:, :, None] + np.arange(block)) % n
    return np.median(samples[places.reshape(DRAWS, -1)[:, :n]], axis=1)


def ratio(old: list[float], new: list[float]) -> tuple[float, float, float]:
    """(NEW / OLD of the medians, and its interval's two ends)."""
    rng = np.random.default_rng(SEED)
    a, b = np.asarray(old, dtype=float), np.asarray(new, dtype=float)
    drawn = medians(b, rng) / medians(a, rng)
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(drawn, [tail, 100 - tail])
    return float(np.median(b) / np.median(a)), float(low), float(high)


def verdict(middle: float, low: float, high: float) -> str:
    if low > 1 and middle > 1 + LEAST_CHANGE:
        return "slower"
    if high < 1 and middle < 1 - LEAST_CHANGE:
        return "faster"
    return "no difference"


def compare(old: dict, new: dict) -> list[dict]:
    """One row per measurement that both files have, in NEW's order."""
    before = {key(row): row for row in old["rows"]}
    found = []
    for row in new["rows"]:
        was = before.get(key(row))
        if was is None:
            continue
        calls = min(len(was["samples_ms"]), len(row["samples_ms"]))
        middle, low, high = ratio(was["samples_ms"], row["samples_ms"])
        found.append(
            {name: row[name] for name in results.KEY}
            | {"old_ms": was["ms_p50"], "new_ms": row["ms_p50"], "ratio": middle, "low": low, "high": high}
            | {"verdict": verdict(middle, low, high) if calls >= LEAST_CALLS else VERDICTS[-1]}
        )
    return found


def machine_changes(old: dict, new: dict) -> list[str]:
    """What about the machines differs, as lines: names, versions, and limits more than MACHINE_CHANGE apart."""
    lines = []
    for name in ("cpu", "gpu", "torch_capability", "threads", "versions"):
        was, now = old["machine"].get(name), new["machine"].get(name)
        if was != now:
            lines.append(f"{name}: {was} became {now}")

    def rates(result):
        return {f"GEMM {g['m']}x{g['k']}x{g['n']} {g['dtype']}": max(g["routes"].values())
                for g in result["limits"]["gemm_gflops"]} | {
                "memory bandwidth": result["limits"]["memory_gb_per_s"]}  # fmt: skip

    was, now = rates(old), rates(new)
    for name in was.keys() & now.keys():
        if was[name] and now[name] and abs(now[name] / was[name] - 1) > MACHINE_CHANGE:
            lines.append(f"the machine's {name} changed by {100 * (now[name] / was[name] - 1):+.0f} %")
    return sorted(lines)


PLAIN = (
    "op",
    "impl",
    "shape",
    "dtype",
    "device",
    "direction",
    "old_ms",
    "new_ms",
    "ratio",
    "low",
    "high",
    "verdict",
)


def plain(row: dict) -> str:
    def text(value):
        if isinstance(value, dict):
            return show(value)
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    return "\t".join(text(row[name]) for name in PLAIN)


def _table(rows: list[dict]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"NEW ÷ OLD, medians with {100 * CONFIDENCE:.0f} % intervals", title_justify="left")
    for name in ("op", "contender", "shape", "dtype", "direction"):
        table.add_column(name)
    for name in ("old ms", "new ms", "ratio", "interval"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("")
    colours = {"faster": "green", "slower": "red", "no difference": "dim", "too few calls": "dim"}
    for row in rows:
        table.add_row(
            row["op"], row["impl"], show(row["shape"]), row["dtype"], row["direction"], f"{row['old_ms']:.4g}",
            f"{row['new_ms']:.4g}", f"{row['ratio']:.3f}", f"{row['low']:.3f} – {row['high']:.3f}", row["verdict"],
            style=colours[row["verdict"]],
        )  # fmt: skip
    Console().print(table)


def main(cfg) -> int:
    """Runs `hpsafety bench compare`; always 0."""
    old, new = results.read(cfg.old), results.read(cfg.new)
    rows = compare(old, new)
    if not rows:
        raise InputError(
            f"{cfg.old} and {cfg.new} have no measurement in common (same {', '.join(results.KEY)})"
        )
    if sys.stdout.isatty():
        _table(rows)
    else:
        print("\n".join(["\t".join(PLAIN), *map(plain, rows)]))
    counts = [f"{sum(row['verdict'] == name for row in rows)} {name}" for name in VERDICTS]
    unmatched = len(old["rows"]) + len(new["rows"]) - 2 * len(rows)
    lines = [", ".join(counts) + (f"; {unmatched} rows stand in one file only" if unmatched else "")]
    print("\n".join(lines + machine_changes(old, new)), file=sys.stderr)
    return 0
