"""Which backend serves a call: resolves `impl` and HPSAFETY_IMPL to a name, and loads the C++ kernels once.

Nothing is probed at import. A forced backend that is missing raises BackendUnavailable with the remedy.
"""

import functools
import importlib
import importlib.metadata
import importlib.util
import itertools
import logging
import os
import sysconfig
from pathlib import Path

import torch

IMPLS = ("reference", "cpu", "triton", "cuda", "flash_attn", "apex")
# (op, impl) -> the module of hpsafety.ops that wraps an optional package and knows why it cannot serve
OPTIONAL = {
    ("adamw_", "apex"): "apex_backend",
    ("attention", "flash_attn"): "flash_attn_backend",
    ("rms_norm", "apex"): "apex_backend",
}
log = logging.getLogger("hpsafety")


def _strict_blas() -> None:
    """On Intel's CPUs MKL rounds by the number of threads and of rows, unless told before its first product not to.

    It costs nothing there (Xeon with AMX: 340 to 370 GFLOP/s on two cores with and without), and others do not need it
    (on AMD's, MKL takes other kernels). MKL_CBWR, where it is set, stands.
    """
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as lines:
            intel = any("GenuineIntel" in line for line in itertools.islice(lines, 5))
    except OSError:
        return
    if intel:
        os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")


_strict_blas()


class BackendUnavailable(RuntimeError):
    """A backend was forced that this installation, device or op does not have."""


def _library_path() -> Path | None:
    capability = torch.backends.cpu.get_cpu_capability()  # honours ATEN_CPU_CAPABILITY
    names = {"AVX512": ("avx512", "avx2"), "AVX2": ("avx2",)}.get(capability, ("default",))
    folder = Path(__file__).parent.parent
    for name in names:
        for path in sorted(folder.glob(f"_cpu_{name}*{sysconfig.get_config_var('EXT_SUFFIX')}")):
            return path
    return None


@functools.cache
def cpu_status() -> tuple[bool, str]:
    """(loaded, what was loaded or why not and the remedy)."""
    path = _library_path()
    if path is None or importlib.util.find_spec("hpsafety._C") is None:
        capability = torch.backends.cpu.get_cpu_capability()
        return False, (
            f"the C++ kernels are not built for this CPU ({capability}): install a C++17 compiler "
            "('apt install g++', 'dnf install gcc-c++', 'xcode-select --install') and run make again"
        )
    try:
        import hpsafety._C  # noqa: F401  the schemas must stand before the kernels register

        torch.ops.load_library(str(path))
    except (ImportError, OSError) as error:
        reason = str(error).splitlines()[0]
        return (
            False,
            f"the C++ kernels were built for another torch or system ({reason}): run 'make clean' and make",
        )
    return True, path.name


@functools.cache
def cpu():
    """The namespace of the C++ kernels (torch.ops.hpsafety_cpu), loaded at the first call."""
    loaded, reason = cpu_status()
    if not loaded:
        raise BackendUnavailable(reason)
    return torch.ops.hpsafety_cpu


# 3.9 is what the tests install; 3.7 is what the CUDA build of torch 2.13 brings: every kernel has been compiled with it
# for both chips, and interpreted.
TRITON_TESTED = ("3.7", "3.9")
MIN_CAPABILITY = (8, 0)


@functools.cache
def triton(op: str):
    """The Triton kernels of one op: the module hpsafety.triton_kernels.<op>, imported at the first call."""
    return importlib.import_module(f"hpsafety.triton_kernels.{op}")


@functools.cache
def _triton_missing() -> str | None:
    """Why no Triton kernel can run in this installation; None when some can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install 'hpsafety[triton]', or the triton that your CUDA torch asks for"
    version = importlib.metadata.version("triton")
    if version.rpartition(".")[0] not in TRITON_TESTED and os.environ.get("HPSAFETY_TRITON_UNTESTED") != "1":
        return (
            f"triton {version} is not among the tested versions ({', '.join(TRITON_TESTED)}); "
            "HPSAFETY_TRITON_UNTESTED=1 takes it all the same"
        )
    if importlib.util.find_spec("hpsafety.triton_kernels") is None:
        return "hpsafety.triton_kernels is not installed: run make, or pip install hpsafety again"
    return None


@functools.cache
def _gpu_refuses(op: str) -> str | None:
    """Why the GPU of this process cannot run the op's Triton kernels; None when it can, or when there is no GPU."""
    if not torch.cuda.is_available():
        return None  # tracing with fake tensors
    gpu = torch.cuda.get_device_properties(torch.cuda.current_device())
    if (gpu.major, gpu.minor) < MIN_CAPABILITY:
        wanted = ".".join(map(str, MIN_CAPABILITY))
        return f"{gpu.name} has compute capability {gpu.major}.{gpu.minor}; the Triton kernels need {wanted}"
    needed = triton(op.rstrip("_")).SHARED_BYTES[gpu.major >= 9]
    if needed > gpu.shared_memory_per_block_optin:
        return f"{gpu.name} has {gpu.shared_memory_per_block_optin} bytes of shared memory a block, it needs {needed}"
    return None


def triton_unavailable(op: str, device: str) -> str | None:
    """Why the Triton kernels cannot serve the op on a device ("cpu", "cuda", ...); None when they can."""
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return (
            "the triton backend needs CUDA tensors, got device cpu; TRITON_INTERPRET=1 interprets it (slow)"
        )
    if device not in ("cpu", "cuda"):
        return f"the triton backend needs CUDA tensors, got device {device}"
    return _triton_missing() or (_gpu_refuses(op) if device == "cuda" else None)


@functools.cache
def cuda(op: str):
    """The CUDA kernels of one op: the module hpsafety.cuda_kernels.<op>, imported at the first call."""
    return importlib.import_module(f"hpsafety.cuda_kernels.{op}")


def cuda_unavailable(op: str, device: str, dtype: torch.dtype | None, head_dim: int | None) -> str | None:
    """Why the CUDA kernels cannot serve the op; None when they can. What is not known is not asked for."""
    reason = cuda("library").unavailable(device)
    if reason is None and (dtype, head_dim) != (None, None):
        refuses = getattr(cuda(op.rstrip("_")), "refuses", None)
        reason = refuses and refuses(dtype, head_dim)
    return reason


# (op, major compute capability) where the CUDA kernels come before Triton's: by the model of time over both's machine
# code (bench/static/predict.py), which tests/cuda/test_static.py holds this to, until bench/gpu_check.sh has measured.
CUDA_FIRST = frozenset({("attention", 8), ("sample", 8), ("sample", 9)})


def in_order(op: str, backends: tuple[str, ...], major: int | None) -> tuple[str, ...]:
    """An op's backends as they are asked on a GPU of this major compute capability (None: not known)."""
    if (op, major) not in CUDA_FIRST:
        return backends
    rest = [name for name in backends if name != "cuda"]
    rest.insert(rest.index("triton"), "cuda")
    return tuple(rest)


def _major(device: str) -> int | None:
    if device != "cuda" or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_properties(torch.cuda.current_device()).major


@functools.cache
def _say_once(line: str) -> None:
    log.info(line)


def unavailable(
    op: str,
    impl: str,
    backends: tuple[str, ...],
    device: str,
    dtype: torch.dtype | None = None,
    head_dim: int | None = None,
) -> str | None:
    """Why `impl` cannot serve `op` on `device` (in `dtype` and `head_dim`, where known); None when it can."""
    if impl not in IMPLS:
        return f"{op}: unknown impl {impl!r}; choose one of {', '.join(IMPLS)}"
    if impl == "reference":
        return None
    if impl not in backends:
        return f"{op} has no {impl} backend; it has: {', '.join(('reference', *backends))}"
    if impl == "cpu":
        if device != "cpu":
            return f"{op}: the cpu backend needs CPU tensors, got device {device}; move them with .cpu()"
        return None if cpu_status()[0] else f"{op}: {cpu_status()[1]}"
    if impl == "triton":
        reason = triton_unavailable(op, device)
        return reason and f"{op}: {reason}"
    if impl == "cuda":
        reason = cuda_unavailable(op, device, dtype, head_dim)
        return reason and f"{op}: {reason}"
    if (op, impl) in OPTIONAL:
        reason = importlib.import_module(f"hpsafety.ops.{OPTIONAL[op, impl]}").unavailable(op, device, dtype)
        return reason and f"{op}: {reason}"
    return None


def resolve(
    op: str,
    impl: str | None,
    backends: tuple[str, ...],
    device: str,
    dtype: torch.dtype | None = None,
    head_dim: int | None = None,
) -> str:
    """The backend's name for one call.

    impl      what the caller asked for; None reads HPSAFETY_IMPL, and after that picks by device and what is built
    backends  what the op has beside its reference, the preferred one first. Optional packages stand last: they serve
              unasked only where nothing of our own is there and the reference would have to
    dtype, head_dim   of the call, where a backend may depend on them
    Raises ValueError for an unknown name, BackendUnavailable for a forced backend that cannot serve.
    """
    impl = impl or os.environ.get("HPSAFETY_IMPL") or None
    if impl is not None:
        reason = unavailable(op, impl, backends, device, dtype, head_dim)
        if reason is not None:
            raise ValueError(reason) if impl not in IMPLS else BackendUnavailable(reason)
        return impl
    for name in in_order(op, backends, _major(device)):
        reason = unavailable(op, name, backends, device, dtype, head_dim)
        if reason is None:
            return name
        if device == "cuda" and name != "cpu":
            _say_once(reason)
    _say_once(f"{op}: served by the reference on {device} (slow)")
    return "reference"


# torch.compile takes the answer as a constant of the graph. This is what torch.compiler.assume_constant_result sets;
# calling that would import torch._dynamo, 1.5 s, in every process.
resolve._dynamo_marked_constant = True
