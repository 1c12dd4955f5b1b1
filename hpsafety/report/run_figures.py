"""Figures of a run's report that no other page has; their style is hpsafety/safety/drawing.py's. Each returns '' where
there is nothing to draw."""

from hpsafety.report.figures import colours, has, label
from hpsafety.safety.drawing import AFTER, BEFORE, INK, MIDDLE, dress, figure, panels, to_svg
from hpsafety.safety.scaling_figures import spread

SCORES = {  # key of eval.json -> label, colour, mark, dashes
    "safety_score/adversarial": ("safety score, adversarial prompts", AFTER, "o", "-"),
    "helpful_score/helpful": ("helpfulness score, helpful prompts", BEFORE, "s", "-"),
    "helpful_score/borderline": ("helpfulness score, borderline prompts", MIDDLE, "^", ":"),
}
FACETS = (("category", "category"), ("attack", "attack vector"), ("turns", "turns"))


def steps_figure(models: list[tuple[str, dict]]) -> str:
    """Mean safety and helpfulness scores by model, with their intervals. models: (name, metrics) in order of time."""
    fig, ax = figure(7.6, 3.6)
    words = []
    for place, (key, (text, colour, mark, dashes)) in enumerate(SCORES.items()):
        found = [(x, name, m[key]) for x, (name, m) in enumerate(models) if has(m.get(key))]
        if not found:
            continue
        errors = list(zip(*(spread(m) for _, _, m in found), strict=True))
        ax.errorbar(
            [x + 0.07 * (place - 1) for x, _, _ in found], [m["value"] for _, _, m in found], yerr=errors, color=colour,
            marker=mark, linestyle=dashes, markersize=6, linewidth=1.6, capsize=3, label=text,
        )  # fmt: skip
        words.append(f"{text}: " + ", ".join(f"{name} {m['value']:.2f}" for _, name, m in found))
    if not words:
        return _none(fig)
    _names_below(ax, [name for name, _ in models])
    ax.set(ylim=(-0.03, 1.03), ylabel="mean score R")
    ax.legend(frameon=False, fontsize=8, labelcolor=INK)
    return to_svg(fig, f"Mean scores by stage. {'; '.join(words)}.")


def _names_below(ax, names: list[str]) -> None:
    crowded = len(names) > 6
    ax.set_xticks(
        range(len(names)), [label(n, 18) for n in names], fontsize=8, rotation=30 if crowded else 0,
        ha="right" if crowded else "center",
    )  # fmt: skip


def spread_figure(models: list[tuple[str, dict]]) -> str:
    """Every answer's score by model, as dots around the box of its quartiles, a panel per reward model and set.

    models  (name, {(judge, set): scores})
    """
    keys = [key for key in _keys(models) if sum(bool(s.get(key)) for _, s in models)]
    if not keys:
        return ""
    fig, axes = panels(len(keys), 7.6, 1.3 + 0.5 * len(models))
    words = []
    for ax, key in zip(axes, keys, strict=True):
        judge, part = key
        kept = [(y, name, s[key]) for y, (name, s) in enumerate(models) if s.get(key)]
        for y, _, values in kept:
            dots = [y + 0.3 * ((7 * i % 11) / 10 - 0.5) for i in range(len(values))]  # apart, always the same
            ax.plot(values, dots, "o", color=colours(len(models))[y], markersize=3, alpha=0.4)
        box = ax.boxplot(
            [v for _, _, v in kept], positions=[y for y, _, _ in kept], widths=0.5, showfliers=False,
            orientation="horizontal",
        )  # fmt: skip
        for part_of in (part_of for parts in box.values() for part_of in parts):
            part_of.set(color=INK, alpha=0.8)
        dress(ax, f"{judge} score\n{part} prompts", "score R")
        ax.set(xlim=(-0.03, 1.03), ylim=(len(models) - 0.5, -0.5))
        ax.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
        ax.set_yticks(range(len(models)), [label(name, 20) for name, _ in models], fontsize=8)
        middle = ", ".join(f"{name} {sorted(v)[len(v) // 2]:.2f}" for _, name, v in kept)
        words.append(f"median {judge} score on {part} prompts: {middle}")
    return to_svg(fig, f"Scores of the held-out answers. {'; '.join(words)}.")


def _keys(models) -> list[tuple[str, str]]:
    return list(dict.fromkeys(key for _, scores in models for key in scores))


def groups_figure(models: list[tuple[str, dict]], facet: str, title: str) -> str:
    """Violations by category, attack vector or turns, a bar with its interval per model. The legend is the order."""
    prefix = f"violation/{facet}/"
    names = list(dict.fromkeys(k for _, m in models for k in m if k.startswith(prefix) and has(m[k])))
    if len(names) < 2:  # one group is the whole
        return ""
    shown = [(place, name, m) for place, (name, m) in enumerate(models) if any(has(m.get(k)) for k in names)]
    height = 0.8 / len(shown)
    fig, ax = figure(7.6, 1.2 + (0.16 * len(shown) + 0.14) * len(names))
    words = []
    for row, (place, name, metrics) in enumerate(shown):
        kept = [(y, metrics[k]) for y, k in enumerate(names) if has(metrics.get(k))]
        ax.barh(
            [y + (row + 0.5) * height - 0.4 for y, _ in kept], [100 * m["value"] for _, m in kept], height * 0.9,
            xerr=list(zip(*(spread(m, 100) for _, m in kept), strict=True)), color=colours(len(models))[place],
            ecolor=colours(len(models))[place], label=label(name), error_kw={"elinewidth": 1.4, "capsize": 3},
        )  # fmt: skip
        told = ", ".join(f"{names[y].removeprefix(prefix)} {100 * m['value']:.0f}%" for y, m in kept)
        words.append(f"{name}: {told}")
    n = {k: max(m[k]["n"] for _, _, m in shown if has(m.get(k))) for k in names}
    ticks = [f"{label(k.removeprefix(prefix), 24)} (n {n[k]})" for k in names]
    ax.set_yticks(range(len(names)), ticks, fontsize=8)
    ax.set(ylim=(len(names) - 0.5, -0.5), xlim=(0, 100), xlabel=f"violations by {title}, %")
    ax.legend(
        frameon=False,
        fontsize=8,
        labelcolor=INK,
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=min(5, len(shown)),
    )
    return to_svg(fig, f"Violations by {title}. {'; '.join(words)}.")


def rounds_figure(rounds: list[dict]) -> str:
    """Gamma by red-team round on the left; violations and rejection of earlier finds on the right."""
    if not rounds:
        return ""
    fig, (left, right) = panels(2, 7.6, 3.0, share_y=False)
    xs, words = [r["round"] for r in rounds], []
    gammas = [(x, r["gamma_auto"]) for x, r in zip(xs, rounds, strict=True) if r["gamma_auto"] is not None]
    if gammas:
        left.plot(*zip(*gammas, strict=True), color=AFTER, marker="o")
        words.append("automatic gamma: " + ", ".join(f"round {x} {g:.2f}" for x, g in gammas))
    for key, text, colour in (
        ("violations", "violations", BEFORE),
        ("rejection", "earlier finds rejected", AFTER),
    ):
        found = [(x, r[key]) for x, r in zip(xs, rounds, strict=True) if has(r[key])]
        if found:
            errors = list(zip(*(spread(m, 100) for _, m in found), strict=True))
            right.errorbar(
                [x for x, _ in found], [100 * m["value"] for _, m in found], yerr=errors, color=colour, marker="o",
                capsize=3, label=text,
            )  # fmt: skip
            words.append(f"{text}: " + ", ".join(f"round {x} {100 * m['value']:.0f}%" for x, m in found))
    if not words:
        return _none(fig)
    dress(left, "gamma_auto, violations per assumed hour", "round")
    dress(right, "share, %", "round")
    left.set(ylim=(0, None))
    right.set(ylim=(-3, 103))
    for ax in (left, right):
        ax.set_xticks(xs)
    if right.get_legend_handles_labels()[0]:
        right.legend(frameon=False, fontsize=8, labelcolor=INK)
    return to_svg(fig, f"Red-team rounds. {'; '.join(words)}.")


def traces_figure(runs: list[tuple[str, list[dict]]]) -> str:
    """The headline picture of two runs: refused adversarial prompts (up) against refused borderline ones (right), a
    line of points per run. runs: (name, points as trade_off takes them)."""
    fig, ax = figure(6.4, 4.6)
    words = []
    for (name, points), colour, dashes in zip(runs, (BEFORE, AFTER), ("--", "-"), strict=True):
        kept = [p for p in points if has(p["adversarial"]) and has(p["borderline"])]
        xs, ys = ([100 * p[key]["value"] for p in kept] for key in ("borderline", "adversarial"))
        for x, y, p in zip(xs, ys, kept, strict=True):
            (left, right), (down, above) = spread(p["borderline"], 100), spread(p["adversarial"], 100)
            ax.errorbar(
                x, y, xerr=[[left], [right]], yerr=[[down], [above]], color=colour, fmt="o", elinewidth=0.8, capsize=2,
                alpha=0.9,
            )  # fmt: skip
            ax.annotate(
                label(p["name"], 14), (x, y), xytext=(5, 4), textcoords="offset points", fontsize=7, color=INK
            )
            words.append(
                f"{name}, {p['name']}: {y:.0f}% of adversarial, {x:.0f}% of borderline prompts refused"
            )
        ax.plot(xs, ys, color=colour, linestyle=dashes, linewidth=1.4, label=label(name))
    if not words:
        return _none(fig)
    ax.set(xlim=(-3, 103), ylim=(-3, 103), ylabel="refused adversarial prompts, %")
    ax.set(xlabel="refused borderline prompts, %")
    ax.legend(frameon=False, fontsize=8, labelcolor=INK, loc="lower right")
    return to_svg(fig, f"Two runs. {'; '.join(words)}.")


def _none(fig) -> str:
    from matplotlib import pyplot

    pyplot.close(fig)
    return ""
