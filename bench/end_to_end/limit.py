"""The machine's best GEMM rate at this model's shapes: python -m bench.end_to_end.limit SETTINGS.json RESULT.json.

How it is measured stands in hpsafety/train/gemm_limit.py. Here it runs in a process of its own before and after every
run, so that all contenders are held against the best the machine showed in the session.
"""

import sys

import torch

from bench.end_to_end.common import Settings, make_groups, read_settings, rows, write_json
from hpsafety.model.config import from_hf
from hpsafety.train import gemm_limit
from hpsafety.train.gemm_limit import Rates, Shape, best_of

__all__ = ["best_of", "combine", "measure"]


def shapes(settings: Settings) -> list[Shape]:
    """The model's linear layers at a full micro-batch; where tokens are predicted also the head, at a block of rows."""
    groups = make_groups(settings)
    response_tokens = sum(len(response) for _, response in rows(groups))
    all_tokens = response_tokens + sum(len(prompt) for prompt, _ in groups)
    head_tokens = response_tokens if settings.work in ("sft", "ppo", "distill") else 0
    return gemm_limit.shapes(from_hf(settings.config), all_tokens, head_tokens, settings.tokens_per_batch)


def measure(settings: Settings) -> Rates:
    """Shape -> route -> best GFLOP/s of a few calls."""
    dtype = torch.bfloat16 if settings.precision == "bf16" else torch.float32
    return gemm_limit.measure(shapes(settings), dtype)


def combine(settings: Settings, rates: Rates) -> float:
    """GFLOP/s of the whole forward mix when every shape goes its best route."""
    return gemm_limit.combine(shapes(settings), rates)


def main(settings_path: str, result_path: str) -> None:
    settings = read_settings(settings_path)
    torch.set_num_threads(settings.threads)
    write_json(result_path, measure(settings))


if __name__ == "__main__":
    main(*sys.argv[1:])
