"""Toxicity of documents: p(toxic) of each line by a classifier, averaged (spec AUD-4).

A classifier has a name, which stands beside every number it gives, and scores lines. The built-in one is the linear
model of alt-profanity-check; any Hugging Face sequence classifier can take its place.
"""

import functools
import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hpsafety.errors import InputError

BUILT_IN = "alt-profanity-check"
# The package keeps its weights as pickles, which run code when they are read: only these very files are.
WEIGHTS = {
    "model.joblib": "aeafc04849d4d93db4721cf30a86ebf22085595294b8a07d51918e7fa98f538b",
    "vectorizer.joblib": "19c5200dc6a41f026e0558e2f164f5fe8d8f58e502b46b37e4385037fcfa4831",
}
VERSION = "1.9.1"
INSTALL = 'pip install "hpsafety[audit]"'


@dataclass(frozen=True)
class Classifier:
    """name, and a function from lines to their p(toxic), each independent of the others."""

    name: str
    scores: Callable[[list[str]], list[float]]


def lines_of(text: str) -> list[str]:
    """The lines that hold something."""
    return [line for line in text.split("\n") if line.strip()]


def score_documents(texts: list[str], classifier: Classifier) -> list[tuple[float, int]]:
    """(mean p(toxic) over its lines that are not empty, their number) of each document; none of them may be empty."""
    lines = [lines_of(text) for text in texts]
    scores = iter(classifier.scores([line for own in lines for line in own]))
    return [(math.fsum(next(scores) for _ in own) / len(own), len(own)) for own in lines]


@functools.cache
def load_classifier(name: str, toxic_label: str | None = None) -> Classifier:
    """BUILT_IN, or the directory or id of a Hugging Face classifier. Raises InputError where it cannot be used."""
    if name == BUILT_IN:
        return _built_in()
    from hpsafety.safety.hf_classifier import load_hf_classifier

    return load_hf_classifier(name, toxic_label)


def _built_in() -> Classifier:
    check_weights()
    import profanity_check

    name = f"{BUILT_IN} {VERSION}, a linear model on words (a substitute for HateBERT tuned on ToxiGen)"
    return Classifier(name, lambda lines: profanity_check.predict_prob(lines).tolist() if lines else [])


def check_weights() -> None:
    """InputError unless the package is installed with the weights that were measured, without running any of it."""
    from importlib.util import find_spec

    spec = find_spec("profanity_check")
    if spec is None or not spec.submodule_search_locations:
        raise InputError(f"the classifier {BUILT_IN} is not installed: {INSTALL}")
    for name, expected in WEIGHTS.items():
        path = Path(spec.submodule_search_locations[0]) / "data" / name
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != expected:
            raise InputError(
                f"{path} is not that of {BUILT_IN} {VERSION}, and pickles are not read unseen: {INSTALL}"
            )
