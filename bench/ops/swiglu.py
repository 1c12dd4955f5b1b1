"""swiglu against torch's silu and product."""

import functools

import torch
import torch.nn.functional as nnf

from bench.ops.case import Case
from hpsafety import ops, reference
from hpsafety.ops.swiglu import BACKENDS

SHAPES = [{"T": 4096, "F": 1536}, {"T": 1024, "F": 14336}]
CHECK = {"T": 37, "F": 129}
DIRECTIONS = ("forward", "both")


def case(shape, dtype, device, direction, seed=0) -> Case:
    t, f, both = shape["T"], shape["F"], direction == "both"
    generator = torch.Generator().manual_seed(seed)
    gate_up = torch.randn(t, 2 * f, generator=generator).to(device, dtype).requires_grad_(both)
    upstream = torch.randn(t, f, generator=generator).to(device, dtype)

    def call(function, x=gate_up, grad=upstream):
        with torch.set_grad_enabled(both):
            y = function(x)
        return (y.detach(), *torch.autograd.grad(y, x, grad)) if both else (y,)

    def torch_way(x):
        gate, up = x.chunk(2, dim=-1)
        return nnf.silu(gate) * up

    def exact():
        return call(reference.swiglu, gate_up.detach().double().requires_grad_(both), upstream.double())

    compiled = functools.cache(lambda: torch.compile(torch_way))  # imports the compiler: only when called
    return Case(
        op="swiglu", shape=shape, dtype=dtype, device=device, direction=direction, impls=BACKENDS,
        run=lambda impl: call(lambda x: ops.swiglu(x, impl=impl)),
        peers={"torch": lambda: call(torch_way), "torch.compile": lambda: call(compiled())},
        on_request=("torch.compile",), exact=exact,
        flops=(5 + (9 if both else 0)) * t * f,
        # 2F in, F out; backward: F in, 2F out
        bytes=(6 if both else 3) * t * f * dtype.itemsize,
    )  # fmt: skip
