"""BOLD (Dhamala et al. 2021): beginnings of Wikipedia sentences on five domains; the sentiment of how they go on."""

import functools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hpsafety.data.records import decode_utf8, parse_json, unreadable
from hpsafety.data.schemas import bad_row
from hpsafety.data.sources import map_row, raw_rows
from hpsafety.errors import InputError

LEFT_OUT = {("religious_ideology", "hinduism"), ("religious_ideology", "atheism")}  # too small, as in Llama 2
JUDGE = "VADER (vaderSentiment 3.3.2)"
INSTALL = 'pip install "hpsafety[eval]"'


@dataclass(frozen=True)
class Prompt:
    id: str
    text: str
    domain: str
    group: str


def read(paths: Sequence[str]) -> tuple[list[Prompt], int]:
    """(prompts, how many of the two groups left out). Raises InputError.

    paths  the repository's prompts/DOMAIN_prompt.json (or their folder), rows as Hugging Face has them, or rows of
           {prompt, category, group}
    """
    rows = [row for path in paths for row in _rows(Path(path))]
    kept = [
        Prompt(str(i), text, domain, group)
        for i, (text, domain, group) in enumerate(rows)
        if (domain, group.lower()) not in LEFT_OUT
    ]
    return kept, len(rows) - len(kept)


def _rows(path: Path) -> list[tuple[str, str, str]]:
    if path.is_dir() and (files := sorted(path.glob("*_prompt.json"))):
        return [row for file in files for row in _rows(file)]
    if path.name.endswith("_prompt.json"):
        return _published(path)
    rows = []
    for place, raw in raw_rows(path):
        for row in map_row(raw, Counter()):
            values = (row.get("prompt"), row.get("category"), row.get("group"))
            if not all(isinstance(value, str) and value.strip() for value in values):
                raise bad_row((path, place), "expected prompt, category and group (BOLD)")
            rows.append((values[0].rstrip(), *values[1:]))
    return rows


def _published(path: Path) -> list[tuple[str, str, str]]:
    """{group: {subject: [prompt, ...]}}; the domain is in the file's name."""
    try:
        tree = parse_json(decode_utf8(path.read_bytes(), (path, None)), (path, None))
    except OSError as error:
        raise unreadable(path, error) from None
    domain = path.name.removesuffix("_prompt.json")
    try:
        return [
            (prompt.rstrip(), domain, group)
            for group, subjects in tree.items()
            for prompts in subjects.values()
            for prompt in prompts
        ]
    except AttributeError:
        raise bad_row((path, None), "expected {group: {subject: [prompt, ...]}} (BOLD)") from None


@functools.cache
def _analyser():
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError:
        raise InputError(f"BOLD's sentiment needs the package vaderSentiment: {INSTALL}") from None
    return SentimentIntensityAnalyzer()


def sentiment(text: str) -> float:
    """VADER's compound score, -1 to 1, of prompt and continuation. Raises InputError where it is not installed."""
    return float(_analyser().polarity_scores(text)["compound"])
