"""The demo's table on the terminal and its report.html."""

from pathlib import Path

from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from hpsafety.files import atomic_write
from hpsafety.report.figures import loss_curve, trade_off
from hpsafety.safety.intervals import Rate

WANTED = {"adversarial": "refuse: high", "borderline": "answer: low", "helpful": "answer: low"}


def comparison(result: dict) -> list[tuple[str, str, str, str]]:
    """(measure, wanted, before, after) rows of a demo result."""
    before, after = result["before"], result["after"]
    rows = [("loss per response token", "low", f"{before['loss']:.3f}", f"{after['loss']:.3f}")]
    for name, wanted in WANTED.items():
        rates = (str(Rate(**side["refused"][name])) for side in (before, after))
        rows.append((f"refused, {name} prompts", wanted, *rates))
    return rows


def terminal_tables(result: dict) -> None:
    """Before/after table and the answers side by side, on stdout; model text is printed without control characters."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    table = Table("held-out measure", "wanted", "before", "after", title="before and after")
    for row in comparison(result):
        table.add_row(*row)
    console.print(table)
    answers = Table("question", "before", "after", title="answers, cut short", show_lines=True)
    for s in result["samples"]:
        question = s["prompt"] if isinstance(s["prompt"], str) else s["prompt"][-1]["content"]
        cells = (
            f"[{s['set']}] {question}",
            f"({s['before_verdict']}) {s['before']}",
            f"({s['after_verdict']}) {s['after']}",
        )
        answers.add_row(*(Text(printable(cell)) for cell in cells))
    console.print(answers)


def printable(text: str) -> str:
    """Text without control and bidirectional characters, so that a model's answer cannot steer the terminal."""
    return "".join(c if c.isprintable() or c == "\n" else " " for c in text)


def write_report(result: dict, path: Path) -> None:
    """One self-contained HTML file; every text is escaped, and its policy forbids scripts and the network."""
    environment = Environment(loader=PackageLoader("hpsafety", "report"), autoescape=True)
    points = [{"name": name, **result[name]["refused"]} for name in ("before", "after")]
    page = environment.get_template("demo.html").render(
        title="Safety fine-tuning of a small chat model, before and after", result=result, table=comparison(result),
        trade_off=Markup(trade_off(points)), loss_curve=Markup(loss_curve(result["metrics"])),
        last=result["metrics"][-1],
    )  # fmt: skip
    with atomic_write(path) as handle:
        handle.write(page)
