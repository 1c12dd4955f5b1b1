"""Preprompts that ask for a safer answer (spec section 7): generic ones, and answer templates by risk label.

All wording stands in preprompts.toml beside this file; a user's file of the same form changes or adds to it.
"""

import difflib
import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path

import numpy as np

from hpsafety.data.chat import default_system, prompt_messages
from hpsafety.errors import file_error

SHIPPED = Path(__file__).with_name("preprompts.toml")
_SLOT = re.compile(r"\{([^{}]*)\}")
_CHOICE = 103  # what the seed's numbers are drawn for


@dataclass(frozen=True, slots=True)
class Preprompt:
    """Text that goes before what the user says. id: "generic/T1/wise-safe" or "template/LABEL"."""

    id: str
    text: str


@dataclass(frozen=True, slots=True)
class Library:
    """Everything there is to choose from.

    generic     all generic preprompts, in a fixed order
    answers     label -> its answer template
    spellings   what a row may say (normalised) -> label
    categories  a row's category (normalised) -> label
    """

    generic: tuple[Preprompt, ...]
    answers: dict[str, Preprompt]
    spellings: dict[str, str]
    categories: dict[str, str]


def load_library(path: str | None = None) -> Library:
    """The package's preprompts, with those of the TOML file `path` over them.

    Raises InputError, naming file and key, for a file that is not of this form, an unknown slot, a label without steps.
    """
    table = _read(SHIPPED)
    if path is not None:
        own = _read(Path(path))
        table = table | {k: table[k] | v if isinstance(v, dict) else v for k, v in own.items()}
    spellings, categories = {}, {}
    for label, entry in table["labels"].items():  # of two labels with one spelling the later has it
        spellings |= {normalise(word): label for word in (label, entry["name"], *entry["spellings"])}
        categories |= {normalise(word): label for word in entry["categories"]}
    answers = {
        label: _answer(label, entry, table["answer"]["notice"]) for label, entry in table["labels"].items()
    }
    return Library(generic_preprompts(table["adjectives"], table["generic"]), answers, spellings, categories)


def generic_preprompts(adjectives: Sequence[str], templates: dict[str, list[str]]) -> tuple[Preprompt, ...]:
    """Adjectives x templates (CD-1): n(n-1) of a form with {adj1} and {adj2}, n of one with {adj1}, one of one without.

    templates  id -> its forms
    """
    out = []
    for name, forms in templates.items():
        for form in forms:
            for chosen in permutations(adjectives, len(set(_SLOT.findall(form)))):
                text = form
                for number, adjective in enumerate(chosen, start=1):
                    text = text.replace(f"{{adj{number}}}", adjective)
                out.append(
                    Preprompt("/".join(["generic", name, *(["-".join(chosen)] if chosen else [])]), text)
                )
    return tuple(out)


def _answer(label: str, entry: dict, notice: str) -> Preprompt:
    """Notice, risk label and numbered steps."""
    lines = [notice, *(f"{number}. {step}" for number, step in enumerate(entry["steps"], start=1))]
    return Preprompt(f"template/{label}", "\n".join(lines).replace("{label}", entry["name"]))


def normalise(text: str) -> str:
    """Lower case, everything but letters and digits as one underscore."""
    return re.sub(r"[\W_]+", "_", text.lower()).strip("_")


def label_of(row: dict, library: Library) -> str | None:
    """The label of a row's risk_label, or without one of its category; None where no answer template is there."""
    said = row.get("risk_label")
    if said is not None and said.strip():
        return library.spellings.get(normalise(said))
    return library.categories.get(normalise(row.get("category") or ""))


def said_risk(row: dict) -> str:
    """What the row says of its risk, for counts: its risk_label or, without one, its category."""
    said = (row.get("risk_label") or "").strip() or row.get("category")
    return normalise(said or "") or "nothing said"


def choose_generic(library: Library, index: int, seed: int) -> Preprompt:
    """The generic preprompt of the prompt with number `index`: any of them with equal chance, from seed and index."""
    return library.generic[int(np.random.default_rng([seed, index, _CHOICE]).integers(len(library.generic)))]


def choose_answer(library: Library, row: dict, fallback: Preprompt) -> Preprompt:
    """The row's answer template, or the (generic) fallback where its label has none (CD-2)."""
    label = label_of(row, library)
    return fallback if label is None else library.answers[label]


def attach(tokenizer, prompt: str | list[dict], preprompt: str, in_system: bool) -> str | list[dict]:
    """The prompt with the preprompt before the last user message, or behind the system text.

    in_system  the system text is the chat's own or, where it has none, what the chat template would write
    Raises InputError where the template takes no system message.
    """
    if not in_system:
        if isinstance(prompt, str):
            return f"{preprompt}\n\n{prompt}"
        *earlier, last = prompt
        return [*earlier, {**last, "content": f"{preprompt}\n\n{last['content']}"}]
    messages = prompt_messages(prompt)
    has_own = messages[0]["role"] == "system"
    system = messages[0]["content"] if has_own else default_system(tokenizer)
    text = f"{system}\n\n{preprompt}" if system else preprompt
    return [{"role": "system", "content": text}, *messages[has_own:]]


# ---- reading the file ----


def _read(path: Path) -> dict:
    """The checked table of one file: what it holds, each in the form that load_library takes."""
    try:
        table = tomllib.loads(path.read_bytes().decode())
    except OSError as error:
        raise file_error(path, f"cannot be read: {error.strerror}; --templates takes a TOML file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise file_error(path, f"is not valid TOML: {error}") from None
    _known(path, "", table, ("adjectives", "generic", "answer", "labels"))
    out = {}
    if "adjectives" in table:
        out["adjectives"] = _texts(path, "adjectives", table["adjectives"], 2)
        if len({word.lower() for word in out["adjectives"]}) < len(out["adjectives"]):
            raise file_error(path, "key adjectives: holds a word twice; every adjective may stand there once")
    if "generic" in table:
        out["generic"] = {
            name: [_slots(path, f"generic.{name}", form, ("adj1", "adj2"))
                   for form in _texts(path, f"generic.{name}", [forms] if isinstance(forms, str) else forms)]
            for name, forms in _table(path, "generic", table["generic"]).items()
        }  # fmt: skip
    if "answer" in table:
        _known(path, "answer.", _table(path, "answer", table["answer"]), ("notice",))
        notice = _texts(path, "answer.notice", [table["answer"].get("notice")])[0]
        if "{label}" not in _slots(path, "answer.notice", notice, ("label",)):
            raise file_error(
                path, "key answer.notice: lacks the slot {label}, which tells the model the risk"
            )
        out["answer"] = {"notice": notice}
    if "labels" in table:
        labels = _table(path, "labels", table["labels"])
        out["labels"] = {
            label: _label(path, f"labels.{label}", entry, label) for label, entry in labels.items()
        }
    return out


def _label(path: Path, key: str, entry, label: str) -> dict:
    _known(path, f"{key}.", _table(path, key, entry), ("name", "spellings", "categories", "steps"))
    if not entry.get("steps"):
        raise file_error(
            path, f"key {key}.steps: there are no steps; expected a list of at least one sentence"
        )
    steps = _texts(path, f"{key}.steps", entry["steps"])
    return {
        "name": _texts(path, f"{key}.name", [entry.get("name", label)])[0],
        "steps": [_slots(path, f"{key}.steps", step, ("label",)) for step in steps],
    } | {name: _texts(path, f"{key}.{name}", entry.get(name, []), 0) for name in ("spellings", "categories")}


def _table(path: Path, key: str, value) -> dict:
    if not isinstance(value, dict):
        raise file_error(path, f"key {key}: expected a table, got {value!r}")
    return value


def _known(path: Path, prefix: str, table: dict, names: tuple[str, ...]) -> None:
    for name in table:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(names)}"
            raise file_error(path, f"key {prefix}{name}: unknown; {hint}")


def _texts(path: Path, key: str, value, least: int = 1) -> list[str]:
    fine = isinstance(value, list) and all(isinstance(text, str) and text.strip() for text in value)
    if not fine or len(value) < least:
        number = f"at least {least} " if least > 1 else ""
        raise file_error(path, f"key {key}: expected {number}text that is not empty, got {value!r}")
    return [text.strip() for text in value]


def _slots(path: Path, key: str, text: str, known: tuple[str, ...]) -> str:
    """The text itself. InputError for a slot that nothing fills, a brace alone, and {adj2} without {adj1}."""
    found = _SLOT.findall(text)
    for name in found:
        if name not in known:
            slots = " and ".join(f"{{{name}}}" for name in known)
            raise file_error(path, f"key {key}: unknown slot {{{name}}}; a text here may hold {slots}")
    if set("{}") & set(_SLOT.sub("", text)):
        raise file_error(path, f"key {key}: has a brace without its partner; braces enclose a slot")
    if "adj2" in found and "adj1" not in found:
        raise file_error(path, f"key {key}: has {{adj2}} without {{adj1}}; name a single slot {{adj1}}")
    return text
