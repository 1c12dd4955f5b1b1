"""The machine's best GEMM rate at this model's shapes: python -m bench.end_to_end.limit SETTINGS.json RESULT.json.

The limit is the FLOP-weighted harmonic mean over the forward shapes of the best route of each. Measured in a process of
its own before and after every run, so that all contenders are held against the best the machine showed in the session.
"""

import sys
from dataclasses import dataclass

import torch

from bench import gemm
from bench.end_to_end.common import Settings, make_pairs, read_settings, write_json

HEAD_ROWS, REPEATS = 256, 3


@dataclass(frozen=True)
class Shape:
    """x (rows, inputs) times a weight (outputs, inputs); share: its FLOPs in a forward pass over the data."""

    name: str
    rows: int
    inputs: int
    outputs: int
    share: float


def shapes(settings: Settings) -> list[Shape]:
    """The model's linear layers at a full micro-batch, and the head at a block of response rows."""
    c = settings.config
    width, mlp, heads = c["hidden_size"], c["intermediate_size"], c["num_attention_heads"]
    head_dim = c.get("head_dim") or width // heads
    pairs = make_pairs(settings)
    response_tokens = sum(len(response) for _, response in pairs)
    all_tokens = response_tokens + sum(len(prompt) for prompt, _ in pairs)
    layer = {
        "gate_up": (width, 2 * mlp), "down": (mlp, width), "o": (heads * head_dim, width),
        "qkv": (width, (heads + 2 * c["num_key_value_heads"]) * head_dim),
    }  # fmt: skip
    work = {name: c["num_hidden_layers"] * all_tokens * k * n for name, (k, n) in layer.items()}
    work["head"] = response_tokens * width * c["vocab_size"]
    total = sum(work.values())
    rows = {name: settings.tokens_per_batch for name in layer} | {"head": HEAD_ROWS}
    layer["head"] = (width, c["vocab_size"])
    return [Shape(name, rows[name], *layer[name], work[name] / total) for name in layer]


def measure(settings: Settings) -> dict[str, dict[str, float]]:
    """Shape -> route -> best GFLOP/s of a few calls."""
    dtype = torch.bfloat16 if settings.precision == "bf16" else torch.float32
    return {
        shape.name: gemm.rates(shape.rows, shape.inputs, shape.outputs, dtype, repeats=REPEATS)
        for shape in shapes(settings)
    }


def combine(settings: Settings, rates: dict[str, dict[str, float]]) -> float:
    """GFLOP/s of the whole forward mix when every shape goes its best route."""
    return 1 / sum(shape.share / max(rates[shape.name].values()) for shape in shapes(settings))


def best_of(measurements: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Per shape and route the best of several measurements."""
    first = measurements[0]
    return {s: {r: max(m[s].get(r, 0.0) for m in measurements) for r in first[s]} for s in first}


def main(settings_path: str, result_path: str) -> None:
    settings = read_settings(settings_path)
    torch.set_num_threads(settings.threads)
    write_json(result_path, measure(settings))


if __name__ == "__main__":
    main(*sys.argv[1:])
