"""pytest plugin of the mutation run: the kernels come from the library HPSAFETY_MUTANT names, and what happened goes
to the file HPSAFETY_MUTANT_REPORT names, step by step, so that a crash too leaves the name of its test."""

import json
import os
from pathlib import Path

import pytest

from hpsafety.ops import backends

LIBRARY = Path(os.environ["HPSAFETY_MUTANT"])
REPORT = Path(os.environ["HPSAFETY_MUTANT_REPORT"])
_seen = {"test": None, "error": None, "library": None}


def _note(**what) -> None:
    _seen.update(what)
    REPORT.write_text(json.dumps(_seen), encoding="utf-8")


def pytest_configure(config) -> None:
    backends._library_path = lambda: LIBRARY


def pytest_runtest_logstart(nodeid) -> None:
    _note(test=nodeid)


@pytest.hookimpl
def pytest_exception_interact(node, call) -> None:
    _note(test=node.nodeid, error=call.excinfo.typename)


def pytest_sessionfinish() -> None:
    _note(library=backends.cpu_status()[1])  # proves which kernels were tested
