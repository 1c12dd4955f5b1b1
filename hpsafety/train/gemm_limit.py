"""The machine's best GEMM rate at a model's shapes: the limit that `hpsafety profile` and bench/ hold a step against.

The limit is the FLOP-weighted harmonic mean over the forward shapes of the best route of each.
"""

from dataclasses import dataclass

import torch

from hpsafety.train import gemm_rates

HEAD_ROWS = 256
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


def measure(wanted: list[Shape], dtype: torch.dtype, device: str = "cpu") -> Rates:
    """The best GFLOP/s of a few calls, per shape and route."""
    return {s.name: gemm_rates.rates(s.rows, s.inputs, s.outputs, dtype, device) for s in wanted}


def combine(wanted: list[Shape], rates: Rates) -> float:
    """GFLOP/s of the whole forward mix when every shape goes its best route."""
    return 1 / sum(shape.share / max(rates[shape.name].values()) for shape in wanted)


def best_of(measurements: list[Rates]) -> Rates:
    """Per shape and route the best of several measurements."""
    first = measurements[0]
    return {s: {r: max(m[s].get(r, 0.0) for m in measurements) for r in first[s]} for s in first}
