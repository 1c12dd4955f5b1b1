"""What the commands that sample or score can be told; hpsafety.config hands them out with the others."""

import dataclasses
import math
from typing import Literal

from hpsafety.config import (
    Precision,
    TrainConfig,
    option,
    require,
    require_at_least,
    require_device,
    require_kv_memory,
    require_precision,
    require_seed,
)


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
        require_precision(self)
        require_at_least(self, 1, "tokens_per_batch")


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
    batch_invariant: bool = option(
        "take every sum in the order of training: logprobs equal the trainer's to the bit", False
    )
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
        require_kv_memory(self)
        require_device(self)
        require_precision(self)


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
        require_precision(self)


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
        require_kv_memory(self)
        require(self, "pool", self.pool in ("all", "last"), "all or last")
