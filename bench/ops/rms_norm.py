"""rms_norm against torch: the norm alone (residual=0), or with the residual added on the way in (residual=1)."""

import functools

import torch
import torch.nn.functional as nnf

from bench.ops.case import Case
from hpsafety import ops, reference
from hpsafety.ops.rms_norm import BACKENDS

# residual=1, as the layers of the model use it: normalises x + residual and returns the sum too
SHAPES = [
    {"T": 8192, "D": 576, "residual": 1},
    {"T": 8192, "D": 576, "residual": 0},
    {"T": 2048, "D": 4096, "residual": 1},
]
CHECK = {"T": 67, "D": 123, "residual": 1}
DIRECTIONS = ("forward", "both")
EPS = 1e-5


def case(shape, dtype, device, direction, seed=0) -> Case:
    t, d, streams = shape["T"], shape["D"], 1 + shape["residual"]
    if streams > 2:
        raise ValueError(f"residual must be 0 or 1, got {shape['residual']}")
    both = direction == "both"
    generator = torch.Generator().manual_seed(seed)

    def draw(*size):
        return torch.randn(size, generator=generator).to(device, dtype)

    inputs = [draw(t, d), 1 + 0.1 * draw(d), *([draw(t, d)] if streams == 2 else [])]
    upstream = [draw(t, d) for _ in range(streams)]

    def call(function, dtype=None):
        """function(x, weight, eps, residual) -> y or (y, sum), with the gradients of all inputs in direction "both"."""
        x, weight, *rest = [x.to(dtype).requires_grad_(both) if dtype else x for x in inputs]
        with torch.set_grad_enabled(both):
            out = function(x, weight, EPS, *rest)
        out = out if isinstance(out, tuple) else (out,)
        if not both:
            return out
        given = [g.to(dtype) if dtype else g for g in upstream]
        return *(o.detach() for o in out), *torch.autograd.grad(out, (x, weight, *rest), given)

    def torch_way(x, weight, eps, residual=None):
        x = x if residual is None else x + residual
        y = nnf.rms_norm(x, (d,), weight, eps)
        return y if residual is None else (y, x)

    for x in inputs:
        x.requires_grad_(both)
    compiled = functools.cache(lambda: torch.compile(torch_way))  # imports the compiler: only when called
    rows = t * d * dtype.itemsize
    return Case(
        op="rms_norm", shape=shape, dtype=dtype, device=device, direction=direction, impls=BACKENDS,
        run=lambda impl: call(lambda *args: ops.rms_norm(*args, impl=impl)),
        peers={"torch": lambda: call(torch_way), "torch.compile": lambda: call(compiled())},
        on_request=("torch.compile",),
        exact=lambda: call(reference.rms_norm, torch.float64),
        flops=(4 * streams + (10 if both else 0)) * t * d,
        # in: the streams; out: the same number. Backward: as many gradients in, and one out, which serves both inputs.
        bytes=(2 * streams + (streams + 1 if both else 0)) * rows + d * dtype.itemsize * (2 if both else 1),
    )  # fmt: skip
