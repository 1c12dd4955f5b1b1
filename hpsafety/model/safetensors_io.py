"""Safetensors files, one or many, read and written one tensor at a time.

Format: 8 bytes header length, a JSON header {name: {dtype, shape, data_offsets}}, then the data, contiguous.
Reading goes through the safetensors package. It can only write whole files from memory (and refuses views that share
storage, as our fused weights do), so writing is done here.
"""

import json
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from hpsafety.errors import file_error
from hpsafety.model.jsonfile import dump_json, read_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
CODES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
ALIGN = 64  # bytes, of where the data begins
_CHUNK = 1 << 24  # elements copied to bytes at a time


def weight_files(directory) -> list[Path]:
    """The safetensors files of a directory: the index's, or the single one.

    Raises InputError where there is none, with the reason when the weights are pickles.
    """
    directory = Path(directory)
    index = directory / INDEX
    if index.is_file():
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not shards or not all(isinstance(s, str) for s in shards.values()):
            raise file_error(index, 'field "weight_map" must map tensor names to file names')
        names = sorted(set(shards.values()))
        for name in names:
            if Path(name).name != name:
                raise file_error(index, f"shard {name!r} must be a file name without a folder")
            if not (directory / name).is_file():
                raise file_error(
                    directory / name, f"no such file, but {INDEX} names it; copy it or download again"
                )
        return [directory / name for name in names]
    if (directory / SINGLE).is_file():
        return [directory / SINGLE]
    pickles = sorted(p.name for p in directory.glob("*.bin")) + sorted(
        p.name for p in directory.glob("*.pt*")
    )
    if pickles:
        raise file_error(
            directory / pickles[0],
            "weights in pickle form are not read, because loading a pickle runs code; save them as safetensors",
        )
    raise file_error(directory, f"no {SINGLE} and no {INDEX} in this directory")


def read_tensors(files: list[Path]) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, CPU tensor) of every tensor, in file order, each read when asked for and held by nobody here.

    Raises InputError for a file that is truncated or corrupt, a name in two files, or a dtype that is no float.
    """
    seen: dict[str, Path] = {}
    for path in files:
        try:
            # pread, not mmap: mapped pages would count as this process's memory, a second copy of the model
            with safe_open(path, framework="pt", backend="pread") as file:
                for name in file.offset_keys():
                    if name in seen:
                        raise file_error(path, f"tensor {name!r} is also in {seen[name].name}")
                    seen[name] = path
                    tensor = file.get_tensor(name)
                    if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
                        raise file_error(
                            path, f"tensor {name!r} has dtype {tensor.dtype}; expected a float dtype"
                        )
                    yield name, tensor
        except (SafetensorError, OSError, ValueError) as error:
            if isinstance(error, PermissionError):
                raise file_error(path, "no permission to read this file") from None
            raise file_error(
                path, f"truncated or corrupt safetensors ({error}); copy or download it again"
            ) from None


Source = tuple[tuple[int, ...], torch.dtype, Callable[[], torch.Tensor]]  # shape, dtype, makes the tensor


def _num_bytes(source: Source) -> int:
    shape, dtype, _ = source
    return torch.Size(shape).numel() * dtype.itemsize


def _write_data(handle, tensor: torch.Tensor) -> None:
    flat = tensor.detach().contiguous().view(-1)
    for start in range(0, flat.numel(), _CHUNK):
        chunk = flat[start : start + _CHUNK].cpu().contiguous()
        handle.write(memoryview(chunk.view(torch.uint8).numpy()))


def write_file(path, sources: dict[str, Source]) -> None:
    """One safetensors file, tensors in the order given, made and written one after another, then fsynced."""
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, source in sources.items():
        end = offset + _num_bytes(source)
        if source[1] not in CODES:
            raise ValueError(f"save: {name} is {source[1]}; expected float32, float16 or bfloat16")
        header[name] = {"dtype": CODES[source[1]], "shape": list(source[0]), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (
        -(len(text) + 8) % ALIGN
    )  # so that a mapped file's tensors stand where allocated ones would
    with open(path, "wb") as handle:
        handle.write(struct.pack("<Q", len(text)) + text)
        for name, (shape, dtype, make) in sources.items():
            tensor = make()
            if tuple(tensor.shape) != tuple(shape) or tensor.dtype != dtype:
                raise ValueError(
                    f"save: {name} is {tuple(tensor.shape)} {tensor.dtype}, announced {shape} {dtype}"
                )
            _write_data(handle, tensor)
        handle.flush()
        os.fsync(handle.fileno())


def write_shards(directory, sources: dict[str, Source], max_shard_bytes: float) -> None:
    """model.safetensors, or numbered shards with their index when the tensors exceed max_shard_bytes together."""
    shards: list[dict[str, Source]] = [{}]
    room = max_shard_bytes
    for name, source in sources.items():
        size = _num_bytes(source)
        if size > room and shards[-1]:
            shards.append({})
            room = max_shard_bytes
        shards[-1][name] = source
        room -= size
    directory = Path(directory)
    if len(shards) == 1:
        write_file(directory / SINGLE, shards[0])
        return
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_file(directory / file, shard)
        weight_map |= dict.fromkeys(shard, file)
    total = sum(map(_num_bytes, sources.values()))
    write_text(directory / INDEX, dump_json({"metadata": {"total_size": total}, "weight_map": weight_map}))


def write_text(path, text: str) -> None:
    """A UTF-8 file in a directory that is not in place yet, fsynced."""
    with open(path, "w", encoding="utf-8", newline="\n") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
