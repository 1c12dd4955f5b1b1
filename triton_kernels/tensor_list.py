"""Lists of tensors in one launch: addresses and sizes in tables on the device, and a flat grid over all chunks.

The tables are copied to the device when a list is seen for the first time; a training step after the first finds them
again. Their keys say all that they hold, so that memory which was freed and given out anew cannot make them wrong.
"""

import collections
import functools

import torch
import triton
import triton.language as tl

from hpsafety.triton_kernels.launch import without_values

KEPT = 16  # tables of addresses; gradients that move at every step need new ones, and must not pile up

_addresses: collections.OrderedDict = collections.OrderedDict()


@triton.jit
def locate(chunks_ptr, sizes_ptr, CHUNK: tl.constexpr):
    """This program's (tensor, first element, size of the tensor)."""
    chunk = tl.program_id(0).to(tl.int64) * 2
    tensor = tl.load(chunks_ptr + chunk).to(tl.int64)
    first = tl.load(chunks_ptr + chunk + 1).to(tl.int64) * CHUNK
    return tensor, first, tl.load(sizes_ptr + tensor)


@triton.jit
def pointer(addresses_ptr, at, example_ptr, ALIGNED: tl.constexpr):
    """The address at `at` as a pointer to what example_ptr points to."""
    pointer = tl.load(addresses_ptr + at).to(example_ptr.dtype)
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer


@functools.lru_cache(64)
def _chunks(sizes: tuple[int, ...], chunk: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(chunks, 2) int32: the tensor and the number of the chunk within it; and the sizes (tensors,) int64."""
    counts = torch.tensor([-(-n // chunk) for n in sizes], dtype=torch.int64)
    tensor = torch.repeat_interleave(torch.arange(len(sizes)), counts)
    within = torch.arange(tensor.numel()) - (counts.cumsum(0) - counts)[tensor]
    return torch.stack((tensor, within), 1).int().to(device), torch.tensor(sizes, device=device)


def chunks(tensors, chunk: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The table of chunks of `chunk` elements, a row for each program; and the tensors' sizes."""
    sizes, device = tuple(x.numel() for x in tensors), tensors[0].device
    if without_values(tensors[0]):
        count = sum(-(-n // chunk) for n in sizes)
        return tuple(torch.empty(shape, dtype=kind, device=device)
                     for shape, kind in (((count, 2), torch.int32), (len(sizes), torch.int64)))  # fmt: skip
    return _chunks(sizes, chunk, device)


def addresses(lists) -> tuple[torch.Tensor, bool]:
    """(lists, tensors) int64, and whether every address is divisible by 16 bytes."""
    device = lists[0][0].device
    if without_values(lists[0][0]):
        return torch.empty((len(lists), len(lists[0])), dtype=torch.int64, device=device), True
    table = tuple(tuple(x.data_ptr() for x in tensors) for tensors in lists)
    key = (table, device)
    if key not in _addresses:
        made = torch.tensor(table, dtype=torch.int64)
        if device.type == "cuda":  # from pageable memory the copy would wait for the device
            made = made.pin_memory().to(device, non_blocking=True)
        _addresses[key] = made, all(address % 16 == 0 for row in table for address in row)
        while len(_addresses) > KEPT:
            _addresses.popitem(last=False)
    _addresses.move_to_end(key)
    return _addresses[key]


def by_dtype(tensors) -> list[list[int]]:
    """The numbers of the tensors that hold something, apart by dtype."""
    kinds = (torch.float32, torch.bfloat16)
    groups = [[i for i, x in enumerate(tensors) if x.dtype == kind and x.numel()] for kind in kinds]
    return [group for group in groups if group]
