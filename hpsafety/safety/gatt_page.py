"""Ghost attention's report for people: the recall table on the terminal and report.html, from report.json's data."""

from pathlib import Path

from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from hpsafety.files import atomic_write
from hpsafety.safety.drawing import AFTER, BEFORE, INK, dress, figure, panels, to_svg

MODELS = (("before", BEFORE), ("after", AFTER))


def cell(rate: dict, short: bool = False) -> str:
    """One rate with its interval, without counts where short; dialogues that did not get so far are said, and are no
    part of it."""
    if not rate["total"]:
        return f"unreachable ({rate['unreachable']})"
    count = "" if short else f"{rate['count']}/{rate['total']}, "
    missing = f"; {rate['unreachable']} unreachable" if rate["unreachable"] else ""
    return f"{100 * rate['value']:.0f} % ({count}{100 * rate['low']:.0f}-{100 * rate['high']:.0f}{missing})"


def header(result: dict) -> list[str]:
    return ["instruction", "model", "without it", *(f"turn {t}" for t in result["eval_turns"])]


def rows(result: dict, short: bool = False) -> list[list[str]]:
    """One row per kind of instruction and model, in the columns of `header`."""
    out = []
    for family, first in result["recall"]["before"].items():
        name = family if first["trained"] else f"{family} (not trained)"
        for model, _ in MODELS:
            part = result["recall"][model][family]
            cells = [cell(rate, short) for rate in (part["control"], *part["turns"].values())]
            out.append([name, model, *cells])
            name = ""
    return out


def show_table(result: dict) -> None:
    """The recall table on stdout."""
    from rich.console import Console
    from rich.table import Table

    table = Table(*header(result), title="the first turn's instruction is followed at (95 % intervals)")
    for row in rows(result, short=True):
        table.add_row(*row)
    console = Console()
    console.print(table)
    mass = result["attention"]
    if mass:
        ends = "; ".join(
            f"{name} {_by_turn(mass[name])[0]:.4f} at turn 1, {_by_turn(mass[name])[-1]:.4f} at turn "
            f"{len(mass[name]['uniform'])}"
            for name, _ in MODELS
        )
        console.print(f"attention on the instruction: {ends}", highlight=False)


def write_page(result: dict, path: Path) -> None:
    """One self-contained HTML file; every text is escaped, and its policy forbids scripts and the network."""
    environment = Environment(loader=PackageLoader("hpsafety", "report"), autoescape=True)
    mass = result["attention"]
    page = environment.get_template("gatt.html").render(
        title="Ghost attention: does the first instruction hold?", result=result, header=header(result),
        rows=rows(result), recall=Markup(recall_figure(result)), mass=Markup(mass_figure(mass)) if mass else None,
        layers=Markup(layer_figure(mass)) if mass else None, cell=cell,
    )  # fmt: skip
    with atomic_write(path) as handle:
        handle.write(page)


def recall_figure(result: dict) -> str:
    """A panel per kind of instruction: recall by turn, before and after, with 95 % intervals and the control's rate."""
    families = list(result["recall"]["before"])
    fig, axes = panels(len(families), 7.6, 2.6, share_y=False)
    words = []
    for ax, family in zip(axes, families, strict=True):
        for shift, (model, colour) in enumerate(MODELS):
            part = result["recall"][model][family]
            points = [
                (t, part["turns"][str(t)]) for t in result["eval_turns"] if part["turns"][str(t)]["total"]
            ]
            if points:
                x = [t + 0.15 * (2 * shift - 1) for t, _ in points]
                y = [100 * rate["value"] for _, rate in points]
                down = [max(0.0, 100 * (rate["value"] - rate["low"])) for _, rate in points]
                up = [max(0.0, 100 * (rate["high"] - rate["value"])) for _, rate in points]
                ax.errorbar(
                    x, y, yerr=[down, up], color=colour, marker="o", markersize=4, capsize=2, label=model
                )
                words.append(
                    f"{family} {model}: "
                    + ", ".join(f"{v:.0f} % at turn {t}" for v, (t, _) in zip(y, points, strict=True))
                )
            if part["control"]["total"]:
                ax.axhline(100 * part["control"]["value"], color=colour, linestyle=":", linewidth=1)
        ax.set(ylim=(-4, 104), xlim=(0, max(result["eval_turns"]) + 1))
        dress(
            ax, family if result["recall"]["before"][family]["trained"] else f"{family} (not trained)", "turn"
        )
        ax.set_xticks(result["eval_turns"])
    axes[0].set_ylabel("followed, %", color=INK, fontsize=8)
    axes[0].legend(frameon=False, fontsize=7, labelcolor=INK)
    return to_svg(fig, f"Recall of the first turn's instruction. {'; '.join(words)}.")


def _by_turn(mass: dict) -> list[float]:
    """Mean over layers."""
    return [sum(column) / len(column) for column in zip(*mass["by_layer"], strict=True)]


def mass_figure(mass: dict) -> str:
    """Mean attention on the instruction's tokens by turn, before and after, and their share of all tokens."""
    fig, ax = figure(6.4, 3.2)
    turns = range(1, len(mass["before"]["uniform"]) + 1)
    words = []
    for name, colour in MODELS:
        values = _by_turn(mass[name])
        ax.plot(turns, values, color=colour, marker="o", markersize=4, label=name)
        words.append(f"{name}: {values[0]:.4f} at turn 1, {values[-1]:.4f} at turn {len(values)}")
    ax.plot(
        turns,
        mass["before"]["uniform"],
        color=INK,
        linestyle=":",
        linewidth=1,
        label="its share of the tokens",
    )
    ax.set(xlabel="turn of the answer", ylabel="attention on the instruction", ylim=(0, None))
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.legend(frameon=False, fontsize=8, labelcolor=INK)
    return to_svg(
        fig, f"Mean attention on the first turn's instruction, over heads and layers. {'; '.join(words)}."
    )


def layer_figure(mass: dict) -> str:
    """Attention on the instruction by layer (up) and turn (right): before, after, and what training changed."""
    fig, axes = panels(3, 7.6, 3.6, share_y=False)
    grids = [mass["before"]["by_layer"], mass["after"]["by_layer"]]
    change = [[b - a for a, b in zip(x, y, strict=True)] for x, y in zip(*grids, strict=True)]
    top = max(max(map(max, grid)) for grid in grids)
    most = max(max(map(abs, row)) for row in change) or 1e-9
    turns, layers = len(change[0]), len(change)
    box = (0.5, turns + 0.5, 0.5, layers + 0.5)
    for ax, grid, title in zip(
        axes, [*grids, change], ("before", "after", "after minus before"), strict=True
    ):
        low, high, colours = (0.0, top, "viridis") if title != "after minus before" else (-most, most, "PuOr")
        image = ax.imshow(grid, origin="lower", aspect="auto", extent=box, vmin=low, vmax=high, cmap=colours)
        ax.grid(False)
        bar = fig.colorbar(image, ax=ax, shrink=0.8)
        bar.ax.tick_params(labelsize=7, colors=INK)
        dress(ax, title, "turn of the answer")
    axes[0].set_ylabel("layer", color=INK, fontsize=8)
    strongest = max(range(layers), key=lambda i: max(change[i]))
    return to_svg(
        fig,
        f"Attention on the instruction by layer and turn; it grew most in layer {strongest + 1} of {layers}.",
    )
