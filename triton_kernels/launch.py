"""The one place that launches a Triton kernel, and so the one that can record what is launched.

A recording is what the checks without a GPU are made of: the launches of a call with fake CUDA tensors are compared
with the interpreter's, and compiled for each chip with the very types, constants and options they have.
"""

import contextlib
import dataclasses

import torch
import triton
from torch._subclasses.fake_tensor import FakeTensor

from hpsafety.triton_kernels import interpreter

INTERPRETED = bool(triton.knobs.runtime.interpret)  # triton.jit looks at the same variable when it decorates
if INTERPRETED:
    interpreter.repair()
DEFAULT_CAPABILITY = (8, 0)
MAX_GRID = 2**31 - 1

_recordings: list["Recording"] = []


@dataclasses.dataclass(frozen=True, slots=True)
class Tensor:
    """What a kernel sees of a tensor. `aligned`: its address is divisible by 16 bytes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    aligned: bool


@dataclasses.dataclass(frozen=True, slots=True)
class Launch:
    """One launch: `arguments` by name in the kernel's order (Tensor, int, float, bool or None), constexprs apart."""

    kernel: object
    programs: int
    arguments: dict
    constants: dict
    num_warps: int
    num_stages: int
    fp_fusion: bool


@dataclasses.dataclass(slots=True)
class Recording:
    launches: list[Launch]
    capability: tuple[int, int] | None


@contextlib.contextmanager
def record(capability: tuple[int, int] | None = None):
    """Collects the launches within. Fake and meta tensors' kernels are not run; `capability`: the chip they are for."""
    recording = Recording([], capability)
    _recordings.append(recording)
    try:
        yield recording.launches
    finally:
        _recordings.remove(recording)


def capability(device: torch.device) -> tuple[int, int]:
    """The compute capability that configurations are chosen for."""
    for recording in reversed(_recordings):
        if recording.capability is not None:
            return recording.capability
    if device.type == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_capability(device)
    return DEFAULT_CAPABILITY


def without_values(x: torch.Tensor) -> bool:
    """A fake or meta tensor: kernels over it are recorded and not run, and there are no addresses."""
    return isinstance(x, FakeTensor) or x.device.type == "meta"


def _describe(value):
    if not isinstance(value, torch.Tensor):
        return value
    offset = value.storage_offset() * value.element_size()
    aligned = offset % 16 == 0 if without_values(value) else value.data_ptr() % 16 == 0
    return Tensor(value.dtype, tuple(value.shape), tuple(value.stride()), aligned)


def launch(kernel, programs: int, *arguments, num_warps=4, num_stages=1, fp_fusion=True, **constants) -> None:
    """Runs `kernel` as a one-dimensional grid of `programs`; none is valid and does nothing.

    arguments   in the kernel's order, without the constexprs; at least one is a tensor
    constants   the constexprs, by name
    fp_fusion   False keeps multiplications and additions apart, where bits are promised
    """
    if programs == 0:
        return
    if programs > MAX_GRID:
        raise ValueError(f"{kernel.__name__}: {programs} programs are more than a grid holds, {MAX_GRID}")
    tensors = [x for x in arguments if isinstance(x, torch.Tensor)]
    if _recordings:
        names = [name for name in kernel.arg_names if name not in constants]
        named = {name: _describe(x) for name, x in zip(names, arguments, strict=True)}
        one = Launch(kernel, programs, named, dict(constants), num_warps, num_stages, fp_fusion)
        for recording in _recordings:
            recording.launches.append(one)
    if without_values(tensors[0]):
        return
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": fp_fusion}
    device = tensors[0].device
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[(programs,)](*arguments, **constants, **options)
