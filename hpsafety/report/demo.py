"""The demo's table on the terminal and its report.html."""

from pathlib import Path

from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from hpsafety.files import atomic_write
from hpsafety.report.figures import loss_curves, score_figure, trade_off
from hpsafety.report.text import printable
from hpsafety.safety import distill_page, eval_page, ppo_page
from hpsafety.safety.intervals import Rate
from hpsafety.safety.measure import JUDGED
from hpsafety.safety.rejection_page import curves_figure

WANTED = {"adversarial": "refuse: high", "borderline": "answer: low", "helpful": "answer: low"}
PPO_ROWS = (
    "reward",
    "reward_safety",
    "reward_helpful",
    "share_safety",
    "kl",
    "ratio_max_first",
    "clip_fraction",
    "length",
)


def comparison(result: dict, short: bool = False) -> list[tuple[str, ...]]:
    """(measure, wanted, one value per model) rows of a demo result. short: rates without their counts."""
    models = result["models"]
    rows = [("loss per response token", "low", *(f"{m['loss']:.3f}" for m in models))]
    for name, wanted in WANTED.items():
        rates = (_rate(m["refused"][name], short) for m in models)
        rows.append((f"refused, {name} prompts", wanted, *rates))
    for judge, name in JUDGED:
        means = (f"{sum(m['scores'][name][judge]) / len(m['scores'][name][judge]):.3f}" for m in models)
        rows.append((f"{judge} score, {name} prompts", "high", *means))
    return rows


def _rate(fields: dict, short: bool) -> str:
    rate = Rate(**fields)
    return f"{100 * rate.value:.0f} % ({100 * rate.low:.0f}-{100 * rate.high:.0f})" if short else str(rate)


def judge_rows(result: dict) -> list[tuple[str, str, str]]:
    """(reward model, pairs trained on, accuracy on held-out pairs) rows."""
    return [
        (kind, str(report["data"]["examples"] - report["held_out"]["pairs"]),
         str(Rate(**report["held_out"]["accuracy"]["all"])))
        for kind, report in result["judges"].items()
    ]  # fmt: skip


def terminal_tables(result: dict) -> None:
    """The table of all models and their answers side by side, on stdout; model text is printed without control
    characters."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console, names = Console(), [m["name"] for m in result["models"]]
    table = Table(title="before and after (95 % intervals; ↑ high is wanted, ↓ low)")
    table.add_column("held out")
    for name in names:
        table.add_column(name, no_wrap=True)
    for measure, wanted, *values in comparison(result, short=True):
        arrow = "↑" if wanted.endswith("high") else "↓"
        stacked = (
            value.replace(" (", "\n(") for value in values
        )  # a rate above its interval: 80 columns hold five
        table.add_row(f"{measure.removesuffix(' prompts')} {arrow}", *stacked)
    console.print(table)
    pairs = Table("reward model", "pairs", "held-out accuracy")
    for row in judge_rows(result):
        pairs.add_row(*row)
    console.print(pairs)
    answers = Table("question", *names, title="answers, cut short", show_lines=True)
    for s in result["samples"]:
        question = s["prompt"] if isinstance(s["prompt"], str) else s["prompt"][-1]["content"]
        cells = (f"[{s['set']}] {question}", *(f"({a['verdict']}) {a['text']}" for a in s["answers"]))
        answers.add_row(*(Text(printable(cell)) for cell in cells))
    console.print(answers)


def write_report(result: dict, path: Path) -> None:
    """One self-contained HTML file; every text is escaped, and its policy forbids scripts and the network."""
    environment = Environment(loader=PackageLoader("hpsafety", "report"), autoescape=True)
    models = result["models"]
    losses = {
        name: rows for name, rows in result["metrics"].items() if name != "ppo"
    }  # its loss need not fall
    ends = [row for row in ppo_page.ends(result["metrics"]["ppo"]) if row[0] in PPO_ROWS]
    page = environment.get_template("demo.html").render(
        title="Making a small chat model safer, step by step", result=result, table=comparison(result, short=True),
        names=[m["name"] for m in models], judges=judge_rows(result), last=result["metrics"]["sft"][-1],
        trade_off=Markup(trade_off([{"name": m["name"], **m["refused"]} for m in models])),
        scores=Markup(score_figure(models, JUDGED[:2])), loss_curves=Markup(loss_curves(losses)),
        curves=Markup(curves_figure(result["best_of_k"]["iterations"])),
        evaluation=[row for row in eval_page.headline_rows(result["eval"]) if row["n"]],
        arms=distill_page.rows(result["distill"]["arms"]), decided=distill_page.decided(result["distill"]),
        ppo_curves=Markup(ppo_page.curves_figure(result["metrics"]["ppo"])), ppo_ends=ends,
    )  # fmt: skip
    with atomic_write(path) as handle:
        handle.write(page)
