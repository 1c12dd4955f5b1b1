"""The audit's figures, from the data of audit.json; their style is drawing.py's."""

from hpsafety.safety.drawing import AFTER, BEFORE, IN_TIME, INK, figure, panels, to_svg

LANGUAGES = 12  # that are drawn


def percent(share: float | None) -> str:
    """'12.34 %', with as many digits as a small share needs."""
    if share is None:
        return "not measured"
    value = 100 * share
    return f"{value:.2f} %" if value >= 0.01 or value == 0 else f"{value:.2g} %"


def _bars(
    ax,
    names: list[str],
    values: list[float],
    colour: str,
    offset: float = 0.0,
    height: float = 0.7,
    label=None,
):
    """Horizontal bars, the first on top, each with its value behind it; values in percent."""
    places = [offset - i for i in range(len(names))]
    ax.barh(places, values, height=height, color=colour, label=label)
    for place, value in zip(places, values, strict=True):
        ax.annotate(
            f"{value:.3g}",
            (value, place),
            xytext=(3, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color=INK,
        )
    ax.grid(False, axis="y")
    ax.set_axisbelow(True)


def _plain(value: float, place: int) -> str:
    return f"{value:g}"


def _names(ax, names: list[str]) -> None:
    ax.set_yticks([-i for i in range(len(names))], names, fontsize=9)


def languages_figure(found: dict) -> str:
    """Shares of documents by language on a logarithmic axis, with unknown and the rarer ones."""
    rows = [(row["language"], row["share"]) for row in found["listed"][:LANGUAGES]]
    others = sum(row["share"] for row in found["listed"][LANGUAGES:]) + found["rarer"]["share"]
    rows += [("others", others), ("unknown", found["unknown"]["share"])]
    rows = [(name, 100 * value) for name, value in rows if value]
    fig, axes = figure(6.4, 0.8 + 0.3 * len(rows))
    _bars(axes, [name for name, _ in rows], [value for _, value in rows], AFTER)
    _names(axes, [name for name, _ in rows])
    lowest = min(value for _, value in rows)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(_plain)
    axes.set(xlim=(lowest / 3, 300), xlabel="documents, % (logarithmic)")
    words = ", ".join(f"{name} {percent(value / 100)}" for name, value in rows)
    return to_svg(fig, f"Languages of the documents, by {found['judge']}: {words}.")


def pronouns_figure(found: dict) -> str:
    """Each family's groups: their share of all documents of the English part, and of those with any of the family."""
    fig, axes = panels(len(found["families"]), 8.2, 3.2, share_y=False)
    words = []
    for ax, (family, part) in zip(axes, found["families"].items(), strict=True):
        names = list(part["groups"])
        for place, (key, label, colour) in enumerate(
            (("of_documents", "of all documents", AFTER), ("of_family", "of those with any of these", BEFORE))
        ):
            values = [100 * (part["groups"][name][key]["share"] or 0.0) for name in names]
            _bars(ax, names, values, colour, 0.2 - 0.4 * place, 0.38, label)
            words += [f"{name} {value:.1f} % {label}" for name, value in zip(names, values, strict=True)]
        _names(ax, names)
        ax.set(
            title=f"{family}: any in {percent(part['any']['share'])}", xlim=(0, 118), xlabel="documents, %"
        )
        ax.title.set(fontsize=10, color=INK)
    labels = axes[0].get_legend_handles_labels()
    fig.legend(*labels, frameon=False, fontsize=8, labelcolor=INK, loc="outside upper center", ncols=2)
    return to_svg(fig, f"Pronouns in the English part. {'; '.join(words)}.")


def identity_figures(found: dict) -> list[str]:
    """Two rows of three panels: the axes' shares of all documents, and each axis's most frequent terms."""
    names = {axis: axis.replace("_and_", ", ").replace("_", " ") for axis in found["axes"]}
    shares = [(names[axis], 100 * (part["any"]["share"] or 0.0)) for axis, part in found["axes"].items()]
    drawn = [("any term of an axis", "of all documents, %", INK, shares)]
    for (axis, part), colour in zip(found["axes"].items(), IN_TIME, strict=False):
        terms = [(row["term"], 100 * row["share"]) for row in part["top"]]
        drawn.append((names[axis], "of its documents, %", colour, terms))
    return [_terms_row(drawn[:3]), _terms_row(drawn[3:])]


def _terms_row(drawn: list[tuple[str, str, str, list[tuple[str, float]]]]) -> str:
    """One panel for each (title, what the bars are shares of, colour, [(term, percent)])."""
    fig, axes = panels(len(drawn), 9.0, 2.5, share_y=False)
    words = []
    for ax, (title, across, colour, rows) in zip(axes, drawn, strict=True):
        terms, shares = [term for term, _ in rows], [value for _, value in rows]
        _bars(ax, terms, shares, colour)
        _names(ax, terms)
        ax.set(title=title, xlim=(0, 1.3 * max(shares, default=0) or 1), ylim=(-4.6, 0.6), xlabel=across)
        ax.title.set(fontsize=10, color=INK)
        ax.xaxis.label.set(fontsize=8)
        ax.tick_params(labelsize=8)
        told = ", ".join(f"{term} {value:.3g} %" for term, value in rows) or "none"
        words.append(f"{title}, {across.removesuffix(', %')}: {told}")
    return to_svg(fig, f"Identity terms. {'; '.join(words)}.")


def toxicity_figure(found: dict) -> str:
    """Histogram of the sampled documents' scores on a logarithmic axis, with the threshold."""
    counts, bins = found["histogram"], len(found["histogram"])
    fig, axes = figure(6.4, 3.2)
    edges = [i / bins for i in range(bins)]
    colours = [BEFORE if edge >= found["threshold"] else AFTER for edge in edges]
    axes.bar(edges, counts, width=1 / bins, align="edge", color=colours, edgecolor="none")
    axes.axvline(found["threshold"], color=INK, linestyle="--", linewidth=1)
    axes.set_yscale("symlog", linthresh=1)
    axes.yaxis.set_major_formatter(_plain)
    axes.set_axisbelow(True)
    axes.set(
        xlim=(0, 1), ylim=(0, None), xlabel="document's score: mean p(toxic) of its lines", ylabel="documents"
    )
    told = ", ".join(f"{n} from {edge:.2f}" for edge, n in zip(edges, counts, strict=True) if n)
    return to_svg(
        fig, f"Toxicity of the sampled documents by {found['judge']}, in bins of {1 / bins:g}: {told}."
    )
