"""AdamW over a model's parameters, and the learning-rate schedule."""

import math
import weakref

import torch

from hpsafety import ops
from hpsafety.train import distributed


def learning_rate(step: int, total: int, peak: float, warmup: int = 0) -> float:
    """The rate of optimiser step `step` (from 0) of `total`: linear warm-up, then a cosine to 10 % of the peak.

    With W = min(warmup, total): peak (t+1)/W for t < W, then peak (0.1 + 0.45 (1 + cos(pi (t-W) / max(1, T-1-W)))).
    """
    warm = min(warmup, total)
    if step < warm:
        return peak * (step + 1) / warm
    return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * (step - warm) / max(1, total - 1 - warm))))


class AdamW:
    """AdamW with decoupled weight decay off norms and biases, global clipping, and a skip on non-finite gradients.

    Frozen parameters (requires_grad False) have no state and never change, but for the rounding of `dtype`.
    dtype  of the computation. Below fp32 an unsharded model's parameters become rounded copies (in place) of fp32
           masters kept here, and gradients accumulate in fp32; a sharded model casts by itself (FSDP2's policy).
    Defaults: the Llama 2 paper's constants for PPO (betas .9/.95, eps 1e-5, decay 0.1, clip 1.0).
    """

    def __init__(
        self, model, dtype=torch.float32, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.1, max_norm=1.0
    ):
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.names, self.params = map(list, zip(*trained, strict=True))
        self.betas, self.eps, self.weight_decay, self.max_norm = betas, eps, weight_decay, max_norm
        self.sharded = hasattr(self.params[0], "to_local")
        self.low_precision = dtype != torch.float32 and not self.sharded
        self.masters = [p.detach().float() for p in self.params]
        self.exp_avg = [torch.zeros_like(m) for m in self.masters]
        self.exp_avg_sq = [torch.zeros_like(m) for m in self.masters]
        self.step_count = torch.zeros((), dtype=torch.int64, device=self.masters[0].device)
        self.main_grads = [torch.zeros_like(m) for m in self.masters] if self.low_precision else None
        self.untouched: set[int] = set()  # parameters whose fp32 gradient is still that of the step before
        if self.low_precision:
            for i, param in enumerate(self.params):
                param.data = param.data.to(dtype)
                param.register_post_accumulate_grad_hook(self._adder(i))
            for param in model.parameters():
                if not param.requires_grad:
                    param.data = param.data.to(dtype)

    def zero_grad(self) -> None:
        for param in self.params:
            param.grad = None
        self.untouched = set(range(len(self.params)))

    def _adder(self, index: int):
        """Moves a parameter's gradient into its fp32 sum; a step's first one is copied, so nothing need be zeroed.

        The hook lives in C++, where Python's garbage collector does not see it: a strong reference back to the
        optimiser would keep optimiser and model in memory for good.
        """
        weak = weakref.ref(self)

        def add(param) -> None:
            own = weak()
            main = own.main_grads[index]
            if index in own.untouched:
                own.untouched.remove(index)
                main.copy_(param.grad)
            else:
                ops.accumulate_(main, param.grad)
            param.grad = None

        return add

    def _gradients(self) -> list[torch.Tensor]:
        if self.low_precision:
            for index in self.untouched:  # no micro-batch reached it in this step
                self.main_grads[index].zero_()
            self.untouched = set()
        grads = self.main_grads if self.low_precision else [p.grad for p in self.params]
        return [
            torch.zeros_like(distributed.local(m)) if g is None else distributed.local(g)
            for g, m in zip(grads, self.masters, strict=True)
        ]

    @torch.no_grad()
    def step(self, lr: float, world) -> torch.Tensor:
        """One update; returns the gradient's global norm (0-dim fp64). A non-finite norm leaves everything as it is.

        Where every rank holds the whole model, the ranks' gradients are added up first.
        """
        grads = self._gradients()
        if self.sharded:
            norm = distributed.all_sum(ops.grad_norm_sq(grads), world).sqrt()
        else:
            distributed.all_sum_together(grads, world)
            norm = ops.grad_norm_sq(grads).sqrt()
        for decay in (True, False):
            pick = [i for i, name in enumerate(self.names) if decays(name) == decay]
            local = lambda tensors: [distributed.local(tensors[i]) for i in pick]  # noqa: B023, E731
            # Both groups count the same step: the second starts from a copy of the count.
            count = self.step_count if not decay else self.step_count.clone()
            ops.adamw_(
                local(self.masters), [grads[i] for i in pick], local(self.exp_avg), local(self.exp_avg_sq),
                lr=lr, betas=self.betas, eps=self.eps, weight_decay=self.weight_decay if decay else 0.0,
                step=count, grad_norm=norm, max_norm=self.max_norm,
                copies=local(self.params) if self.low_precision else None,
            )  # fmt: skip
        return norm

    def state(self) -> dict[str, torch.Tensor]:
        """What a checkpoint holds beside the parameters, by name; tensors are shared, so loading fills them."""
        out = {"step": self.step_count}
        for kind, tensors in (("exp_avg", self.exp_avg), ("exp_avg_sq", self.exp_avg_sq)):
            out |= {f"{kind}.{name}": t for name, t in zip(self.names, tensors, strict=True)}
        if self.low_precision:
            out |= {f"master.{name}": t for name, t in zip(self.names, self.masters, strict=True)}
        return out


def decays(name: str) -> bool:
    """Weight decay acts on matrices: not on norms, not on biases."""
    return not name.endswith(("norm", "bias"))
