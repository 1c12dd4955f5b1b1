"""Finer risk labels and topics of false claims, told by words where a row does not say them (spec RT-4).

The words stand in hpsafety/data/redteam/areas.toml. They sort dialogues for people to look at; they judge nothing.
"""

import functools
import re
import tomllib
from pathlib import Path

from hpsafety.safety.preprompts import load_library, normalise

AREAS = Path(__file__).parent.parent / "data" / "redteam" / "areas.toml"
OTHER = "other"
FALSE_INFORMATION = "false_information"  # of preprompts.toml
_WORD = re.compile(r"\w+")


@functools.cache
def _tables() -> tuple[dict, dict]:
    table = tomllib.loads(AREAS.read_text(encoding="utf-8"))
    return table["areas"], table["topics"]


@functools.cache
def _library():
    return load_library()


def _nearest(text: str, areas: dict[str, list[str]]) -> str:
    """The area with most of its words in the text; OTHER where there is none."""
    words = _WORD.findall(text.lower())

    def hits(listed: list[str]) -> int:
        whole = {word for word in listed if not word.endswith("*")}
        stems = tuple(word[:-1] for word in listed if word.endswith("*"))
        return sum(word in whole or word.startswith(stems) for word in words)

    best = max(areas, key=lambda name: hits(areas[name]))  # of equals the first
    return best if hits(areas[best]) else OTHER


def risk_label(row: dict) -> str:
    """ "category/area" of a prompt row: the area its risk_label names (preprompts.toml knows the spellings), else the
    one its last user turn has most words of."""
    said = (row.get("risk_label") or "").strip()
    if said:
        area = _library().spellings.get(normalise(said)) or normalise(said)[:40] or OTHER
    else:
        prompt = row["prompt"]
        text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        area = _nearest(text, _tables()[0][row["category"]])
    return f"{row['category']}/{area}"


def misinformation_topic(label: str, vector: str, request: str) -> str | None:
    """The topic of a dialogue about a false claim: one labelled as false information, or whose attack is a false
    premise (vector logic); None for any other dialogue."""
    if vector != "logic" and label.partition("/")[2] != FALSE_INFORMATION:
        return None
    return _nearest(request, _tables()[1])
