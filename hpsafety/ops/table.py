"""Which backend serves each op here, and why not the others: what `hpsafety ops` prints."""

import importlib

import torch

from hpsafety.ops import backends

# op -> the module of hpsafety.ops that holds it
OPS = {
    "attention": "attention",
    "linear_logprob": "linear_logprob",
    "linear_cross_entropy": "linear_cross_entropy",
    "distill_loss": "distill_loss",
    "paged_attention": "paged_attention",
    "rms_norm": "rms_norm",
    "rope": "rope",
    "sample": "sample",
    "swiglu": "swiglu",
    "ppo_loss": "ppo_loss",
    "gae": "gae",
    "reward_score": "reward_score",
    "pair_loss": "pair_loss",
    "adamw_": "adamw",
    "accumulate_": "accumulate",
}


CHIPS = {8: "sm_80", 9: "sm_90"}


def _on_gpus(op: str, impl: str, have: tuple[str, ...]) -> str:
    """On which chips a backend that has a rival there comes first."""
    if "cuda" not in have:
        return "first on every GPU"
    first = [
        name
        for major, name in CHIPS.items()
        if next(one for one in backends.in_order(op, have, major) if one in ("triton", "cuda")) == impl
    ]
    return f"by the model of time first on {' and '.join(first) or 'no GPU'}"


def table() -> list[dict]:
    """One row per op and backend: {"op", "backend", "available", "why"}; the serving one says so in "why"."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    for op, module in OPS.items():
        have = importlib.import_module(f"hpsafety.ops.{module}").BACKENDS
        serving = backends.resolve(op, None, have, device)
        for impl in backends.IMPLS:
            reason = backends.unavailable(op, impl, have, device)
            why = reason.removeprefix(f"{op}: ") if reason else "available when forced"
            if impl == serving:
                why = f"serves on {device}"
            elif impl == "reference":
                why = "the oracle; serves where no other backend does"
            if impl in ("triton", "cuda") and impl in have:
                why += f"; {_on_gpus(op, impl, have)}"
            rows.append({"op": op, "backend": impl, "available": reason is None, "why": why})
    return rows
