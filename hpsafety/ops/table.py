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
            rows.append({"op": op, "backend": impl, "available": reason is None, "why": why})
    return rows
