"""The list of mutants, each one small bug: one TOML file per op beside this module for csrc/cpu, in triton/ for
triton_kernels, in cuda/ for csrc/cuda.

op = "rope"
sources = ["rope.cpp"]               # csrc/cpu: enough kernels to run the tests below; elsewhere: those mutated
tests = ["tests/ops/test_rope.py"]   # must fail on every mutant, and pass without one

[[mutants]]
name = "forward-again"
kind = "wrong sign"                  # the class of bug, in words
find = "..."                         # text that occurs exactly once in the sources and the headers they include
replace = "..."
equivalent = "why"                   # only for a mutant that changes no behaviour: listed, not run
"""

import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
KERNELS = ROOT / "csrc" / "cpu"
TRITON = ROOT / "triton_kernels"
CUDA = ROOT / "csrc" / "cuda"
FOLDER = Path(__file__).resolve().parent
_INCLUDE = re.compile(r'^#include "([^"]+)"', re.MULTILINE)


def texts_of(*sources: str) -> dict[str, str]:
    """Sources of csrc/cpu or csrc/cuda with the headers there that they include, or of triton_kernels: name -> text."""
    if sources and sources[0].endswith(".py"):
        return {name: (TRITON / name).read_text(encoding="utf-8") for name in sources}
    folder = CUDA if sources and sources[0].endswith((".cu", ".cuh")) else KERNELS
    texts, waiting = {}, list(sources)
    while waiting:
        name = waiting.pop()
        if name not in texts and not name.startswith("../"):
            texts[name] = (folder / name).read_text(encoding="utf-8")
            waiting += _INCLUDE.findall(texts[name])
    return texts


@dataclass(frozen=True, kw_only=True, slots=True)
class Mutant:
    op: str
    sources: tuple[str, ...]
    tests: tuple[str, ...]
    name: str
    kind: str
    find: str
    replace: str
    equivalent: str = ""

    @property
    def is_triton(self) -> bool:
        return self.sources[0].endswith(".py")

    @property
    def is_cuda(self) -> bool:
        return self.sources[0].endswith((".cu", ".cuh"))

    @property
    def id(self) -> str:
        return f"{self.op}/{self.name}"

    def apply(self) -> dict[str, str]:
        """{file: its mutated text}; ValueError where `find` is not there exactly once: the sources have moved on."""
        if not self.find:
            return {}
        texts = texts_of(*self.sources)
        count = sum(text.count(self.find) for text in texts.values())
        if count != 1:
            raise ValueError(
                f"{self.id} is stale: its text occurs {count} times in {sorted(texts)}: {self.find!r}"
            )
        return {n: t.replace(self.find, self.replace) for n, t in texts.items() if self.find in t}


def control(mutant: Mutant) -> Mutant:
    """The same build and the same tests, with nothing changed."""
    return Mutant(
        op=mutant.op, sources=mutant.sources, tests=mutant.tests,
        name="control", kind="nothing changed", find="", replace="",
    )  # fmt: skip


def load(folder: Path = FOLDER) -> list[Mutant]:
    """All mutants, op by op; ValueError for a file that is not in the form above."""
    mutants = []
    for path in [*sorted(folder.glob("*.toml")), *sorted(folder.glob("*/*.toml"))]:
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
