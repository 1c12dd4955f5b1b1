"""Stand-ins for optional packages: plain torch with the signatures, layouts and traps of flash-attn 2.8 and apex.

They let the code that calls the packages run, forward and backward, where neither is installed. Signatures are held
against hpsafety/ops/signatures.py. What a real function leaves unwritten is filled with NaN here, and what would crash
or silently go wrong there is an assertion here.
"""

import numpy as np
import torch

calls = []  # (function, what tells the calls of a test apart)


def _sequences(cu_seqlens, max_seqlen, total):
    assert cu_seqlens.dtype == torch.int32 and cu_seqlens.is_contiguous() and cu_seqlens.dim() == 1
    offsets = cu_seqlens.tolist()
    lengths = [b - a for a, b in zip(offsets, offsets[1:], strict=False)]
    assert lengths, "batch size must be positive"
    assert offsets[0] == 0 and offsets[-1] == total, "rows of no sequence would stay unwritten"
    assert min(lengths) > 0, "empty sequences have hung or crashed"
    assert max(lengths) <= max_seqlen
    return offsets


def _loads(*tensors):
    """The kernels' 16-byte loads: contiguous last dim, strides and address in multiples of 8 elements."""
    for x in tensors:
        assert x.stride(-1) == 1 and x.shape[-1] % 8 == 0 and x.shape[-1] <= 256
        assert all(s % 8 == 0 for s in x.stride()[:-1]) and x.data_ptr() % 16 == 0, "misaligned load"


def _scores(q, k, scale, causal):
    """(heads, rows, keys) fp32 of one sequence; the causal mask is aligned at the bottom right."""
    group = q.shape[1] // k.shape[1]
    scores = torch.einsum("ihd,jhd->hij", q.float(), k.float().repeat_interleave(group, 1)) * scale
    if causal:
        i, j = torch.arange(q.shape[0])[:, None], torch.arange(k.shape[0])
        scores = scores.masked_fill(j > i + k.shape[0] - q.shape[0], float("-inf"))
    return scores


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False,
    block_table=None,
):  # fmt: skip
    """(out, softmax_lse (nheads, total_q) natural, S_dmask)."""
    assert dropout_p == softcap == 0.0 and window_size == (-1, -1) and alibi_slopes is block_table is None
    assert return_attn_probs and q.dtype == k.dtype == v.dtype
    assert max_seqlen_q > 1, "a bound of 1 takes the decoding path, which keeps lse in another order"
    _loads(q, k, v)
    offsets_q = _sequences(cu_seqlens_q, max_seqlen_q, q.shape[0])
    offsets_k = _sequences(cu_seqlens_k, max_seqlen_k, k.shape[0])
    calls.append(("forward", len(offsets_q) - 1, causal))
    out = torch.full_like(q, torch.nan, memory_format=torch.contiguous_format)
    lse = torch.full((q.shape[1], q.shape[0]), torch.nan)
    group = q.shape[1] // k.shape[1]
    for i in range(len(offsets_q) - 1):
        a, b, c, d = *offsets_q[i : i + 2], *offsets_k[i : i + 2]
        scores = _scores(q[a:b], k[c:d], softmax_scale, causal)
        total = scores.logsumexp(-1)
        weights = (scores - total[..., None]).exp()
        out[a:b] = torch.einsum("hij,jhd->ihd", weights, v[c:d].float().repeat_interleave(group, 1)).to(
            q.dtype
        )
        lse[:, a:b] = torch.where(total.isnan(), torch.inf, total)  # as the kernel does
    return out, lse, torch.empty(0)


def _flash_attn_varlen_backward(
    dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
    softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, deterministic, rng_state=None,
    zero_tensors=False,
):  # fmt: skip
    """Writes dq, dk, dv from the given out and lse, whatever call they came from; returns softmax_d."""
    assert (
        dropout_p == softcap == 0.0 and window_size_left == window_size_right == -1 and alibi_slopes is None
    )
    assert softmax_lse.shape == (q.shape[1], q.shape[0]) and softmax_lse.is_contiguous()
    assert softmax_lse.dtype == torch.float32
    assert dout.shape == out.shape == dq.shape == q.shape and dk.shape == dv.shape == k.shape == v.shape
    assert dout.dtype == q.dtype == k.dtype == v.dtype == out.dtype == dq.dtype == dk.dtype == dv.dtype
    _loads(dout, q, k, v, out, dq, dk, dv)
    offsets_q = _sequences(cu_seqlens_q, max_seqlen_q, q.shape[0])
    offsets_k = _sequences(cu_seqlens_k, max_seqlen_k, k.shape[0])
    calls.append(("backward", len(offsets_q) - 1, causal, deterministic))
    group = q.shape[1] // k.shape[1]
    delta = (dout.float() * out.float()).sum(-1).t()  # (heads, rows)
    for i in range(len(offsets_q) - 1):
        a, b, c, d = *offsets_q[i : i + 2], *offsets_k[i : i + 2]
        wide_k, wide_v = (x[c:d].float().repeat_interleave(group, 1) for x in (k, v))
        p = (_scores(q[a:b], k[c:d], softmax_scale, causal) - softmax_lse[:, a:b, None]).exp()
        dp = torch.einsum("ihd,jhd->hij", dout[a:b].float(), wide_v)
        ds = p * (dp - delta[:, a:b, None]) * softmax_scale
        dq[a:b] = torch.einsum("hij,jhd->ihd", ds, wide_k)
        # One rounded dK, dV per query head, and their sum over the heads of a group rounded again: as the package does.
        wide = (
            torch.einsum("hij,ihd->jhd", ds, q[a:b].float()),
            torch.einsum("hij,ihd->jhd", p, dout[a:b].float()),
        )
        for grad, x in zip((dk, dv), wide, strict=True):
            x = x.to(q.dtype).float() if group > 1 else x
            grad[c:d] = x.unflatten(1, (-1, group)).sum(2)
    return torch.empty(q.shape[1], q.shape[0] + 128 * (len(offsets_q) - 1))


FLASH_ATTN = {f.__name__: f for f in (flash_attn_varlen_func, _flash_attn_varlen_backward)}


def _lists(chunk_size, noop_flag, tensor_lists, depth):
    assert isinstance(chunk_size, int) and chunk_size > 0
    assert noop_flag.dtype == torch.int32 and noop_flag.numel() == 1
    assert len(tensor_lists) == depth and len(tensor_lists[0]) > 0
    for tensors in tensor_lists:
        assert len(tensors) == len(tensor_lists[0]) and len({x.dtype for x in tensors}) == 1
        for x, first in zip(tensors, tensor_lists[0], strict=True):
            assert x.is_contiguous() and x.numel() == first.numel() and not x.requires_grad
            assert 0 < x.numel() < 2**31, "an empty last tensor loses the launch; the indices are int32"


# The parameters of the C++ functions have no names; these annotations are what pybind11 writes into their docstrings.
def multi_tensor_scale(arg0, arg1, arg2, arg3):
    """multi_tensor_scale(arg0: int, arg1: torch.Tensor, arg2: List[List[torch.Tensor]], arg3: float) -> None"""
    _lists(arg0, arg1, arg2, 2)
    calls.append(("scale", len(arg2[0])))
    for source, target in zip(*arg2, strict=True):
        target.copy_(source.float() * arg3)
        arg1.bitwise_or_(torch.isfinite(source).all().logical_not())


def multi_tensor_adam_capturable(arg0, arg1, arg2, arg3, arg4, arg5, arg6, arg7, arg8, arg9, arg10, arg11):
    """multi_tensor_adam_capturable(arg0: int, arg1: torch.Tensor, arg2: List[List[torch.Tensor]], \
arg3: torch.Tensor, arg4: float, arg5: float, arg6: float, arg7: torch.Tensor, arg8: int, arg9: int, arg10: float, \
arg11: torch.Tensor) -> None"""
    _lists(arg0, arg1, arg2, 4)
    lr, step, inv_scale = arg3, arg7, arg11
    assert lr.dtype == inv_scale.dtype == torch.float32 and step.dtype == torch.int32
    assert lr.numel() == step.numel() == inv_scale.numel() == 1
    assert (arg8, arg9) == (1, 1), "decoupled decay, bias correction"
    beta1, beta2, eps, decay = (float(np.float32(x)) for x in (arg4, arg5, arg6, arg10))
    calls.append(("adam", len(arg2[0])))
    go = arg1 != 1
    correction1, correction2 = (1 - torch.tensor(beta).pow(step) for beta in (beta1, beta2))
    for g, p, m, v in zip(*arg2, strict=True):
        assert g.dtype == p.dtype and m.dtype == v.dtype == torch.float32
        new_g = g.float() * inv_scale
        new_m = beta1 * m + (1 - beta1) * new_g
        new_v = beta2 * v + (1 - beta2) * new_g * new_g
        update = new_m / correction1 / ((new_v / correction2).sqrt() + eps) + decay * p
        for old, new in ((g, new_g), (m, new_m), (v, new_v), (p, p - lr * update)):
            old.copy_(torch.where(go, new, old))  # the gradient is overwritten too


def rms_forward_affine(arg0, arg1, arg2, arg3):
    """rms_forward_affine(arg0: torch.Tensor, arg1: Tuple[int, ...], arg2: torch.Tensor, arg3: float) \
-> list[torch.Tensor]"""
    x, shape, weight, eps = arg0, arg1, arg2, arg3
    assert x.is_contiguous() and weight.is_contiguous() and list(weight.shape) == shape == [x.shape[-1]]
    assert x.numel(), "a grid without blocks is a CUDA error"
    calls.append(("rms_forward",))
    rstd = torch.rsqrt(x.float().square().mean(-1) + eps)
    return [weight * (x.float() * rstd[:, None]).to(x.dtype), rstd]


def rms_backward_affine(arg0, arg1, arg2, arg3, arg4, arg5, arg6):
    """rms_backward_affine(arg0: torch.Tensor, arg1: torch.Tensor, arg2: torch.Tensor, \
arg3: collections.abc.Sequence[int], arg4: torch.Tensor, arg5: typing.SupportsFloat | typing.SupportsIndex, \
arg6: bool) -> list[torch.Tensor]"""
    grad, rstd, x, shape, weight, _, memory_efficient = arg0, arg1, arg2, arg3, arg4, arg5, arg6
    assert all(t.is_contiguous() for t in (grad, rstd, x, weight)) and list(weight.shape) == shape
    assert rstd.dtype == torch.float32 and memory_efficient is False and x.numel()
    calls.append(("rms_backward",))
    normed = x.float() * rstd[:, None]
    wg = weight.float() * grad.float()
    grad_x = (wg - normed * (wg * normed).mean(-1, keepdim=True)) * rstd[:, None]
    return [grad_x.to(x.dtype), (grad.float() * normed).sum(0).to(weight.dtype)]


class Compiled:
    """A function without a Python signature, as pybind11's are: its docstring alone tells its parameters."""

    def __init__(self, function):
        self.__doc__, self.call = function.__doc__, function

    def __call__(self, *args):
        return self.call(*args)


ADAM = {f.__name__: Compiled(f) for f in (multi_tensor_scale, multi_tensor_adam_capturable)}
RMS_NORM = {f.__name__: Compiled(f) for f in (rms_forward_affine, rms_backward_affine)}
