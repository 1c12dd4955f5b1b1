"""The counts of a corpus audit (spec section 1): made block by block, and added up in any grouping to the same bits.

A document is in the English part where its language is `en`. Pronouns and terms are counted for all documents and for
the English part apart, so that every share can name its denominator. Nothing is filtered (AUD-6).
"""

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from hpsafety.data.corpus import Block, Fault, documents, read_document
from hpsafety.safety.audit_sample import Sample, bucket_of, sampling_key
from hpsafety.safety.audit_terms import Found, Lists, find, load_lists
from hpsafety.safety.toxicity import load_classifier, score_documents

UNKNOWN = "unknown"
ENGLISH = "en"
LEAST = 0.5  # probability from which a language is accepted (AUD-5)
HEAD = 1000  # characters of a document whose language is told
SCOPES = ("all", "english")

Identify = Callable[[str], tuple[str, float]]  # text -> (language, probability)


@dataclass
class Tally:
    """Documents of one scope, and how many of them mention what."""

    documents: int = 0
    families: Counter = field(default_factory=Counter)  # any pronoun of the family
    groups: Counter = field(default_factory=Counter)  # family/group
    pronouns: int = 0  # any pronoun at all
    axes: Counter = field(default_factory=Counter)  # any term of the axis
    terms: Counter = field(default_factory=Counter)  # axis/term

    def count(self, found: Found) -> None:
        self.documents += 1
        self.pronouns += bool(found.groups)
        self.families.update({family for family, _ in found.groups})
        self.groups.update(f"{family}/{group}" for family, group in found.groups)
        self.axes.update({axis for axis, _ in found.terms})
        self.terms.update(f"{axis}/{term}" for axis, term in found.terms)


@dataclass
class Counts:
    """Whole numbers only: the order in which blocks are added changes nothing."""

    bytes: int = 0  # of unpacked lines and rows, whether they could be measured or not
    characters: int = 0  # of the documents that were
    languages: Counter = field(default_factory=Counter)
    all: Tally = field(default_factory=Tally)
    english: Tally = field(default_factory=Tally)
    buckets: Counter = field(default_factory=Counter)  # bucket of the sampling key -> English documents
    faults: Counter = field(default_factory=Counter)  # kind -> what was not measured

    def add(self, other) -> None:
        """Takes the counts of other documents in."""
        _add(self, other)

    def record(self) -> dict:
        """As JSON; `read_counts` makes it again."""
        return _record(self)


def _record(value):
    if isinstance(value, Counter):  # dataclasses.asdict breaks Counters in Python 3.11
        return dict(value)
    if dataclasses.is_dataclass(value):
        return {item.name: _record(getattr(value, item.name)) for item in dataclasses.fields(value)}
    return value


def _add(mine, theirs) -> None:
    for item in dataclasses.fields(mine):
        old, new = getattr(mine, item.name), getattr(theirs, item.name)
        if isinstance(old, Counter):
            old.update(new)
        elif isinstance(old, int):
            setattr(mine, item.name, old + new)
        else:
            _add(old, new)


def read_counts(record: dict) -> Counts:
    """Counts from what `record` gave, also after a way through JSON, which turns whole-number keys into text."""
    made = {}
    for name, value in record.items():
        if name in SCOPES:
            made[name] = Tally(**{k: Counter(v) if isinstance(v, dict) else v for k, v in value.items()})
        elif name == "buckets":
            made[name] = Counter({int(k): v for k, v in value.items()})
        else:
            made[name] = Counter(value) if isinstance(value, dict) else value
    return Counts(**made)


def language_of(text: str, identify: Identify) -> str:
    """The language of a document's first HEAD characters; unknown below the probability LEAST (AUD-5)."""
    language, probability = identify(text.lstrip()[:HEAD])
    return language if probability >= LEAST else UNKNOWN


def measure(
    block: Block, seed: int, max_line: int, identify: Identify, lists: Lists
) -> tuple[Counts, list[Fault]]:
    """The counts of one block's documents, and what could not be measured, in order."""
    counts, faults = Counts(bytes=sum(len(raw) for raw in block.raw if raw)), []
    for line, text in documents(block, max_line):
        if isinstance(text, Fault):
            counts.faults[text.kind] += 1
            faults.append(text)
            continue
        language = language_of(text, identify)
        found = find(text, lists)
        counts.characters += len(text)
        counts.languages[language] += 1
        counts.all.count(found)
        if language == ENGLISH:
            counts.english.count(found)
            counts.buckets[bucket_of(sampling_key(seed, block.file, line))] += 1
    return counts, faults


# ---- the identifier that is used ----


@functools.cache
def language_identifier() -> Identify:
    """py3langid, with normalised probabilities. Its model lies in the package."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True).classify


def identifier_name() -> str:
    from importlib.metadata import version

    return f"py3langid {version('py3langid')}, on a document's first {HEAD:,} characters (a substitute for fastText's)"


def measure_block(block: Block, seed: int, max_line: int) -> tuple[Counts, list[Fault]]:
    """`measure` with the built-in identifier and lists: what a worker process does."""
    return measure(block, seed, max_line, language_identifier(), load_lists())


def score_block(
    block: Block, seed: int, max_line: int, sample: Sample, classifier: str, toxic_label: str | None
) -> list[dict]:
    """A row for each English document of the block that may be in the sample: place, sampling key, lines and score."""
    chosen: list[tuple[int, int]] = []
    texts: list[str] = []
    for line, raw in enumerate(block.raw, start=block.first):
        key = sampling_key(seed, block.file, line)
        if not sample.may_hold(key):
            continue
        text = read_document(block, line, raw, max_line)
        if isinstance(text, str) and language_of(text, language_identifier()) == ENGLISH:
            chosen.append((line, key))
            texts.append(text)
    scored = score_documents(texts, load_classifier(classifier, toxic_label))
    return [
        {"file": block.path, "line": line, "key": key, "lines": lines, "score": score}
        for (line, key), (score, lines) in zip(chosen, scored, strict=True)
    ]
