"""What the terminal shows: a table per case; plain tab-separated lines, one a row, everywhere else."""

import sys

from bench.harness.contenders import show

PLAIN = ("op", "impl", "shape", "dtype", "device", "direction", "ms_p20", "ms_p50", "ms_p80", "ms_min", "repeats",
         "limit_ms", "limit_by", "pct_of_limit", "pct_of_limit_best", "peak_mb")  # fmt: skip


def plain(row: dict) -> str:
    def text(name):
        value = row[name]
        if isinstance(value, dict):
            return show(value)
        return "-" if value is None else f"{value:.5g}" if isinstance(value, float) else str(value)

    return "\t".join(text(name) for name in PLAIN)


def milliseconds(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


class Writer:
    """Rows to stdout as they come. A terminal gets rich tables."""

    def __init__(self, terminal: bool | None = None):
        self.terminal = sys.stdout.isatty() if terminal is None else terminal
        self.begun = False

    def rows(self, rows: list[dict]) -> None:
        if not rows:
            return
        if self.terminal:
            self._table(rows)
            return
        if not self.begun:
            print("\t".join(PLAIN))
        self.begun = True
        print("\n".join(plain(row) for row in rows), flush=True)

    def _table(self, rows: list[dict]) -> None:
        from rich.console import Console
        from rich.table import Table

        first = rows[0]
        title = f"{first['op']} {first['direction']}, {show(first['shape'])}, {first['dtype']}, {first['cache']} caches"
        table = Table(
            title=title,
            title_justify="left",
            caption=caption(first),
            caption_justify="left",
            title_style="bold",
        )
        table.add_column("contender", no_wrap=True)
        for column in (
            "ms p20",
            "p50",
            "p80",
            "best",
            "calls",
            "% of limit\np50",
            "\nbest",
            "time ÷\nfirst",
            "peak\nMB",
        ):
            table.add_column(column, justify="right", no_wrap=True)
        for row in rows:
            ratio = "" if row is first else f"{row['ms_p50'] / first['ms_p50']:.2f}"
            table.add_row(
                row["impl"], *(milliseconds(row[f"ms_{name}"]) for name in ("p20", "p50", "p80", "min")),
                str(row["repeats"]), f"{row['pct_of_limit']:.0f}", f"{row['pct_of_limit_best']:.0f}", ratio,
                "-" if row["peak_mb"] is None else f"{row['peak_mb']:.1f}",
                style="dim" if row["peer"] else None,
            )  # fmt: skip
        Console().print(table)

    def end(self, record: dict) -> None:
        """What all rows share, on a terminal; the lines elsewhere are for programs."""
        if not self.terminal:
            return
        m = record["machine"]
        versions = ", ".join(f"{name} {version}" for name, version in m["versions"].items())
        print(
            f"{m.get('gpu', m['cpu'])}, {m['torch_capability']}, {m['threads']} of {m['cores']} cores; {versions}"
        )
        print(f"commit {m['commit'][:12]}; load average at the start {m['load_average'][0]:.1f}")
        for wrong in record["wrong"]:
            print(f"{wrong['op']} {wrong['direction']} {wrong['dtype']} {wrong['impl']}: {wrong['fault']}")


def caption(row: dict) -> str:
    by = {"gemm": "its GEMMs", "memory": "memory", "cache": "the cache", "call": "the cost of a call"}[
        row["limit_by"]
    ]
    note = f"\n{row['note']}" if row["note"] else ""
    return f"limit {milliseconds(row['limit_ms'])} ms: {by} ({row['limit']}){note}"
