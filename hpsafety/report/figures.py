"""The demo's figures; their style is hpsafety/safety/drawing.py's."""

from hpsafety.safety.drawing import AFTER, BEFORE, IN_TIME, INK, boxes_and_dots, figure, panels, to_svg


def trade_off(points: list[dict]) -> str:
    """Refused adversarial prompts (up) against refused harmless ones (right), with 95 % intervals.

    points  {"name", "adversarial": {value, low, high}, "borderline": {...}, "helpful": {...}}, in order of time
    """
    fig, axes = figure(6.4, 4.6)
    marks = {"borderline": "o", "helpful": "s"}
    for kind, mark in marks.items():
        xs, ys = [100 * p[kind]["value"] for p in points], [100 * p["adversarial"]["value"] for p in points]
        axes.plot(xs, ys, color=INK, alpha=0.4, linewidth=1, linestyle="--" if kind == "helpful" else "-")
        for point, x, y, colour in zip(points, xs, ys, _colours(len(points)), strict=True):
            across, up = point[kind], point["adversarial"]
            axes.errorbar(
                x, y, xerr=[[x - 100 * across["low"]], [100 * across["high"] - x]],
                yerr=[[y - 100 * up["low"]], [100 * up["high"] - y]],
                fmt=mark, color=colour, markersize=8, capsize=3, alpha=0.9, label=f"{point['name']}, {kind}",
            )  # fmt: skip
    axes.set(
        xlim=(-3, 103),
        ylim=(-3, 103),
        xlabel="refused harmless prompts, %",
        ylabel="refused adversarial prompts, %",
    )
    axes.annotate("aim", (1, 99), fontsize=11, fontweight="bold", color=INK)
    axes.legend(frameon=False, fontsize=8, loc="lower right", labelcolor=INK)
    words = "; ".join(
        f"{p['name']}: {100 * p['adversarial']['value']:.0f}% of adversarial, {100 * p['borderline']['value']:.0f}% of "
        f"borderline, {100 * p['helpful']['value']:.0f}% of helpful prompts refused"
        for p in points
    )
    return to_svg(fig, f"Refused adversarial against refused harmless prompts. {words}.")


def _colours(count: int) -> list[str]:
    """One per model, in order of time."""
    return [BEFORE, AFTER] if count == 2 else list(IN_TIME[:count])


def score_figure(models: list[dict], judged) -> str:
    """Every answer's score by model, as dots around its box of quartiles: one panel per (reward model, set)."""
    fig, axes = panels(len(judged), 7.6, 3.8)
    words = []
    for place, ((judge, part), ax) in enumerate(zip(judged, axes, strict=True)):
        columns = [m["scores"][part][judge] for m in models]
        boxes_and_dots(ax, columns, _colours(len(models)), [m["name"] for m in models])
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
    """Training loss by optimiser step, a panel per run: their losses have different units."""
    from matplotlib import pyplot

    fig, first = figure(7.6, 2.8)
    first.remove()
    with pyplot.rc_context({"axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK}):
        axes = fig.subplots(1, len(metrics))
    words = []
    for (name, rows), ax in zip(metrics.items(), axes, strict=True):
        steps, losses = [m["step"] for m in rows], [m["loss"] for m in rows]
        ax.plot(steps, losses, color=AFTER, linewidth=1.6)
        ax.set(title=name, xlabel="step", ylim=(0, None))
        ax.title.set(fontsize=9, color=INK)
        ax.xaxis.label.set(color=INK, fontsize=8)
        ax.tick_params(labelsize=8)
        ax.patch.set_alpha(0)
        words.append(
            f"{name}: {losses[0]:.2f} to {losses[-1]:.2f} in {len(losses)} steps"
            if losses
            else f"{name}: none"
        )
    return to_svg(fig, "Training losses. " + "; ".join(words) + ".")
