"""One op, known to torch and cheap to call.

An Op is registered with torch.library (schema, fake kernel, autograd), so that opcheck, FakeTensor and
torch.compile(fullgraph=True) see it. Outside of tracing a call skips the dispatcher (which costs 30-60 us in Python)
and goes to the backend through a torch.autograd.Function made of the very same pieces.
"""

from collections.abc import Callable

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

_LIBRARY = torch.library.Library("hpsafety", "DEF")  # kept alive for the life of the process


class Op:
    """A functional custom op `hpsafety::name` whose last argument is the backend's name.

    schema    torch schema of the arguments without `impl`, and the returns: "(Tensor x) -> Tensor"
    backends  backend name -> callable with the schema's arguments; returns fresh contiguous tensors
    fake      callable that returns empty outputs of the right shape, dtype and device
    setup_context, backward   as in torch.library.register_autograd; None for an op without gradient.
              Both see `impl` as the last input; backward returns one gradient per input, None for impl.
    """

    def __init__(
        self,
        name: str,
        schema: str,
        backends: dict[str, Callable],
        fake: Callable,
        setup_context: Callable | None = None,
        backward: Callable | None = None,
    ):
        self.name, self.backends = name, backends
        arguments, returns = schema.rsplit(" -> ", 1)
        _LIBRARY.define(f"{name}{arguments[:-1]}, str impl) -> {returns}")
        _LIBRARY.impl(name, self._run, "CompositeExplicitAutograd")
        qualified = f"hpsafety::{name}"
        torch.library.register_fake(qualified, lambda *args: fake(*args[:-1]), lib=_LIBRARY)
        self.overload = getattr(torch.ops.hpsafety, name).default
        self.function = None
        if backward is not None:
            torch.library.register_autograd(qualified, backward, setup_context=setup_context, lib=_LIBRARY)

            def forward(ctx, *args):
                # One method: with a setup_context of its own, apply() inspects the signature at every call, 20 us.
                output = self._run(*args)
                setup_context(ctx, args, output)
                return output

            members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
            self.function = type(name, (torch.autograd.Function,), members)

    def _run(self, *args):
        return self.backends[args[-1]](*args[:-1])

    def __call__(self, *args):
        if torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None:
            return self.overload(*args)
        if self.function is not None and torch.is_grad_enabled() and _requires_grad(args):
            return self.function.apply(*args)
        return self.backends[args[-1]](*args[:-1])


def _requires_grad(args) -> bool:
    return any(isinstance(x, torch.Tensor) and x.requires_grad for x in args)


def check(condition: bool, message: str, *values) -> None:
    """Raises ValueError(message.format(*values)) unless condition holds; formats only on failure."""
    if not condition:
        raise ValueError(message.format(*values))
