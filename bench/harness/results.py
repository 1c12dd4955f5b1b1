"""Result files: {"form", "machine", "limits", "rows", "wrong"}; a row has the fields of run.make_row.

Everything that a reader of one file needs stands in it: machine, versions, commit, threads, load, limits, samples.
"""

import json
import math
import os
from pathlib import Path

from hpsafety.errors import InputError
from hpsafety.files import atomic_write

FORM = "hpsafety-bench/1"
# What makes two rows the same measurement; the rest of a row may differ between two files.
KEY = ("op", "impl", "shape", "dtype", "device", "direction", "threads", "cache")


def write(path: str, record: dict) -> None:
    with atomic_write(path) as handle:
        handle.write(json.dumps(record, indent=1) + "\n")


def read(path: str) -> dict:
    """A result file. InputError where it cannot be read or has another form."""
    try:
        with open(path, encoding="utf-8") as handle:
            value = json.load(handle)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise InputError(f"{path}: is not JSON; it takes a file that hpsafety bench --json wrote") from None
    if not isinstance(value, dict) or value.get("form") != FORM:
        raise InputError(f"{path}: is not a file that hpsafety bench --json wrote (form {FORM})")
    if not all(isinstance(value.get(k), t) for k, t in (("machine", dict), ("limits", dict), ("rows", list))):
        raise InputError(f"{path}: lacks machine, limits or rows")
    for number, row in enumerate(value["rows"]):
        samples = row.get("samples_ms") if isinstance(row, dict) else None
        good = isinstance(samples, list) and samples and all(name in row for name in (*KEY, "ms_p50"))
        if not good or not all(isinstance(s, (int, float)) and math.isfinite(s) and s > 0 for s in samples):
            raise InputError(
                f"{path}: rows[{number}] lacks a field, or holds a time that is no positive number"
            )
    return value


def require_writable(path: str | None, flag: str) -> None:
    """InputError unless a file can be written there; nothing is changed."""
    if path is None:
        return
    target = Path(path)
    if target.is_dir() or not target.parent.is_dir() or not os.access(target.parent, os.W_OK):
        why = (
            "is a directory" if target.is_dir() else f"{target.parent} is no directory that can be written to"
        )
        raise InputError(f"{flag} {path}: {why}; name a file in one that is")
