"""rms_norm, forward and backward. Limit: bytes; a row is held in registers between its two passes."""

import torch
import triton
import triton.language as tl

from hpsafety.triton_kernels.launch import launch

SHARED_BYTES = (16384, 16384)  # a block's at most, on sm_80 and on sm_90
ROWS_PER_PARTIAL = 32  # grad_weight is summed over 32 rows on chip, then over the partials: 4 % more bytes
COLUMNS_PER_SUM = 64


@triton.jit(do_not_specialize=["rows"])
def rms_norm_forward(
    x_ptr, residual_ptr, weight_ptr, y_ptr, sum_ptr, rstd_ptr, rows, d, eps, HAS_RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    mask = (row < rows)[:, None] & (column < d)[None, :]
    at = row.to(tl.int64)[:, None] * d + column[None, :]
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        summed = x + tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
        summed = summed.to(x_ptr.dtype.element_ty)  # what is normalised is what is kept: backward sees it
        tl.store(sum_ptr + at, summed, mask=mask)
        x = summed.to(tl.float32)
    rstd = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(x * x, 1) / d + eps))
    weight = tl.load(weight_ptr + column, mask=column < d, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, x * rstd[:, None] * weight[None, :], mask=mask)
    tl.store(rstd_ptr + row, rstd, mask=row < rows)


@triton.jit(do_not_specialize=["rows"])
def rms_norm_backward_rows(
    dy_ptr, dsum_ptr, x_ptr, weight_ptr, rstd_ptr, dx_ptr, partial_ptr, rows, d, HAS_SUM: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """With xhat = x rstd and c = mean(dy w xhat): dx = rstd (dy w - c xhat) + dsum, and dw sums dy xhat."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    column = tl.arange(0, BLOCK)
    inside = column < d
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    dw = tl.zeros([BLOCK], tl.float32)
    for row in range(first, tl.minimum(first + ROWS, rows)):
        at = tl.cast(row, tl.int64) * d + column
        rstd = tl.load(rstd_ptr + row)
        xhat = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32) * rstd
        dy = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32)
        dw += dy * xhat
        dy *= weight
        dx = (dy - tl.sum(dy * xhat, 0) / d * xhat) * rstd
        if HAS_SUM:
            dx += tl.load(dsum_ptr + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx_ptr + at, dx, mask=inside)
    tl.store(partial_ptr + tl.program_id(0).to(tl.int64) * d + column, dw, mask=inside)


@triton.jit(do_not_specialize=["partials"])
def sum_partials(partial_ptr, out_ptr, partials, d, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """out[j] = sum over i of partial[i, j], in an order that nothing but `partials` decides."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.arange(0, ROWS)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(0, partials, ROWS):
        mask = (first + row < partials)[:, None] & (column < d)[None, :]
        at = (first + row).to(tl.int64)[:, None] * d + column[None, :]
        total += tl.load(partial_ptr + at, mask=mask, other=0.0)
    tl.store(out_ptr + column, tl.sum(total, 0), mask=column < d)


def _shape(d: int) -> dict:
    """Rows of a program, columns of its block, and its warps: 16 to 64 fp32 numbers a thread."""
    block = triton.next_power_of_2(d)
    return {"ROWS": max(1, 1024 // block), "BLOCK": block, "num_warps": min(max(block // 512, 4), 16)}


def rms_norm(x, weight, eps, residual):
    """(y, x + residual or an empty tensor, rstd); arguments as in hpsafety::rms_norm."""
    x, weight = x.contiguous(), weight.contiguous()
    rows, d = x.shape
    summed = x.new_empty(x.shape if residual is not None else (0,))
    residual = residual if residual is None else residual.contiguous()
    y, rstd = torch.empty_like(x), x.new_empty(rows, dtype=torch.float32)
    config = _shape(d)
    launch(
        rms_norm_forward, triton.cdiv(rows, config["ROWS"]), x, residual, weight, y, summed, rstd, rows, d, eps,
        HAS_RESIDUAL=residual is not None, **config,
    )  # fmt: skip
    return y, summed, rstd


def rms_norm_backward(grad_y, grad_sum, x, weight, rstd):
    """(grad_x, grad_weight); grad_x is also the residual's gradient."""
    grad_y, x, weight = grad_y.contiguous(), x.contiguous(), weight.contiguous()
    grad_sum = grad_sum if grad_sum is None else grad_sum.contiguous()
    rows, d = x.shape
    partials = triton.cdiv(rows, ROWS_PER_PARTIAL)
    grad_x, grad_weight = torch.empty_like(x), torch.empty_like(weight)
    partial = x.new_empty((partials, d), dtype=torch.float32)
    config = _shape(d) | {"ROWS": ROWS_PER_PARTIAL}
    launch(
        rms_norm_backward_rows, partials, grad_y, grad_sum, x, weight, rstd, grad_x, partial, rows, d,
        HAS_SUM=grad_sum is not None, **config,
    )  # fmt: skip
    columns = triton.cdiv(d, COLUMNS_PER_SUM)
    launch(sum_partials, columns, partial, grad_weight, partials, d, BLOCK=COLUMNS_PER_SUM, ROWS=16)
    return grad_x, grad_weight
