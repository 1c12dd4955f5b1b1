"""What the benchmarks of the linear family share: inputs of realistic scale, and the peers' two ways to work.

"torch" holds all logits and leaves the gradients to autograd. "torch chunked" does the same for 256 rows at a time and
adds the weight gradients up, which is what a careful plain loop does.
"""

import torch

SHAPES = (
    {"N": 4096, "D": 576, "V": 49_152},  # smollm2
    {"N": 512, "D": 4096, "V": 32_000},  # Llama 2 7B
)
CHECK = {"N": 257, "D": 64, "V": 507}
DIRECTIONS = ("forward", "both")


def model(n: int, d: int, v: int, dtype, device, generator) -> tuple[torch.Tensor, torch.Tensor]:
    """hidden (N, D) after a norm, and a head whose logits have a standard deviation of about 1."""
    hidden = torch.randn(n, d, generator=generator).to(device, dtype)
    weight = torch.randn(v, d, generator=generator).mul_(d**-0.5).to(device, dtype)
    return hidden, weight


def contender(loss, hidden, weight, incoming, direction: str, rows: int | None = None):
    """A call that returns (losses,) or (losses, grad_hidden, grad_weight).

    loss      loss(hidden, weight, rows) -> one number per row, of the rows in that slice
    incoming  gradient per row
    rows      rows of a chunk; None: all at once
    """
    n = hidden.shape[0]
    slices = [slice(i, i + (rows or n)) for i in range(0, n, rows or n)]

    def joined(pieces):
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def forward():
        with torch.no_grad():
            return (joined([loss(hidden[s], weight, s) for s in slices]),)

    def both():
        losses, grads_hidden, grad_weight = [], [], None
        w = weight.detach().requires_grad_()
        for s in slices:
            h = hidden[s].detach().requires_grad_()
            out = loss(h, w, s)
            dh, dw = torch.autograd.grad(out, (h, w), incoming[s])
            losses.append(out.detach())
            grads_hidden.append(dh)
            grad_weight = dw if grad_weight is None else grad_weight.add_(dw)
        return joined(losses), joined(grads_hidden), grad_weight

    return forward if direction == "forward" else both


def peers(loss, *args) -> dict:
    return {"torch": contender(loss, *args), "torch chunked": contender(loss, *args, rows=256)}


def gemms(n: int, d: int, v: int, direction: str) -> tuple[tuple[int, int, int, int], ...]:
    """Logits, and for the gradients dH = dz W and dW = dz^T H, as (M, K, N, count)."""
    return ((n, d, v, 1), *(((n, v, d, 1), (v, n, d, 1)) if direction == "both" else ()))


def flops(of) -> float:
    return float(sum(2 * m * k * n * count for m, k, n, count in of))


def traffic(hidden, weight, direction: str) -> float:
    """Inputs read once, one fp32 number per row written; in both directions the gradients as well."""
    sizes = hidden.nbytes + weight.nbytes
    return float((2 if direction == "both" else 1) * sizes + 4 * hidden.shape[0])
