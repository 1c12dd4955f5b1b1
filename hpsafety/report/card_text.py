"""A model card's pieces, and how they are written: Markdown that holds no HTML and no link from data, HTML, YAML."""

import json
import re
from dataclasses import dataclass

from markupsafe import Markup, escape

from hpsafety.report.text import line


class Data(str):
    """Text that came from a run or a flag and not from hpsafety."""


class Ref(str):
    """A manifest's hash."""


@dataclass(frozen=True)
class Field:
    """name: Data where it holds a name from the run. lines: each a tuple of str (ours), Data and Ref."""

    name: str
    lines: list[tuple]


@dataclass(frozen=True)
class Section:
    title: str
    fields: list[Field]


def html(parts: tuple) -> Markup:
    """One line of a field."""
    return Markup("").join(
        Markup('<sup class="ref"><a href="#m-{0}">{0}</a></sup>').format(p) if isinstance(p, Ref)
        else Markup("<span class=\"data\" dir=\"auto\">{}</span>").format(p) if isinstance(p, Data) else escape(p)
        for p in parts
    )  # fmt: skip


def markdown(title: str, unfit: str | None, sections: list[Section], header: dict) -> str:
    """card.md."""
    out = ["---", *yaml(header), "---", "", f"# Model card: {code(title)}", ""]
    if unfit:
        out += [f"**Not fit for deployment.** {escaped(unfit)}", ""]
    out += ["Twelve hex digits after a number name the manifest of the run that made it.", ""]
    for section in sections:
        out += [f"## {escaped(section.title)}", ""]
        for field in section.fields:
            out.append(
                f"- {code(field.name)}" if isinstance(field.name, Data) else f"- **{escaped(field.name)}**"
            )
            out += [f"  - {''.join(map(_piece, parts)).strip()}" for parts in field.lines]
        out.append("")
    return "\n".join(out)


def _piece(part: str) -> str:
    if isinstance(part, Ref):
        return f"[{part}]" if part == "none" else f"`{part}`"
    return code(part) if isinstance(part, Data) and part else escaped(part)


def code(text: str) -> str:
    """Text as a code span, in which nothing is a tag, a link or emphasis."""
    text = line(text, 1000) or " "
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    pad = " " if "`" in text else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def escaped(text: str) -> str:
    """Text in which no character means anything to Markdown."""
    keep = len(text) - len(text.lstrip(" "))
    return " " * keep + re.sub(r"([\\`*_{}\[\]<>#!|~&])", r"\\\1", text[keep:])


def yaml(header: dict, indent: str = "") -> list[str]:
    """Lines of block YAML; every scalar is written as JSON, which YAML reads."""
    out = []
    for key, value in header.items():
        if value is None:
            continue
        if isinstance(value, dict):
            out += [f"{indent}{key}:", *yaml(value, indent + "  ")]
        elif isinstance(value, list) and value:
            out.append(f"{indent}{key}:")
            for item in value:
                if isinstance(item, dict):
                    first, *rest = yaml(item, indent + "    ")
                    out += [f"{indent}  - {first.strip()}", *rest]
                else:
                    out.append(f"{indent}  - {scalar(item)}")
        else:
            out.append(f"{indent}{key}: {scalar(value)}")
    return out


def scalar(value) -> str:
    """A number, a truth, an empty list, or a text between quotes."""
    return json.dumps(line(value, 1000) if isinstance(value, str) else value, ensure_ascii=False)
