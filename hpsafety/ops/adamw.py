"""adamw_ and grad_norm_sq: contract, checks and backends. The formula stands in hpsafety/reference/adamw.py.

Both work on lists of local tensors outside of autograd and are never traced, so they go to the backend directly.
"""

import torch

from hpsafety import reference
from hpsafety.ops import apex_backend, backends
from hpsafety.ops.registration import check

BACKENDS = ("cpu", "triton", "apex")
NORM_BACKENDS = ("cpu", "triton")
GRAD_DTYPES = (torch.float32, torch.bfloat16)
LOW_DTYPES = (torch.bfloat16,)


def _check_list(name, tensors, params, dtypes):
    """One tensor per parameter, of its shape and device, contiguous, of one of dtypes."""
    count = len(params)
    check(len(tensors) == count, "adamw_: {} must have {} tensors, got {}", name, count, len(tensors))
    for i, (x, p) in enumerate(zip(tensors, params, strict=True)):
        if x.shape != p.shape or x.device != p.device or x.dtype not in dtypes or not x.is_contiguous():
            raise ValueError(
                f"adamw_: {name}[{i}] must be a contiguous {tuple(p.shape)} of {' or '.join(map(str, dtypes))} on "
                f"{p.device}, got {tuple(x.shape)} {x.dtype} on {x.device} with strides {x.stride()}"
            )


def _check_apart(named):
    """No two tensors that are written, and none that is read, may share memory with one that is written."""
    spans = []
    for name, tensors in named.items():
        for i, x in enumerate(tensors):
            if x.numel() and not x.is_meta:
                begin = x.data_ptr()
                spans.append((begin, begin + x.numel() * x.element_size(), name, i))
    spans.sort()
    end, owner = 0, None
    for begin, stop, name, i in spans:
        if begin < end and not (name == owner[0] == "grads"):
            raise ValueError(f"adamw_: {name}[{i}] overlaps {owner[0]}[{owner[1]}] in memory")
        if stop > end:
            end, owner = stop, (name, i)


def _check_scalar(name, x, dtypes, params):
    check(
        isinstance(x, torch.Tensor) and x.dim() == 0 and x.dtype in dtypes,
        "adamw_: {} must be a 0-dim tensor of {}, got {!r}",
        name, " or ".join(map(str, dtypes)), x,
    )  # fmt: skip
    check(not params or x.device == params[0].device, "adamw_: {} must be on the parameters' device", name)


def _check_settings(lr, betas, eps, weight_decay):
    check(lr >= 0 and eps >= 0 and weight_decay >= 0, "adamw_: lr, eps and weight_decay must be >= 0, got {}, {}, {}",
          lr, eps, weight_decay)  # fmt: skip
    check(0 <= betas[0] < 1 and 0 <= betas[1] < 1, "adamw_: betas must lie in [0, 1), got {}", betas)


@torch.no_grad()
def adamw_(
    params, grads, exp_avg, exp_avg_sq, *, lr, betas, eps, weight_decay, step, grad_norm, max_norm, copies=None,
    impl=None,
):  # fmt: skip
    """One AdamW step in place, in one pass over memory: clip, update, round the copies.

    params      list of fp32 tensors
    grads       list like params, fp32 or bf16; left as they are
    exp_avg, exp_avg_sq   lists like params, fp32: the moments
    lr, betas, eps, weight_decay   as torch.optim.AdamW (decoupled decay, bias correction)
    step        0-dim int64 tensor: steps done so far; 1 is added
    grad_norm   0-dim fp32 or fp64 tensor: the gradient's norm over all parameters and ranks
    max_norm    gradients are scaled by min(1, max_norm / (grad_norm + 1e-6)); 0, negative or inf: no clipping
    copies      list of bf16 tensors like params that get the new values, rounded to nearest even; or None
    When grad_norm is not finite nothing is written and step stays. No host synchronisation; in Triton two launches,
    three with gradients of both dtypes, for any number of tensors.
    Raises ValueError on lists that do not fit and on tensors that are not contiguous or overlap in memory.
    """
    check(all(p.dtype == torch.float32 for p in params), "adamw_: params must be float32")
    copies = list(copies or ())
    _check_list("params", params, params, (torch.float32,))
    _check_list("grads", grads, params, GRAD_DTYPES)
    _check_list("exp_avg", exp_avg, params, (torch.float32,))
    _check_list("exp_avg_sq", exp_avg_sq, params, (torch.float32,))
    if copies:
        _check_list("copies", copies, params, LOW_DTYPES)
    _check_apart(
        {"params": params, "grads": grads, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "copies": copies}
    )
    _check_scalar("step", step, (torch.int64,), params)
    _check_scalar("grad_norm", grad_norm, (torch.float32, torch.float64), params)
    _check_settings(lr, betas, eps, weight_decay)
    impl = backends.resolve("adamw_", impl, BACKENDS, step.device.type)
    if impl == "reference":
        new = reference.adamw(
            params, grads, exp_avg, exp_avg_sq, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, step=step,
            grad_norm=grad_norm, max_norm=max_norm, low_dtypes=[c.dtype for c in copies],
        )  # fmt: skip
        finite = torch.isfinite(grad_norm)
        copied = [torch.where(finite, n, c) for n, c in zip(new[4], copies, strict=True)]
        written = [*params, *exp_avg, *exp_avg_sq, step, *copies]
        for old, fresh in zip(written, [*new[0], *new[1], *new[2], new[3], *copied], strict=True):
            old.copy_(fresh)
        return
    run = {
        "cpu": lambda *args: backends.cpu().adamw_(*args),
        "triton": lambda *args: backends.triton("adamw").adamw_(*args),
        "apex": apex_backend.adamw_,
    }[impl]
    run(params, grads, exp_avg, exp_avg_sq, lr, *betas, eps, weight_decay, step, grad_norm, max_norm, copies)


@torch.no_grad()
def grad_norm_sq(grads, *, impl=None):
    """The sum of squares over all tensors: what a rank adds to the global gradient norm.

    grads    list of fp32 or bf16 tensors
    returns  0-dim fp64 tensor, summed in fp64 over fixed blocks: the same bits for any number of threads, and in
             every run of one backend
    Raises ValueError on another dtype.
    """
    for i, grad in enumerate(grads):
        good = grad.dtype in GRAD_DTYPES
        check(good, "grad_norm_sq: grads[{}] must be float32 or bfloat16, got {}", i, grad.dtype)
    device = grads[0].device.type if grads else "cpu"
    impl = backends.resolve("grad_norm_sq", impl, NORM_BACKENDS, device)
    if impl == "reference" or not grads:
        return reference.grad_norm_sq(grads)
    return (backends.triton("grad_norm_sq") if impl == "triton" else backends.cpu()).grad_norm_sq(grads)
