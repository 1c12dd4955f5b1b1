"""accumulate_ in Triton: one fp32 addition per element. The bug this file must catch: a tail that is left out."""

import pytest
import torch

from hpsafety import ops, reference
from hpsafety.triton_kernels import accumulate as kernels
from tests.ops.forms import PAST_INT32, lazy_zeros
from tests.triton.audit import audit
from tests.triton.device import DEVICE
from tests.triton.last_program import last_program, needs_interpreter

DTYPES = [torch.float32, torch.bfloat16]


def check_bits(shape, dtype, seed=1):
    g = torch.Generator().manual_seed(seed)
    total, grad = torch.randn(shape, generator=g), torch.randn(shape, generator=g).to(dtype)
    expected, before = reference.accumulate(total, grad), reference.calls["accumulate"]
    ours, grad = total.to(DEVICE), grad.to(DEVICE)
    assert ops.accumulate_(ours, grad, impl="triton") is None
    assert reference.calls["accumulate"] == before and torch.equal(ours.cpu(), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0,), (), (1,), (15,), (3, 5, 7), (1023,), (1024,), (1025,), (61, 50)])
def test_is_the_oracle_to_the_bit(shape, dtype):
    check_bits(shape, dtype)


@pytest.mark.sweep
@pytest.mark.parametrize("seed", range(40))
def test_drawn_shapes(seed):
    g = torch.Generator().manual_seed(seed)
    check_bits(tuple(int(x) for x in torch.randint(1, 70, (2,), generator=g)), DTYPES[seed % 2], seed)


def test_a_gradient_that_is_not_contiguous():
    total, grad = torch.randn(30, 20, device=DEVICE), torch.randn(20, 30, device=DEVICE).bfloat16()
    expected = total + grad.t().float()
    ops.accumulate_(total, grad.t(), impl="triton")
    assert torch.equal(total, expected)


def test_nan_and_inf_propagate():
    nan, inf = float("nan"), float("inf")
    total = torch.tensor([0.0, 1.0, inf, inf], device=DEVICE)
    ops.accumulate_(total, torch.tensor([nan, inf, -1.0, -inf], device=DEVICE).bfloat16(), impl="triton")
    assert total[0].isnan() and total[1] == total[2] == inf and total[3].isnan()


@pytest.mark.parametrize("dtype", DTYPES)
@needs_interpreter
def test_memory_and_traffic(monkeypatch, dtype):
    """Each element is read once and written once."""
    monkeypatch.setattr(kernels, "BLOCK", 32)
    total, grad = torch.randn(7, 19), torch.randn(7, 19).to(dtype)
    expected = total + grad.float()
    for seed in (None, 5):
        ours = total.clone()
        with audit(seed, total=ours, grad=grad) as seen:
            kernels.accumulate_(ours, grad)
        seen.check()
        assert torch.equal(ours, expected)
        moved = seen.traffic["total"]
        assert moved.load_bytes == moved.load_unique == moved.store_bytes == total.nbytes
        assert seen.traffic["grad"].load_bytes == grad.nbytes


@needs_interpreter
def test_offsets_past_32_bits(monkeypatch):
    """The last program of 2^31 elements, in memory of which nothing else is touched."""
    monkeypatch.setattr(kernels, "launch", last_program)
    total, grad = lazy_zeros(PAST_INT32), lazy_zeros(PAST_INT32, torch.bfloat16)
    total[-3:], grad[-2:] = 1.0, 2.0
    ops.accumulate_(total, grad, impl="triton")
    assert total[-4:].tolist() == [0.0, 1.0, 3.0, 3.0]
