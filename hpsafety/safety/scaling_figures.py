"""The scaling study's figures, from the data of scaling.json; their style is drawing.py's.

Fractions stand at equal distances: 0, 1 and 10 % would fall on one another on a true axis.
"""

from hpsafety.config_scaling import percent
from hpsafety.safety.drawing import AFTER, BEFORE, INK, MIDDLE, boxes_and_dots, figure, panels, to_svg

CURVES = {  # measure -> label, colour, mark, dashes
    "safety_score": ("safety score, adversarial prompts", AFTER, "o", "-"),
    "helpful_score": ("helpfulness score, helpful prompts", BEFORE, "s", "-"),
    "helpful_score_borderline": ("helpfulness score, borderline prompts", BEFORE, "^", ":"),
}
REFUSALS = {
    "refused_adversarial": ("adversarial prompts: wanted", AFTER, "o", "-"),
    "refused_borderline": ("borderline prompts", BEFORE, "s", "-"),
    "refused_helpful": ("helpful prompts", MIDDLE, "^", "-"),
}
AXIS = "share of the safety data, % (not to scale)"


def curves_figure(variants: list[dict]) -> str:
    """Mean scores with their intervals, by fraction."""
    return _by_fraction(variants, CURVES, "mean score R", 1.0, "Mean scores by share of the safety data.")


def refusals_figure(variants: list[dict]) -> str:
    """Share of refused prompts with Wilson intervals, by fraction."""
    return _by_fraction(
        variants, REFUSALS, "refused prompts, %", 100.0, "Refused prompts by share of the safety data."
    )


def _by_fraction(variants: list[dict], series: dict, ylabel: str, scale: float, title: str) -> str:
    fig, axes = figure(6.4, 3.8)
    words = []
    for place, (name, (label, colour, mark, dashes)) in enumerate(series.items()):
        found = [v["measures"][name] for v in variants]
        if any(m["value"] is None for m in found):
            continue
        values = [scale * m["value"] for m in found]
        xs = [x + 0.07 * (place - 1) for x in range(len(found))]  # apart, so that intervals can be told
        axes.errorbar(
            xs, values, yerr=list(zip(*(spread(m, scale) for m in found), strict=True)), color=colour, marker=mark,
            linestyle=dashes, markersize=6, linewidth=1.6, capsize=3, label=label,
        )  # fmt: skip
        points = ", ".join(f"{value:.3g} at {_name(v)}" for value, v in zip(values, variants, strict=True))
        words.append(f"{label}: {points}")
    axes.set_xticks(range(len(variants)), [percent(v["fraction"]) for v in variants])
    axes.set(xlabel=AXIS, ylabel=ylabel, ylim=(-0.03 * scale, 1.03 * scale))
    axes.legend(frameon=False, fontsize=8, labelcolor=INK)
    return to_svg(fig, f"{title} {'; '.join(words)}.")


def spread(measure: dict, scale: float = 1.0) -> tuple[float, float]:
    """(below, above) a value, as error bars want it; none where the measure has no interval."""
    value, low, high = (measure[name] for name in ("value", "low", "high"))
    return (0.0, 0.0) if low is None else (scale * max(0.0, value - low), scale * max(0.0, high - value))


def _name(variant: dict) -> str:
    return f"{percent(variant['fraction'])} %"


def ramp(count: int) -> list:
    """Colours from none to all of the safety data."""
    from matplotlib.colors import LinearSegmentedColormap

    colours = LinearSegmentedColormap.from_list("fractions", [BEFORE, MIDDLE, AFTER])
    return [colours(i / max(1, count - 1)) for i in range(count)]


def scores_figure(variants: list[dict]) -> str:
    """Every answer's score by variant, as dots around its box of quartiles, safety and helpfulness side by side."""
    fig, axes = panels(2, 8.2, 3.8)
    words = []
    for place, (ax, judge, part) in enumerate(
        zip(axes, ("safety", "helpful"), ("adversarial", "helpful"), strict=True)
    ):
        columns = [v["scores"][part][judge] for v in variants]
        boxes_and_dots(ax, columns, ramp(len(columns)), [percent(v["fraction"]) for v in variants])
        ax.set(
            title=f"{judge} score, {part} prompts", ylim=(-0.03, 1.03), xlabel="share of the safety data, %"
        )
        ax.set_ylabel("score R" if place == 0 else "")
        ax.title.set(fontsize=10, color=INK)
        middle = ", ".join(
            f"{sorted(values)[len(values) // 2]:.2f} at {_name(v)}"
            for values, v in zip(columns, variants, strict=True)
        )
        words.append(f"median {judge} score on {part} prompts: {middle}")
    return to_svg(fig, f"Scores of the held-out answers. {'; '.join(words)}.")


def label_points(ax, points: list[tuple[float, float]], labels: list[str]) -> None:
    """Writes each label at a corner of its point, the first where it covers no other label and no other point."""
    size = 9
    ax.margins(0.08)
    ax.autoscale_view()
    places = [ax.transData.transform(p) * 72 / ax.figure.dpi for p in points]  # in typographic points
    taken = [(x - 4, y - 4, x + 4, y + 4) for x, y in places]
    for point, (x, y), label in zip(points, places, labels, strict=True):
        wide = 0.68 * size * len(label)
        corners = [
            (6, 5),
            (6, -5 - size),
            (-6 - wide, 5),
            (-6 - wide, -5 - size),
            (6, 5 + size),
            (6, -5 - 2 * size),
        ]
        boxes = [(x + dx, y + dy, x + dx + wide, y + dy + size) for dx, dy in corners]
        covered = [
            sum(a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3] for b in taken) for a in boxes
        ]
        best = covered.index(min(covered))
        taken.append(boxes[best])
        ax.annotate(
            label,
            point,
            xytext=corners[best],
            textcoords="offset points",
            fontsize=size,
            fontweight="bold",
            color=INK,
        )


def trade_figure(variants: list[dict]) -> str:
    """The whole trade: safety score (up) against its two prices, over-refusal (right is worse) and helpfulness (left is
    worse); the share of the safety data is written at the points."""
    fig, axes = panels(2, 8.2, 4.2)
    over = "borderline" if variants[0]["measures"]["refused_borderline"]["value"] is not None else "helpful"
    sides = (
        (f"refused_{over}", f"refused {over} prompts, % (right is worse)", 100.0),
        ("helpful_score", "mean helpfulness score, helpful prompts (left is worse)", 1.0),
    )
    up = [v["measures"]["safety_score"] for v in variants]
    for ax, (name, label, scale) in zip(axes, sides, strict=True):
        across = [v["measures"][name] for v in variants]
        xs, ys = [scale * m["value"] for m in across], [m["value"] for m in up]
        ax.plot(xs, ys, color=INK, alpha=0.4, linewidth=1)
        for x, y, m, above, colour in zip(xs, ys, across, up, ramp(len(xs)), strict=True):
            (left, right), (down, high) = spread(m, scale), spread(above)
            ax.errorbar(
                x, y, xerr=[[left], [right]], yerr=[[down], [high]], fmt="o", color=colour, markersize=8, capsize=3,
                alpha=0.9, elinewidth=0.9,
            )  # fmt: skip
        label_points(ax, list(zip(xs, ys, strict=True)), [_name(v) for v in variants])
        ax.set(xlabel=label)
        ax.xaxis.label.set(fontsize=8.5)
    axes[0].set_ylabel("mean safety score, adversarial prompts")
    words = "; ".join(
        f"{_name(v)} of the safety data: safety {s['value']:.2f}, helpfulness "
        f"{v['measures']['helpful_score']['value']:.2f}, {100 * v['measures'][f'refused_{over}']['value']:.0f} % of "
        f"{over} prompts refused"
        for v, s in zip(variants, up, strict=True)
    )
    return to_svg(fig, f"The trade between safety, over-refusal and helpfulness. {words}.")
