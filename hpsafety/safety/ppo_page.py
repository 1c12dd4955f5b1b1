"""PPO's report for people: its curves, and report.html in the run directory, from the lines of metrics.jsonl."""

from pathlib import Path

from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from hpsafety.files import atomic_write
from hpsafety.safety.drawing import AFTER, BEFORE, INK, MIDDLE, dress, figure, panels, to_svg

REWARDS = {
    "reward": ("R_c", INK), "reward_safety": ("R_s", BEFORE), "reward_helpful": ("R_h", AFTER),
    "valid_reward": ("R_c, held out", MIDDLE),
}  # fmt: skip
PHASES = {"rollout": AFTER, "score": MIDDLE, "logprobs": BEFORE, "update": INK}
# Measure, and how it is written.
FIGURES = {
    "reward": "{:.3f}", "reward_safety": "{:.3f}", "reward_helpful": "{:.3f}", "share_safety": "{:.2f}",
    "valid_reward": "{:.3f}", "kl": "{:.4f}", "kl_coef": "{:g}", "ratio_max_first": "{:.4f}", "ratio_max": "{:.3f}",
    "clip_fraction": "{:.3f}", "entropy": "{:.3f}", "length": "{:.1f}", "explained_variance": "{:.2f}",
    "grad_norm": "{:.3g}",
}  # fmt: skip


def write_page(rows: list[dict], counts: dict, path: Path) -> None:
    """One self-contained HTML file of the run's iterations; it holds no text of prompts or answers."""
    environment = Environment(loader=PackageLoader("hpsafety", "report"), autoescape=True)
    page = environment.get_template("ppo.html").render(
        title="PPO: what the reward models saw, and how far the policy went", counts=counts, rows=ends(rows),
        iterations=len(rows), curves=Markup(curves_figure(rows)), times=Markup(times_figure(rows)),
    )  # fmt: skip
    with atomic_write(path) as handle:
        handle.write(page)


def ends(rows: list[dict]) -> list[tuple[str, str, str]]:
    """(measure, in the first iteration that has it, in the last)."""
    found = []
    for name, form in FIGURES.items():
        values = [row[name] for row in rows if name in row]
        if values:
            found.append((name, form.format(values[0]), form.format(values[-1])))
    return found


def curves_figure(rows: list[dict]) -> str:
    """Mean rewards, KL to the start and length by iteration."""
    fig, axes = panels(3, 7.6, 3.0, share_y=False)
    words = []
    for name, (label, colour) in REWARDS.items():
        points = [(row["iteration"], row[name]) for row in rows if name in row]
        if points:
            axes[0].plot(*zip(*points, strict=True), color=colour, marker="o", markersize=3, label=label)
            words.append(f"{label} from {points[0][1]:.3f} to {points[-1][1]:.3f}")
    axes[0].legend(frameon=False, fontsize=7, labelcolor=INK)
    steps = [row["iteration"] for row in rows]
    for ax, name, title in ((axes[1], "kl", "KL to the start"), (axes[2], "length", "length")):
        values = [row[name] for row in rows]
        ax.plot(steps, values, color=AFTER, marker="o", markersize=3)
        if name == "length":
            ax.set(ylim=(0, None))
        words.append(f"{title} from {values[0]:.4g} to {values[-1]:.4g}" if values else f"{title}: none")
    titles = ("mean score R", "KL to the start, nats per token", "tokens per answer")
    for ax, title in zip(axes, titles, strict=True):
        dress(ax, title, "iteration")
    return to_svg(fig, f"PPO over {len(rows)} iterations: {'; '.join(words)}.")


def times_figure(rows: list[dict]) -> str:
    """Seconds of each phase by iteration, stacked."""
    fig, ax = figure(7.6, 2.4)
    steps, below = [row["iteration"] for row in rows], [0.0] * len(rows)
    words = []
    for name, colour in PHASES.items():
        seconds = [row[f"time_{name}_s"] for row in rows]
        ax.bar(steps, seconds, bottom=below, color=colour, alpha=0.8, label=name, width=0.8)
        below = [a + b for a, b in zip(below, seconds, strict=True)]
        words.append(f"{name} {sum(seconds) / max(1, len(seconds)):.2f}")
    dress(ax, "seconds per iteration", "iteration")
    ax.legend(frameon=False, fontsize=7, labelcolor=INK, ncols=4)
    return to_svg(fig, f"Mean seconds per iteration: {', '.join(words)}.")
