"""The container of a GGUF file: metadata and tensors, bounds-checked.

gguf.GGUFReader takes 5 s for a vocabulary of 49,152 (a numpy view per token) and loops without end on a damaged array
length, so the header is read here; the quantised blocks are decoded by the gguf package.
Layout: github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3, little-endian).
"""

import math
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from hpsafety.errors import file_error

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MAX_DIMS = 4
_LENGTH = struct.Struct("<Q").unpack_from
_CHUNK_BYTES = 1 << 17  # decoded at a time: its temporaries stay in cache, and the Python loop is short


@dataclass(frozen=True)
class GGUFTensor:
    """Where a tensor lies in the file; `shape` in torch's order."""

    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    start: int  # bytes from the start of the file
    num_bytes: int


@dataclass(frozen=True)
class GGUFFile:
    """metadata: key -> number, bool, string or list; tensors: name -> GGUFTensor."""

    path: Path
    metadata: dict
    tensors: dict[str, GGUFTensor]

    def read(self, name: str) -> torch.Tensor:
        """A tensor decoded to fp32; BF16, F16 and all block formats that the gguf package decodes."""
        info = self.tensors[name]
        with open(self.path, "rb") as handle:
            handle.seek(info.start)
            data = np.fromfile(handle, np.uint8, info.num_bytes)
        values, block = GGML_QUANT_SIZES[info.kind]
        out = np.empty(math.prod(info.shape), np.float32)
        step = max(1, _CHUNK_BYTES // block)
        try:
            for start in range(0, info.num_bytes // block, step):
                part = data[start * block : (start + step) * block]
                out[start * values : (start + step) * values] = dequantize(part, info.kind)
        except NotImplementedError:
            raise file_error(
                self.path, f"tensor {name!r} has type {info.kind.name}, which is not supported"
            ) from None
        return torch.from_numpy(out).view(info.shape)


class _Cursor:
    """Reads little-endian values from bytes; IndexError at the end of the file."""

    def __init__(self, data):
        self.data, self.at = data, 0

    def take(self, size: int) -> bytes:
        if size > len(self.data) - self.at:
            raise IndexError
        self.at += size
        return bytes(self.data[self.at - size : self.at])

    def number(self, code: str):
        return struct.unpack("<" + code, self.take(struct.calcsize(code)))[0]

    def string(self) -> str:
        return self.take(self.number("Q")).decode("utf-8")

    def value(self, kind: int):
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.number(_SCALARS[kind])
        inner, count = self.number("I"), self.number("Q")
        if inner in _SCALARS:
            code = _SCALARS[inner]
            return list(struct.unpack(f"<{count}{code}", self.take(count * struct.calcsize(code))))
        if count > len(self.data) - self.at:  # an entry takes at least a byte
            raise IndexError
        return self.strings(count) if inner == _STRING else [self.value(inner) for _ in range(count)]

    def strings(self, count: int) -> list[str]:
        """`count` strings; its own loop, because a vocabulary has 100,000 of them."""
        data, at, size, out = self.data, self.at, len(self.data), []
        for _ in range(count):
            start = at + 8
            if start > size:
                raise IndexError
            at = start + _LENGTH(data, at)[0]
            if at > size:
                raise IndexError
            out.append(str(data[start:at], "utf-8"))
        self.at = at
        return out


def open_gguf(path) -> GGUFFile:
    """Parse the header. InputError for a file that is no GGUF, truncated, corrupt, big-endian or of version 1."""
    path = Path(path)
    damaged = "truncated or corrupt GGUF ({}); copy or download it again"
    try:
        with open(path, "rb") as handle:
            size = handle.seek(0, 2)
        if size < 24:
            raise file_error(path, damaged.format(f"{size} bytes"))
        cursor = _Cursor(memoryview(np.memmap(path, np.uint8, "r")))
        if cursor.take(4) != b"GGUF":
            raise file_error(path, "this is no GGUF file: it does not start with GGUF")
        version = cursor.number("I")
        if version not in (2, 3):
            raise file_error(path, f"GGUF version {version} is not supported; little-endian 2 and 3 are")
        num_tensors, num_fields = cursor.number("Q"), cursor.number("Q")
        metadata = {}
        for _ in range(num_fields):
            key = cursor.string()
            metadata[key] = cursor.value(cursor.number("I"))
        entries = [_tensor_entry(cursor) for _ in range(num_tensors)]
        align = metadata.get("general.alignment", 32)
        start = -(-cursor.at // align) * align
        tensors = {}
        for name, shape, kind, offset in entries:
            tensors[name] = _tensor(name, shape, GGMLQuantizationType(kind), start + offset)
            if tensors[name].start + tensors[name].num_bytes > size:
                raise ValueError(f"tensor {name!r} ends beyond the file's {size} bytes")
        if len(tensors) < len(entries):
            raise ValueError("a tensor name occurs twice")
    except IndexError:
        raise file_error(path, damaged.format("it ends within its header")) from None
    except (
        ValueError,
        KeyError,
        TypeError,
        ZeroDivisionError,
        OverflowError,
        RecursionError,
        MemoryError,
    ) as error:
        raise file_error(path, damaged.format(f"{type(error).__name__}: {error}")) from None
    return GGUFFile(path, metadata, tensors)


def _tensor_entry(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    name, dims = cursor.string(), cursor.number("I")
    if not 1 <= dims <= _MAX_DIMS:
        raise ValueError(f"tensor {name!r} has {dims} dimensions")
    shape = tuple(cursor.number("Q") for _ in range(dims))[::-1]  # ggml counts the fastest dimension first
    return name, shape, cursor.number("I"), cursor.number("Q")


def _tensor(name: str, shape: tuple[int, ...], kind: GGMLQuantizationType, start: int) -> GGUFTensor:
    values, size = GGML_QUANT_SIZES[kind]
    if shape[-1] % values:
        raise ValueError(
            f"tensor {name!r}: rows of {shape[-1]} are no multiple of {kind.name}'s block of {values}"
        )
    return GGUFTensor(shape, kind, start, math.prod(shape) // values * size)
