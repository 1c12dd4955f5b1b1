"""rope, rope_ and rope_qkv: contract, checks and backends. The formula stands in hpsafety/reference/rope.py.

All run on one kernel, which reads and writes strided heads; the backward is the same kernel with -sin.
"""

import torch

from hpsafety import reference
from hpsafety.ops import backends
from hpsafety.ops.registration import Op, check
from hpsafety.ops.rows import values_readable

BACKENDS = ("cpu", "triton")
DTYPES = (torch.float32, torch.bfloat16)


def _cpu(q, k, positions, cos, sin, inverse):
    q_out, k_out = q.new_empty(q.shape), k.new_empty(k.shape)
    backends.cpu().rope_(q, k, None, positions, cos, sin, inverse, q_out, k_out, None)
    return q_out, k_out


def _fake(q, k, positions, cos, sin, inverse):
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _setup_context(ctx, inputs, output):
    _, _, positions, cos, sin, ctx.inverse, ctx.impl = inputs
    ctx.save_for_backward(positions, cos, sin)


def _backward(ctx, grad_q, grad_k):
    return *_op(grad_q, grad_k, *ctx.saved_tensors, not ctx.inverse, ctx.impl), None, None, None, None, None


_op = Op(
    "rope",
    "(Tensor q, Tensor k, Tensor positions, Tensor cos, Tensor sin, bool inverse) -> (Tensor, Tensor)",
    {"cpu": _cpu, "triton": lambda *args: backends.triton("rope").rope(*args)},
    _fake,
    _setup_context,
    _backward,
)


def _cpu_qkv(qkv, positions, cos, sin):
    t, g, j, size = qkv.shape
    j -= 2
    q, k, v = qkv.new_empty((t, g * j, size)), qkv.new_empty((t, g, size)), qkv.new_empty((t, g, size))
    q_in, k_in, v_in = qkv.split_with_sizes((j, 1, 1), 2)
    backends.cpu().rope_(q_in, k_in, v_in, positions, cos, sin, False, q.view(t, g, j, size), k, v)
    return q, k, v


def _fake_qkv(qkv, positions, cos, sin):
    t, g, j, size = qkv.shape
    kv = (t, g, size)
    return qkv.new_empty((t, g * (j - 2), size)), qkv.new_empty(kv), qkv.new_empty(kv)


def _grad_shape(grad_q, grad_k):
    t, g, size = grad_k.shape
    return t, g, grad_q.shape[1] // g + 2, size


def _cpu_qkv_backward(grad_q, grad_k, grad_v, positions, cos, sin):
    shape = t, g, j, size = _grad_shape(grad_q, grad_k)
    grad = grad_q.new_empty(shape)
    q_out, k_out, v_out = grad.split_with_sizes((j - 2, 1, 1), 2)
    grad_q = grad_q.unflatten(1, (g, j - 2))
    backends.cpu().rope_(grad_q, grad_k, grad_v, positions, cos, sin, True, q_out, k_out, v_out)
    return grad


_qkv_backward_op = Op(
    "rope_qkv_backward",
    "(Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor positions, Tensor cos, Tensor sin) -> Tensor",
    {"cpu": _cpu_qkv_backward, "triton": lambda *args: backends.triton("rope_qkv").rope_qkv_backward(*args)},
    lambda grad_q, grad_k, *_: grad_q.new_empty(_grad_shape(grad_q, grad_k)),
)


def _setup_context_qkv(ctx, inputs, output):
    _, positions, cos, sin, ctx.impl = inputs
    ctx.save_for_backward(positions, cos, sin)


def _backward_qkv(ctx, grad_q, grad_k, grad_v):  # autograd hands over zeros for an output that was not used
    return _qkv_backward_op(grad_q, grad_k, grad_v, *ctx.saved_tensors, ctx.impl), None, None, None, None


_qkv_op = Op(
    "rope_qkv",
    "(Tensor qkv, Tensor positions, Tensor cos, Tensor sin) -> (Tensor, Tensor, Tensor)",
    {"cpu": _cpu_qkv, "triton": lambda *args: backends.triton("rope_qkv").rope_qkv(*args)},
    _fake_qkv,
    _setup_context_qkv,
    _backward_qkv,
)


def _check_tables(op, x, positions, cos, sin, impl):
    """What all three ask of the tables, and of the heads x (T, ..., K). The C++ kernel checks the positions itself."""
    t, size = x.shape[0], x.shape[-1]
    check(size % 2 == 0, "{}: the head dim K must be even, got {}", op, size)
    check(
        positions.shape == (t,) and positions.dtype == torch.int32,
        "{}: positions must be ({},) int32, got {} {}",
        op, t, tuple(positions.shape), positions.dtype,
    )  # fmt: skip
    check(
        cos.dim() == 2 and cos.shape[1] == size // 2 and sin.shape == cos.shape,
        "{}: cos and sin must be (max_pos, {}), got {} and {}",
        op, size // 2, tuple(cos.shape), tuple(sin.shape),
    )  # fmt: skip
    check(
        positions.device == x.device and cos.device == x.device and sin.device == x.device,
        "{}: positions, cos and sin must be on {}, got {}, {} and {}",
        op, x.device, positions.device, cos.device, sin.device,
    )  # fmt: skip
    if impl != "reference":
        check(x.dtype in DTYPES, "{}: expected float32 or bfloat16, got {}; call .float() first", op, x.dtype)
        check(
            cos.dtype == torch.float32 and sin.dtype == torch.float32,
            "{}: cos and sin must be float32, got {} and {}", op, cos.dtype, sin.dtype,
        )  # fmt: skip
    if impl != "cpu" and t and values_readable(positions):
        low, high = positions.aminmax()
        check(
            0 <= int(low) and int(high) < cos.shape[0],
            "{}: positions must lie in [0, {}), got {} to {}", op, cos.shape[0], int(low), int(high),
        )  # fmt: skip


def _check_heads(op, q, k):
    check(
        q.dim() == 3 and k.dim() == 3 and q.shape[::2] == k.shape[::2],
        "{}: q must be (T, H, K) and k (T, G, K), got {} and {}", op, tuple(q.shape), tuple(k.shape),
    )  # fmt: skip
    check(
        q.dtype == k.dtype and q.device == k.device,
        "{}: k must be like q {} on {}, got {} on {}", op, q.dtype, q.device, k.dtype, k.device,
    )  # fmt: skip


def rope(q, k, positions, cos, sin, *, impl=None):
    """Rotary position embedding: rotates the pairs (i, i + K/2) of every head (rotate-half, as HF Llama).

    q          (T, H, K) fp32 or bf16
    k          (T, G, K) like q
    positions  (T,) int32 in [0, max_pos)
    cos, sin   (max_pos, K/2) fp32; no gradient flows to them
    returns    q, k: fresh, contiguous; the arithmetic is fp32
    NaN and inf stay in their pair.
    Raises ValueError on shapes, dtypes or devices that do not fit, and on positions out of range: of CUDA tensors
    these are read with HPSAFETY_CHECK=1 alone.
    """
    _check_heads("rope", q, k)
    impl = backends.resolve("rope", impl, BACKENDS, q.device.type)
    _check_tables("rope", q, positions, cos, sin, impl)
    if impl == "reference":
        return reference.rope(q, k, positions, cos, sin)
    return _op(q, k, positions, cos, sin, False, impl)


def rope_(q, k, positions, cos, sin, *, impl=None):
    """rope in place, for decoding: writes to q and k (last stride 1) and returns them. Never traced.

    Raises ValueError as rope does, and where a gradient would have to flow.
    """
    check(
        not torch.is_grad_enabled() or not (q.requires_grad or k.requires_grad),
        "rope_: writes in place and has no gradient; call rope, or wrap the call in torch.no_grad()",
    )
    _check_heads("rope_", q, k)
    for name, x in (("q", q), ("k", k)):
        check(
            x.stride(-1) == 1 and torch._debug_has_internal_overlap(x) != 1,
            "rope_: {} must have last stride 1 and no two elements in one place, got strides {}; call rope",
            name, x.stride(),
        )  # fmt: skip
    impl = backends.resolve("rope_", impl, BACKENDS, q.device.type)
    _check_tables("rope_", q, positions, cos, sin, impl)
    if impl == "reference":
        q_out, k_out = reference.rope(q, k, positions, cos, sin)
        return q.copy_(q_out), k.copy_(k_out)
    if impl == "triton":
        backends.triton("rope").rope_(q, k, positions, cos, sin)
    else:
        backends.cpu().rope_(q, k, None, positions, cos, sin, False, q, k, None)
    return q, k


def rope_qkv(qkv, positions, cos, sin, *, impl=None):
    """Splits the fused projection, rotates q and k and copies v, in one pass.

    qkv        (T, G, J + 2, K) fp32 or bf16: for each kv head its J query heads, its key head, its value head
    positions, cos, sin   as for rope
    returns    q (T, G*J, K), k (T, G, K), v (T, G, K): fresh, contiguous
    Raises ValueError as rope does.
    """
    check(
        qkv.dim() == 4 and qkv.shape[1] >= 1 and qkv.shape[2] >= 3,
        "rope_qkv: qkv must be (T, G, J + 2, K) with G, J >= 1, got shape {}", tuple(qkv.shape),
    )  # fmt: skip
    impl = backends.resolve("rope_qkv", impl, BACKENDS, qkv.device.type)
    _check_tables("rope_qkv", qkv, positions, cos, sin, impl)
    if impl == "reference":
        return reference.rope_qkv(qkv, positions, cos, sin)
    return _qkv_op(qkv, positions, cos, sin, impl)
