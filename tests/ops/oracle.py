"""The one test form of all kernels (style rule 14): errors are judged against the fp64 oracle, and the budget is the
error that plain torch makes in the kernel's own dtype. Nobody tunes an atol."""

import torch

from hpsafety import reference


def to_fp64(args: dict) -> dict:
    return {k: v.detach().double() if _floats(v) else v for k, v in args.items()}


def _floats(v) -> bool:
    return isinstance(v, torch.Tensor) and v.is_floating_point()


def run_with_grads(
    function, args: dict, seed: int = 0, grads: tuple[str, ...] | None = None, **kwargs
) -> dict:
    """Outputs and the gradients of a random projection of them.

    args   name -> tensor or value; float tensors (or those named in `grads`) get requires_grad
    Returns {"out0": ..., "grad_x": ...}; the projection is the same for every dtype.
    """
    wanted = [k for k, v in args.items() if _floats(v)] if grads is None else list(grads)
    leaves = {k: v.detach().clone().requires_grad_(k in wanted) if _floats(v) else v for k, v in args.items()}
    outputs = function(**leaves, **kwargs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(seed)
    total, result = 0.0, {}
    for i, out in enumerate(outputs):
        result[f"out{i}"] = out.detach()
        if out.requires_grad:
            weights = torch.randn(out.shape, generator=generator, dtype=torch.float64)
            total = total + (out.double() * weights.to(out.device)).sum()
    if wanted and isinstance(total, torch.Tensor):
        found = torch.autograd.grad(total, [leaves[k] for k in wanted], allow_unused=True)
        result |= {f"grad_{k}": g for k, g in zip(wanted, found, strict=True) if g is not None}
    return result


def check_error(name: str, ours, exact, plain, factor: float = 2.0) -> None:
    """max|ours - exact| <= factor * max|plain - exact| + 4 ulp of the largest exact value; the same for the mean."""
    assert ours.shape == exact.shape, f"{name}: shape {tuple(ours.shape)}, expected {tuple(exact.shape)}"
    if not exact.numel():
        return
    finite = torch.isfinite(exact)
    same = torch.where(
        finite, torch.isfinite(ours), (ours.double() == exact) | (ours.isnan() & exact.isnan())
    )
    assert bool(same.all()), (
        f"{name}: non-finite values differ from the oracle's at {int((~same).sum())} places"
    )
    off = torch.where(finite, (ours.double() - exact).abs(), 0.0)
    budget = torch.where(finite, (plain.double() - exact).abs(), 0.0)
    ulp = torch.finfo(ours.dtype).eps * float(exact[finite].abs().max() if finite.any() else 0.0)
    for what, got, allowed in (("max", off.max(), budget.max()), ("mean", off.mean(), budget.mean())):
        limit = factor * float(allowed) + 4 * ulp
        worst = int(off.argmax())
        assert float(got) <= limit, (
            f"{name}: {what} error {float(got):.3e} > {limit:.3e}; worst at flat index {worst}: ours "
            f"{float(ours.flatten()[worst])!r}, plain {float(plain.flatten()[worst])!r}, "
            f"exact {float(exact.flatten()[worst])!r}"
        )


def check_against_oracle(
    op_name: str, op, args: dict, factor: float = 2.0, impl: str = "cpu", device: str = "cpu", **kwargs
) -> dict:
    """Runs the op's backend, the oracle in fp64 and the oracle in the op's dtype; judges every output and gradient.

    device  where the backend runs; the oracles run on the CPU
    """
    oracle = getattr(reference, op_name)
    exact = run_with_grads(oracle, to_fp64(args), **kwargs)
    plain = run_with_grads(oracle, args, **kwargs)
    before = reference.calls[op_name]
    there = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in args.items()}
    ours = {k: v.cpu() for k, v in run_with_grads(op, there, impl=impl, **kwargs).items()}
    assert reference.calls[op_name] == before, f"the {impl} backend of {op_name} called the reference"
    assert ours.keys() == exact.keys(), f"{op_name}: got {sorted(ours)}, oracle has {sorted(exact)}"
    for name in exact:
        check_error(f"{op_name}.{name}", ours[name], exact[name], plain[name], factor)
    return ours
