"""Ghost attention's lists of hobbies and public figures, made by the model itself and saved with the prompt and the raw
output (spec GATT-4).

A small model rarely gives a long list at once, and makes things up. So it is asked several times, each time with other
draws, until there are as many usable names as were asked for; those that more of its answers hold come first. A list
that stays short is used as it is, and that is said and counted.
"""

import re
from collections import Counter

from hpsafety.data.chat import encode_prompt
from hpsafety.errors import RunError
from hpsafety.rollout.engine import Engine, Request

# Our wording; {count} is the number wanted.
QUESTIONS = {
    "hobby": "List {count} hobbies that people enjoy. Write only their names, one per line.",
    "figure": (
        "List {count} famous people from history, science, music and sport. Write only their full names, one per line."
    ),
}
ROUNDS = 3
SAMPLES = 8  # answers per family and round
TEMPERATURE = 0.7
LIST_TOKENS = 160  # per answer
LEAST = 2  # usable names below which a run cannot go on
SEED_STEP = 7_000_003  # so that the lists share no draw with the dialogues

MARKER = re.compile(r"^\s*(?:[-*\u2022\u2013]+|\(?\d{1,3}[.):])\s*")  # of a line in a list
TAIL = re.compile(r"[:;(\[,!?]|(?<=[^\W\d_]{3})\.|\s[-\u2013\u2014]\s")  # what follows is an explanation
WORD = re.compile(r"[^\W\d_]+(?:['\u2019-][^\W\d_]+)*\.?")
# Words that begin a sentence, not a hobby.
TALK = set(
    "i i'm it it's there here sure people they you some these this that of a an the my your we".split()
)
PARTICLES = {"de", "da", "di", "van", "von", "der", "den", "del", "la", "le", "of", "the", "bin", "al", "el"}
# Roles nobody should be asked to play: named for crimes against humanity. Matched on a name's last words.
NEVER = (
    "hitler",
    "stalin",
    "himmler",
    "goebbels",
    "eichmann",
    "mengele",
    "mussolini",
    "pol pot",
    "bin laden",
)


def make_lists(model, count: int, settings) -> list[dict]:
    """What the model names, a dict per family of QUESTIONS: {family, question, seed, temperature, wanted, raw, items,
    rejected, short}.

    count     names wanted per family;  settings: rollout.sampler.Settings of the draw
    raw       its answers {text, finish} as they came;  items: the usable names;  rejected: lines that hold none
    Raises RunError, with the raw text, where fewer than LEAST names can be used.
    """
    questions = {family: question.format(count=count) for family, question in QUESTIONS.items()}
    raw: dict[str, list[dict]] = {family: [] for family in questions}
    found: dict[str, tuple[list[str], list[str]]] = {family: ([], []) for family in questions}
    for number in range(ROUNDS):
        short = [family for family in questions if len(found[family][0]) < count]
        if not short:
            break
        keys = {number * len(QUESTIONS) + list(QUESTIONS).index(family): family for family in short}
        requests = [
            Request(encode_prompt(model.tokenizer, questions[f]), SAMPLES, key) for key, f in keys.items()
        ]
        for key, rollouts in Engine(model, settings).groups(requests):
            raw[keys[key]] += [
                {"text": model.tokenizer.decode(r.tokens, skip_special=True), "finish": r.finish}
                for r in rollouts
            ]
        found |= {family: parse([whole(**answer) for answer in raw[family]], family) for family in short}
    for family, (items, _) in found.items():
        if len(items) < LEAST:
            text = " | ".join(answer["text"] for answer in raw[family])
            raise RunError(
                f"the model's {len(raw[family])} lists of {family} names hold {len(items)} that can be used, and "
                f"{LEAST} are the least; use a model that follows instructions. It was asked {questions[family]!r} "
                f"and said: {text[:600]!r}"
            )
    return [
        {
            "family": family, "question": questions[family], "seed": settings.seed, "temperature": settings.temperature,
            "wanted": count, "raw": raw[family], "items": items[:count], "rejected": rejected,
            "short": max(0, count - len(items)),
        }
        for family, (items, rejected) in found.items()
    ]  # fmt: skip


def whole(text: str, finish: str) -> str:
    """The text without its last name where the answer was cut."""
    if finish != "length":
        return text
    end = text.rfind("\n")
    return text[: end if end >= 0 else max(text.rfind(","), 0)]


def parse(texts: list[str], family: str) -> tuple[list[str], list[str]]:
    """(usable names, each once; lines that hold none). Names of more texts come first, then earlier ones. A line may be
    a row of names."""
    names: dict[str, str] = {}  # by their folded form, as first written
    votes: Counter = Counter()
    rejected = []
    for text in texts:
        voted = set()
        for line in filter(str.strip, text.splitlines()):
            for part in line.split(",") if line.count(",") >= 3 else [line]:
                name = clean(part, family)
                if name is None:
                    rejected.append(part.strip()[:80])
                else:
                    names.setdefault(name.casefold(), name)
                    voted.add(name.casefold())
        votes.update(sorted(voted))
    order = sorted(names, key=lambda key: -votes[key])  # stable: earlier ones first among equals
    return [names[key] for key in order], rejected


def clean(line: str, family: str) -> str | None:
    """The name in one line of a list, without number, emphasis and explanation; None where it is no name."""
    name = TAIL.split(MARKER.sub("", line).replace("*", "").replace('"', "").strip(), maxsplit=1)[0]
    name = " ".join(name.replace("_", " ").split())
    words = name.split()
    if not 3 <= len(name) <= 40 or not all(WORD.fullmatch(word) for word in words):
        return None
    return _hobby(words) if family == "hobby" else _figure(words)


def _hobby(words: list[str]) -> str | None:
    name = " ".join(words).lower()
    if len(words) > 3 or words[0].lower() in TALK or words[0].lower() in ("and", "or"):
        return None
    return name


def _figure(words: list[str]) -> str | None:
    """At least two words, written as names are. A name that stands for crimes is left out."""
    proper = [word for word in words if word.lower() not in PARTICLES]
    if not 2 <= len(words) <= 5 or len(proper) < 2 or words[0].lower() in TALK:
        return None
    if not all(word[0].isupper() and word[1:2].islower() or len(word) <= 2 for word in proper):
        return None
    name = " ".join(words)
    return None if name.lower().endswith(NEVER) else name
