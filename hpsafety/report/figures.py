"""The demo's figures; their style is hpsafety/safety/drawing.py's."""

from hpsafety.safety.drawing import AFTER, BEFORE, INK, figure, to_svg


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
    return [BEFORE, AFTER] if count == 2 else [AFTER] * count


def loss_curve(metrics: list[dict]) -> str:
    """Training loss by optimiser step."""
    fig, axes = figure(6.4, 3.2)
    steps, losses = [m["step"] for m in metrics], [m["loss"] for m in metrics]
    axes.plot(steps, losses, color=AFTER, linewidth=1.8)
    axes.set(xlabel="optimiser step", ylabel="loss, nats per trained token", ylim=(0, None))
    ends = f"from {losses[0]:.2f} to {losses[-1]:.2f}" if losses else "no steps"
    return to_svg(fig, f"Training loss over {len(steps)} steps, {ends} nats per token.")
