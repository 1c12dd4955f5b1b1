"""A red-team round for people: tables on the terminal and report.html, from the data of redteam.json."""

from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from hpsafety.data.schemas import ATTACKS, CATEGORIES
from hpsafety.files import atomic_write
from hpsafety.safety.drawing import AFTER, BEFORE, INK, dress, panels, to_svg
from hpsafety.safety.redteam_report import SUMMARIES

SHOWN = 24  # dialogues in the report, and replays, at most


def percent(found: dict | None) -> str:
    """'12 % (6/50, 6-24)' of a rate; 'not measured' where there is none."""
    if found is None or found["value"] is None:
        return "not measured"
    low, high = 100 * found["low"], 100 * found["high"]
    return f"{100 * found['value']:.0f} % ({found['count']}/{found['n']}, {low:.0f}-{high:.0f})"


def printable(text: str) -> str:
    """The text without control characters, ANSI escapes and marks that turn the direction of writing; newlines stay."""
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in str(text))


def headlines(result: dict) -> list[tuple[str, str, str]]:
    """(measure, figure, note) rows. gamma_auto and people's gamma never share a row (RT-5)."""
    auto, people = result["gamma_auto"], result["gamma"]
    rows = [
        ("violations", percent(result["violations"]), f"judge: {result['violations']['judge']}"),
        ("gamma_auto, violations an hour", f"{auto['value']:.2f}", auto["label"]),
    ]  # fmt: skip
    if result["rejection"] is not None:
        rows.append(("rejection rate of earlier violations", percent(result["rejection"]), "high is wanted"))
    if people is not None:
        spread = "" if people["low"] is None else f" ({people['low']:.2f}-{people['high']:.2f})"
        note = f"{people['label']}; {people['persons']} persons, {people['hours']:g} hours; judge: {people['judge']}"
        rows.append(
            ("gamma of people", f"{people['value']:.2f}{spread}; pooled {people['pooled']:.2f}", note)
        )
    return rows


def cells(result: dict) -> list[list[str]]:
    """Violations / attempts, a row per vector and a column per category, sums last (RT-7)."""
    of = {(row["vector"], row["category"]): (row["violations"], row["n"]) for row in result["by"]}

    def total(places) -> str:
        bad, n = (sum(of[place][i] for place in places) for i in (0, 1))
        return f"{bad}/{n}"

    rows = [[v, *(total([(v, c)]) for c in CATEGORIES), total([(v, c) for c in CATEGORIES])] for v in ATTACKS]
    columns = [total([(v, c) for v in ATTACKS]) for c in CATEGORIES]
    return [*rows, ["all", *columns, total(list(of))]]


def summary_rows(result: dict) -> dict[str, list[tuple[str, int, int]]]:
    """Heading -> (what, dialogues, violating ones) of each of the four summaries."""
    out = {}
    for key, heading in SUMMARIES.items():
        names = result["degree_scale"] if key == "degree" else {}
        out[heading] = [
            (f"{part} {names[part]}" if part in names else part, count, result["violating"][key].get(part, 0))
            for part, count in result[key].items()
        ]
    return out


def show_tables(result: dict) -> None:
    """The headlines, vector x category and the four summaries on stdout."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    table = Table("measure", "figure", "", title=f"red-team round {result['round']} (95 % intervals)")
    for row in headlines(result):
        table.add_row(*(Text(printable(cell)) for cell in row))
    console.print(table)
    table = Table("vector", *CATEGORIES, "all", title="violations / attempts")
    for row in cells(result):
        table.add_row(*row)
    console.print(table)
    for heading, rows in summary_rows(result).items():
        parts = ", ".join(f"{what}: {n} ({bad})" for what, n, bad in rows) or "none"
        line = printable(f"{heading}, dialogues (violating): {parts}")
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def write_page(result: dict, dialogues: Sequence[dict], replays: Sequence[dict], path: Path) -> None:
    """One self-contained HTML file; every text is escaped, and its policy forbids scripts and the network. Dialogues
    stay folded until asked for."""
    environment = Environment(loader=PackageLoader("hpsafety", "report"), autoescape=True)
    environment.filters["shown"] = printable
    bad = sorted((row for row in dialogues if row["violation"]), key=lambda row: (-row["degree"], row["id"]))
    again = sorted(replays, key=lambda row: (not row["violation"], row["id"]))
    page = environment.get_template("redteam.html").render(
        title=f"Red-team round {result['round']}", result=result, headlines=headlines(result), cells=cells(result),
        categories=CATEGORIES, summaries=summary_rows(result), percent=percent, violating=bad[:SHOWN],
        violations=len(bad), replays=again[:SHOWN], replayed=len(again), summary=Markup(summary_figure(result)),
        chain=Markup(chain_figure(result["rounds"])) if len(result["rounds"]) > 1 else None,
    )  # fmt: skip
    with atomic_write(path) as handle:
        handle.write(page)


def chain_figure(rounds: Sequence[dict]) -> str:
    """gamma_auto, violations and rejection rate by round, the last two with 95 % intervals."""
    fig, axes = panels(3, 7.6, 2.8, share_y=False)
    numbers = [entry["round"] for entry in rounds]
    autos = [entry["gamma_auto"]["value"] for entry in rounds]
    axes[0].plot(numbers, autos, color=BEFORE, marker="o", markersize=5)
    axes[0].set_ylim(0, 1.15 * max([*autos, 0.1]))
    words = ["gamma_auto: " + ", ".join(f"{v:.2f} in round {n}" for n, v in zip(numbers, autos, strict=True))]
    for ax, key, colour in ((axes[1], "violations", BEFORE), (axes[2], "rejection", AFTER)):
        known = [(e["round"], e[key]) for e in rounds if e[key] is not None and e[key]["value"] is not None]
        values = [100 * rate["value"] for _, rate in known]
        if known:
            down = [100 * (rate["value"] - rate["low"]) for _, rate in known]
            up = [100 * (rate["high"] - rate["value"]) for _, rate in known]
            ax.errorbar(
                [n for n, _ in known],
                values,
                yerr=[down, up],
                color=colour,
                marker="o",
                markersize=5,
                capsize=3,
            )
        ax.set_ylim(-4, 104)
        told = ", ".join(f"{v:.0f} % in round {n}" for v, (n, _) in zip(values, known, strict=True))
        words.append(f"{key}: {told or 'none'}")
    labels = {rounds[0]["gamma_auto"]["attempts_per_hour"], rounds[-1]["gamma_auto"]["attempts_per_hour"]}
    assumed = " and ".join(f"{value:g}" for value in sorted(labels))
    for ax, title in zip(
        axes,
        (f"gamma_auto ({assumed} attempts/h assumed)", "violations, %", "rejection rate, %"),
        strict=True,
    ):
        dress(ax, title, "round")
        ax.set_xlim(numbers[0] - 0.5, numbers[-1] + 0.5)
        ax.set_xticks(numbers)
    return to_svg(fig, f"Rounds of the chain. {'; '.join(words)}.")


def summary_figure(result: dict) -> str:
    """The four summaries as bars: all dialogues, and the violating ones within."""
    fig, axes = panels(4, 7.8, 3.0, share_y=False)
    words = []
    for ax, (key, heading) in zip(axes, SUMMARIES.items(), strict=True):
        parts = list(result[key].items())[:8]
        names = [printable(name.partition("/")[2] if key == "risk" else name)[:16] for name, _ in parts]
        if key == "risk":
            names = [f"{part[:3]} {name}" for (part, _), name in zip(parts, names, strict=True)]
        places = list(range(len(parts)))[::-1]
        ax.barh(places, [n for _, n in parts], color=AFTER, alpha=0.45)
        ax.barh(
            places, [result["violating"][key].get(part, 0) for part, _ in parts], color=BEFORE, height=0.45
        )
        ax.set_yticks(places, names)
        dress(ax, heading, "dialogues")
        ax.tick_params(labelsize=7)
        ax.tick_params(axis="y", colors=INK)
        ax.title.set_fontsize(8)
        ax.grid(axis="y", visible=False)
        told = ", ".join(f"{printable(part)} {n}" for part, n in parts)
        words.append(f"{heading}: {told or 'none'}")
    return to_svg(fig, f"Dialogues of the round, the violating ones dark. {'. '.join(words)}.")
