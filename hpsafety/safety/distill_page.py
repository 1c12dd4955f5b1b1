"""Context distillation's report for people: tables on the terminal and report.html, from the data of report.json."""

from pathlib import Path

from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from hpsafety.files import atomic_write
from hpsafety.safety.drawing import AFTER, BEFORE, INK, MIDDLE, figure, to_svg
from hpsafety.safety.reward_report import rate_of

COLOURS = {"none": BEFORE, "generic": MIDDLE, "template": AFTER, "distilled": INK}
HEADER = (
    "answers",
    "mean R_s (95 %)",
    "R_s at 10/50/90 %",
    "refusals",
    "words",
    "off the prompt",
    "hedges/100 words",
)
SHORT = ("answers", "mean R_s (95 %)", "refusals")  # on the terminal
NAMES = {
    "none": "no preprompt", "generic": "generic preprompt", "template": "answer template",
    "distilled": "distilled, no preprompt", "rm": "--select rm", "all": "--select all",
}  # fmt: skip


def number(value: float | None, form: str = ".3f") -> str:
    return "-" if value is None else format(value, form)


def mean(row: dict) -> str:
    """0.512 (0.480, 0.544)."""
    if row["low"] is None:
        return number(row["mean"])
    return f"{row['mean']:.3f} ({row['low']:.3f}, {row['high']:.3f})"


def cells(m: dict) -> tuple[str, ...]:
    """One row of HEADER."""
    vague = m["vagueness"]
    return (
        str(m["n"]), mean(m["safety"]), "/".join(number(m["percentiles"][p], ".2f") for p in ("10", "50", "90")),
        str(rate_of(m["refusal"])), number(vague["words"], ".0f"), str(rate_of(vague["off_prompt"])),
        number(vague["hedges_per_100_words"], ".1f"),
    )  # fmt: skip


def rows(part: dict) -> list[tuple[str, ...]]:
    """(name, *cells) of each condition."""
    return [(NAMES[name], *cells(m)) for name, m in part.items()]


def decided(result: dict) -> str:
    """What became of the samples, in a line."""
    d = result["decisions"]
    out = "".join(f", {count} left out ({why})" for why, count in d["excluded"].items())
    return f"{d['kept']} of {d['samples']} samples kept, {d['not_better']} not above the plain answer{out}"


def show_tables(result: dict) -> None:
    """Samples, and where there are any the held-out answers, on stdout."""
    from rich.console import Console
    from rich.table import Table

    parts = {f"samples: {decided(result)}": result["arms"]}
    parts |= {
        f"held-out {name} prompts, greedy": part for name, part in (result.get("heldout") or {}).items()
    }
    for title, part in parts.items():
        table = Table("asked with", *SHORT, title=title)
        for name, m in part.items():
            table.add_row(name, str(m["n"]), mean(m["safety"]), str(rate_of(m["refusal"])))
        Console().print(table)


def write_page(result: dict, path: Path) -> None:
    """One self-contained HTML file; every text is escaped, and its policy forbids scripts and the network."""
    environment = Environment(loader=PackageLoader("hpsafety", "report"), autoescape=True)
    page = environment.get_template("distill.html").render(
        title="Safety context distillation", result=result, header=HEADER, rows=rows, decided=decided(result),
        names=NAMES, mean=mean,
        distributions=Markup(distributions(result["arms"], "Safety scores of the samples")),
        gains=Markup(gain_figure(result["gain"])),
        heldout={
            name: Markup(distributions(part, f"Safety scores, held-out {name} prompts"))
            for name, part in (result.get("heldout") or {}).items()
        },
    )  # fmt: skip
    with atomic_write(path) as handle:
        handle.write(page)


def distributions(part: dict, title: str) -> str:
    """Share of answers that score R_s or less, for every score there is (CD-6)."""
    fig, axes = figure(6.4, 3.8)
    words = []
    for name, m in part.items():
        scores = sorted(m["scores"])
        if not scores:
            continue
        shares = [(i + 1) / len(scores) for i in range(len(scores))]
        axes.step(
            [0.0, *scores, 1.0], [0.0, *shares, 1.0], where="post", color=COLOURS[name], linewidth=1.8,
            linestyle="--" if name == "distilled" else "-", label=f"{NAMES[name]} (n = {len(scores)})",
        )  # fmt: skip
        words.append(f"{NAMES[name]}: mean {m['safety']['mean']:.3f}, median {m['percentiles']['50']:.3f}")
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="safety score R_s", ylabel="share of answers at or below")
    axes.legend(frameon=False, fontsize=8, labelcolor=INK, loc="upper left")
    return to_svg(fig, f"{title}. " + "; ".join(words) + ".")


def gain_figure(gain: dict) -> str:
    """Mean gain by tenths of the plain answer's score, beside the control's (CD-7)."""
    fig, axes = figure(6.4, 3.8)
    control = next(iter(gain.values()))
    series = {"none": [(row["original"], row["control"]) for row in control]}
    series |= {arm: [(row["original"], row["gain"]) for row in part] for arm, part in gain.items()}
    words = []
    for arm, points in series.items():
        label = "a second plain sample (control)" if arm == "none" else NAMES[arm]
        axes.plot(
            *zip(*points, strict=True), color=COLOURS[arm], linewidth=1.8, marker="o", markersize=5, label=label,
            linestyle="--" if arm == "none" else "-",
        )  # fmt: skip
        words.append(
            f"{label}: {points[0][1]:+.3f} at the lowest scores, {points[-1][1]:+.3f} at the highest"
        )
    axes.axhline(0, color=INK, alpha=0.4, linewidth=1)
    axes.set(xlabel="score of the plain answer, mean of each tenth", ylabel="mean gain in R_s")
    axes.legend(frameon=False, fontsize=8, labelcolor=INK)
    return to_svg(fig, "Gain over the plain answer. " + "; ".join(words) + ".")
