"""adamw_ against torch.optim's kernels, on the matrices of L transformer layers.

Every contender clips (by a factor of 1, so that repeating does not shrink the gradients), updates, and in bf16
(gradients in bf16, weights in fp32) makes the rounded copies that the next forward multiplies with.
"""

import torch

from bench.ops.case import Case
from hpsafety import ops, reference
from hpsafety.ops.adamw import BACKENDS

SHAPES = [{"L": 8, "D": 576, "F": 1536}, {"L": 1, "D": 2048, "F": 8192}]
CHECK = {"L": 2, "D": 33, "F": 65}
DIRECTIONS = ("forward",)
SETTINGS = {"lr": 2e-5, "betas": (0.9, 0.95), "eps": 1e-5, "weight_decay": 0.1}
NORM, MAX_NORM = 0.5, 1.0  # the clipping factor is 1


class State:
    """One contender's tensors: all contenders start alike, and each writes to its own."""

    def __init__(self, shape, dtype, device, seed):
        generator = torch.Generator().manual_seed(seed)
        d, f = shape["D"], shape["F"]
        sizes = [(5 * d // 3, d), (d, d), (2 * f, d), (d, f), (d,)] * shape["L"]

        def draw(scale, as_dtype=torch.float32):
            return [scale * torch.randn(size, generator=generator).to(device, as_dtype) for size in sizes]

        self.params, self.grads, self.exp_avg = draw(0.02), draw(1e-3, dtype), draw(1e-4)
        self.exp_avg_sq = [1e-6 * x.square() + 1e-9 for x in draw(1.0)]
        self.step = torch.tensor(7, device=device)
        self.copies = [p.to(dtype) for p in self.params] if dtype != torch.float32 else []

    def result(self):
        return *self.params, *self.exp_avg, *self.exp_avg_sq, *self.copies


def _torch_way(state: State, norm: torch.Tensor, **form):
    """A call of torch.optim.AdamW on this state, after clipping and widening as a plain loop does it."""
    optimiser = torch.optim.AdamW(state.params, **SETTINGS, **form)
    for p, m, v in zip(state.params, state.exp_avg, state.exp_avg_sq, strict=True):
        optimiser.state[p] = {"step": state.step.float(), "exp_avg": m, "exp_avg_sq": v}

    def call():
        grads = [g.float() for g in state.grads]
        torch._foreach_mul_(grads, (MAX_NORM / (norm + 1e-6)).clamp(max=1.0))
        for p, grad in zip(state.params, grads, strict=True):
            p.grad = grad
        optimiser.step()
        if state.copies:
            torch._foreach_copy_(state.copies, state.params)
        return state.result()

    return call


def case(shape, dtype, device, direction, seed=0) -> Case:
    norm = torch.tensor(NORM, device=device)
    states = {name: State(shape, dtype, device, seed) for name in (*BACKENDS, "foreach", "fused")}

    def run(impl):
        if impl not in states:  # the reference, which competes on request only
            states[impl] = State(shape, dtype, device, seed)
        state = states[impl]
        ops.adamw_(
            state.params, state.grads, state.exp_avg, state.exp_avg_sq, step=state.step, grad_norm=norm,
            max_norm=MAX_NORM, copies=state.copies, impl=impl, **SETTINGS,
        )  # fmt: skip
        return state.result()

    def exact():
        s = State(shape, dtype, device, seed)
        wide = ([x.double() for x in xs] for xs in (s.params, s.grads, s.exp_avg, s.exp_avg_sq))
        new = reference.adamw(*wide, step=s.step, grad_norm=norm.double(), max_norm=MAX_NORM, **SETTINGS)
        return *new[0], *new[1], *new[2], *(new[0] if s.copies else [])

    count = sum(x.numel() for x in states["fused"].params)
    return Case(
        op="adamw_", shape=shape, dtype=dtype, device=device, direction=direction, impls=BACKENDS, run=run,
        peers={f"torch {form}": _torch_way(states[form], norm, **{form: True}) for form in ("fused", "foreach")},
        exact=exact, flops=14 * count,
        # parameter and both moments in and out, gradient in; bf16: half the gradient, and the copies out
        bytes=28 * count, note=f"{count / 1e6:.1f} M parameters",
    )  # fmt: skip
