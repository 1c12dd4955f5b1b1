"""rope against the rotate-half form of transformers' Llama, written in torch; tables are gathered by position."""

import functools

import torch

from bench.ops.case import Case
from hpsafety import ops, reference
from hpsafety.ops.rope import BACKENDS

SHAPES = [{"T": 8192, "H": 9, "G": 3, "K": 64}, {"T": 2048, "H": 32, "G": 8, "K": 128}]
CHECK = {"T": 53, "H": 9, "G": 3, "K": 64}
DIRECTIONS = ("forward", "both")
MAX_POSITIONS, THETA = 2048, 100_000.0


def _tables(k: int, device: str):
    angles = torch.arange(MAX_POSITIONS)[:, None] * THETA ** (-torch.arange(0, k, 2) / k)
    return angles.cos().to(device), angles.sin().to(device)


def _rotate_half(x):
    low, high = x.chunk(2, dim=-1)
    return torch.cat((-high, low), dim=-1)


def _transformers_way(q, k, positions, cos, sin):
    """As transformers' apply_rotary_pos_emb, with the tables looked up and doubled as its rotary module does."""
    c = torch.cat((cos[positions],) * 2, dim=-1)[:, None].to(q.dtype)
    s = torch.cat((sin[positions],) * 2, dim=-1)[:, None].to(q.dtype)
    return q * c + _rotate_half(q) * s, k * c + _rotate_half(k) * s


def case(shape, dtype, device, direction, seed=0) -> Case:
    t, h, g, k = (shape[name] for name in "THGK")
    if k % 2:
        raise ValueError(f"the head dim K must be even, got {k}")
    both = direction == "both"
    generator = torch.Generator().manual_seed(seed)

    def draw(heads):
        return torch.randn(t, heads, k, generator=generator).to(device, dtype)

    q, key, grad_q, grad_k = draw(h).requires_grad_(both), draw(g).requires_grad_(both), draw(h), draw(g)
    # Positions of packed rows: runs that start anew, as prompts and responses do.
    positions = (torch.arange(t, dtype=torch.int32) % 317).to(device)
    cos, sin = _tables(k, device)

    def call(function, x=(q, key), grads=(grad_q, grad_k), tables=(cos, sin)):
        with torch.set_grad_enabled(both):
            out = function(*x, positions, *tables)
        return (*(o.detach() for o in out), *torch.autograd.grad(out, x, grads)) if both else out

    def exact():
        x = tuple(x.detach().double().requires_grad_(both) for x in (q, key))
        return call(reference.rope, x, (grad_q.double(), grad_k.double()), (cos.double(), sin.double()))

    compiled = functools.cache(
        lambda: torch.compile(_transformers_way)
    )  # imports the compiler: only when called
    heads = t * (h + g) * k
    return Case(
        op="rope", shape=shape, dtype=dtype, device=device, direction=direction, impls=BACKENDS,
        run=lambda impl: call(lambda *args: ops.rope(*args, impl=impl)),
        peers={"torch": lambda: call(_transformers_way), "torch.compile": lambda: call(compiled())},
        on_request=("torch.compile",), exact=exact,
        flops=3 * heads * (2 if both else 1),
        # heads in and out (and their gradients), positions, and the tables' rows that are used
        bytes=(4 if both else 2) * heads * dtype.itemsize + 4 * t + 2 * 4 * min(t, 317) * (k // 2),
    )  # fmt: skip
