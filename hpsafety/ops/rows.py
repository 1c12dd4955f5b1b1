"""What several ops check alike: whether values may be read, rows of N numbers, counts, offsets."""

import math
import os

import torch

from hpsafety.ops.registration import check


def values_readable(tensor) -> bool:
    """Whether checks may read the tensor's values: on CPU always, elsewhere with HPSAFETY_CHECK=1, never in tracing."""
    if torch.compiler.is_compiling():
        return False
    return tensor.device.type == "cpu" or os.environ.get("HPSAFETY_CHECK") == "1"


def check_rows(op: str, rows: dict, impl: str | None, dtypes=(torch.float32, torch.bfloat16)) -> None:
    """All rows (N,) of one length and device, each of one of the dtypes; fp64 too where the reference serves."""
    first_name, first = next(iter(rows.items()))
    shape, device = first.shape, first.device
    dtypes = (*dtypes, torch.float64) if impl == "reference" and torch.float32 in dtypes else dtypes
    for name, row in rows.items():
        if row.dim() == 1 and row.shape == shape and row.dtype in dtypes and row.device == device:
            continue
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(
            f"{op}: {name} must be (N,) {wanted} on {device}, N as in {first_name}; got {describe(row)}"
        )


def describe(x: torch.Tensor) -> str:
    return f"{tuple(x.shape)} {x.dtype} on {x.device}"


def denominator(op: str, name: str, value, device) -> tuple[float | None, torch.Tensor | None]:
    """The count a loss is divided by, as (number, None), (None, 0-dim tensor), or (None, None) for None."""
    if value is None:
        return None, None
    if isinstance(value, torch.Tensor):
        check(
            value.dim() == 0 and value.device == device and not value.is_complex(),
            "{}: {} must be a number or a 0-dim tensor on {}, got {}", op, name, device, describe(value),
        )  # fmt: skip
        if values_readable(value):
            check(value.item() >= 0, "{}: {} must be >= 0, got {}", op, name, value.item())
        return None, value.detach()
    check(0 <= value < math.inf, "{}: {} must be a finite number >= 0, got {}", op, name, value)
    return float(value), None


def check_offsets(op: str, name: str, offsets, end: int, device) -> None:
    """Offsets (count + 1,) that start at 0, rise strictly (nothing is empty) and end at `end`."""
    check(
        offsets.dim() == 1 and offsets.numel() > 0 and offsets.dtype in (torch.int32, torch.int64)
        and offsets.device == device,
        "{}: {} must be (count + 1,) int32 on {}, got {}", op, name, device, describe(offsets),
    )  # fmt: skip
    if not values_readable(offsets):
        return
    first, last = int(offsets[0]), int(offsets[-1])
    check(
        first == 0 and last == end,
        "{}: {} must run from 0 to {}, got {} to {}", op, name, end, first, last,
    )  # fmt: skip
    if offsets.numel() > 1:
        lengths = offsets.diff()
        shortest = int(lengths.min())
        check(
            shortest > 0, "{}: {} must rise strictly: entry {} follows {} after it starts; drop what is empty",
            op, name, int(lengths.argmin()) + 1, shortest,
        )  # fmt: skip
