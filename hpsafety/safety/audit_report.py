"""What an audit found, as audit.json holds it: every share with its count, its denominator and the tool behind it."""

import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import hpsafety
from hpsafety.data.corpus import KINDS
from hpsafety.errors import RunError
from hpsafety.files import atomic_write
from hpsafety.safety.audit import ENGLISH, LEAST, SCOPES, UNKNOWN, Tally
from hpsafety.safety.audit_job import SAMPLE, State
from hpsafety.safety.audit_sample import Sample, bucket_of
from hpsafety.safety.audit_terms import Lists, list_hashes, load_lists
from hpsafety.safety.intervals import wilson

LISTED = 0.00005  # share of the documents above which a language is listed
TOP = 5  # terms of an axis that are shown
TOXIC = 0.5
BINS = 20  # of document scores
WORDS = "whole words in any case; hpsafety/data/terms"


def share(count: int, total: int) -> dict:
    """{count, of, share}; the share is None where there is nothing to divide by."""
    return {"count": count, "of": total, "share": count / total if total else None}


def summarise(state: State, folder: Path, cfg, tools: dict[str, str], files: list[str]) -> dict:
    """audit.json. Depends on the corpus, the seed and the tools; on nothing that differs between two runs."""
    counts, lists = state.counts, load_lists()
    found = {kind: counts.faults.get(kind, 0) for kind in KINDS}
    measured = counts.all.documents
    return {
        "tools": {"hpsafety": hpsafety.__version__, **tools, "words": WORDS, "lists": list_hashes()},
        "settings": {"seed": cfg.seed, "toxicity_sample": cfg.toxicity_sample, "max_line": cfg.max_line},
        "corpus": {
            "files": files,
            "counts": {
                "files": len(files), "bytes": counts.bytes, "documents": measured, "characters": counts.characters,
                "english_documents": counts.english.documents,
                **{kind.replace(" ", "_"): n for kind, n in found.items()},
            },
            "faults": {kind: {"count": n, "first": state.examples.get(kind, [])} for kind, n in found.items() if n},
        },
        "languages": languages(counts.languages, tools["language"]),
        "pronouns": {"judge": WORDS} | {scope: pronouns(getattr(counts, scope), lists) for scope in SCOPES},
        "identity": {"judge": WORDS} | {scope: identity(getattr(counts, scope), lists) for scope in SCOPES},
        "toxicity": toxicity(folder, counts.english.documents, cfg, tools["toxicity"]),
    }  # fmt: skip


def languages(found: Counter, judge: str) -> dict:
    """All shares sum to 1: the listed languages, unknown, and those too rare to be listed (AUD-5)."""
    total = found.total()
    ordered = sorted(found, key=lambda name: (-found[name], name))
    listed = [name for name in ordered if name != UNKNOWN and found[name] > LISTED * total]
    rare = sum(n for name, n in found.items() if name != UNKNOWN and name not in listed)
    return {
        "judge": judge,
        "accepted_from_probability": LEAST,
        "documents": total,
        "listed": [{"language": name, **share(found[name], total)} for name in listed],
        UNKNOWN: share(found[UNKNOWN], total),
        "rarer": share(rare, total) | {"each_at_most": LISTED},
        "all": {name: found[name] for name in ordered},
    }


def pronouns(tally: Tally, lists: Lists) -> dict:
    """Of each family and group the documents with a member: of all, and of those with any of the family (AUD-2)."""
    families = {}
    for family, groups in lists.families.items():
        any_of = tally.families[family]
        families[family] = {
            "any": share(any_of, tally.documents),
            "groups": {
                group: {"of_documents": share(n, tally.documents), "of_family": share(n, any_of)}
                for group in groups
                for n in [tally.groups[f"{family}/{group}"]]
            },
        }
    return {"documents": tally.documents, "any": share(tally.pronouns, tally.documents), "families": families}


def identity(tally: Tally, lists: Lists) -> dict:
    """Of each axis its share of the documents, and of its terms theirs of the axis's documents (AUD-2, AUD-3)."""
    axes = {}
    for axis, terms in lists.axes.items():
        any_of = tally.axes[axis]
        counted = {term: tally.terms[f"{axis}/{term}"] for term in terms}
        ordered = sorted((term for term in terms if counted[term]), key=lambda term: (-counted[term], term))
        axes[axis] = {
            "any": share(any_of, tally.documents),
            "top": [{"term": term, **share(counted[term], any_of)} for term in ordered[:TOP]],
            "terms": {term: counted[term] for term in ordered},
        }
    return {"documents": tally.documents, "axes": axes}


# ---- the sample ----


def write_sample(folder: Path, sample: Sample) -> None:
    """toxicity.jsonl: the rows of sample.jsonl that belong to the sample, in the order of the corpus.

    Raises RunError where they are not as many as the first pass counted.
    """
    border = sorted(row["key"] for row in _rows(folder / SAMPLE) if bucket_of(row["key"]) == sample.border)
    last = border[sample.from_border - 1] if 0 < sample.from_border <= len(border) else -1
    written = 0
    with atomic_write(folder / "toxicity.jsonl") as handle:
        for row in _rows(folder / SAMPLE):
            if row.pop("key") <= last:
                handle.write(json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n")
                written += 1
    if written != sample.size:
        raise RunError(
            f"the sample has {written} documents, not {sample.size}: the corpus was changed while it was read"
        )


def _rows(path: Path) -> Iterator[dict]:
    if path.exists():
        with open(path, encoding="utf-8") as handle:
            yield from map(json.loads, handle)


def toxicity(folder: Path, population: int, cfg, judge: str) -> dict:
    """The sample's scores: the share of documents from TOXIC up with its Wilson interval, the mean, a histogram."""
    documents = lines = toxic = 0
    histogram = [0] * BINS

    def scores() -> Iterator[float]:
        nonlocal documents, lines, toxic
        for row in _rows(folder / "toxicity.jsonl"):
            documents, lines, toxic = documents + 1, lines + row["lines"], toxic + (row["score"] >= TOXIC)
            histogram[min(BINS - 1, int(row["score"] * BINS))] += 1
            yield row["score"]

    total = math.fsum(scores())
    rate = asdict(wilson(toxic, documents))
    return {
        "judge": judge, "population": f"documents whose language is {ENGLISH}", "population_documents": population,
        "fraction": cfg.toxicity_sample, "seed": cfg.seed, "documents": documents, "lines": lines,
        "threshold": TOXIC,
        "share": {name: value if documents else None for name, value in rate.items()} | {"of": documents},
        "mean": total / documents if documents else None, "histogram": histogram,
    }  # fmt: skip
