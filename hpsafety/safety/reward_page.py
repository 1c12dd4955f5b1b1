"""A reward model's report for people: a table on the terminal and report.html, from the data of report.json."""

from pathlib import Path

from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from hpsafety.files import atomic_write
from hpsafety.safety.drawing import AFTER, BEFORE, INK, figure, to_svg
from hpsafety.safety.reward_report import HISTOGRAM_BINS, rate_of

BINS = {
    "1": "bin 1: chosen safe, rejected unsafe", "2": "bin 2: both safe", "3": "bin 3: both unsafe", "none": "no bin",
}  # fmt: skip


def measures(result: dict) -> list[tuple[str, str]]:
    """(measure, share with counts and interval) rows; groups without examples are left out."""
    accuracy, unsafe = result["held_out"]["accuracy"], result["held_out"]["unsafe"]
    rows = {f"accuracy, {name} data": rate for name, rate in accuracy["data"].items()}
    rows |= {f"accuracy, {'not rated' if k == 'none' else k}": rate for k, rate in accuracy["rating"].items()}
    rows |= {f"accuracy, {BINS[number]}": rate for number, rate in accuracy["bin"].items()}
    rows = {"accuracy: chosen scores higher": accuracy["all"]} | {k: r for k, r in rows.items() if r["total"]}
    if unsafe["recall_below_0.5"]["total"]:
        for threshold in ("0.5", "0.15"):
            found, flagged = (f"{word}_below_{threshold}" for word in ("recall", "precision"))
            rows[f"unsafe responses found, R < {threshold} (recall)"] = unsafe[found]
            rows[f"of those flagged, unsafe, R < {threshold} (precision)"] = unsafe[flagged]
    return [(name, str(rate_of(rate))) for name, rate in rows.items()]


def show_table(result: dict) -> None:
    """The measures on stdout."""
    from rich.console import Console
    from rich.table import Table

    title = f"{result['kind']} reward model on {result['held_out']['pairs']} held-out pairs"
    table = Table("measure", "share (count/total, 95 % interval)", title=title)
    for row in measures(result):
        table.add_row(*row)
    Console().print(table)


def write_page(result: dict, path: Path) -> None:
    """One self-contained HTML file; every text is escaped, and its policy forbids scripts and the network."""
    held = result["held_out"]
    environment = Environment(loader=PackageLoader("hpsafety", "report"), autoescape=True)
    page = environment.get_template("reward.html").render(
        title=f"A {result['kind']} reward model on held-out pairs", result=result, held=held,
        measures=measures(result), rate=rate_of,
        calibration=Markup(calibration_figure(held)), histogram=Markup(histogram_figure(held["histogram"])),
    )  # fmt: skip
    with atomic_write(path) as handle:
        handle.write(page)


def calibration_figure(held: dict) -> str:
    """Stated against observed share, with 95 % intervals: of safe responses by R, of right choices by confidence."""
    fig, axes = figure(6.4, 4.6)
    axes.plot([0, 1], [0, 1], color=INK, alpha=0.4, linewidth=1, linestyle="--")
    series = {
        "responses: R against share safe": ("calibration", "o", AFTER),
        "pairs: confidence against share right": ("pairwise_calibration", "s", BEFORE),
    }
    words = []
    for label, (name, mark, colour) in series.items():
        rows = [row for row in held[name] if row["share"]["total"]]
        if not rows:
            continue
        rates = [rate_of(row["share"]) for row in rows]
        spread = [[r.value - r.low for r in rates], [r.high - r.value for r in rates]]
        axes.errorbar(
            [row["mean"] for row in rows], [r.value for r in rates], yerr=spread, fmt=mark, color=colour,
            markersize=7, capsize=3, alpha=0.9, label=f"{label} (n = {sum(r.total for r in rates)})",
        )  # fmt: skip
        points = ", ".join(
            f"{row['mean']:.2f} stated, {r.value:.2f} observed" for row, r in zip(rows, rates, strict=True)
        )
        words.append(f"{label}: {points}")
    axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), xlabel="stated by the model", ylabel="observed share")
    if words:
        axes.legend(frameon=False, fontsize=8, loc="upper left", labelcolor=INK)
    return to_svg(fig, "Calibration. " + ("; ".join(words) or "No held-out examples") + ".")


def histogram_figure(histogram: dict) -> str:
    """How often each score occurs, chosen above the axis' line and rejected beside it."""
    fig, axes = figure(6.4, 3.2)
    width = 1 / HISTOGRAM_BINS
    for name, colour, shift in (("chosen", AFTER, 0.27), ("rejected", BEFORE, 0.73)):
        places = [(i + shift) * width for i in range(HISTOGRAM_BINS)]
        axes.bar(places, histogram[name], width=0.44 * width, color=colour, label=name)
    axes.set(xlabel="score R", ylabel="responses", xlim=(0, 1))
    axes.legend(frameon=False, fontsize=8, labelcolor=INK)
    peaks = ", ".join(
        f"{name} responses most often near {(max(range(HISTOGRAM_BINS), key=counts.__getitem__) + 0.5) * width:.2f}"
        for name, counts in histogram.items()
        if any(counts)
    )
    return to_svg(fig, f"Scores of held-out responses. {peaks or 'None'}.")
