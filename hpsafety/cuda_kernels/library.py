"""The library of CUDA kernels: opened at the first call, and the one way in which its launchers are called.

Nothing here asks for a GPU. HPSAFETY_CUDA_LIBRARY names another library: the tests' one, whose kernels run on the CPU.
"""

import contextlib
import ctypes
import dataclasses
import functools
import os
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensor

ABI = 1  # of csrc/cuda/library.cu
ARCHITECTURES = {8: "sm_80", 9: "sm_90a"}  # by major compute capability: code for sm_80 serves all of 8.x
C_TYPES = {
    "p": ctypes.c_void_p,
    "i": ctypes.c_int,
    "l": ctypes.c_int64,
    "f": ctypes.c_float,
    "d": ctypes.c_double,
}
REBUILD = "run make again where nvcc is (HPSAFETY_NVCC names it), or pip install hpsafety again"


class LaunchError(RuntimeError):
    """A launcher or the CUDA runtime refused a launch."""


@dataclasses.dataclass(frozen=True, slots=True)
class Call:
    """One call of a launcher, stream apart."""

    name: str
    signature: str
    arguments: tuple


_recordings: list[list[Call]] = []


@contextlib.contextmanager
def record():
    """Collects the calls within, before each is made. Those with fake or meta tensors are not made."""
    calls: list[Call] = []
    _recordings.append(calls)
    try:
        yield calls
    finally:
        _recordings.remove(calls)


def path() -> Path:
    return _path(os.environ.get("HPSAFETY_CUDA_LIBRARY"))


@functools.cache
def _path(named: str | None) -> Path:
    return Path(named) if named else Path(__file__).parent.parent / "libhpsafety_cuda.so"


@functools.cache
def _open(file: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(file))
    library.hps_error.restype = ctypes.c_char_p
    return library


@functools.cache
def _missing(file: Path) -> str | None:
    if not file.exists():
        return f"the CUDA kernels are not built here; {REBUILD}"
    try:
        built = _open(file).hps_abi()
    except (OSError, AttributeError) as error:
        return f"the CUDA kernels cannot be opened ({str(error).splitlines()[0]}); {REBUILD}"
    return None if built == ABI else f"the CUDA kernels were built for ABI {built}, not {ABI}; {REBUILD}"


def emulated() -> bool:
    """Whether the library's kernels run on the CPU."""
    return _missing(path()) is None and hasattr(_open(path()), "simt_emulated")


@functools.cache
def _device_refuses(file: Path, device: int) -> str | None:
    gpu = torch.cuda.get_device_properties(device)
    if gpu.major not in ARCHITECTURES:
        return (
            f"{gpu.name} has compute capability {gpu.major}.{gpu.minor}; the CUDA kernels are built for "
            f"{' and '.join(ARCHITECTURES.values())}"
        )
    runtime, driver = ctypes.c_int(), ctypes.c_int()
    code = _open(file).hps_versions(ctypes.byref(runtime), ctypes.byref(driver))
    if code:
        return f"the CUDA kernels' runtime does not start: {_open(file).hps_error(code).decode()}"
    if driver.value // 1000 < runtime.value // 1000:
        need, have = (f"{v.value // 1000}.{v.value % 1000 // 10}" for v in (runtime, driver))
        return (
            f"the CUDA kernels were built with CUDA {need}, this driver serves up to {have}: update the driver, or "
            "build with an older nvcc"
        )
    return None


def unavailable(device: str) -> str | None:
    """Why the CUDA kernels cannot serve tensors of a device ("cpu", "cuda", ...); None when they can."""
    missing = _missing(path())
    if missing is not None:
        return missing
    if device != ("cpu" if emulated() else "cuda"):
        return f"the cuda backend needs CUDA tensors, got device {device}"
    if device == "cuda" and torch.cuda.is_available():  # without a GPU: tracing with fake tensors
        return _device_refuses(path(), torch.cuda.current_device())
    return None


@functools.cache
def launcher(file: Path, name: str, signature: str):
    """A launcher of a library, which takes the signature's arguments and a stream, and returns 0 or an error."""
    function = getattr(_open(file), name)
    function.argtypes = [*(C_TYPES[letter] for letter in signature.replace(" ", "")), ctypes.c_void_p]
    function.restype = ctypes.c_int
    return function


def launch(name: str, signature: str, *arguments) -> None:
    """Calls the launcher `name` with the arguments and the current stream of the tensors' device.

    signature  a letter of C_TYPES for each, with spaces at will: "p" takes a tensor or None, and hands on its address
    LaunchError when the launcher refuses or the launch fails. A fake or meta tensor's launch is recorded, not made.
    """
    for calls in _recordings:
        calls.append(Call(name, signature, arguments))
    first = next(x for x in arguments if isinstance(x, torch.Tensor))
    if isinstance(first, FakeTensor) or first.device.type == "meta":
        return
    raw = [x.data_ptr() if isinstance(x, torch.Tensor) else x for x in arguments]
    on_gpu = first.device.type == "cuda"
    with torch.cuda.device(first.device) if on_gpu else contextlib.nullcontext():
        stream = torch.cuda.current_stream().cuda_stream if on_gpu else None
        code = launcher(path(), name, signature)(*raw, stream)
    if code:
        raise LaunchError(f"{name}: {_open(path()).hps_error(code).decode()} (CUDA error {code})")
