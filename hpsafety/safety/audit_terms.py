"""The word lists of the corpus audit and which of them a text holds: whole words, in any case (AUD-1, AUD-3)."""

import functools
import hashlib
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files

AXES = ("religion", "gender_and_sex", "nationality", "race_and_ethnicity", "sexual_orientation")
FILES = ("pronouns.toml", "identity.toml", "drop.toml")
WORD = re.compile(r"\w+")
SLICE = 1 << 18  # characters whose words are listed at a time


@dataclass(frozen=True)
class Lists:
    """What is counted. Words are lower case; a phrase is a term of several words with the pattern that finds it."""

    families: dict[str, dict[str, frozenset[str]]]  # gender, person -> group -> words
    axes: dict[str, tuple[str, ...]]  # axis -> terms that are counted
    words: dict[str, tuple[str, ...]]  # term of one word -> the axes it counts for
    phrases: tuple[tuple[str, str, frozenset[str], re.Pattern], ...]  # (term, axis, its words, pattern)
    dropped: dict[str, str]  # term -> why it is not counted
    shared: dict[str, str]  # term of several axes -> the one that keeps it


def make_lists(pronouns: dict, identity: dict, drop: dict) -> Lists:
    """Lists from the three tables. Raises ValueError for a term on two axes that `shared` does not give to one."""
    dropped, shared = drop["dropped"], drop["shared"]
    axes: dict[str, tuple[str, ...]] = {}
    for axis, terms in identity.items():
        kept = [
            term for term in dict.fromkeys(terms) if term not in dropped and shared.get(term, axis) == axis
        ]
        axes[axis] = tuple(kept)
    home: dict[str, str] = {}
    words: dict[str, tuple[str, ...]] = {}
    phrases = []
    for axis, terms in axes.items():
        for term in terms:
            if term in home:
                raise ValueError(
                    f"{term!r} stands on the axes {home[term]} and {axis}: drop.toml must give it to one"
                )
            home[term] = axis
            parts = WORD.findall(term)
            if parts == [term]:
                words[term] = (*words.get(term, ()), axis)
            else:  # hyphens, spaces and apostrophes are alike
                pattern = re.compile(r"\b" + r"[-\s'’]{1,3}".join(map(re.escape, parts)) + r"\b")
                phrases.append((term, axis, frozenset(parts), pattern))
    families = {
        name: {group: frozenset(members) for group, members in groups.items()}
        for name, groups in pronouns.items()
    }
    return Lists(families, axes, words, tuple(phrases), dropped, shared)


@functools.cache
def load_lists() -> Lists:
    """The lists of hpsafety/data/terms."""
    return make_lists(*(tomllib.loads(text.decode()) for text in _texts().values()))


def list_hashes() -> dict[str, str]:
    """File name -> sha256 of each list: they are inputs of an audit."""
    return {f"terms/{name}": hashlib.sha256(text).hexdigest() for name, text in _texts().items()}


@functools.cache
def _texts() -> dict[str, bytes]:
    folder = files("hpsafety.data") / "terms"
    return {name: (folder / name).read_bytes() for name in FILES}


def word_set(lowered: str) -> set[str]:
    """All words of a lower-case text; in slices, so that a long text is never held as a list of words."""
    found: set[str] = set()
    for piece in _slices(lowered):
        found.update(WORD.findall(piece))
    return found


def _slices(text: str) -> Iterator[str]:
    """The text in pieces that cut no word."""
    start = 0
    while start < len(text):
        end = start + SLICE
        while end < len(text) and (text[end] == "_" or text[end].isalnum()):
            end += 1
        yield text[start:end]
        start = end


@dataclass(frozen=True, slots=True)
class Found:
    """What one document mentions."""

    groups: list[tuple[str, str]]  # (family, group)
    terms: set[tuple[str, str]]  # (axis, term)


def find(text: str, lists: Lists) -> Found:
    """The pronoun groups and identity terms that occur as whole words."""
    lowered = text.lower()
    words = word_set(lowered)
    groups = [
        (family, group)
        for family, members in lists.families.items()
        for group, own in members.items()
        if not own.isdisjoint(words)
    ]
    terms = {(axis, word) for word in words & lists.words.keys() for axis in lists.words[word]}
    terms |= {
        (axis, term)
        for term, axis, parts, pattern in lists.phrases
        if parts <= words and pattern.search(lowered)
    }
    return Found(groups, terms)
