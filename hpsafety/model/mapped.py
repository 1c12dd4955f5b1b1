"""Frozen models that lie in a file and are in memory only while they are used.

The file holds the parameters under our names, in the fused layout and the dtype of the computation, so that to use a
model is to map its file: nothing is converted, processes of one machine share the pages, and the system may take them
back. A parked model keeps its module; its parameters are on the meta device outside of `present`.
"""

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import nn

from hpsafety.files import fsync_dir
from hpsafety.model.llama import Trunk
from hpsafety.model.safetensors_io import CODES, write_file


def empty(model: Trunk) -> Trunk:
    """The model itself without its weights: names, shapes and dtypes stay."""
    return model.to_empty(device="meta")


def write(model: Trunk, path: Path) -> None:
    """The model's parameters as one safetensors file, whole or not at all. OSError passes through."""
    temporary = path.with_name(f".{path.name}.tmp")
    parts = {name: p.detach() for name, p in model.named_parameters()}
    try:
        write_file(temporary, {n: (tuple(p.shape), p.dtype, lambda p=p: p) for n, p in parts.items()})
        os.replace(temporary, path)
        fsync_dir(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def holds(path: Path, model: Trunk) -> bool:
    """Whether the file is whole and has the model's names, shapes and dtypes (its size is checked, not its bytes)."""
    expected = {n: (list(p.shape), CODES[p.dtype]) for n, p in model.named_parameters()}
    try:
        with safe_open(path, "pt") as file:
            parts = {name: file.get_slice(name) for name in file.offset_keys()}
            return expected == {n: (part.get_shape(), part.get_dtype()) for n, part in parts.items()}
    except (SafetensorError, OSError):
        return False


def give_back() -> None:
    """Returns freed memory to the system, which glibc would keep: files that are mapped cannot use it."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


@contextlib.contextmanager
def present(model: Trunk, device) -> Iterator[Trunk]:
    """The model with its weights, within: mapped on a CPU, read onto another device. One that is not parked as it is.

    Nothing else may hold on to the parameters: their pages leave the process with the last reference.
    """
    if model.weights_file is None:
        yield model
        return
    give_back()
    with safe_open(model.weights_file, "pt", device=str(device)) as file:
        state = {n: nn.Parameter(file.get_tensor(n), requires_grad=False) for n in file.offset_keys()}
    try:
        model.load_state_dict(state, assign=True)
        model.requires_grad_(False)
        del state
        yield model
    finally:
        empty(model)
