"""accumulate_ against its oracle: one fp32 addition per element, whatever the shape, dtype and threads.

One bug this file must catch: a tail (numel not a multiple of the vector) that is left out.
"""

import pytest
import torch

from hpsafety import ops, reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(0,), (), (1,), (15,), (16,), (17,), (3, 5, 7), (257, 129), (70_001,)])
def test_is_the_oracle_to_the_bit(shape, dtype):
    g = torch.Generator().manual_seed(1)
    total, grad = torch.randn(shape, generator=g), torch.randn(shape, generator=g).to(dtype)
    expected, before = reference.accumulate(total, grad), grad.clone()
    reference.calls.clear()
    ours = total.clone()
    assert ops.accumulate_(ours, grad, impl="cpu") is None
    assert not reference.calls and torch.equal(ours, expected) and torch.equal(grad, before)
    plain = total.clone()
    ops.accumulate_(plain, grad, impl="reference")
    assert reference.calls["accumulate"] == 1 and torch.equal(plain, expected)


def test_threads_and_repeats_change_no_bit():
    total, grad = torch.randn(300_000), torch.randn(300_000).bfloat16()
    expected, threads = total + grad.float(), torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for _ in range(34):
                ours = total.clone()
                ops.accumulate_(ours, grad)
                assert torch.equal(ours, expected)
    finally:
        torch.set_num_threads(threads)


def test_random_shapes_and_a_gradient_that_is_not_contiguous():
    g = torch.Generator().manual_seed(0)
    for _ in range(25):
        rows, columns = (int(x) for x in torch.randint(1, 90, (2,), generator=g))
        total, grad = (
            torch.randn(rows, columns, generator=g),
            torch.randn(columns, rows, generator=g).bfloat16(),
        )
        expected = total + grad.t().float()
        ops.accumulate_(total, grad.t())
        assert torch.equal(total, expected)


def test_nan_and_inf_propagate():
    total = torch.tensor([0.0, 1.0, float("inf"), float("inf")])
    ops.accumulate_(total, torch.tensor([float("nan"), float("inf"), -1.0, float("-inf")]).bfloat16())
    assert total[0].isnan() and total[1] == total[2] == float("inf") and total[3].isnan()


@pytest.mark.parametrize(
    "total, grad, message",
    [
        (torch.zeros(3).double(), torch.zeros(3), "total must be contiguous float32, got torch.float64"),
        (torch.zeros(4, 3).t(), torch.zeros(3, 4), "total must be contiguous float32"),
        (torch.zeros(3), torch.zeros(4), r"grad must be \(3,\) float32 or bfloat16 on cpu, got \(4,\)"),
        (torch.zeros(3), torch.zeros(3).half(), "got .* torch.float16"),
    ],
)
def test_bad_arguments(total, grad, message):
    with pytest.raises(ValueError, match=message):
        ops.accumulate_(total, grad)


def test_the_kernel_checks_what_its_memory_depends_on():
    for total, grad in ((3, 4), (4, 3)):
        with pytest.raises(ValueError, match="total must be contiguous float32"):
            torch.ops.hpsafety_cpu.accumulate_(torch.zeros(total), torch.zeros(grad))
