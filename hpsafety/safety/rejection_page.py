"""Rejection sampling's report for people: a table on the terminal and report.html, from the data of report.json."""

from pathlib import Path

from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from hpsafety.files import atomic_write
from hpsafety.safety.drawing import AFTER, BEFORE, INK, figure, to_svg

# Iteration, temperature, number of winners, their mean scores, mean over prompts of the best and the median of K, and
# how many winners each iteration gave.
HEADER = ("it.", "T", "winners", "R_c", "R_s", "R_h", "best of K", "median", "from")


def rows(result: dict) -> list[tuple[str, ...]]:
    """One row of HEADER per iteration."""
    out = []
    for it in result["iterations"]:
        won = it["winners"]
        origin = ", ".join(f"{number}: {count}" for number, count in won["from_iteration"].items())
        numbers = (won["r_c"], won["r_s"], won["r_h"], it["max"][-1], it["median"][-1])
        out.append(
            (
                str(it["iteration"]),
                f"{it['temperature']:g}",
                str(won["count"]),
                *(f"{x:.3f}" for x in numbers),
                origin,
            )
        )
    return out


def show_table(result: dict) -> None:
    """The iterations on stdout."""
    from rich.console import Console
    from rich.table import Table

    table = Table(*HEADER, title=f"best of {result['k']}")
    for row in rows(result):
        table.add_row(*row)
    Console().print(table)


def write_page(result: dict, path: Path) -> None:
    """One self-contained HTML file; every text is escaped, and its policy forbids scripts and the network."""
    environment = Environment(loader=PackageLoader("hpsafety", "report"), autoescape=True)
    page = environment.get_template("reject.html").render(
        title="Rejection sampling: what the best of K is worth", result=result, header=HEADER, rows=rows(result),
        curves=Markup(curves_figure(result["iterations"])),
    )  # fmt: skip
    with atomic_write(path) as handle:
        handle.write(page)


def curves_figure(iterations: list[dict]) -> str:
    """Mean over prompts of max and median of the first N samples, by N; later iterations are darker (RS-5)."""
    fig, axes = figure(6.4, 4.0)
    words = []
    for number, it in enumerate(iterations, start=1):
        strength = 0.3 + 0.7 * number / len(iterations)
        counts = range(1, len(it["max"]) + 1)
        for name, colour in (("max", AFTER), ("median", BEFORE)):
            label = f"{name}, iteration {it['iteration']}"
            axes.plot(
                counts,
                it[name],
                color=colour,
                alpha=strength,
                linewidth=1.8,
                marker="o",
                markersize=4,
                label=label,
            )
        words.append(
            f"iteration {it['iteration']}: max {it['max'][0]:.3f} at 1, {it['max'][-1]:.3f} at {len(it['max'])}, "
            f"median {it['median'][-1]:.3f}"
        )
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(xlabel="samples per prompt, N", ylabel="mean score R_c over prompts")
    axes.legend(frameon=False, fontsize=8, labelcolor=INK)
    return to_svg(fig, "Best and median score over N samples. " + "; ".join(words) + ".")
