"""What the tests of the linear family share: tiles so small that small inputs have borders, and sums of traffic."""

import math

import pytest
import torch

from hpsafety.triton_kernels import distill_loss, linear_cross_entropy, linear_logprob, linear_tiles
from tests.triton.audit import Audit
from tests.triton.device import DEVICE

M, N, K = 32, 64, 32  # rows, words and width of a tile
PART_ROWS, PART_WORDS, SPLIT = 64, 128, 128


def use_small_tiles(monkeypatch) -> None:
    """A GPU keeps its own tiles; parts of dz and splits are small there too."""
    if DEVICE == "cpu":
        tile = linear_tiles._tiles(M, N, K, 4, 1)
        monkeypatch.setattr(linear_tiles, "TILES", dict.fromkeys(linear_tiles.TILES, (tile, tile)))
    monkeypatch.setattr(linear_tiles, "dz_part", lambda item: (PART_ROWS, PART_WORDS))
    monkeypatch.setattr(linear_tiles, "KEPT_BLOCK", 32)
    monkeypatch.setattr(linear_tiles, "GATHERED", {"ROWS": 4, "BLOCK": 32})
    monkeypatch.setattr(linear_tiles, "WORDS_PER_SPLIT", SPLIT)
    for module in (linear_logprob, distill_loss):
        monkeypatch.setattr(module, "MERGED_SPLITS", 2)
    monkeypatch.setattr(linear_cross_entropy, "rows_of_part", lambda v, item: PART_ROWS)
    monkeypatch.setattr(linear_cross_entropy, "MERGED_TILES", 2)
    monkeypatch.setattr(linear_cross_entropy, "LOSS_BLOCK", 32)
    for module in (linear_tiles, linear_logprob, linear_cross_entropy, distill_loss):
        monkeypatch.setattr(module, "GROUP", 2)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch, request):
    if "real_tiles" not in request.fixturenames:
        use_small_tiles(monkeypatch)


@pytest.fixture
def real_tiles():
    """The tiles that a GPU gets."""


def blocks(count: int, size: int) -> int:
    return math.ceil(count / size)


def blocks_by_part(rows: int) -> int:
    """Row blocks of `rows` kept rows, which every part of PART_ROWS starts anew."""
    return sum(blocks(min(PART_ROWS, rows - first), M) for first in range(0, rows, PART_ROWS))


def traffic_of(seen: Audit, tensor: torch.Tensor):
    """The traffic of a tensor that was allocated within the audit."""
    return next(r.traffic for r in seen.regions if r.base == tensor.untyped_storage().data_ptr())


def new_bytes(seen: Audit, *results: torch.Tensor) -> int:
    """Bytes that were allocated within the audit, without those of the results."""
    kept = {t.untyped_storage().data_ptr() for t in results}
    return sum(r.bytes for r in seen.regions if r.name.startswith("new") and r.base not in kept)


class Allocated(torch.overrides.TorchFunctionMode):
    """Counts the bytes of what new_empty and new_zeros make: also of fake tensors, which have no memory."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if getattr(function, "__name__", "") in ("new_empty", "new_zeros"):
            self.bytes += result.numel() * result.element_size()
        return result
