"""Matrix products with a weight, by the route that is fastest on this machine.

fp32 on a CPU with AVX-512: oneDNN on the plain weight runs at 100-105 GFLOP/s a thread where torch.mm (MKL) runs at
81-94 (AMD EPYC; 1,000 rows of 576 x 3,072 and 1,536 x 576), with nothing packed or copied. Weight gradients gain
nothing (both operands are new), nor does bf16 (torch.mm is oneDNN already). The route depends on the machine and the
dtype alone, never on a measurement or on the rows, so that a resumed run and a smaller batch give the same bits: oneDNN
rounds a row alike for every number of rows from 2 up.

No product with a weight has fewer than MIN_ROWS rows: smaller inputs are padded with zeros. Below that, BLAS picks
other kernels and a row's last bits would depend on how many rows stand beside it. `row_difference` measures on this
very machine whether they do above it (design section 7).

Every micro-batch has another number of rows. oneDNN keeps the code it compiles for each shape, and torch what it wraps
around it, 1,024 of each unless told otherwise: hundreds of MB that are never asked for again (smollm2 in bf16, PPO with
adapters: +60 MB an iteration). Few shapes are alive at a time, so a short memory costs nothing. The variables
ONEDNN_PRIMITIVE_CACHE_CAPACITY and LRU_CACHE_CAPACITY, where they are set, stand.
"""

import functools
import os
from typing import NamedTuple

import torch
import torch.nn.functional as nnf

MIN_ROWS = 16
for _name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):  # read at the first product
    os.environ.setdefault(_name, "64")


@functools.cache
def _onednn():
    """oneDNN's linear, or None where this torch or CPU does not have it (or has not been seen to gain by it)."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkldnn.is_available():
        return None
    try:
        call = torch.ops.mkldnn._linear_pointwise.default
        call(torch.zeros(2, 2), torch.zeros(2, 2), None, "none", [], "")
    except (AttributeError, RuntimeError, TypeError, NotImplementedError):
        return None
    return call


def plain_linear(x_TI, weight_OI, bias_O=None):
    """linear(x, weight, bias), outside of autograd."""
    rows = x_TI.shape[0]
    if 0 < rows < MIN_ROWS:
        padded = nnf.pad(x_TI, (0, 0, 0, MIN_ROWS - rows))
        return plain_linear(padded, weight_OI, bias_O)[:rows]
    call = _onednn() if x_TI.dtype == torch.float32 and x_TI.device.type == "cpu" else None
    if call is None or rows == 0:
        return nnf.linear(x_TI, weight_OI, bias_O)
    return call(x_TI.contiguous(), weight_OI, bias_O, "none", [], "")


@functools.cache
def row_difference(out_features: int, in_features: int, dtype: torch.dtype, device: str = "cpu") -> float:
    """The largest change of one row's product when other rows stand beside it, relative to its largest element.

    0.0: rows are bit-equal for every number of rows tried (MIN_ROWS to 1,000), as they were on every CPU seen.
    """
    generator = torch.Generator().manual_seed(0)
    rows, place = 1000, torch.device(device)
    x = torch.randn(rows, in_features, generator=generator).to(place, dtype)
    weight = torch.randn(out_features, in_features, generator=generator).to(place, dtype)
    whole = plain_linear(x, weight)
    worst = 0.0
    for count in (1, MIN_ROWS, 17, 31, 64, 100, 257):
        part = plain_linear(x[:count], weight)
        worst = max(worst, float((part - whole[:count]).abs().max()))
    return worst / float(whole.abs().max())


class Adapter(NamedTuple):
    """A low-rank term beside a weight (O, I), rank r: x W^T + scale (x down^T) up^T (hpsafety/model/lora.py)."""

    down: torch.Tensor | None  # (r, I)
    up: torch.Tensor | None  # (O, r)
    scale: float


NONE = Adapter(None, None, 0.0)


def product(x_TI, weight_OI, bias_O, down_rI, up_Or, scale):
    """(linear of the weight and its adapter, what is to be kept of the adapter for backward), outside of autograd."""
    out = plain_linear(x_TI, weight_OI, bias_O)
    if down_rI is None:
        return out, ()
    low_Tr = plain_linear(x_TI, down_rI).mul_(scale)
    return out.add_(plain_linear(low_Tr, up_Or)), (down_rI, up_Or, low_Tr)


def low_gradient(grad_TO, kept, scale):
    """(T, r) gradient of x down^T; None without an adapter. kept: by `product`."""
    return plain_linear(grad_TO, kept[1].t()).mul_(scale) if kept else None


def input_gradient(grad_TO, weight_OI, kept, grad_low_Tr):
    """(T, I) gradient of x."""
    grad_x = plain_linear(grad_TO, weight_OI.t())
    return grad_x.add_(plain_linear(grad_low_Tr, kept[0].t())) if kept else grad_x


def adapter_gradients(grad_TO, x_TI, kept, grad_low_Tr):
    """Gradients of down, up and the scale, which has none."""
    return (grad_low_Tr.t() @ x_TI, grad_TO.t() @ kept[2], None) if kept else (None, None, None)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, down, up, scale):
        out, kept = product(x, weight, bias, down, up, scale)
        ctx.save_for_backward(x, weight, *kept)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx, grad):
        x, weight, *kept = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        grad_low = low_gradient(grad, kept, ctx.scale)
        return (
            input_gradient(grad, weight, kept, grad_low) if need_x else None,
            grad.t() @ x if need_weight else None,
            grad.sum(0) if need_bias else None,
            *adapter_gradients(grad, x, kept, grad_low),
        )


def linear(x_TI, weight_OI, bias_O=None, adapter: Adapter | None = None):
    """x (T, I) @ weight (O, I)^T + bias + the adapter's term: (T, O), with gradients. Dtypes: all alike."""
    down, up, scale = adapter or NONE
    if torch.compiler.is_compiling():
        out = nnf.linear(x_TI, weight_OI, bias_O)
        return out if down is None else out + nnf.linear(nnf.linear(x_TI, down) * scale, up)
    if not torch.is_grad_enabled():
        return product(x_TI, weight_OI, bias_O, down, up, scale)[0]
    return _Linear.apply(x_TI, weight_OI, bias_O, down, up, scale)
