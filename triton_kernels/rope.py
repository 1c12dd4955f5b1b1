"""rope and rope_, and the kernel of rope_qkv: it reads and writes strided heads. The backward turns by -sin.

Limit: bytes. A program takes all heads of one token, so that the token's row of the tables is read once.
"""

import triton
import triton.language as tl

from hpsafety.triton_kernels.launch import launch

SHARED_BYTES = (0, 0)  # a block's at most, on sm_80 and on sm_90
TILE = 2048  # elements of half heads in registers at a time


@triton.jit
def _turn(
    x_ptr, y_ptr, token, x_token, x_group, x_head, y_token, y_group, y_head, c, s, COUNT: tl.constexpr,
    PER_GROUP: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr, ROTATE: tl.constexpr,
):  # fmt: skip
    """COUNT heads of one token, PER_GROUP of them at even steps; both halves are read before either is written."""
    column = tl.arange(0, BLOCK)[None, :]
    x_ptr += token * x_token
    y_ptr += token * y_token
    for first in range(0, COUNT, HEADS):
        head = first + tl.arange(0, HEADS)
        mask = (head < COUNT)[:, None] & (column < HALF)
        group, own = (head // PER_GROUP).to(tl.int64), (head % PER_GROUP).to(tl.int64)
        at = (group * x_group + own * x_head)[:, None] + column
        to = (group * y_group + own * y_head)[:, None] + column
        low, high = (
            tl.load(x_ptr + at, mask=mask, other=0.0),
            tl.load(x_ptr + at + HALF, mask=mask, other=0.0),
        )
        if ROTATE:
            low, high = low.to(tl.float32), high.to(tl.float32)
            low, high = low * c - high * s, high * c + low * s
        tl.store(y_ptr + to, low, mask=mask)
        tl.store(y_ptr + to + HALF, high, mask=mask)


@triton.jit
def rope_heads(
    positions_ptr, cos_ptr, sin_ptr, q_ptr, k_ptr, v_ptr, q_out_ptr, k_out_ptr, v_out_ptr,
    q_token, q_group, q_head, k_token, k_group, v_token, v_group,
    q_out_token, q_out_group, q_out_head, k_out_token, k_out_group, v_out_token, v_out_group,
    H: tl.constexpr, G: tl.constexpr, PER_GROUP: tl.constexpr, HALF: tl.constexpr, INVERSE: tl.constexpr,
    HAS_V: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    row = tl.load(positions_ptr + token).to(tl.int64) * HALF
    c = tl.load(cos_ptr + row + column, mask=column < HALF, other=0.0)[None, :]
    s = tl.load(sin_ptr + row + column, mask=column < HALF, other=0.0)[None, :]
    if INVERSE:
        s = -s
    _turn(
        q_ptr, q_out_ptr, token, q_token, q_group, q_head, q_out_token, q_out_group, q_out_head, c, s,
        H, PER_GROUP, HALF, HEADS, BLOCK, True,
    )  # fmt: skip
    _turn(
        k_ptr, k_out_ptr, token, k_token, k_group, 0, k_out_token, k_out_group, 0, c, s,
        G, 1, HALF, KV_HEADS, BLOCK, True,
    )  # fmt: skip
    if HAS_V:
        _turn(
            v_ptr, v_out_ptr, token, v_token, v_group, 0, v_out_token, v_out_group, 0, c, s,
            G, 1, HALF, KV_HEADS, BLOCK, False,
        )  # fmt: skip


def _readable(x):
    return x if x.stride(-1) == 1 else x.contiguous()


def turn_heads(q, k, v, positions, cos, sin, inverse, q_out, k_out, v_out) -> None:
    """q, q_out (T, groups, J, K) or (T, H, K), k, v (T, G, K) and theirs: any strides but the last, which is 1."""
    tokens, half = q.shape[0], q.shape[-1] // 2
    per_group = q.shape[2] if q.dim() == 4 else 1
    heads, kv_heads = q.shape[1] * per_group, k.shape[1]
    if tokens == 0 or half == 0:
        return
    q, k, v = _readable(q), _readable(k), v if v is None else _readable(v)
    block = triton.next_power_of_2(half)

    def tile(count):
        return min(triton.next_power_of_2(max(count, 1)), max(1, TILE // block))

    def steps(x):
        return x.stride()[:2] if x is not None else (0, 0)

    def q_steps(x):
        return x.stride()[:3] if x.dim() == 4 else (*x.stride()[:2], 0)

    launch(
        rope_heads, tokens, positions.contiguous(), cos.contiguous(), sin.contiguous(), q, k, v, q_out, k_out, v_out,
        *q_steps(q), *steps(k), *steps(v), *q_steps(q_out), *steps(k_out), *steps(v_out),
        H=heads, G=kv_heads, PER_GROUP=per_group, HALF=half, INVERSE=inverse, HAS_V=v is not None,
        HEADS=tile(heads), KV_HEADS=tile(kv_heads), BLOCK=block, num_warps=4 if tile(heads) * block >= TILE else 2,
    )  # fmt: skip


def rope(q, k, positions, cos, sin, inverse):
    """(q, k) turned; arguments as in hpsafety::rope."""
    q_out, k_out = q.new_empty(q.shape), k.new_empty(k.shape)
    turn_heads(q, k, None, positions, cos, sin, inverse, q_out, k_out, None)
    return q_out, k_out


def rope_(q, k, positions, cos, sin) -> None:
    """Turns q and k in place; their last stride is 1."""
    turn_heads(q, k, None, positions, cos, sin, False, q, k, None)
