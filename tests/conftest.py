"""Shared by all tests: few threads, and the path of the public data sets where they are."""

import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():  # Triton decides when a kernel is defined: the interpreter, or a GPU
    os.environ.setdefault("TRITON_INTERPRET", "1")

ROOT = Path(__file__).resolve().parent.parent
if "OMP_NUM_THREADS" not in os.environ:  # what make sets stands
    torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of public data sets beside the repository, which is no part of it."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"public data sets are not here: {folder}")
    return folder
