"""Figures that the demo's report and a run's share; their style is hpsafety/safety/drawing.py's."""

from hpsafety.report.text import line
from hpsafety.safety.drawing import AFTER, BEFORE, IN_TIME, INK, boxes_and_dots, dress, figure, panels, to_svg
from hpsafety.safety.scaling_figures import label_points, spread

MARKS = {"borderline": "o", "helpful": "s"}


def label(name, most: int = 28) -> str:
    """A name as matplotlib shows it literally: no mathematics between dollars, no hiding behind an underscore."""
    text = line(name, most).replace("\\", "\N{SET MINUS}").replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def colours(count: int) -> list[str]:
    """One per model, in order of time; they come again beyond six, and numbers tell the points apart."""
    return [BEFORE, AFTER] if count == 2 else [IN_TIME[i % len(IN_TIME)] for i in range(count)]


def trade_off(points: list[dict]) -> str:
    """Refused adversarial prompts (up) against refused harmless ones (right), with 95 % intervals.

    points  {"name", "adversarial": {value, low, high}, "borderline": {...}, "helpful": {...}}, in order of time; a
            measure may be absent or have the value None
    """
    return plane(
        points, "adversarial", "refused adversarial prompts, %", "of adversarial prompts refused", (1, 99)
    )


def plane(points: list[dict], up: str, ylabel: str, words: str, aim: tuple[float, float]) -> str:
    """One numbered point per model and harmless set: measure `up` (in %) against refused harmless prompts; '' without
    a point. aim: where a good model stands."""
    fig, axes = figure(7.6, 5.2)
    places, numbers, told = [], [], []
    for kind, mark in MARKS.items():
        kept = [i for i, p in enumerate(points) if has(p.get(kind)) and has(p.get(up))]
        xs, ys = ([100 * points[i][key]["value"] for i in kept] for key in (kind, up))
        axes.plot(xs, ys, color=INK, alpha=0.4, linewidth=1, linestyle="--" if kind == "helpful" else "-")
        for i, x, y in zip(kept, xs, ys, strict=True):
            (left, right), (down, above) = spread(points[i][kind], 100), spread(points[i][up], 100)
            axes.errorbar(
                x, y, xerr=[[left], [right]], yerr=[[down], [above]], fmt=mark, markersize=8, capsize=3, alpha=0.9,
                elinewidth=0.9, color=colours(len(points))[i],
            )  # fmt: skip
            told.append(
                f"{line(points[i]['name'], 40)}: {y:.0f}% {words}, {x:.0f}% of {kind} prompts refused"
            )
        places += zip(xs, ys, strict=True)
        numbers += [str(i) for i in kept]
    axes.set(xlim=(-3, 103), ylim=(-3, 103), xlabel="refused harmless prompts, %", ylabel=ylabel)
    axes.annotate("aim", aim, fontsize=11, fontweight="bold", color=INK, alpha=0.75)
    if not told:
        from matplotlib import pyplot

        pyplot.close(fig)
        return ""
    label_points(axes, places, numbers)
    _legend(axes, [p["name"] for p in points], "lower right" if aim[1] > 50 else "upper right")
    return to_svg(fig, f"{ylabel} against refused harmless prompts. {'; '.join(told)}.")


def _legend(axes, names: list, where: str) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=colour, linewidth=4, label=f"{i}  {label(name)}")
        for i, (name, colour) in enumerate(zip(names, colours(len(names)), strict=True))
    ]
    handles += [
        Line2D([], [], color=INK, marker=m, linestyle="", label=f"{k} prompts") for k, m in MARKS.items()
    ]
    axes.legend(handles=handles, frameon=False, fontsize=8, loc=where, labelcolor=INK)


def has(found: dict | None) -> bool:
    """Whether a measure was taken."""
    return bool(found) and found.get("value") is not None


def score_figure(models: list[dict], judged) -> str:
    """Every answer's score by model, as dots around its box of quartiles: one panel per (reward model, set)."""
    fig, axes = panels(len(judged), 7.6, 3.8)
    words = []
    for place, ((judge, part), ax) in enumerate(zip(judged, axes, strict=True)):
        columns = [m["scores"][part][judge] for m in models]
        boxes_and_dots(ax, columns, colours(len(models)), [label(m["name"]) for m in models])
        ax.set(
            title=f"{judge} score, {part} prompts",
            ylim=(-0.03, 1.03),
            ylabel="score R" if place == 0 else None,
        )
        ax.title.set(fontsize=10, color=INK)
        means = ", ".join(f"{m['name']} {sum(v) / len(v):.2f}" for m, v in zip(models, columns, strict=True))
        words.append(f"mean {judge} score on {part} prompts: {means}")
    return to_svg(fig, f"Scores of the held-out answers. {'; '.join(words)}.")


def loss_curves(metrics: dict[str, list[dict]]) -> str:
    """Training loss by optimiser step, a panel per run, four in a row: their losses have different units."""
    from matplotlib import pyplot

    rows = -(-len(metrics) // 4)
    fig, first = figure(7.6, 2.6 * rows)
    first.remove()
    with pyplot.rc_context({"axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK}):
        axes = fig.subplots(rows, min(4, len(metrics)), squeeze=False).flatten()
    words = []
    for (name, lines), ax in zip(metrics.items(), axes, strict=False):
        steps, losses = [m["step"] for m in lines], [m["loss"] for m in lines]
        ax.plot(steps, losses, color=AFTER, linewidth=1.6)
        dress(ax, label(name), "step")
        ax.set(ylim=(0, None))
        ax.patch.set_alpha(0)
        words.append(
            f"{name}: {losses[0]:.2f} to {losses[-1]:.2f} in {len(losses)} steps"
            if losses
            else f"{name}: none"
        )
    for ax in axes[len(metrics) :]:
        ax.remove()
    return to_svg(fig, "Training losses. " + "; ".join(words) + ".")
