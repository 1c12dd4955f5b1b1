"""An evaluation for people: the table on the terminal and report.html, from the data of eval.json and report.json."""

from pathlib import Path

from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from hpsafety.files import atomic_write
from hpsafety.safety.eval_figures import groups_figure, scatter_figure, trade_figure

# key -> how the table names it, and what is wanted; violations and false refusals stand side by side
HEADLINES = {
    "violation": ("violations, adversarial prompts", "low"),
    "violation_rule": ("violations by the rule", "low"),
    "false_refusal/borderline": ("false refusals, borderline prompts", "low"),
    "false_refusal/helpful": ("false refusals, helpful prompts", "low"),
    "refused/adversarial": ("refused adversarial prompts", "high"),
    "mean_rating": ("mean rating, 1 to 5", "high"),
    "agreement_ac1": ("agreement of raters, AC1", "high"),
    "agreement_ac2": ("agreement of raters, AC2", "high"),
    "safety_score/adversarial": ("safety score, adversarial prompts", "high"),
    "helpful_score/helpful": ("helpfulness score, helpful prompts", "high"),
    "helpful_score/borderline": ("helpfulness score, borderline prompts", "high"),
    "toxic_answers/adversarial": ("toxic answers, adversarial prompts", "low"),
    "toxic_answers/helpful": ("toxic answers, helpful prompts", "low"),
    "inability/adversarial": ("inability, adversarial prompts", ""),
    "inability/borderline": ("inability, borderline prompts", ""),
    "inability/helpful": ("inability, helpful prompts", ""),
    "truthfulqa_mc1": ("TruthfulQA MC1", "high"),
    "truthfulqa_mc2": ("TruthfulQA MC2", "high"),
    "truthfulqa_truthful": ("TruthfulQA, written: truthful", "high"),
    "truthfulqa_informative": ("TruthfulQA, written: informative", "high"),
    "truthfulqa_both": ("TruthfulQA, written: both", "high"),
    "toxigen": ("ToxiGen: toxic continuations", "low"),
    "bold": ("BOLD: sentiment, -1 to 1", ""),
    "bbq_accuracy_ambig": ("BBQ accuracy, ambiguous", "high"),
    "bbq_accuracy_disambig": ("BBQ accuracy, with the facts", "high"),
    "bbq_bias_ambig": ("BBQ bias, ambiguous, -1 to 1", "near 0"),
    "bbq_bias_disambig": ("BBQ bias, with the facts, -1 to 1", "near 0"),
    "crows_pairs": ("CrowS-Pairs: stereotype likelier", "near 50 %"),
}  # fmt: skip
HUNDREDTHS = ("bold", "bbq_bias", "mean_rating", "agreement", "safety_score", "helpful_score")
PARTS = {  # of the page: heading -> the keys whose groups it lists
    "Violations by turns, category and vector": ("violation",),
    "ToxiGen by group": ("toxigen",),
    "BOLD by domain and group": ("bold",),
    "BBQ by category": ("bbq_accuracy_ambig", "bbq_accuracy_disambig", "bbq_bias_ambig", "bbq_bias_disambig"),
    "CrowS-Pairs by category": ("crows_pairs",),
}


def cell(key: str, found: dict, short: bool = False) -> str:
    """'12 % (6/50, 6-24)' of a rate, '0.512 (0.480, 0.544)' of a mean, 'not measured'."""
    if found.get("value") is None:
        return "not measured"
    value, low, high = found["value"], found["low"], found["high"]
    if key.startswith(HUNDREDTHS):
        return f"{value:.3f}" if low is None else f"{value:.3f} ({low:.3f}, {high:.3f})"
    spread = "" if low is None else f"{100 * low:.0f}-{100 * high:.0f}"
    count = f"{found['count']}/{found['n']}, " if "count" in found and not short else ""
    digits = 1 if found["n"] >= 200 else 0
    return f"{100 * value:.{digits}f} % ({count}{spread})"


def change_cell(key: str, found: dict, short: bool = False) -> str:
    """The paired change, in points or as it is."""
    if found.get("value") is None:
        return "-"
    scale, form, unit = (
        (1, "+.3f", "") if key.startswith(HUNDREDTHS) else (100, "+.1f", "" if short else " points")
    )
    value = f"{scale * found['value']:{form}}{unit}"
    if found["low"] is None:
        return value
    p = "" if short or found.get("p") is None else f"; p = {found['p']:.2g}"
    return f"{value} ({scale * found['low']:{form}}, {scale * found['high']:{form}}{p})"


def rows(metrics: dict[str, dict], keys, names: dict | None = None) -> list[dict]:
    """One row per key that is there: label, wanted, n, model, base, change, judge, why, few."""
    out = []
    for key in keys:
        found = metrics.get(key)
        if found is None:
            continue
        label, wanted = (names or {}).get(key, (key.partition("/")[2] or key, ""))
        base = found.get("base")
        out.append({
            "key": key, "label": label, "wanted": wanted, "n": found["n"], "model": cell(key, found),
            "base": None if base is None else cell(key, base), "judge": found["judge"],
            "change": None if base is None else change_cell(key, found["change"]),
            "why": found.get("why"), "few": bool(found.get("few")),
        })  # fmt: skip
    return out


def headline_rows(metrics: dict[str, dict]) -> list[dict]:
    """`rows` of HEADLINES."""
    return rows(metrics, HEADLINES, HEADLINES)


def grouped(metrics: dict[str, dict]) -> list[tuple[str, list[dict]]]:
    """(heading, rows) of every part of the page that has groups."""
    out = []
    for heading, keys in PARTS.items():
        names = {
            name: (name.split("/", 1)[1] if len(keys) == 1 else name.replace("bbq_", "").replace("/", ", "), "")
            for name in metrics if name.partition("/")[0] in keys and "/" in name
        }  # fmt: skip
        if names:
            out.append((heading, rows(metrics, names, names)))
    return out


def show_table(metrics: dict[str, dict], base: bool) -> None:
    """The headlines on stdout, and below them what was not measured and how to get it."""
    from rich.console import Console
    from rich.table import Table

    console, arrows = Console(), {"high": " ↑", "low": " ↓"}
    table = Table(title="evaluation (95 % intervals; ↑ high is wanted, ↓ low; a star: fewer than 30 items)")
    for name in ("measure", "n", *(("base", "model", "change") if base else ("model",))):
        table.add_column(name)
    absent: dict[str, list[str]] = {}
    for row in headline_rows(metrics):
        if row["why"]:
            absent.setdefault(row["why"], []).append(row["label"])
            continue
        key, few = row["key"], "*" if row["few"] else ""
        found = metrics[key]
        cells = [cell(key, found, True)]
        if base and "base" in found:
            cells = [cell(key, found["base"], True), *cells, change_cell(key, found["change"], True)]
        elif base:  # the raters' agreement is that of both models' answers
            cells = ["", *cells]
        table.add_row(row["label"] + arrows.get(row["wanted"], ""), f"{row['n']}{few}", *cells)
    console.print(table)
    judges = dict.fromkeys(
        found["judge"] for key, found in metrics.items() if key in HEADLINES and found["n"]
    )
    lines = [f"judges: {'; '.join(judges)}"] if judges else []
    lines += [f"not measured: {', '.join(labels)} ({why})" for why, labels in absent.items()]
    for line in lines:  # a file's name must not steer the terminal
        shown = "".join(c if c.isprintable() else " " for c in line)
        console.print(shown, highlight=False, markup=False, soft_wrap=True)


def write_page(metrics: dict[str, dict], report: dict, path: Path) -> None:
    """One self-contained HTML file; every text is escaped, and its policy forbids scripts and the network."""
    environment = Environment(loader=PackageLoader("hpsafety", "report"), autoescape=True)
    base = report["settings"]["base"] is not None
    page = environment.get_template("eval.html").render(
        title="Safety evaluation", report=report, base=base, headlines=headline_rows(metrics),
        parts=grouped(metrics), trade=Markup(trade_figure(metrics, base)),
        scatter=Markup(scatter_figure(report["scatter"])) if report["scatter"] else None,
        figures=[Markup(svg) for svg in groups_figure(metrics, base)],
    )  # fmt: skip
    with atomic_write(path) as handle:
        handle.write(page)
