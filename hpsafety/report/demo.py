"""What a pipeline says on the terminal when it ends: a table of its evaluations, and where things lie."""

import json
from pathlib import Path

from hpsafety.report.text import printable

WANTED = {  # key of eval.json -> (what the table calls it, what is wanted)
    "refused/adversarial": ("refused, adversarial", "high"),
    "false_refusal/borderline": ("refused, borderline", "low"),
    "false_refusal/helpful": ("refused, helpful", "low"),
    "violation": ("violations", "low"),
    "safety_score/adversarial": ("safety score, adversarial", "high"),
    "helpful_score/helpful": ("helpful score, helpful", "high"),
    "helpful_score/borderline": ("helpful score, borderline", "high"),
}


def comparison(evals: dict[str, dict]) -> list[tuple[str, ...]]:
    """(measure, wanted, one value per evaluation) rows.

    evals  name -> eval.json, in the order of the columns; a measure that none of them took is left out
    """
    rows = []
    for key, (name, wanted) in WANTED.items():
        entries = [found.get(key) for found in evals.values()]
        if any(entry and entry["value"] is not None for entry in entries):
            rows.append((name, wanted, *map(cell, entries)))
    return rows


def cell(entry: dict | None) -> str:
    """A rate in per cent with its 95 % interval, or a mean, whose interval stands in the evaluation's own report."""
    if entry is None or entry["value"] is None:
        return "not measured"
    if entry.get("kind") == "rate":
        return f"{100 * entry['value']:.0f} % ({100 * entry['low']:.0f}-{100 * entry['high']:.0f})"
    return f"{entry['value']:.3f}"


def show_end(pipeline, state: dict) -> None:
    """The table on stdout, the paths and the time on stderr."""
    from hpsafety.train.metrics import say

    evals = {
        stage.name.removeprefix("eval-"): json.loads((stage.out / "eval.json").read_text(encoding="utf-8"))
        for stage in pipeline.stages
        if stage.run == "eval"
    }
    if evals:
        show_table(evals)
    trained = [stage for stage in pipeline.stages if (stage.out / "model").is_dir()]
    say(f"\n{pipeline.out / 'pipeline.json'}: every stage, its settings, its seconds")
    for what, path in (
        ("last model", trained[-1].out / "model" if trained else None),
        ("report", pipeline.out / "report.html"),
        *((f"{stage.name}", stage.out / "card.md") for stage in pipeline.stages if stage.run == "card"),
    ):
        if path is not None and Path(path).exists():
            say(f"{what}: {path}")
    say(f"{sum(entry['seconds'] for entry in state['stages']):.0f} s in all stages")


def show_table(evals: dict[str, dict]) -> None:
    """Every evaluation a column; a value stands above its interval, so that 80 columns hold five."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="held-out questions after each stage (95 % intervals; ↑ high is wanted, ↓ low)")
    table.add_column("")
    for name in evals:
        table.add_column(printable(name), no_wrap=True)
    for measure, wanted, *values in comparison(evals):
        arrow = "↑" if wanted == "high" else "↓"
        table.add_row(f"{measure} {arrow}", *(value.replace(" (", "\n(") for value in values))
    Console().print(table)
