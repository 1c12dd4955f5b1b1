"""The list of mutants: one TOML file per op beside this module, each mutant one small bug in csrc/cpu.

    op = "rope"
    sources = ["rope.cpp"]               # of csrc/cpu: enough kernels to run the tests below
    tests = ["tests/ops/test_rope.py"]   # must fail on every mutant, and pass without one

    [[mutants]]
    name = "forward-again"
    kind = "wrong sign"                  # the class of bug, in words
    file = "rope.cpp"                    # of csrc/cpu; headers too
    find = "..."                         # source text that occurs exactly once in the file
    replace = "..."
    equivalent = "why"                   # only for a mutant that changes no behaviour: listed, not run
"""

import tomllib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
KERNELS = ROOT / "csrc" / "cpu"
FOLDER = Path(__file__).resolve().parent


@dataclass(frozen=True, kw_only=True, slots=True)
class Mutant:
    op: str
    sources: tuple[str, ...]
    tests: tuple[str, ...]
    name: str
    kind: str
    file: str
    find: str
    replace: str
    equivalent: str = ""

    @property
    def id(self) -> str:
        return f"{self.op}/{self.name}"

    def apply(self, text: str) -> str:
        """The mutated source; ValueError where `find` is not there exactly once: the source has moved on."""
        count = text.count(self.find)
        if count != 1:
            raise ValueError(f"{self.id} is stale: its text occurs {count} times in {self.file}: {self.find!r}")
        return text.replace(self.find, self.replace)


def control(mutant: Mutant) -> Mutant:
    """The same build and the same tests, with nothing changed."""
    return Mutant(
        op=mutant.op, sources=mutant.sources, tests=mutant.tests,
        name="control", kind="nothing changed", file="", find="", replace="",
    )  # fmt: skip


def load(folder: Path = FOLDER) -> list[Mutant]:
    """All mutants, op by op; ValueError for a file that is not in the form above."""
    mutants = []
    for path in sorted(folder.glob("*.toml")):
        suite = tomllib.loads(path.read_text(encoding="utf-8"))
        try:
            shared = {"op": suite["op"], "sources": tuple(suite["sources"]), "tests": tuple(suite["tests"])}
            mutants += [Mutant(**shared, **one) for one in suite["mutants"]]
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path.name}: {error}") from error
    ids = [m.id for m in mutants]
    twice = sorted({i for i in ids if ids.count(i) > 1})
    if twice:
        raise ValueError(f"two mutants of one name: {', '.join(twice)}")
    return mutants
