"""The style of every figure: inline SVG that follows the page's colours, light or dark, and carries its meaning as alt
text. Here and not in report/, because stages draw too and stand below it."""

import html
import io
import re

INK = "#010203"  # stands for the page's text colour; replaced by currentColor in the SVG
# Readable on light and dark, and apart for colour-blind readers.
BEFORE, MIDDLE, AFTER = "#d9822b", "#8a63d2", "#2b7bd9"
IN_TIME = (BEFORE, MIDDLE, AFTER, "#1f9e89", "#c94f7c", "#8c8c3a")  # of models that follow one another


def figure(width: float = 6.4, height: float = 3.8):
    """A matplotlib figure and axes in the page's style, inches."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    style = {
        "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK,
        "axes.spines.top": False, "axes.spines.right": False, "svg.fonttype": "none", "svg.hashsalt": "hpsafety",
        "font.family": "sans-serif", "axes.grid": True, "grid.alpha": 0.25, "grid.color": INK,
    }  # fmt: skip
    with pyplot.rc_context(style):
        fig, axes = pyplot.subplots(figsize=(width, height), layout="constrained")
    fig.patch.set_alpha(0)
    axes.patch.set_alpha(0)
    return fig, axes


def panels(count: int, width: float, height: float, share_y: bool = True):
    """A figure and `count` axes side by side, by default on one y axis, in the page's style, inches."""
    from matplotlib import pyplot

    fig, first = figure(width, height)
    first.remove()
    style = {"axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK, "axes.labelcolor": INK}
    with pyplot.rc_context(style | {"axes.grid": True, "grid.alpha": 0.25, "grid.color": INK}):
        axes = fig.subplots(1, count, sharey=share_y, squeeze=False)[0]
    for ax in axes:
        ax.patch.set_alpha(0)
        ax.spines[["top", "right"]].set_visible(False)
    return fig, axes


def dress(ax, title: str, across: str) -> None:
    """Title and x axis of a small panel that counts whole things."""
    ax.set(title=title, xlabel=across)
    ax.title.set(fontsize=9, color=INK)
    ax.xaxis.label.set(color=INK, fontsize=8)
    ax.tick_params(labelsize=8)
    ax.xaxis.get_major_locator().set_params(integer=True)


def boxes_and_dots(ax, columns: list[list[float]], colours: list, names: list[str]) -> None:
    """Each column's values as dots around the box of its quartiles."""
    for x, (values, colour) in enumerate(zip(columns, colours, strict=True)):
        spread = [
            x + 0.26 * ((7 * i % 11) / 10 - 0.5) for i in range(len(values))
        ]  # apart, the same every time
        ax.plot(spread, values, "o", color=colour, markersize=3, alpha=0.45)
    box = ax.boxplot(columns, positions=range(len(columns)), widths=0.5, showfliers=False)
    for line in (line for lines in box.values() for line in lines):
        line.set(color=INK, alpha=0.8)
    ax.set_xticks(range(len(columns)), names, fontsize=8)


def to_svg(fig, alt: str) -> str:
    """The figure as an <svg> element with role and label; closes the figure."""
    import matplotlib
    from matplotlib import pyplot

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "hpsafety"}):
        fig.savefig(buffer, format="svg", metadata={"Date": None})
    pyplot.close(fig)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    return svg.replace("<svg", f'<svg role="img" aria-label="{html.escape(alt, quote=True)}"', 1)
