"""The CUDA backend of these tests: on a GPU the library that nvcc built, else the emulated one."""

import os
from pathlib import Path

import pytest
import torch

from hpsafety.cuda_kernels import library
from tests.cuda import emulation
from tests.device import DEVICE, place
from tests.ops.oracle import check_against_oracle

__all__ = ["DEVICE", "check_cuda", "place"]


def check_cuda(op_name: str, op, args: dict, factor: float = 2.0, **kwargs) -> dict:
    """check_against_oracle with impl="cuda", on DEVICE."""
    return check_against_oracle(op_name, op, args, factor, impl="cuda", device=DEVICE, **kwargs)


@pytest.fixture(scope="session")
def cuda_library() -> Path:
    """The library's path. Several test processes may build it at once: each file is put in place whole."""
    named = os.environ.get("HPSAFETY_CUDA_LIBRARY")
    if named:
        return Path(named)
    if torch.cuda.is_available():
        if library.unavailable("cuda"):
            pytest.skip(library.unavailable("cuda"))
        return library.path()
    if emulation.compiler() is None:
        pytest.skip("no C++ compiler to build the emulated kernels with: apt install g++")
    return emulation.make_library()


@pytest.fixture(autouse=True)
def cuda_backend(cuda_library, monkeypatch):
    monkeypatch.setenv("HPSAFETY_CUDA_LIBRARY", str(cuda_library))


def pytest_collection_modifyitems(items) -> None:
    """Sanitizers take most of the time: `make test` leaves them to `make test-cuda`, which the ladder runs too."""
    for item in items:
        if "tests/cuda" in item.path.as_posix() and "replay" in item.name:
            item.add_marker(pytest.mark.replay)
