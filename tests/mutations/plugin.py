"""pytest plugin of the mutation run: the kernels come from the library, or the folder of Triton or CUDA files, that
HPSAFETY_MUTANT names, and what happened goes to the file HPSAFETY_MUTANT_REPORT names, step by step, so that a crash
too leaves the name of its test."""

import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest

from hpsafety.cuda_kernels import library
from hpsafety.ops import backends

LIBRARY = Path(os.environ["HPSAFETY_MUTANT"])
REPORT = Path(os.environ["HPSAFETY_MUTANT_REPORT"])
EMULATED = LIBRARY / "emulated.so"  # in a folder of CUDA files
_seen = {"test": None, "error": None, "library": None}


def _note(**what) -> None:
    _seen.update(what)
    REPORT.write_text(json.dumps(_seen), encoding="utf-8")


def pytest_configure(config) -> None:
    if not LIBRARY.is_dir():
        backends._library_path = lambda: LIBRARY
        return
    if EMULATED.exists():
        os.environ |= {"HPSAFETY_CUDA_LIBRARY": str(EMULATED), "HPSAFETY_CUDA_SOURCES": str(LIBRARY)}
        return
    spec = importlib.util.spec_from_file_location(
        "hpsafety.triton_kernels", LIBRARY / "__init__.py", submodule_search_locations=[str(LIBRARY)]
    )
    sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[spec.name])


def pytest_runtest_logstart(nodeid) -> None:
    _note(test=nodeid)


@pytest.hookimpl
def pytest_exception_interact(node, call) -> None:
    _note(test=node.nodeid, error=call.excinfo.typename)


def pytest_sessionfinish() -> None:
    """Notes which kernels were tested: the library that was loaded, or the folder the Triton modules came from."""
    if not LIBRARY.is_dir():
        _note(library=backends.cpu_status()[1])
        return
    if EMULATED.exists():
        opened = library._open.cache_info().currsize == 1 and library.path() == EMULATED
        _note(library=LIBRARY.name if opened else "nowhere")
        return
    launch = sys.modules.get("hpsafety.triton_kernels.launch")
    _note(library=Path(launch.__file__).parent.name if launch else "nowhere")
