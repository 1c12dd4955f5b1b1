"""The demo's template files and the filling of their slots."""

import re
import tomllib
from pathlib import Path

HERE = Path(__file__).parent
_SLOT = re.compile(r"\{(\w+)\}")


def read_toml(name: str) -> dict:
    """The tables of templates/NAME.toml."""
    with open(HERE / "templates" / f"{name}.toml", "rb") as handle:
        return tomllib.load(handle)


def fill(skeleton: str, slots: dict[str, str]) -> str:
    """The skeleton with each {name} replaced. Raises KeyError for a slot that has no text."""
    return _SLOT.sub(lambda match: slots[match[1]], skeleton)
