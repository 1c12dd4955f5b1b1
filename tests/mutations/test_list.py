"""The list of mutants itself: in form, in step with the sources, and with the table; running them takes minutes."""

import dataclasses
import importlib

import pytest

from tests.mutations.mutants import CUDA, FOLDER, KERNELS, ROOT, TRITON, control, load
from tests.mutations.run import GOOD, choose, judge, write_table

MUTANTS = load()


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.id)
def test_a_mutant_fits_the_sources(mutant):
    """Its text occurs exactly once and changes; a source that has moved on makes it stale."""
    ((name, text),) = mutant.apply().items()
    folder = TRITON if mutant.is_triton else CUDA if mutant.is_cuda else KERNELS
    assert text != (folder / name).read_text(encoding="utf-8")
    assert all((ROOT / name).exists() for name in mutant.tests)


def test_every_op_has_three_mutants():
    tools = {"__init__.py", "launch.py", "interpreter.py"}
    by_source = {p.name: 0 for p in [*KERNELS.glob("*.cpp"), *TRITON.glob("*.py")] if p.name not in tools}
    for mutant in MUTANTS:
        if not mutant.equivalent:
            for name in mutant.sources:
                by_source[name] = by_source.get(name, 0) + 1
    assert all(count >= 3 for count in by_source.values()), by_source


def test_the_table_names_every_mutant():
    lines = (FOLDER / "README.md").read_text(encoding="utf-8").splitlines()
    rows = {tuple(cell.strip() for cell in line.split("|")[1:3]) for line in lines if line.startswith("| ")}
    missing = {(m.op, m.name) for m in MUTANTS} - rows
    assert not missing, f"run make test-mutations ARGS='--only ... --write': {sorted(missing)}"


def test_a_stale_mutant_is_an_error():
    mutant = MUTANTS[0]
    with pytest.raises(ValueError, match="is stale: its text occurs 0 times"):
        dataclasses.replace(mutant, find="no such text").apply()
    with pytest.raises(ValueError, match="is stale: its text occurs [1-9][0-9]* times"):
        dataclasses.replace(mutant, find="const ").apply()
    assert control(mutant).sources == mutant.sources and not control(mutant).apply()


def test_a_bad_list_is_an_error(tmp_path):
    (tmp_path / "x.toml").write_text('op = "x"\nsources = []\n')
    with pytest.raises(ValueError, match="x.toml: 'tests'"):
        load(tmp_path)


@pytest.mark.parametrize(
    "code, seen, status",
    [
        (None, {"test": "a.py::t"}, "hung"),
        (-11, {"test": "a.py::t"}, "crashed"),
        (97, {"test": "a.py::t"}, "crashed"),  # the emulation of CUDA says so
        (0, {"library": "x.so"}, "survived"),
        (0, {"library": "_cpu_avx512.so"}, "error"),  # the tests ran on other kernels
        (1, {"library": "x.so", "test": "a.py::t", "error": "AssertionError"}, "killed"),
        (1, {"library": "x.so"}, "error"),
        (4, {}, "error"),  # no such test file
    ],
)
def test_what_counts_as_killed(code, seen, status):
    assert judge(code, seen, KERNELS / "x.so", "")["status"] == status
    assert (status in GOOD) == (status in {"hung", "crashed", "killed"})


def test_five_fifths_are_the_whole():
    parts = [choose(MUTANTS, [""], n) for n in range(5)]
    assert sorted(m.id for part in parts for m in part) == sorted(m.id for m in MUTANTS)
    assert choose(MUTANTS, [""], 7) == parts[2]


def test_the_table_is_written_from_results(tmp_path, monkeypatch):
    run = importlib.import_module("tests.mutations.run")
    mutant = dataclasses.replace(MUTANTS[0], equivalent="")
    monkeypatch.setattr(run, "FOLDER", tmp_path)
    monkeypatch.setattr(run, "load", lambda: [mutant])
    row = {"op": mutant.op, "name": mutant.name, "status": "crashed", "test": "a.py::t", "by": "SIGSEGV"}
    for rows, text in (([], "not run"), ([row], "crashed by `a.py::t` (SIGSEGV)")):
        write_table(rows)
        assert text in (tmp_path / "README.md").read_text()
