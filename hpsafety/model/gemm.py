"""Matrix products with a weight, by the route that is fastest on this machine.

fp32 on a CPU with AVX-512: oneDNN on the plain weight runs at 100-105 GFLOP/s a thread where torch.mm (MKL) runs at
81-94 (AMD EPYC; 1,000 rows of 576 x 3,072 and 1,536 x 576), with nothing packed or copied. Weight gradients gain
nothing (both operands are new), nor does bf16 (torch.mm is oneDNN already). The route depends on the machine and the
dtype alone, never on a measurement or on the rows, so that a resumed run and a smaller batch give the same bits: oneDNN
rounds a row alike for every number of rows from 2 up.

No product with a weight has fewer than MIN_ROWS rows: smaller inputs are padded with zeros. Below that, BLAS picks
other kernels and a row's last bits would depend on how many rows stand beside it. `row_difference` measures on this
very machine whether they do above it (design section 7).
"""

import functools

import torch
import torch.nn.functional as nnf

MIN_ROWS = 16


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


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return plain_linear(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        return (
            plain_linear(grad, weight.t()) if need_x else None,
            grad.t() @ x if need_weight else None,
            grad.sum(0) if need_bias else None,
        )


def linear(x_TI, weight_OI, bias_O=None):
    """x (T, I) @ weight (O, I)^T + bias: (T, O), with gradients. Dtypes: all alike."""
    if torch.compiler.is_compiling():
        return nnf.linear(x_TI, weight_OI, bias_O)
    if not torch.is_grad_enabled():
        return plain_linear(x_TI, weight_OI, bias_O)
    return _Linear.apply(x_TI, weight_OI, bias_O)
