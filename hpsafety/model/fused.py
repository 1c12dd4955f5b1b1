"""Linear layers that keep little for backward.

A trained token's memory is set by what each layer saves. Autograd would keep the input of every linear layer: the
normalised row (D floats) and the SwiGLU output (F floats). Both are recomputed here from what is kept anyway, at the
price of one elementwise pass. Under torch.compile the plain composition stands: its partitioner does the same.

Legend: T tokens, D width, F mlp width, O output width. GEMMs: hpsafety/model/gemm.py.
"""

import torch

from hpsafety import ops
from hpsafety.model.gemm import NONE, adapter_gradients, input_gradient, linear, low_gradient, product
from hpsafety.ops import backends
from hpsafety.ops.rms_norm import BACKENDS as NORM_BACKENDS
from hpsafety.ops.rms_norm import backward_op as rms_norm_backward
from hpsafety.ops.rms_norm import forward_op as rms_norm_forward
from hpsafety.ops.swiglu import BACKENDS as SWIGLU_BACKENDS
from hpsafety.ops.swiglu import backward_op as swiglu_backward
from hpsafety.ops.swiglu import forward_op as swiglu_forward


class _NormLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, norm_weight, eps, weight, bias, residual, impl, down, up, scale):
        y, summed, _ = rms_norm_forward(x, norm_weight, eps, residual, impl)
        if residual is None:
            summed = x
        out, kept = product(y, weight, bias, down, up, scale)
        ctx.save_for_backward(summed, norm_weight, weight, *kept)
        ctx.eps, ctx.impl, ctx.has_residual, ctx.scale = eps, impl, residual is not None, scale
        ctx.set_materialize_grads(False)
        return out if residual is None else (out, summed)

    @staticmethod
    def backward(ctx, grad_out, grad_sum=None):
        summed, norm_weight, weight, *kept = ctx.saved_tensors
        need_weight, need_bias = ctx.needs_input_grad[3:5]
        if grad_out is None:
            return grad_sum, None, None, None, None, grad_sum, None, None, None, None
        y, _, rstd = rms_norm_forward(summed, norm_weight, ctx.eps, None, ctx.impl)
        grad_weight = grad_out.t() @ y if need_weight else None
        grad_bias = grad_out.sum(0) if need_bias else None
        grad_low = low_gradient(grad_out, kept, ctx.scale)
        grad_adapter = adapter_gradients(grad_out, y, kept, grad_low)
        del y
        grad_y = input_gradient(grad_out, weight, kept, grad_low)
        grad_x, grad_norm = rms_norm_backward(grad_y, grad_sum, summed, norm_weight, rstd, ctx.impl)
        grad_residual = grad_x if ctx.has_residual else None
        return grad_x, grad_norm, None, grad_weight, grad_bias, grad_residual, None, *grad_adapter


def norm_linear(x_TD, norm_weight_D, eps, weight_OD, bias_O=None, residual_TD=None, adapter=None):
    """linear(rms_norm(x + residual)): returns (out (T, O), x + residual); keeps the sum only, not the normalised row.

    Without a residual the second return is x itself. Dtypes: all alike, fp32 or bf16.
    adapter  of the weight (gemm.Adapter), or None
    """
    impl = backends.resolve("rms_norm", None, NORM_BACKENDS, x_TD.device.type)
    if impl == "reference" or torch.compiler.is_compiling() or not torch.is_grad_enabled():
        normed = ops.rms_norm(x_TD, norm_weight_D, eps, residual_TD, impl=impl)
        y, summed = (normed, x_TD) if residual_TD is None else normed
        return linear(y, weight_OD, bias_O, adapter), summed
    out = _NormLinear.apply(
        x_TD, norm_weight_D, eps, weight_OD, bias_O, residual_TD, impl, *(adapter or NONE)
    )
    return (out, x_TD) if residual_TD is None else out


class _SwiGLULinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up, weight, bias, impl, down, up, scale):
        out, kept = product(swiglu_forward(gate_up, impl), weight, bias, down, up, scale)
        ctx.save_for_backward(gate_up, weight, *kept)
        ctx.impl, ctx.scale = impl, scale
        return out

    @staticmethod
    def backward(ctx, grad_out):
        gate_up, weight, *kept = ctx.saved_tensors
        _, need_weight, need_bias = ctx.needs_input_grad[:3]
        grad_low = low_gradient(grad_out, kept, ctx.scale)
        grad_y = input_gradient(grad_out, weight, kept, grad_low)
        grad_gate_up, y = swiglu_backward(grad_y, gate_up, ctx.impl)
        grad_weight = grad_out.t() @ y if need_weight else None
        grad_bias = grad_out.sum(0) if need_bias else None
        return grad_gate_up, grad_weight, grad_bias, None, *adapter_gradients(grad_out, y, kept, grad_low)


def swiglu_linear(gate_up_T2F, weight_DF, bias_D=None, adapter=None):
    """linear(swiglu(gate_up)): (T, D); keeps gate_up only. adapter: of the weight (gemm.Adapter), or None."""
    impl = backends.resolve("swiglu", None, SWIGLU_BACKENDS, gate_up_T2F.device.type)
    if impl == "reference" or torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return linear(ops.swiglu(gate_up_T2F, impl=impl), weight_DF, bias_D, adapter)
    return _SwiGLULinear.apply(gate_up_T2F, weight_DF, bias_D, impl, *(adapter or NONE))
