"""Other people's text made harmless: prompts, answers, names and settings, for a page, a terminal or a spreadsheet."""

import csv
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

from hpsafety.files import atomic_write

MOST = 4_000  # characters of one text on a page
MOST_IN_CELL = 32_000  # a spreadsheet's cell holds 32,767
FORMULA = "=+-@＝＋－＠"
JOINERS = "\u200c\u200d"  # of letters and emoji; they neither hide nor turn anything


def visible(text, most: int = MOST) -> str:
    """Text whose control characters and bidirectional marks are written out, as ⟨U+202E⟩, and whose end is cut off
    beyond `most` characters, with a note. Line feeds and tabs stay; an odd blank becomes a plain one."""
    text = text if isinstance(text, str) else str(text)
    kept = "".join(map(_seen, text[:most].replace("\r\n", "\n")))
    return kept if len(text) <= most else f"{kept} … ({len(text) - most:,} further characters cut)"


def _seen(c: str) -> str:
    if c.isprintable() or c in "\n\t" or c in JOINERS:
        return c
    return " " if unicodedata.category(c) == "Zs" else f"⟨U+{ord(c):04X}⟩"


def line(text, most: int = 200) -> str:
    """`visible` on one line: names, paths, settings."""
    return " ".join(visible(text, most).split())


def printable(text: str) -> str:
    """Text without control and bidirectional characters, so that a model's answer cannot steer the terminal."""
    return "".join(c if c.isprintable() or c == "\n" else " " for c in text)


def cell(value) -> str | float | int:
    """A value for a spreadsheet: a number as it is, None as nothing; a text that could be taken for a formula begins
    with an apostrophe."""
    if value is None:
        return ""
    if isinstance(value, int | float):
        return value
    text = visible(value, MOST_IN_CELL)
    risky = text[:1] in ("\t", "\n") or text.lstrip()[:1] in tuple(FORMULA)
    return f"'{text}" if risky else text


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence]) -> None:
    """UTF-8, one line per row, every cell by `cell`."""
    with atomic_write(path) as handle:
        table = csv.writer(handle, lineterminator="\n")
        table.writerow(header)
        table.writerows([cell(value) for value in row] for row in rows)


def said(prompt) -> str:
    """A prompt as text: a string, or a dialogue's turns with their roles."""
    if isinstance(prompt, str):
        return prompt
    turns = [turn for turn in prompt if isinstance(turn, dict)] if isinstance(prompt, list) else []
    if len(turns) == 1:
        return str(turns[0].get("content", ""))
    return "\n".join(f"{turn.get('role', '')}: {turn.get('content', '')}" for turn in turns)
