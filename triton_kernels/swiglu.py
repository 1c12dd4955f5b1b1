"""swiglu, forward and backward. Limit: bytes; the backward makes silu again from gate_up, and y with it."""

import torch
import triton
import triton.language as tl

from hpsafety.triton_kernels.launch import launch

SHARED_BYTES = (0, 0)  # a block's at most, on sm_80 and on sm_90
TILE = 1024  # elements of y that a program makes: 8 a thread, 16 bytes of bf16


@triton.jit
def _tile(rows, f, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """(offsets in y, offsets of the gate, mask) of this program's tile; the up column stands f behind the gate's."""
    across = tl.cdiv(f, BLOCK)
    row = (tl.program_id(0) // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) % across * BLOCK + tl.arange(0, BLOCK)
    mask = (row < rows)[:, None] & (column < f)[None, :]
    at = row[:, None] * f + column[None, :]
    return at, at + row[:, None] * f, mask


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit(do_not_specialize=["rows"])
def swiglu_forward(gate_up_ptr, y_ptr, rows, f, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    at, gate_at, mask = _tile(rows, f, ROWS, BLOCK)
    gate = tl.load(gate_up_ptr + gate_at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + gate_at + f, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, gate * _sigmoid(gate) * up, mask=mask)


@triton.jit(do_not_specialize=["rows"])
def swiglu_gradient(
    dy_ptr, gate_up_ptr, grad_ptr, y_ptr, rows, f, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """With s = sigmoid(gate): d gate = dy up s (1 + gate (1 - s)), d up = dy gate s."""
    at, gate_at, mask = _tile(rows, f, ROWS, BLOCK)
    dy = tl.load(dy_ptr + at, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_up_ptr + gate_at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + gate_at + f, mask=mask, other=0.0).to(tl.float32)
    s = _sigmoid(gate)
    silu = gate * s
    tl.store(grad_ptr + gate_at, dy * up * (s + silu * (1.0 - s)), mask=mask)
    tl.store(grad_ptr + gate_at + f, dy * silu, mask=mask)
    tl.store(y_ptr + at, silu * up, mask=mask)


def _grid(rows: int, f: int) -> tuple[int, dict]:
    """(programs, constants): a tile of wide rows is a part of one, that of narrow rows holds several."""
    block = min(triton.next_power_of_2(max(f, 1)), TILE)
    height = TILE // block
    return triton.cdiv(rows, height) * triton.cdiv(f, block), {"ROWS": height, "BLOCK": block}


def swiglu(gate_up):
    """silu(gate) * up; arguments as in hpsafety::swiglu."""
    gate_up = gate_up.contiguous()
    rows, f = gate_up.shape[0], gate_up.shape[1] // 2
    y = gate_up.new_empty((rows, f))
    programs, constants = _grid(rows, f)
    launch(swiglu_forward, programs, gate_up, y, rows, f, **constants)
    return y


def swiglu_backward(grad, gate_up):
    """(grad_gate_up, y)."""
    grad, gate_up = grad.contiguous(), gate_up.contiguous()
    rows, f = grad.shape
    grad_gate_up, y = torch.empty_like(gate_up), torch.empty_like(grad)
    programs, constants = _grid(rows, f)
    launch(swiglu_gradient, programs, grad, gate_up, grad_gate_up, y, rows, f, **constants)
    return grad_gate_up, y
