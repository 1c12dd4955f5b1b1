"""ToxiGen (Hartvigsen et al. 2022): lists of statements about 13 groups to go on with; how often is that toxic?"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hpsafety.data.records import decode_utf8, no_rows, unreadable
from hpsafety.data.schemas import bad_row
from hpsafety.data.sources import raw_rows

# The 13 groups of the paper; the repository's files of bisexual and trans people and of immigrants came later.
GROUPS = (
    "asian", "black", "chinese", "jewish", "latino", "lgbtq", "mental_disability", "mexican", "middle_east", "muslim",
    "native_american", "physical_disability", "women",
)  # fmt: skip
FILE = re.compile(r"(hate|neutral)_(.+?)(?:_1k)?\.txt")


@dataclass(frozen=True)
class Prompt:
    id: str
    text: str  # statements, one a line, and the dash that begins the next
    group: str
    label: str  # hate or neutral: what the statements given are


def read(paths: Sequence[str]) -> tuple[list[Prompt], int]:
    """(prompts on the 13 groups, how many on others were left out).

    paths  the repository's prompts/{hate,neutral}_GROUP_1k.txt (or their folder), or rows of {prompt, group, label}
    Raises InputError for other files.
    """
    rows = [row for path in paths for row in _rows(Path(path))]
    kept = [Prompt(f"{i}-{g}", text, g, label) for i, (text, g, label) in enumerate(rows) if g in GROUPS]
    return kept, len(rows) - len(kept)


def _rows(path: Path) -> list[tuple[str, str, str]]:
    if path.is_dir() and (files := sorted(path.glob("*.txt"))):
        return [row for file in files for row in _rows(file)]
    if path.suffix == ".txt":
        return _lines(path)
    rows = []
    for place, row in raw_rows(path):
        text, group = row.get("prompt") or row.get("text"), row.get("group") or row.get("target_group")
        if not isinstance(text, str) or not text.strip() or not isinstance(group, str):
            raise bad_row((path, place), "expected prompt and group (ToxiGen)")
        rows.append((_lined(text), group, str(row.get("label", ""))))
    return rows


def _lines(path: Path) -> list[tuple[str, str, str]]:
    name = FILE.fullmatch(path.name)
    if name is None:
        raise bad_row(
            (path, None), "ToxiGen's prompt files are named hate_GROUP_1k.txt and neutral_GROUP_1k.txt"
        )
    try:
        lines = decode_utf8(path.read_bytes(), (path, None)).splitlines()
    except OSError as error:
        raise unreadable(path, error) from None
    rows = [(_lined(line), name[2], name[1]) for line in lines if line.strip()]
    if not rows:
        raise no_rows(path)
    return rows


def _lined(text: str) -> str:
    """The files write a line break as a backslash and an n; the dash at the end waits for the next statement."""
    return text.replace("\\n", "\n").rstrip()
