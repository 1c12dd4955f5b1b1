"""An audit for people: tables on the terminal and report.html, from the data of audit.json."""

from pathlib import Path

from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from hpsafety.files import atomic_write
from hpsafety.safety.audit_figures import (
    identity_figures,
    languages_figure,
    percent,
    pronouns_figure,
    toxicity_figure,
)

Rows = list[tuple[str, ...]]


def language_rows(found: dict) -> Rows:
    """(language, documents, share) of every listed language, of unknown and of the rarer ones together."""
    rows = [(row["language"], row) for row in found["listed"]]
    rows += [
        ("unknown", found["unknown"]),
        (f"each at most {percent(found['rarer']['each_at_most'])}", found["rarer"]),
    ]
    return [(name, f"{row['count']:,}", percent(row["share"])) for name, row in rows]


def pronoun_rows(found: dict) -> Rows:
    """(family, group, documents, share of all, share of those with any of the family); "any" heads each family."""
    rows = []
    for family, part in found["families"].items():
        rows.append((family, "any", f"{part['any']['count']:,}", percent(part["any"]["share"]), ""))
        for group, row in part["groups"].items():
            whole, own = row["of_documents"], row["of_family"]
            rows.append(("", group, f"{whole['count']:,}", percent(whole["share"]), percent(own["share"])))
    return rows


def identity_rows(found: dict) -> Rows:
    """(axis, documents, share of all, its most frequent terms with their share among its documents)."""
    return [
        (
            axis.replace("_", " "), f"{part['any']['count']:,}", percent(part["any"]["share"]),
            ", ".join(f"{row['term']} {percent(row['share'])}" for row in part["top"]) or "none",
        )
        for axis, part in found["axes"].items()
    ]  # fmt: skip


def toxicity_rows(found: dict) -> Rows:
    rate, told = found["share"], "not measured"
    if rate["value"] is not None:
        value, low, high = (percent(rate[name]) for name in ("value", "low", "high"))
        told = f"{value} ({rate['count']:,} of {rate['of']:,}, {low} to {high})"
    return [
        (f"documents with a score of {found['threshold']} or more", told),
        ("mean score", "not measured" if found["mean"] is None else f"{found['mean']:.4f}"),
        (
            "sampled",
            f"{found['documents']:,} of {found['population_documents']:,} English documents, seed {found['seed']}",
        ),
        ("classifier", found["judge"]),
        ("lines scored", f"{found['lines']:,}"),
    ]


def fault_rows(corpus: dict) -> Rows:
    return [(kind, f"{row['count']:,}", "; ".join(row["first"])) for kind, row in corpus["faults"].items()]


def show_tables(result: dict) -> None:
    """The audit on stdout, in tables narrow enough for 80 columns."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console, counts = Console(), result["corpus"]["counts"]
    console.print(f"{counts['documents']:,} documents, {counts['english_documents']:,} of them English")
    rest = language_rows(result["languages"])
    tables = (
        ("languages", ("language", "documents", "share"), rest if len(rest) < 14 else [*rest[:10], *rest[-2:]]),
        ("pronouns, English part", ("family", "group", "documents", "of all", "of any"),
         pronoun_rows(result["pronouns"]["english"])),
        ("identity terms, all documents", ("axis", "documents", "of all", "most frequent, of the axis's documents"),
         identity_rows(result["identity"]["all"])),
        ("toxicity", ("measure", "value"), toxicity_rows(result["toxicity"])),
        ("not measured", ("kind", "count", "first"), fault_rows(result["corpus"])),
    )  # fmt: skip
    for title, header, rows in tables:
        if rows:
            table = Table(*header, title=title)
            for row in rows:
                table.add_row(*map(Text, row))
            console.print(table)
    console.print(Text(f"language: {result['tools']['language']}\ntoxicity: {result['tools']['toxicity']}"))


def write_page(result: dict, path: Path) -> None:
    """One self-contained HTML file; every text is escaped, and its policy forbids scripts and the network."""
    environment = Environment(loader=PackageLoader("hpsafety", "report"), autoescape=True)
    measured = result["corpus"]["counts"]["documents"]
    page = environment.get_template("audit.html").render(
        title="What is in the corpus", result=result, counts=result["corpus"]["counts"],
        languages=language_rows(result["languages"]), toxicity=toxicity_rows(result["toxicity"]),
        pronouns={scope: pronoun_rows(result["pronouns"][scope]) for scope in ("english", "all")},
        identity={scope: identity_rows(result["identity"][scope]) for scope in ("all", "english")},
        faults=fault_rows(result["corpus"]),
        figures={
            "languages": Markup(languages_figure(result["languages"])),
            "pronouns": Markup(pronouns_figure(result["pronouns"]["english"])),
            "identity": Markup("\n".join(identity_figures(result["identity"]["all"]))),
            "toxicity": Markup(toxicity_figure(result["toxicity"])),
        } if measured else {},
    )  # fmt: skip
    with atomic_write(path) as handle:
        handle.write(page)
