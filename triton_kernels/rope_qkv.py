"""rope_qkv, forward and backward: the split of a fused projection, on the kernel of rope.py."""

from hpsafety.triton_kernels.rope import SHARED_BYTES as SHARED_BYTES
from hpsafety.triton_kernels.rope import turn_heads


def _split(qkv, j):
    """Views of q (T, G, J, K), k and v (T, G, K)."""
    return qkv.narrow(2, 0, j), qkv.select(2, j), qkv.select(2, j + 1)


def rope_qkv(qkv, positions, cos, sin):
    """(q, k, v) out of (T, G, J + 2, K): q and k turned, v copied."""
    t, g, j, size = qkv.shape
    j -= 2
    q, k, v = qkv.new_empty((t, g * j, size)), qkv.new_empty((t, g, size)), qkv.new_empty((t, g, size))
    turn_heads(*_split(qkv, j), positions, cos, sin, False, q.view(t, g, j, size), k, v)
    return q, k, v


def rope_qkv_backward(grad_q, grad_k, grad_v, positions, cos, sin):
    """The gradient of qkv (T, G, J + 2, K)."""
    t, g, size = grad_k.shape
    j = grad_q.shape[1] // g
    grad = grad_q.new_empty((t, g, j + 2, size))
    turn_heads(grad_q.unflatten(1, (g, j)), grad_k, grad_v, positions, cos, sin, True, *_split(grad, j))
    return grad
