"""attention: contract, checks and backends. The formula stands in hpsafety/reference/attention.py."""

import math

import torch

from hpsafety import reference
from hpsafety.ops import backends, flash_attn_backend
from hpsafety.ops.registration import Op, check
from hpsafety.ops.rows import values_readable
from hpsafety.reference.attention import check_segments

BACKENDS = ("cpu", "triton", "cuda", "flash_attn")
MAX_HEAD_DIM = 256


def _fake(q, k, v, segments, softmax_scale, deterministic):
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)


def _fake_backward(grad, q, k, v, out, lse, segments, softmax_scale, deterministic):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


# The C++, Triton and CUDA kernels are deterministic always; the flag is for backends where it has a price.
_backward_op = Op(
    "attention_backward",
    "(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor segments, float softmax_scale,"
    " bool deterministic) -> (Tensor, Tensor, Tensor)",
    {
        "cpu": lambda *args: backends.cpu().attention_backward(*args[:-1]),
        "triton": lambda *args: backends.triton("attention_backward").attention_backward(*args),
        "cuda": lambda *args: backends.cuda("attention_backward").attention_backward(*args),
        "flash_attn": flash_attn_backend.attention_backward,
    },
    _fake_backward,
)


def _setup_context(ctx, inputs, output):
    q, k, v, segments, ctx.softmax_scale, ctx.deterministic, ctx.impl = inputs
    out, lse = output
    ctx.save_for_backward(q, k, v, out, lse, segments)
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, _):
    if grad is None:
        return (None,) * 7
    q, k, v, out, lse, segments = ctx.saved_tensors
    grads = _backward_op(grad, q, k, v, out, lse, segments, ctx.softmax_scale, ctx.deterministic, ctx.impl)
    return (*grads, None, None, None, None)


def _on_gpu(backend):
    def attention(q, k, v, segments, softmax_scale, deterministic):
        if values_readable(segments):
            check_segments(segments.cpu(), q.shape[0])
        return backend("attention").attention(q, k, v, segments, softmax_scale, deterministic)

    return attention


_op = Op(
    "attention",
    "(Tensor q, Tensor k, Tensor v, Tensor segments, float softmax_scale, bool deterministic) -> (Tensor, Tensor)",
    {
        "cpu": lambda *args: backends.cpu().attention(*args[:-1]),
        "triton": _on_gpu(backends.triton),
        "cuda": _on_gpu(backends.cuda),
        "flash_attn": flash_attn_backend.attention,
    },
    _fake,
    _setup_context,
    _backward,
)


def _check(q, k, v, segments, softmax_scale):
    check(q.dim() == 3, "attention: q must be (T, H, K), got shape {}", tuple(q.shape))
    check(
        k.dim() == 3 and k.shape[0] == q.shape[0] and k.shape[2] == q.shape[2] and k.dtype == q.dtype,
        "attention: k must be ({}, G, {}) {}, got {} {}",
        q.shape[0], q.shape[2], q.dtype, tuple(k.shape), k.dtype,
    )  # fmt: skip
    check(
        v.shape == k.shape and v.dtype == k.dtype,
        "attention: v must be like k {} {}, got {} {}",
        tuple(k.shape), k.dtype, tuple(v.shape), v.dtype,
    )  # fmt: skip
    check(
        k.shape[1] > 0 and q.shape[1] > 0 and q.shape[1] % k.shape[1] == 0,
        "attention: the {} query heads must be a multiple of the {} kv heads",
        q.shape[1], k.shape[1],
    )  # fmt: skip
    check(
        1 <= q.shape[2] <= MAX_HEAD_DIM,
        "attention: head dim must be 1 to {}, got {}",
        MAX_HEAD_DIM,
        q.shape[2],
    )
    check(
        segments.dim() == 2 and segments.shape[1] == 4 and segments.dtype == torch.int32,
        "attention: segments must be (S, 4) torch.int32, got {} {}",
        tuple(segments.shape), segments.dtype,
    )  # fmt: skip
    check(
        k.device == q.device and v.device == q.device and segments.device == q.device,
        "attention: all tensors must be on one device; q is on {}, k on {}, v on {}, segments on {}",
        q.device, k.device, v.device, segments.device,
    )  # fmt: skip
    check(
        math.isfinite(softmax_scale) and softmax_scale > 0,
        "attention: softmax_scale must be positive, got {}",
        softmax_scale,
    )


def attention(q, k, v, segments, softmax_scale=None, deterministic=False, *, impl=None):
    """Packed causal attention with shared prefixes and grouped query heads.

    q              (T, H, K) fp32 or bf16 (flash_attn: bf16 or fp16; cuda: bf16, K 64 or 128), K <= 256; may be a view
                   whose last dim is contiguous
    k, v           (T, G, K) like q; query head h reads kv head h // (H / G)
    segments       (S, 4) int32: start, end, prefix_start, prefix_end, sorted by start. Row i of start..end-1 sees
                   all rows prefix_start..prefix_end-1 and the rows start..i; equal prefix bounds mean no prefix
    softmax_scale  factor of the scores, 1/sqrt(K) by default
    deterministic  the same bits at every run; the C++ kernels always are, for any number of threads, and the Triton
                   and CUDA kernels, at the price of seven products instead of five in backward
    returns        (T, H, K) like q, fresh; rows of no segment are zero and get zero gradients
    Saved for backward: q, k, v, the output, and lse (T, H) fp32, base 2.
    A NaN reaches its own row and the rows that see it, no other. A score of -inf has weight 0; a row of no
    other score is NaN, as in torch.
    Raises ValueError on shapes, dtypes, devices or segments that do not fit (empty, unsorted, overlapping, out of
    range).
    """
    softmax_scale = q.shape[-1] ** -0.5 if softmax_scale is None else float(softmax_scale)
    _check(q, k, v, segments, softmax_scale)
    impl = backends.resolve("attention", impl, BACKENDS, q.device.type, q.dtype, q.shape[2])
    if impl == "reference":
        return reference.attention(q, k, v, segments, softmax_scale)
    check(
        q.dtype in (torch.float32, torch.bfloat16) or impl == "flash_attn",
        "attention: q must be float32 or bfloat16, got {}",
        q.dtype,
    )
    return _op(q, k, v, segments, softmax_scale, bool(deterministic), impl)[0]
