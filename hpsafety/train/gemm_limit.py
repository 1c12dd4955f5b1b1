"""The machine's best GEMM rate at a model's shapes: the limit that `hpsafety profile` and bench/ hold a step against.

The limit is the FLOP-weighted harmonic mean over the forward shapes of the best route of each.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as nnf

HEAD_ROWS, REPEATS = 256, 3
Rates = dict[str, dict[str, float]]  # shape -> route -> GFLOP/s


@dataclass(frozen=True)
class Shape:
    """x (rows, inputs) times a weight (outputs, inputs); share: its FLOPs in a forward pass over the data."""

    name: str
    rows: int
    inputs: int
    outputs: int
    share: float


def shapes(config, tokens: int, head_tokens: int, rows: int) -> list[Shape]:
    """The linear layers of a LlamaConfig at `rows` rows, and its head at a block of rows.

    tokens, head_tokens  counts that pass through the layers and through the head: the weights of the mean
    rows                 of a full micro-batch
    """
    width, mlp, heads = config.width, config.mlp_width, config.num_heads * config.head_dim
    layer = {
        "gate_up": (width, 2 * mlp), "down": (mlp, width), "o": (heads, width),
        "qkv": (width, heads + 2 * config.num_kv_heads * config.head_dim),
    }  # fmt: skip
    work = {name: config.num_layers * tokens * k * n for name, (k, n) in layer.items()}
    work["head"] = head_tokens * width * config.vocab_size
    total = max(1, sum(work.values()))
    layer["head"] = (width, config.vocab_size)
    return [
        Shape(name, HEAD_ROWS if name == "head" else rows, *layer[name], work[name] / total) for name in layer
    ]


def _routes(shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, Callable[[], object]]:
    """Name -> call; a route this torch or device lacks is left out."""
    x = torch.randn(shape.rows, shape.inputs, device=device).to(dtype)
    weight = torch.randn(shape.outputs, shape.inputs, device=device).to(dtype)
    out = torch.empty(shape.rows, shape.outputs, dtype=dtype, device=device)
    routes = {"mm": lambda: torch.mm(x, weight.t(), out=out), "linear": lambda: nnf.linear(x, weight)}
    if device.type != "cpu":
        return routes
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, shape.rows)
        point = torch.ops.mkldnn._linear_pointwise
        point(x, packed, None, "none", [], "")
        routes["mkldnn packed"] = lambda: point(x, packed, None, "none", [], "")
    except (AttributeError, RuntimeError, TypeError):
        pass
    if dtype == torch.float32:
        left, right, result = x.numpy(), weight.t().numpy(), out.numpy()
        routes["numpy"] = lambda: np.matmul(left, right, out=result)
    return routes


def measure(wanted: list[Shape], dtype: torch.dtype, device: torch.device = torch.device("cpu")) -> Rates:  # noqa: B008
    """The best GFLOP/s of a few calls, per shape and route."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    rates: Rates = {}
    for shape in wanted:
        rates[shape.name] = {}
        for route, call in _routes(shape, dtype, device).items():
            call()
            best = float("inf")
            for _ in range(REPEATS):
                wait()
                start = time.perf_counter()
                call()
                wait()
                best = min(best, time.perf_counter() - start)
            rates[shape.name][route] = 2 * shape.rows * shape.inputs * shape.outputs / best / 1e9
    return rates


def combine(wanted: list[Shape], rates: Rates) -> float:
    """GFLOP/s of the whole forward mix when every shape goes its best route."""
    return 1 / sum(shape.share / max(rates[shape.name].values()) for shape in wanted)


def best_of(measurements: list[Rates]) -> Rates:
    """Per shape and route the best of several measurements."""
    first = measurements[0]
    return {s: {r: max(m[s].get(r, 0.0) for m in measurements) for r in first[s]} for s in first}
