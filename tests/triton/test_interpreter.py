"""The interpreter's bf16 repair: right with it, and still needed without (in a process of its own)."""

import subprocess
import sys

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from hpsafety.triton_kernels import interpreter, launch

pytestmark = pytest.mark.skipif(not launch.INTERPRETED, reason="the kernels run on a GPU here")


@triton.jit
def _dot(a_ptr, b_ptr, c_ptr, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(c_ptr + at, tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at)))


@triton.jit
def _copy(x_ptr, y_ptr, N: tl.constexpr):
    tl.store(y_ptr + tl.arange(0, N), tl.load(x_ptr + tl.arange(0, N)))


def test_bf16_dots_multiply_numbers():
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(32, 32, generator=g).bfloat16() for _ in range(2))
    c = torch.empty(32, 32)
    _dot[(1,)](a, b, c, N=32)
    torch.testing.assert_close(c, a.float() @ b.float(), rtol=1e-5, atol=1e-5)


def test_fp32_rounds_to_nearest_even():
    halfway = torch.tensor([0x3F808000, 0x3F818000, 0x3F80FFFF, 0x7F7FFFFF], dtype=torch.int32).view(torch.float32)
    x = torch.cat([halfway, torch.tensor([0.0, -0.0, torch.inf, -torch.inf]), torch.randn(120)])
    y = torch.empty(128, dtype=torch.bfloat16)
    _copy[(1,)](x, y, N=128)
    assert torch.equal(y.view(torch.int16), x.bfloat16().view(torch.int16))


@triton.jit
def _double(x_ptr, N: tl.constexpr):
    at = x_ptr + tl.arange(0, N)
    tl.store(at, tl.load(at) + tl.load(at))


def test_arithmetic_in_bf16_is_refused():
    with pytest.raises(triton.runtime.errors.InterpreterError, match="widen to fp32 first"):
        _double[(1,)](torch.ones(8, dtype=torch.bfloat16), N=8)


def test_not_a_number_stays_one():
    patterns = np.array([0x7FC00000, 0xFFC00000, 0x7F800001, 0xFFFFFFFF], np.uint32).view(np.float32)
    bits = torch.from_numpy(interpreter.to_bf16_bits(patterns).view(np.int16))
    assert bits.view(torch.bfloat16).isnan().all()


def test_the_stock_interpreter_is_still_wrong():
    """When this fails, the repair of interpreter.py can go."""
    program = (
        "import torch, triton, triton.language as tl\n"
        "import triton.runtime.interpreter as stock\n"
        "a = stock.TensorHandle(torch.full((16, 16), 2.0).bfloat16().view(torch.uint16).numpy(), tl.bfloat16)\n"
        "zero = stock.TensorHandle(torch.zeros(16, 16).numpy(), tl.float32)\n"
        "c = stock.InterpreterBuilder().create_dot(a, a, zero, None, 0)\n"
        "print(float(c.data[0, 0]))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert float(done.stdout) != 64.0
