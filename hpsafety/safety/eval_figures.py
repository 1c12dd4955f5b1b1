"""Figures of an evaluation: the whole trade, scores before and after, figures by group."""

from hpsafety.safety.drawing import AFTER, BEFORE, INK, dress, figure, panels, to_svg

FALSE = (("borderline", "o"), ("helpful", "s"))
GROUPS = {"toxigen": ("toxic continuations by group, %", 100), "bold": ("sentiment by group, VADER", 1)}


def trade_figure(metrics: dict, base: bool) -> str:
    """Violations (down is better) against false refusals (left is better), both models; without a judge of violations,
    adversarial prompts that were not refused take their place."""
    up, label, flip = "violation", "violations, %", False
    if metrics.get(up, {}).get("value") is None:
        up, label, flip = "refused/adversarial", "adversarial prompts not refused, %", True
    fig, ax = figure(6.4, 4.2)
    words = []
    for name, colour in (("base", BEFORE), ("model", AFTER)) if base else (("model", AFTER),):
        y = _numbers(metrics.get(up), name, flip)
        for kind, mark in FALSE:
            x = _numbers(metrics.get(f"false_refusal/{kind}"), name)
            if x is None or y is None:
                continue
            ax.errorbar(
                x[0], y[0], xerr=[[x[0] - x[1]], [x[2] - x[0]]], yerr=[[y[0] - y[1]], [y[2] - y[0]]], fmt=mark,
                color=colour, markersize=8, capsize=3, alpha=0.9, label=f"{name}, {kind} prompts",
            )  # fmt: skip
            words.append(f"{name}: {label[:-3]} {y[0]:.0f} %, false refusals of {kind} prompts {x[0]:.0f} %")
    if not words:
        return ""
    ax.set(xlim=(-3, 103), ylim=(-3, 103), xlabel="false refusals, %", ylabel=label)
    ax.annotate("aim", (1, 1), fontsize=11, fontweight="bold", color=INK)
    ax.legend(frameon=False, fontsize=8, loc="upper right", labelcolor=INK)
    return to_svg(fig, "; ".join(words) + ".")


def _numbers(found: dict | None, model: str, flip: bool = False) -> tuple[float, float, float] | None:
    found = (found or {}) if model == "model" else (found or {}).get("base", {})
    if found.get("value") is None:
        return None
    value, low, high = (100 * found[name] for name in ("value", "low", "high"))
    return (100 - value, 100 - high, 100 - low) if flip else (value, low, high)


def scatter_figure(scatter: dict[str, dict]) -> str:
    """Each prompt's score before (x) and after (y): a panel per reward model and its own set (EVAL-9)."""
    fig, axes = panels(len(scatter), 3.8 * len(scatter), 3.8)
    words = []
    for (name, part), ax in zip(scatter.items(), axes, strict=True):
        ax.plot([0, 1], [0, 1], color=INK, alpha=0.5, linewidth=1)
        ax.plot(part["before"], part["after"], "o", color=AFTER, markersize=4, alpha=0.5)
        title = f"{name}: {100 * part['above']['value']:.0f} % above the line"
        ax.set(
            xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), xlabel="base", ylabel="model" if ax is axes[0] else None
        )
        ax.set_title(title.replace(": ", "\n"), fontsize=9, color=INK)
        words.append(f"{title}, n {part['above']['n']}")
    return to_svg(fig, f"Scores before and after. {'; '.join(words)}.")


def groups_figure(metrics: dict, base: bool) -> list[str]:
    """A bar chart with intervals for each benchmark that has groups."""
    out = []
    for key, (title, scale) in GROUPS.items():
        depth = 2 if key == "bold" else 1
        names = [name for name in metrics if name.startswith(f"{key}/") and name.count("/") == depth]
        if names:
            out.append(_bars(key, title, scale, names, metrics, base))
    return out


def _bars(key: str, title: str, scale: float, names: list[str], metrics: dict, base: bool) -> str:
    fig, ax = figure(7.2, 1.0 + 0.24 * len(names))
    sides = (("base", BEFORE, -0.16), ("model", AFTER, 0.16)) if base else (("model", AFTER, 0.0),)
    for side, colour, shift in sides:
        found = [metrics[n] if side == "model" else metrics[n]["base"] for n in names]
        kept = [(i, f) for i, f in enumerate(found) if f.get("value") is not None]
        values = [scale * f["value"] for _, f in kept]
        errors = [
            [abs(scale * (f["value"] - (f[end] if f[end] is not None else f["value"]))) for _, f in kept]
            for end in ("low", "high")
        ]
        places = [i + shift for i, _ in kept]
        ax.errorbar(values, places, xerr=errors, fmt="o", color=colour, markersize=4, label=side, capsize=2)
    labels = [f"{n.split('/', 1)[1]}{' *' if metrics[n].get('few') else ''}" for n in names]
    ax.set_yticks(range(len(names)), labels, fontsize=7)
    ax.invert_yaxis()
    dress(ax, title, "")
    ax.legend(frameon=False, fontsize=8, labelcolor=INK)
    words = ", ".join(f"{n.split('/', 1)[1]} {scale * metrics[n]['value']:.2f}" for n in names)
    return to_svg(fig, f"{title}: {words}.")
