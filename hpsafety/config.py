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


def __getattr__(name: str):
    """Configs that have a file of their own."""
    if name == "PPOConfig":
        return importlib.import_module("hpsafety.config_ppo").PPOConfig
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
        require_seed(self)
        require_device(self)
        require(self, "precision", self.precision in ("auto", "fp32", "bf16"), "auto, fp32 or bf16")
        require_at_least(self, 1, "batch", "tokens_per_batch", "epochs", "steps")
        require_at_least(self, 2, "max_length")
        require_at_least(self, 0, "warmup", "checkpoint_every")
        for field in ("lr", "eps", "clip"):
            value = getattr(self, field)
            require(self, field, math.isfinite(value) and value > 0, "a number greater than 0")
        require(self, "weight_decay", 0 <= self.weight_decay < math.inf, "a number, 0 or greater")
        for field in ("beta1", "beta2"):
            require(self, field, 0 <= getattr(self, field) < 1, "from 0 to below 1")


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
class ScoreConfig:
    """Scores of groups of responses by two reward models."""

    safety_rm: str = option("directory of the safety reward model")
    helpful_rm: str = option("directory of the helpfulness reward model")
    data: tuple[str, ...] = option("JSON-lines files of groups: a prompt and its responses")
    out: str = option("file to write, one line per input line; what OUT.part holds is resumed")
    device: str = option("auto, cpu, cuda or cuda:N", "auto")
    precision: Precision = option("bf16 only where it is faster when auto", "auto")
    tokens_per_batch: int = option(
        "tokens per micro-batch and rank; changes memory and speed, not the result", 4096
    )
    all_safety: bool = option("take rows without is_safety as safety rows", False)
    resume: bool = option("go on from what OUT.part holds", True)

    def __post_init__(self):
        require(self, "safety_rm", bool(self.safety_rm), "a directory")
        require(self, "helpful_rm", bool(self.helpful_rm), "a directory")
        require(self, "data", len(self.data) > 0 and all(self.data), "one file or more")
        require(self, "out", bool(self.out), "a file")
        require_device(self)
        require(self, "precision", self.precision in ("auto", "fp32", "bf16"), "auto, fp32 or bf16")
        require_at_least(self, 1, "tokens_per_batch")


def memory_bytes(text: str | None) -> int | None:
    """Bytes of a size such as 512MB, 2GB or 1.5G, in powers of 1024; None where it is no size above 0."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:I?B)?", (text or "").strip().upper())
    return int(float(match[1]) * 1024 ** " KMGT".index(match[2] or " ")) or None if match else None


def require_sampling(cfg) -> None:
    """The settings of a draw, by the names all sampling commands share."""
    require_at_least(cfg, 1, "max_new_tokens")
    require(cfg, "temperature", 0 <= cfg.temperature < math.inf, "a number, 0 (greedy) or greater")
    require(cfg, "top_p", 0 < cfg.top_p <= 1, "greater than 0 and at most 1")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SampleConfig:
    """K responses per prompt."""

    model: str = option("model to sample from: HF directory, .gguf file, or smollm2")
    data: tuple[str, ...] = option("JSON-lines files of prompts")
    out: str = option("JSON-lines file of groups to write; OUT.part holds what is finished until then")
    k: int = option("responses per prompt", 1)
    temperature: float = option("of the softmax; 0 is greedy", 1.0)
    top_p: float = option("draw from the most likely words of this much probability, 0 to 1", 1.0)
    top_k: int = option("draw from this many most likely words; 0: all", 0)
    max_new_tokens: int = option("tokens per response, at most", 256)
    seed: int = option("seed of the draws, with the prompt's line and the sample's number", 0)
    kv_memory: str | None = option(
        "keys and values of each process, such as 512MB or 2GB; a quarter of the free memory if absent", None
    )
    max_batch: int = option("sequences decoded at once, at most; changes memory and speed, not the text", 64)
    device: str = option("auto, cpu, cuda or cuda:N", "auto")
    precision: Precision = option("bf16 only where it is faster when auto", "auto")
    resume: bool = option("go on from what OUT.part holds", True)

    def __post_init__(self):
        require(self, "model", bool(self.model), "a directory, a file or a name")
        require(self, "data", len(self.data) > 0 and all(self.data), "one file or more")
        require(self, "out", bool(self.out), "a file")
        require_at_least(self, 1, "k", "max_batch")
        require_at_least(self, 0, "top_k")
        require_sampling(self)
        require_seed(self)
        known = self.kv_memory is None or memory_bytes(self.kv_memory) is not None
        require(self, "kv_memory", known, "a size such as 512MB or 2GB")
        require_device(self)
        require(self, "precision", self.precision in ("auto", "fp32", "bf16"), "auto, fp32 or bf16")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ChatConfig:
    """Talk to a checkpoint in the terminal."""

    model: str = option("model to talk to: HF directory, .gguf file, or smollm2")
    against: str | None = option("a second model that answers side by side", None)
    system: str | None = option("system message of the conversation", None)
    temperature: float = option("of the softmax; 0 is greedy", 0.7)
    top_p: float = option("draw from the most likely words of this much probability, 0 to 1", 0.95)
    max_new_tokens: int = option("tokens per answer, at most", 512)
    seed: int = option("seed of the draws, with the turn's number", 0)
    device: str = option("auto, cpu, cuda or cuda:N", "auto")
    precision: Precision = option("bf16 only where it is faster when auto", "auto")

    def __post_init__(self):
        require(self, "model", bool(self.model), "a directory, a file or a name")
        require(self, "against", self.against != "", "a directory, a file or a name")
        require(self, "system", self.system is None or bool(self.system.strip()), "text")
        require_sampling(self)
        require_seed(self)
        require_device(self)
        require(self, "precision", self.precision in ("auto", "fp32", "bf16"), "auto, fp32 or bf16")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RejectConfig(TrainConfig):
    """Rejection sampling: the best of K samples per prompt becomes what the base model is fine-tuned on."""

    model: str = option("newest model: it samples in the first iteration, with --student in all")
    base: str | None = option("weights every fine-tuning starts from; --model if absent", None)
    student: str | None = option("smaller model to fine-tune on --model's best samples; never sampled", None)
    safety_rm: str = option("directory of the safety reward model")
    helpful_rm: str = option("directory of the helpfulness reward model")
    data: tuple[str, ...] = option("JSON-lines files of prompts, or folders of the datasets library")
    k: int = option("samples per prompt", 8)
    iterations: int = option("rounds of sampling and fine-tuning; each samples the one before's model", 1)
    temperatures: tuple[float, ...] = option(
        "grid of the search on validation prompts in each iteration; one value: no search", (0.7, 1.0, 1.3)
    )
    search_prompts: int = option("validation prompts of the search, at most", 64)
    top_p: float = option("probability kept of the most likely words, above 0 to 1", 1.0)
    top_k: int = option("most likely words kept; 0: all", 0)
    max_new_tokens: int = option("tokens per sample, at most", 256)
    pool: Literal["all", "last"] = option("winners from all iterations so far, or from the last alone", "all")
    pool_from: tuple[str, ...] = option(
        "earlier runs of reject, or group files, whose samples join the pool", ()
    )
    all_safety: bool = option("take rows without is_safety as safety rows", False)
    kv_memory: str | None = option(
        "memory for keys and values, as 2GB; a quarter of what is free if absent", None
    )
    max_batch: int = option("sequences decoded at once, at most", 64)
    epochs: int = option("passes over the winners", 2)
    lr: float = option("peak learning rate; a cosine takes it to a tenth", 2e-5)

    def __post_init__(self):
        TrainConfig.__post_init__(self)
        for field in ("safety_rm", "helpful_rm"):
            require(self, field, bool(getattr(self, field)), "a directory")
        require_at_least(self, 1, "k", "iterations", "search_prompts", "max_new_tokens", "max_batch")
        require_at_least(self, 0, "top_k")
        require(self, "top_p", 0 < self.top_p <= 1, "above 0, up to 1")
        fine = all(0 <= t < math.inf for t in self.temperatures) and self.temperatures
        require(self, "temperatures", bool(fine), "one number or more, each 0 or greater")
        require(self, "pool", self.pool in ("all", "last"), "all or last")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DemoConfig:
    """The whole pipeline, small, on the built-in model and data."""

    out: str = option("directory for the model, the report and the logs", "demo-out")
    seed: int = option("seed of the data subset and order", 0)
    device: str = option("auto, cpu, cuda or cuda:N", "auto")
    precision: Precision = option("bf16 only where it is faster when auto", "auto")
    batch: int = option("examples per optimiser step", 4)
    lr: float = option("peak learning rate; a cosine takes it to a tenth", 1e-4)
    train_tokens: int = option("tokens to train on, at most", 12_000)
    eval_prompts: int = option("held-out prompts asked per set, before and after", 60)
    answer_tokens: int = option("tokens per answer, at most", 40)
    reward_tokens: int = option("tokens each reward model is trained on, at most", 10_000)
    held_pairs: int = option("held-out pairs each reward model is measured on, at most", 48)
    k: int = option("answers per prompt in rejection sampling", 4)
    reject_tokens: int = option("tokens of prompts and samples in rejection sampling, at most", 8_000)

    def __post_init__(self):
        require(self, "out", bool(self.out), "a directory")
        require_seed(self)
        require_device(self)
        require(self, "precision", self.precision in ("auto", "fp32", "bf16"), "auto, fp32 or bf16")
        require_at_least(self, 1, "batch", "train_tokens", "eval_prompts", "answer_tokens", "reward_tokens")
        require_at_least(self, 1, "held_pairs", "k", "reject_tokens")
        require(self, "lr", math.isfinite(self.lr) and self.lr > 0, "a number greater than 0")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ProfileConfig:
    """What `hpsafety profile <stage>` takes beside the stage's own flags."""

    profile_steps: int = option("optimiser steps to record", 3)
    profile_warmup: int = option("steps before them that are not recorded", 1)

    def __post_init__(self):
        require_at_least(self, 1, "profile_steps")
        require_at_least(self, 0, "profile_warmup")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BenchConfig:
    """Microbenchmarks of the ops, each against its peers and against what the machine can do."""

    ops: tuple[str, ...] = option("ops by name, or all (first shape of each, 4 minutes)", positional="OP")
    shape: tuple[str, ...] = option(
        "shapes as NAME=NUMBER,... (N=64,D=576); sizes left out as by default", ()
    )
    dtype: str = option("float32, bfloat16, or both with a comma", "float32")
    impl: str | None = option(
        "contenders with commas: backends, reference, peers; all but the slow ones if absent", None
    )
    direction: str | None = option("forward, both (with backward), or both words with a comma", None)
    device: str = option("auto, cpu, cuda or cuda:N", "auto")
    threads: int | None = option("CPU threads; torch's own number if absent", None)
    seconds: float | None = option("seconds of timed calls per contender; 2 if absent, less for all", None)
    cache: Literal["auto", "cold", "warm"] = option(
        "state of the caches before a call; auto: warm for cases that move less than 4 MiB", "auto"
    )
    memory: bool = option(
        "also each contender's peak memory beyond its inputs, in a process of its own", False
    )
    seed: int = option("seed of the inputs", 0)
    json: str | None = option("file for machine, limits, rows and all samples", None)
    plot: str | None = option("file for the roofline picture, .png or .svg", None)

    @property
    def dtypes(self) -> tuple[str, ...]:
        return words(self.dtype)

    @property
    def impls(self) -> tuple[str, ...] | None:
        return None if self.impl is None else words(self.impl)

    @property
    def directions(self) -> tuple[str, ...]:
        return () if self.direction is None else words(self.direction)

    def __post_init__(self):
        require(
            self, "dtype", {*self.dtypes} <= {"float32", "bfloat16"} and self.dtypes, "float32 or bfloat16"
        )
        require(self, "impl", self.impls != (), "one name or more")
        known = {*self.directions} <= {"forward", "both"} and (self.direction is None or self.directions)
        require(self, "direction", known, "forward, both or forward,both")
        require_device(self)
        require_seed(self)
        require_at_least(self, 1, "threads")
        bounded = self.seconds is None or 0 < self.seconds < math.inf
        require(self, "seconds", bounded, "a number greater than 0")
        require(self, "cache", self.cache in ("auto", "cold", "warm"), "auto, cold or warm")
        require(self, "json", self.json != "", "a file")
        pictures = self.plot is None or self.plot.endswith((".png", ".svg"))
        require(self, "plot", pictures, "a file that ends in .png or .svg")


def words(text: str) -> tuple[str, ...]:
    """'a, b' as ('a', 'b'), each once."""
    return tuple(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BenchCompareConfig:
    """Two result files of hpsafety bench --json against each other."""

    old: str = option("result file to compare with", positional="OLD")
    new: str = option("result file in question", positional="NEW")
