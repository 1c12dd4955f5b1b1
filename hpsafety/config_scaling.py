"""What `hpsafety scaling` can be told; hpsafety.config hands ScalingConfig out with the others."""

import dataclasses
import math

from hpsafety.config import (
    TrainConfig,
    flag,
    option,
    require,
    require_at_least,
    require_kv_memory,
    require_training,
)
from hpsafety.errors import InputError

# What settings that are not given become: in a study, and with --demo.
USUAL = {
    "model": "", "out": "", "lr": 2e-5, "batch": 64, "epochs": 2, "warmup": 0, "checkpoint_every": 50,
    "max_new_tokens": 256,
}  # fmt: skip
DEMO = {
    "model": "smollm2", "out": "scaling-demo", "lr": 1e-4, "batch": 4, "epochs": 1, "warmup": 3, "checkpoint_every": 0,
    "max_new_tokens": 40, "eval_prompts": 30,
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ScalingConfig(TrainConfig):
    """The safety-data-scaling study: one fine-tuning per share of the safety rows, all on the same helpful rows."""

    demo: bool = option("a small study of the built-in model and data, which needs no other flag", False)
    model: str | None = option(
        "model every variant starts from: HF directory, .gguf file, or smollm2, which --demo takes", None
    )
    data: tuple[str, ...] = option("JSON-lines files of demonstrations, helpful and safety rows", ())
    safety_rm: str = option("directory of the safety reward model", "")
    helpful_rm: str = option("directory of the helpfulness reward model", "")
    out: str | None = option(
        "directory to write; a study found there goes on; scaling-demo with --demo", None
    )
    fractions: tuple[float, ...] = option(
        "shares of the safety rows, 0 to 1: a variant each", (0.0, 0.01, 0.1, 0.25, 0.5, 1.0)
    )
    eval: tuple[str, ...] = option(
        "files of held-out prompts; the rows of --data that are held out if absent", ()
    )
    eval_prompts: int | None = option(
        "held-out prompts of each set, at most: the first of it; all if absent", None
    )
    max_new_tokens: int | None = option("tokens per answer, at most; 256 if absent, 40 with --demo", None)
    temperature: float = option("of the answers; 0 is greedy", 0.0)
    kv_memory: str | None = option(
        "memory for keys and values, as 2GB; a quarter of what is free if absent", None
    )
    max_batch: int = option("sequences decoded at once, at most", 64)
    all_safety: bool = option("take rows of --data without is_safety as safety rows", False)
    batch: int | None = option("examples per optimiser step; 64 if absent, 4 with --demo", None)
    epochs: int | None = option("passes over a variant's data; 2 if absent, 1 with --demo", None)
    lr: float | None = option(
        "peak learning rate; a cosine takes it to a tenth; 2e-5 if absent, 1e-4 with --demo", None
    )
    warmup: int | None = option("optimiser steps of linear warm-up; 0 if absent, 3 with --demo", None)
    checkpoint_every: int | None = option(
        "optimiser steps between checkpoints, 0: only when interrupted; 50 if absent, 0 with --demo", None
    )

    def __post_init__(self):
        for field, value in (DEMO if self.demo else USUAL).items():
            if getattr(self, field) is None:
                object.__setattr__(self, field, value)
        for field in ("data", "safety_rm", "helpful_rm", *(("eval",) if self.demo else ("model", "out"))):
            if self.demo:
                require(self, field, not getattr(self, field), "left out with --demo, which brings its own")
            elif not getattr(self, field):
                text = type(self).__dataclass_fields__[field].metadata["help"]
                raise InputError(f"{flag(field)} is missing ({text}); hpsafety scaling --demo needs none")
        require_training(self)
        if not self.demo:
            require(self, "data", all(self.data), "one file or more")
            require(self, "eval", all(self.eval), "one file or more")
        require_at_least(self, 1, "eval_prompts", "max_new_tokens", "max_batch")
        require(self, "temperature", 0 <= self.temperature < math.inf, "a number, 0 (greedy) or greater")
        require_kv_memory(self)
        shares = self.fractions
        fine = len(shares) > 0 and all(0 <= share <= 1 for share in shares)
        require(self, "fractions", fine, "one number or more, each from 0 to 1")
        require(self, "fractions", len({*map(percent, shares)}) == len(shares), "numbers that differ")


def percent(fraction: float) -> str:
    """A share in percent, as the folders and figures name it: '0.5', '10'."""
    return f"{100 * fraction:g}"
