"""What each command can be told: one flat, frozen dataclass per command, checked when it is made.

The command line is generated from these fields: the name gives the flag, the type its form, the metadata its help.
Importing this file imports no torch. A value that does not fit raises InputError with one line that names the flag.
"""

import dataclasses
import importlib
import math
import re
from typing import Literal

from hpsafety.errors import InputError

Precision = Literal["auto", "fp32", "bf16"]


_ELSEWHERE = {
    "config_sampling": ("ScoreConfig", "SampleConfig", "ChatConfig", "RejectConfig"),
    "config_ppo": ("PPOConfig",),
    "config_gatt": ("GAttConfig",),
    "config_scaling": ("ScalingConfig",),
    "config_distill": ("DistillConfig",),
    "config_audit": ("AuditConfig",),
    "config_eval": ("EvalConfig",),
    "config_pipeline": ("PipelineConfig", "DemoConfig", "SelectConfig"),
    "config_redteam": ("RedteamConfig",),
    "config_report": ("ReportConfig", "CardConfig"),
    "config_tools": ("ProfileConfig", "BenchConfig", "BenchCompareConfig", "PlanConfig"),
}


def __getattr__(name: str):
    """Configs that stand in a file of their own, read when they are asked for."""
    for module, names in _ELSEWHERE.items():
        if name in names:
            return getattr(importlib.import_module(f"hpsafety.{module}"), name)
    raise AttributeError(name)


def option(help: str, default=dataclasses.MISSING, positional: str | None = None):
    """A field with its help text; without a default it must be given. positional: its name where it has no flag."""
    return dataclasses.field(default=default, metadata={"help": help, "positional": positional})


def flag(field: str) -> str:
    return "--" + field.replace("_", "-")


def require(cfg, field: str, ok: bool, expected: str) -> None:
    """InputError unless `ok`: '--lr must be greater than 0, got -1.0'."""
    if not ok:
        raise InputError(f"{flag(field)} must be {expected}, got {getattr(cfg, field)!r}")


def require_at_least(cfg, minimum: int, *fields: str) -> None:
    """Each field is at least `minimum`, or None where the field allows it."""
    for field in fields:
        value = getattr(cfg, field)
        require(cfg, field, value is None or value >= minimum, f"at least {minimum}")


def require_device(cfg) -> None:
    known = re.fullmatch(r"auto|cpu|cuda(:\d+)?", cfg.device) is not None
    require(cfg, "device", known, "auto, cpu, cuda or cuda:N")


def require_precision(cfg) -> None:
    require(cfg, "precision", cfg.precision in ("auto", "fp32", "bf16"), "auto, fp32 or bf16")


def require_seed(cfg) -> None:
    require(cfg, "seed", 0 <= cfg.seed < 2**63, "from 0 to 2^63 - 1")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """What every training stage can be told. A stage's config adds its own fields and may give another default."""

    model: str = option("model to start from: HF directory, .gguf file, or smollm2")
    data: tuple[str, ...] = option("JSON-lines files, or folders of the datasets library")
    out: str = option("run directory to write; a run found there is resumed")
    seed: int = option(
        "seed of everything that is drawn: data order, subsets, held-out rows, fresh weights", 0
    )
    device: str = option("auto, cpu, cuda or cuda:N", "auto")
    precision: Precision = option("bf16 only where it is faster when auto", "auto")
    batch: int = option("examples per optimiser step, over all ranks", 64)
    tokens_per_batch: int = option(
        "tokens per micro-batch and rank; changes memory and speed, not the result", 1024
    )
    max_length: int | None = option(
        "tokens; a longer example is dropped and counted; the model's context if absent", None
    )
    epochs: int = option("passes over the data", 1)
    steps: int | None = option("exactly this many optimiser steps; overrides --epochs", None)
    lr: float = option("peak learning rate; a cosine takes it to a tenth", 1e-5)
    warmup: int | None = option("optimiser steps of linear warm-up", 0)
    weight_decay: float = option("decoupled weight decay, on all but norms and biases", 0.1)
    clip: float = option("largest global gradient norm", 1.0)
    beta1: float = option("AdamW: decay of the first moment per step", 0.9)
    beta2: float = option("AdamW: decay of the second moment per step", 0.95)
    eps: float = option("AdamW: added to the root of the second moment", 1e-5)
    checkpoint_every: int = option("optimiser steps between checkpoints; 0: only when interrupted", 50)
    resume: bool = option("go on from the checkpoint that OUT holds", True)
    recompute: bool = option("recompute blocks in backward: less memory, a third more work", False)

    def __post_init__(self):
        require(self, "model", bool(self.model), "a directory, a file or a name")
        require(self, "data", len(self.data) > 0 and all(self.data), "one file or more")
        require(self, "out", bool(self.out), "a directory")
        require_training(self)


def require_training(cfg: TrainConfig) -> None:
    """The settings of a training, without what it reads and writes."""
    require_seed(cfg)
    require_device(cfg)
    require_precision(cfg)
    require_at_least(cfg, 1, "batch", "tokens_per_batch", "epochs", "steps")
    require_at_least(cfg, 2, "max_length")
    require_at_least(cfg, 0, "warmup", "checkpoint_every")
    for field in ("lr", "eps", "clip"):
        value = getattr(cfg, field)
        require(cfg, field, math.isfinite(value) and value > 0, "a number greater than 0")
    require(cfg, "weight_decay", 0 <= cfg.weight_decay < math.inf, "a number, 0 or greater")
    for field in ("beta1", "beta2"):
        require(cfg, field, 0 <= getattr(cfg, field) < 1, "from 0 to below 1")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SFTConfig(TrainConfig):
    """Supervised fine-tuning on demonstrations, helpful and safe mixed."""

    data: tuple[str, ...] = option("JSON-lines files of demonstrations, or folders of the datasets library")
    epochs: int = option("passes over the data", 2)
    lr: float = option("peak learning rate; a cosine takes it to a tenth", 2e-5)
    warmup: int = option("optimiser steps of linear warm-up", 0)
    safety_fraction: float = option("share of the safety rows used, 0 to 1; all helpful rows are", 1.0)
    all_safety: bool = option("take rows without is_safety as safety rows", False)

    def __post_init__(self):
        TrainConfig.__post_init__(self)  # super() does not work in a slotted dataclass
        require(self, "safety_fraction", 0 <= self.safety_fraction <= 1, "from 0 to 1")


# kind of reward model: its margin and the weight of its auxiliary safety loss where none is given
REWARD_DEFAULTS = {"safety": ("none", 1.0), "helpfulness": ("small", 0.0)}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RewardConfig(TrainConfig):
    """A reward model from preference pairs. `margin` and `aux_weight` hold the kind's defaults once it is made."""

    kind: Literal["safety", "helpfulness"] = option("what the model judges; sets the mix of data, see docs")
    margin: Literal["none", "small", "large"] | None = option(
        "gap asked for by rating; small for helpfulness, none for safety if absent", None
    )
    aux_weight: float | None = option(
        "weight of the safety bins' auxiliary loss; 1 for safety, 0 for helpfulness if absent", None
    )
    head_only: bool = option("train the score head alone: the model's own weights stay as they are", False)
    data: tuple[str, ...] = option("JSON-lines files of preferences, or folders of the datasets library")
    batch: int = option("pairs per optimiser step, over all ranks", 512)
    warmup: int | None = option("optimiser steps of linear warm-up; 3 % of them, at least 5, if absent", None)

    def __post_init__(self):
        TrainConfig.__post_init__(self)
        require(self, "kind", self.kind in REWARD_DEFAULTS, "safety or helpfulness")
        margin, aux_weight = REWARD_DEFAULTS[self.kind]
        for field, default in (("margin", margin), ("aux_weight", aux_weight)):
            if getattr(self, field) is None:
                object.__setattr__(self, field, default)
        require(self, "margin", self.margin in ("none", "small", "large"), "none, small or large")
        require(self, "aux_weight", 0 <= self.aux_weight < math.inf, "a number, 0 or greater")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DPOConfig(TrainConfig):
    """Direct preference optimisation of a chat model on preference pairs."""

    model: str = option("model to start from, and the frozen reference: HF directory, .gguf file, or smollm2")
    data: tuple[str, ...] = option("JSON-lines files of preferences, or folders of the datasets library")
    batch: int = option("pairs per optimiser step, over all ranks", 64)
    lr: float = option("peak learning rate; a cosine takes it to a tenth", 1e-6)
    warmup: int | None = option("optimiser steps of linear warm-up; 10 % of them if absent", None)
    beta: float = option("strength of the pull to the start; smaller lets the model go further", 0.1)

    def __post_init__(self):
        TrainConfig.__post_init__(self)
        require(self, "beta", 0 < self.beta < math.inf, "a number greater than 0")


def memory_bytes(text: str | None) -> int | None:
    """Bytes of a size such as 512MB, 2GB or 1.5G, in powers of 1024; None where it is no size above 0."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:I?B)?", (text or "").strip().upper())
    return int(float(match[1]) * 1024 ** " KMGT".index(match[2] or " ")) or None if match else None


def require_kv_memory(cfg) -> None:
    known = cfg.kv_memory is None or memory_bytes(cfg.kv_memory) is not None
    require(cfg, "kv_memory", known, "a size such as 512MB or 2GB")
