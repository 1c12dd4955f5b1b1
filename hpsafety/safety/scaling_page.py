"""The scaling study for people: tables on the terminal and report.html, from the data of scaling.json."""

from pathlib import Path

from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from hpsafety.config_scaling import percent
from hpsafety.files import atomic_write
from hpsafety.safety.scaling_figures import curves_figure, refusals_figure, scores_figure, trade_figure

SCORES = {  # heading of a column -> measure
    "safety": "safety_score", "p1": "safety_p1", "p5": "safety_p5", "p10": "safety_p10",
    "helpful": "helpful_score", "change": "helpful_change", "helpful, borderline": "helpful_score_borderline",
}  # fmt: skip
REFUSED = ("adversarial", "borderline", "helpful")
FEW = 100  # adversarial prompts below which the 1st percentile rests on one or two of them


def score_rows(result: dict) -> list[tuple[str, ...]]:
    """(share, safety rows, one cell per column of SCORES) of every variant: value and 95 % interval."""
    return [
        (f"{percent(v['fraction'])} %", str(v["safety_rows_used"]),
         *(score(v["measures"][name], "+" if name == "helpful_change" else "") for name in SCORES.values()))
        for v in result["variants"]
    ]  # fmt: skip


def score_tables(result: dict) -> list[tuple[tuple[str, ...], list[tuple[str, ...]]]]:
    """(header, rows) of a table of safety scores and one of helpfulness scores: together they are wider than a page."""
    rows, names = score_rows(result), list(SCORES)
    return [
        (("safety data", "rows", *names[:4]), [row[:6] for row in rows]),
        (("safety data", *names[4:]), [(row[0], *row[6:]) for row in rows]),
    ]


def score(found: dict, sign: str = "") -> str:
    """'0.710 (0.682-0.751)'; of a change with its sign, '+0.010 (-0.020, +0.034)'."""
    if found["value"] is None:
        return "not measured"
    value, low, high = (
        None if found[k] is None else f"{found[k]:{sign}.3f}" for k in ("value", "low", "high")
    )
    return value if low is None else f"{value} ({low}, {high})" if sign else f"{value} ({low}-{high})"


def refusal_rows(result: dict) -> list[tuple[str, ...]]:
    """(share, refused share of every set with its Wilson interval) of every variant."""
    return [
        (f"{percent(v['fraction'])} %", *(share(v["measures"][f"refused_{part}"]) for part in REFUSED))
        for v in result["variants"]
    ]


def share(found: dict) -> str:
    if found["value"] is None:
        return "not measured"
    value, low, high = (f"{100 * found[k]:.0f}" for k in ("value", "low", "high"))
    return f"{value} % ({low}-{high})"


def refusal_header(result: dict) -> tuple[str, ...]:
    return ("safety data", *(f"{part}, n = {result['sets'][part]}" for part in REFUSED))


def show_tables(result: dict) -> None:
    """The variants on stdout, in tables narrow enough for 80 columns."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    full = [dict(zip(("data", "rows", *SCORES), row, strict=True)) for row in score_rows(result)]
    low = ("p1", "p5", "p10")
    tables = (
        ("safety score, adversarial prompts: mean, low percentiles", ("data", "rows", "safety", *low)),
        ("helpfulness score: helpful prompts, change, borderline prompts", ("data", *list(SCORES)[4:])),
    )
    for title, names in tables:
        table = Table(*names, title=title)
        for row in full:  # a percentile's interval stands in the report only
            table.add_row(*(row[name].split(" (")[0] if name in low else row[name] for name in names))
        console.print(table)
    refusals = Table(*refusal_header(result), title="refused prompts (95 % intervals, as above)")
    for row in refusal_rows(result):
        refusals.add_row(*row)
    console.print(refusals)
    console.print(trend_line(result))


def trend_line(result: dict) -> str:
    """Rank correlations of the fraction with what it should and should not move."""
    names = {
        "safety_score": "mean safety score", "refused_adversarial": "refused adversarial prompts",
        "helpful_score": "mean helpfulness score",
        "refused_borderline": "refused borderline prompts",
    }  # fmt: skip
    found = [
        f"{label} {'not defined' if result['trend'][name] is None else format(result['trend'][name], '+.2f')}"
        for name, label in names.items()
    ]
    return f"Spearman's correlation with the share of the safety data: {', '.join(found)}"


def write_page(result: dict, path: Path) -> None:
    """One self-contained HTML file; every text is escaped, and its policy forbids scripts and the network."""
    variants = result["variants"]
    environment = Environment(loader=PackageLoader("hpsafety", "report"), autoescape=True)
    page = environment.get_template("scaling.html").render(
        title="What safety data buys, and what it costs", result=result, trend=trend_line(result),
        names=[percent(v["fraction"]) for v in variants], base=percent(result["base_fraction"]),
        score_tables=score_tables(result),
        refusal_header=refusal_header(result), refusal_rows=refusal_rows(result),
        few=result["sets"]["adversarial"] < FEW, trade=Markup(trade_figure(variants)),
        curves=Markup(curves_figure(variants)), scores=Markup(scores_figure(variants)),
        refusals=Markup(refusals_figure(variants)),
    )  # fmt: skip
    with atomic_write(path) as handle:
        handle.write(page)
