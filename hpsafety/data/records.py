"""The records on disk (JSON lines): reading, excluding and counting, writing (DATA-1..3, DATA-6)."""

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from hpsafety.data.schemas import (
    ATTACKS,
    CATEGORIES,
    RATINGS,
    REQUIRED,
    ROLES,
    SPLITS,
    TRAIN_SPLITS,
    bad_row,
    type_name,
    validate,
)
from hpsafety.errors import InputError, file_error
from hpsafety.files import atomic_write

__all__ = [
    "ATTACKS",
    "CATEGORIES",
    "RATINGS",
    "REQUIRED",
    "ROLES",
    "SPLITS",
    "TRAIN_SPLITS",
    "Records",
    "admit",
    "check_disjoint",
    "iter_numbered",
    "iter_records",
    "normalise_prompt",
    "read_records",
    "validate",
    "write_records",
]


@dataclass(frozen=True, slots=True)
class Records:
    """Validated rows in file order, and how many were excluded or lack something, by reason."""

    rows: list[dict]
    counts: Counter = field(default_factory=Counter)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[dict]:
        return iter(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


def read_records(path, kind: str) -> Records:
    """All rows of a JSON-lines file. Raises InputError for the first bad line and for a file without rows."""
    counts: Counter = Counter()
    rows = list(iter_records(path, kind, counts))
    return Records(rows, counts)


def iter_records(path, kind: str, counts: Counter | None = None) -> Iterator[dict]:
    """The rows of a JSON-lines file, one at a time, without those that are excluded.

    counts  filled, where given, with what `admit` counts
    Raises InputError as `read_records` does, at the line where reading has come to.
    """
    return (row for _, row in iter_numbered(path, kind, counts))


def iter_numbered(path, kind: str, counts: Counter | None = None) -> Iterator[tuple[int, dict]]:
    """(line number, row) of the rows that `iter_records` gives."""
    counts = Counter() if counts is None else counts
    for line, row in iter_json_lines(path):
        if admit(validate(row, kind, (path, line)), kind, counts):
            yield line, row


def iter_json_lines(path) -> Iterator[tuple[int, dict]]:
    """(line number, object) of each line that is not blank; no schema yet. Raises InputError."""
    found = False
    try:
        with open(path, "rb") as handle:
            for line, raw in enumerate(handle, start=1):
                text = decode_utf8(raw, (path, line)).strip()
                if text:
                    found = True
                    yield line, parse_object(text, (path, line))
    except OSError as error:
        raise unreadable(path, error) from None
    if not found:
        raise no_rows(path)


def write_records(path, rows: Iterable[dict]) -> int:
    """Write rows as compact JSON lines in the order given, whole or not at all; returns how many."""
    count = 0
    with atomic_write(path) as handle:
        for row in rows:
            handle.write(json.dumps(row, ensure_ascii=False, allow_nan=False, separators=(",", ":")) + "\n")
            count += 1
    return count


def admit(row: dict, kind: str, counts: Counter) -> bool:
    """Whether a validated row is used; counts why not, and what accepted rows lack (DATA-6, PREF-1)."""
    if kind in ("demonstration", "preference"):
        if not all((row.get("checks") or {}).values()):
            counts["excluded: a reviewer check is false"] += 1
            return False
        counts["without checks"] += row.get("checks") is None
    if kind == "preference":
        if (row.get("chosen_safe"), row.get("rejected_safe")) == (False, True):
            counts["excluded: chosen unsafe, rejected safe"] += 1
            return False
        if row.get("gen_a") is not None and row.get("gen_a") == row.get("gen_b"):
            counts["excluded: gen_a equals gen_b"] += 1
            return False
        counts["without rating"] += row.get("rating") is None
        counts["without safety_bin"] += row.get("safety_bin") is None
        counts["without gen_a or gen_b"] += row.get("gen_a") is None or row.get("gen_b") is None
        counts["empty answers"] += (row["chosen"] == "") + (row["rejected"] == "")
    if kind == "group":
        counts["empty answers"] += sum(text == "" for text in row["responses"])
    counts["rows"] += 1
    return True


def normalise_prompt(prompt) -> str:
    """A prompt's text, lower-cased, white space collapsed; one user message equals the plain string."""
    if not isinstance(prompt, str):
        if len(prompt) == 1:
            return normalise_prompt(prompt[0]["content"])
        return "\n".join(f"{m['role']}: {normalise_prompt(m['content'])}" for m in prompt)
    return " ".join(prompt.lower().split())


def check_disjoint(train_rows: Iterable[dict], heldout_rows: Iterable[dict]) -> None:
    """DATA-3: raise InputError, naming both rows, when a training prompt is also held out."""
    heldout = {normalise_prompt(row["prompt"]): _name(row, i) for i, row in enumerate(heldout_rows)}
    for index, row in enumerate(train_rows):
        other = heldout.get(normalise_prompt(row["prompt"]))
        if other is not None:
            raise InputError(
                f"the prompt of training row {_name(row, index)} is also that of held-out row {other}; "
                "take it out of one of the two (DATA-3)"
            )


def _name(row: dict, index: int) -> str:
    return json.dumps(row["id"]) if row.get("id") is not None else f"number {index + 1}"


# ---- parsing ----


def decode_utf8(raw: bytes, where: tuple) -> str:
    """Text of a line or file, without a byte order mark. Raises InputError where it is not UTF-8."""
    try:
        return raw.decode("utf-8-sig" if where[1] in (1, None) else "utf-8")
    except UnicodeDecodeError as error:
        raise bad_row(where, f"not UTF-8: byte 0x{raw[error.start]:02x} at byte {error.start + 1}") from None


def parse_json(text: str, where: tuple):
    """A JSON value without NaN, infinities or lone surrogates, which could not be written back."""
    try:
        value = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite)
        if "\\ud" in text.lower():
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except json.JSONDecodeError as error:
        place = f"line {error.lineno} " if where[1] is None else ""
        raise bad_row(where, f"not JSON: {error.msg} at {place}column {error.colno}") from None
    except UnicodeEncodeError:
        raise bad_row(where, "a \\ud800..\\udfff escape without its partner is not text") from None
    except RecursionError:
        raise bad_row(where, "not a record: nested too deeply") from None
    except ValueError as error:
        raise bad_row(where, f"not JSON: {error}") from None


def parse_object(text: str, where: tuple) -> dict:
    """One JSON object. Raises InputError for anything else."""
    value = parse_json(text, where)
    if not isinstance(value, dict):
        raise bad_row(where, f"expected a JSON object {{...}}, got {type_name(value)}")
    return value


def unreadable(path, error: OSError) -> InputError:
    """The one-line message for a file that cannot be read."""
    if isinstance(error, FileNotFoundError):
        return file_error(path, "no such file")
    return file_error(path, f"cannot be read: {error.strerror or error}")


def no_rows(path) -> InputError:
    """The one-line message for a file without rows."""
    return file_error(path, "the file has no rows; expected one JSON object a line")


def _refuse_constant(name: str):
    raise ValueError(f"{name} is not a number JSON allows")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is too large for a number")
    return value
