"""Linear layers that keep little for backward.

A trained token's memory is set by what each layer saves. Autograd would keep the input of every linear layer: the
normalised row (D floats) and the SwiGLU output (F floats). Both are recomputed here from what is kept anyway, at the
price of one elementwise pass. Under torch.compile the plain composition stands: its partitioner does the same.

Legend: T tokens, D width, F mlp width, O output width. GEMMs: hpsafety/model/gemm.py.
"""

import torch

from hpsafety import ops
from hpsafety.model.gemm import linear, plain_linear
from hpsafety.ops import backends
from hpsafety.ops.rms_norm import BACKENDS as NORM_BACKENDS
from hpsafety.ops.rms_norm import backward_op as rms_norm_backward
from hpsafety.ops.rms_norm import forward_op as rms_norm_forward
from hpsafety.ops.swiglu import BACKENDS as SWIGLU_BACKENDS
from hpsafety.ops.swiglu import backward_op as swiglu_backward
from hpsafety.ops.swiglu import forward_op as swiglu_forward


class _NormLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, norm_weight, eps, weight, bias, residual, impl):
        y, summed, _ = rms_norm_forward(x, norm_weight, eps, residual, impl)
        if residual is None:
            summed = x
        ctx.save_for_backward(summed, norm_weight, weight)
        ctx.eps, ctx.impl, ctx.has_residual = eps, impl, residual is not None
        ctx.set_materialize_grads(False)
        out = plain_linear(y, weight, bias)
        return out if residual is None else (out, summed)

    @staticmethod
    def backward(ctx, grad_out, grad_sum=None):
        summed, norm_weight, weight = ctx.saved_tensors
        need_weight, need_bias = ctx.needs_input_grad[3:5]
        if grad_out is None:
            return grad_sum, None, None, None, None, grad_sum, None
        y, _, rstd = rms_norm_forward(summed, norm_weight, ctx.eps, None, ctx.impl)
        grad_weight = grad_out.t() @ y if need_weight else None
        grad_bias = grad_out.sum(0) if need_bias else None
        del y
        grad_y = plain_linear(grad_out, weight.t())
        grad_x, grad_norm = rms_norm_backward(grad_y, grad_sum, summed, norm_weight, rstd, ctx.impl)
        return grad_x, grad_norm, None, grad_weight, grad_bias, grad_x if ctx.has_residual else None, None


def norm_linear(x_TD, norm_weight_D, eps, weight_OD, bias_O=None, residual_TD=None):
    """linear(rms_norm(x + residual)): returns (out (T, O), x + residual); keeps the sum only, not the normalised row.

    Without a residual the second return is x itself. Dtypes: all alike, fp32 or bf16.
    """
    impl = backends.resolve("rms_norm", None, NORM_BACKENDS, x_TD.device.type)
    if impl == "reference" or torch.compiler.is_compiling() or not torch.is_grad_enabled():
        normed = ops.rms_norm(x_TD, norm_weight_D, eps, residual_TD, impl=impl)
        y, summed = (normed, x_TD) if residual_TD is None else normed
        return linear(y, weight_OD, bias_O), summed
    out = _NormLinear.apply(x_TD, norm_weight_D, eps, weight_OD, bias_O, residual_TD, impl)
    return (out, x_TD) if residual_TD is None else out


class _SwiGLULinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up, weight, bias, impl):
        ctx.save_for_backward(gate_up, weight)
        ctx.impl = impl
        return plain_linear(swiglu_forward(gate_up, impl), weight, bias)

    @staticmethod
    def backward(ctx, grad_out):
        gate_up, weight = ctx.saved_tensors
        _, need_weight, need_bias = ctx.needs_input_grad[:3]
        grad_gate_up, y = swiglu_backward(plain_linear(grad_out, weight.t()), gate_up, ctx.impl)
        grad_weight = grad_out.t() @ y if need_weight else None
        return grad_gate_up, grad_weight, grad_out.sum(0) if need_bias else None, None


def swiglu_linear(gate_up_T2F, weight_DF, bias_D=None):
    """linear(swiglu(gate_up)): (T, D); keeps gate_up only."""
    impl = backends.resolve("swiglu", None, SWIGLU_BACKENDS, gate_up_T2F.device.type)
    if impl == "reference" or torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return linear(ops.swiglu(gate_up_T2F, impl=impl), weight_DF, bias_D)
    return _SwiGLULinear.apply(gate_up_T2F, weight_DF, bias_D, impl)
