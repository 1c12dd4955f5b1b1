"""adamw_ and rms_norm through NVIDIA's apex, where it is built with its CUDA extensions: the only file that imports it.

The package is called apex, but so is an unrelated one on PyPI. So nothing here imports `apex`: the extension modules
that hold the kernels are asked for by their own names.
"""

import functools
import importlib
import importlib.util
import math
from pathlib import Path

import torch

from hpsafety.ops import signatures

PACKAGE = "apex"
MODULES = {  # op -> the extension module, and what is called there
    "adamw_": ("amp_C", ("multi_tensor_scale", "multi_tensor_adam_capturable")),
    "rms_norm": ("fused_layer_norm_cuda", ("rms_forward_affine", "rms_backward_affine")),
}
INSTALL = (
    "git clone https://github.com/NVIDIA/apex && cd apex && "
    "APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install -v --no-build-isolation ."
)
BRINGS = "fused AdamW and RMSNorm for ops.adamw_ and ops.rms_norm"
CHUNK = 2048 * 32  # elements of a kernel block; the package's own choice
PIECE = (
    1 << 26
)  # elements of one call: bounds the scratch copy (256 MiB) and keeps the kernels' int32 indices small


def functions(op: str) -> dict:
    """Recorded name -> the package's function."""
    module, names = MODULES[op]
    module = importlib.import_module(module)
    return {name: getattr(module, name) for name in names}


def _absent(module: str) -> str:
    """Why an extension module is not there: no apex, the other apex, or one without its kernels."""
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return f"NVIDIA's apex is not installed: {INSTALL}"
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    if any((folder / "multi_tensor_apply").is_dir() for folder in folders):
        return f"this apex was built without its CUDA extensions ({module} is missing): {INSTALL}"
    return f"the installed apex is an unrelated package of PyPI, not NVIDIA's: pip uninstall apex, then {INSTALL}"


@functools.cache
def missing(op: str) -> str | None:
    """Why the package cannot serve `op` on this machine, with the remedy; None when it can. Looked at once."""
    module = MODULES[op][0]
    if importlib.util.find_spec(module) is None:
        return _absent(module)
    try:
        changed = signatures.mismatch(functions(op))
    except (ImportError, AttributeError, OSError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        return f"apex's {module} does not load ({reason}); build it for this torch: {INSTALL}"
    return (
        f"this apex is not the one that the calls were written for: {changed}; {INSTALL}" if changed else None
    )


def unavailable(op: str, device: str, dtype: torch.dtype | None) -> str | None:
    """Why a call cannot be served; None when it can."""
    if device != "cuda":
        return f"apex is not for CPUs: it takes CUDA tensors, got device {device}"
    return missing(op)


def _runs(lists):
    """Cuts lists of like tensors into calls: [[pieces of the first], ...] of at most PIECE elements each.

    A call takes one dtype per list, so gradients go by dtype. Empty tensors are left out: where one stands last in a
    call, the package never launches what it had collected.
    """
    for dtype in sorted({x.dtype for x in lists[0]}, key=str):
        run, size = [], 0
        for tensors in zip(*lists, strict=True):
            if tensors[0].dtype != dtype or not tensors[0].numel():
                continue
            for pieces in zip(*(x.detach().view(-1).split(PIECE) for x in tensors), strict=True):
                if run and size + pieces[0].numel() > PIECE:
                    yield list(map(list, zip(*run, strict=True)))
                    run, size = [], 0
                run.append(pieces)
                size += pieces[0].numel()
        if run:
            yield list(map(list, zip(*run, strict=True)))


def adamw_(
    params, grads, exp_avg, exp_avg_sq, lr, beta1, beta2, eps, weight_decay, step, grad_norm, max_norm, copies
):
    """ops.adamw_ by multi_tensor_adam_capturable: rate, step, clip factor and the skip flag stay on the device.

    That kernel writes the scaled gradient back and wants it in the parameters' dtype; ours stay as they are, so it
    gets fp32 scratch copies. It writes no low-precision copies beside fp32 gradients either: they are torch's work.
    """
    finite = torch.isfinite(grad_norm)
    step.add_(finite)
    device = step.device
    skip = finite.logical_not().to(torch.int32).reshape(1)
    ignored = torch.zeros_like(skip)  # multi_tensor_scale's own flag: the norm alone decides
    rate = torch.full((1,), lr, dtype=torch.float32, device=device)
    clip = torch.ones((1,), dtype=torch.float32, device=device)
    if 0 < max_norm < math.inf:
        clip = (max_norm / (grad_norm.double() + 1e-6)).clamp(max=1.0).float().reshape(1)
    count = step.to(torch.int32).reshape(1)
    call = functions("adamw_")
    for pieces in _runs([grads, params, exp_avg, exp_avg_sq]):
        scratch = [torch.empty_like(g, dtype=torch.float32) for g in pieces[0]]
        call["multi_tensor_scale"](CHUNK, ignored, [pieces[0], scratch], 1.0)
        decoupled, correct_bias = 1, 1
        call["multi_tensor_adam_capturable"](
            CHUNK, skip, [scratch, *pieces[1:]], rate, beta1, beta2, eps, count, decoupled, correct_bias,
            weight_decay, clip,
        )  # fmt: skip
    for param, copy in zip(params, copies, strict=False):
        copy.copy_(torch.where(finite, param.to(copy.dtype), copy))


def rms_norm(x, weight, eps, residual):
    """Forward of ops.rms_norm: y, x + residual (empty without one), rstd (T,) fp32."""
    summed = x.new_empty((0,)) if residual is None else x + residual
    x = (x if residual is None else summed).contiguous()
    if not x.numel():
        return x.new_empty(x.shape), summed, x.new_empty(x.shape[:1], dtype=torch.float32)
    y, rstd = functions("rms_norm")["rms_forward_affine"](x, [x.shape[1]], weight.contiguous(), eps)
    return y, summed.contiguous(), rstd


def rms_norm_backward(grad_y, grad_sum, x, weight, rstd):
    """(grad_x, grad_weight) of ops.rms_norm; grad_sum, where there is one, is added to grad_x."""
    if not x.numel():
        return x.new_empty(x.shape), torch.zeros_like(weight, memory_format=torch.contiguous_format)
    backward = functions("rms_norm")["rms_backward_affine"]
    # eps is read in the memory-efficient mode alone (the last argument), which recomputes x from y
    tensors = (grad_y.contiguous(), rstd, x.contiguous(), [x.shape[1]], weight.contiguous())
    grad_x, grad_weight = backward(*tensors, 0.0, False)
    return grad_x if grad_sum is None else grad_x + grad_sum, grad_weight
