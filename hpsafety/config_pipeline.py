"""What `pipeline`, `select` and `demo` can be told; hpsafety.config hands their configs out with the others."""

import dataclasses
from typing import Literal

from hpsafety.config import (
    Precision,
    option,
    require,
    require_at_least,
    require_device,
    require_precision,
    require_seed,
)
from hpsafety.errors import InputError

RECORDS = ("demonstration", "prompt", "preference", "document")
ROW_KINDS = ("safety", "borderline", "helpful")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PipelineConfig:
    """All stages of a TOML file in its order; a stage that is done and unchanged is left as it is."""

    file: str = option("TOML file of the stages, see docs/pipeline.md", positional="FILE.toml")
    out: str | None = option("directory to write; the file's own out if absent", None)
    plan: bool = option("a dry run: what would be done, in what time and memory; nothing is written", False)
    force_from: str | None = option("stage to do anew, with all that depends on it", None)
    seed: int | None = option("seed of every stage that names none of its own; the file's if absent", None)
    device: str | None = option("auto, cpu, cuda or cuda:N; the file's if absent", None)
    precision: Precision | None = option("auto, fp32 or bf16; the file's if absent", None)

    def __post_init__(self):
        require(self, "out", self.out != "", "a directory")
        require(self, "force_from", self.force_from != "", "the name of a stage")
        if self.seed is not None:
            require_seed(self)
        if self.device is not None:
            require_device(self)
        if self.precision is not None:
            require_precision(self)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DemoConfig:
    """The whole pipeline, small, on the built-in model and data: configs/demo.toml."""

    out: str = option("directory for the models, the report and the logs", "demo-out")
    plan: bool = option("a dry run: what would be done, in what time and memory", False)
    force_from: str | None = option("stage to do anew, with all that depends on it", None)
    seed: int | None = option(
        "seed of the data subsets, of their order and of all samples; 0 if absent", None
    )
    device: str | None = option("auto, cpu, cuda or cuda:N; auto if absent", None)
    precision: Precision | None = option("auto, fp32 or bf16; auto if absent", None)
    train_tokens: int | None = option("tokens to fine-tune on, at most", None)
    reward_tokens: int | None = option("tokens each reward model is trained on, at most", None)
    reject_tokens: int | None = option("tokens of prompts and samples in rejection sampling, at most", None)
    ppo_tokens: int | None = option("tokens of prompts and samples in PPO, at most", None)
    distill_tokens: int | None = option("tokens of prompts and samples in distillation, at most", None)
    eval_prompts: int | None = option("held-out prompts asked per set, after each stage", None)

    def __post_init__(self):
        require(self, "out", bool(self.out), "a directory")
        require_at_least(self, 1, "train_tokens", "reward_tokens", "reject_tokens", "ppo_tokens")
        require_at_least(self, 1, "distill_tokens", "eval_prompts")
        PipelineConfig.__post_init__(self)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SelectConfig:
    """A seeded part of record files: the kinds in turn, until a budget of tokens is spent."""

    data: tuple[str, ...] = option("JSON-lines files of records, or folders of the datasets library")
    out: str = option("directory to write; OUT/rows.jsonl holds the rows")
    record: Literal["demonstration", "prompt", "preference", "document"] = option(
        "what the rows are read and written as; prompt leaves responses out, document joins both",
        "demonstration",
    )
    model: str | None = option("model whose tokenizer counts --tokens", None)
    tokens: int | None = option("tokens of all rows together, at most; all rows if absent", None)
    extra_tokens: int = option("tokens a row counts beside its own: what will be sampled for it", 0)
    kinds: tuple[str, ...] = option("kinds of rows: safety, borderline, helpful", ROW_KINDS)
    shares: tuple[int, ...] = option("safety rows to other rows, as 9 1; the kinds in turn if absent", ())
    exclude: tuple[str, ...] = option("files whose prompts are left out", ())
    valid: int = option("rows with split valid that are kept beside, at most", 0)
    seed: int = option("seed of the order", 0)
    resume: bool = option("leave OUT as it is where it holds this selection", True)

    def __post_init__(self):
        require(self, "data", len(self.data) > 0 and all(self.data), "one file or more")
        require(self, "out", bool(self.out), "a directory")
        require(self, "record", self.record in RECORDS, ", ".join(RECORDS))
        require_at_least(self, 1, "tokens")
        require_at_least(self, 0, "extra_tokens", "valid")
        if self.tokens is not None and not self.model:
            raise InputError("--tokens needs --model, whose tokenizer counts them")
        known = bool(self.kinds) and {*self.kinds} <= {*ROW_KINDS}
        require(self, "kinds", known, f"of {', '.join(ROW_KINDS)}")
        parts = not self.shares or (len(self.shares) == 2 and min(self.shares) >= 0 and sum(self.shares) > 0)
        require(self, "shares", parts, "two numbers, 0 or greater, not both 0")
        require(self, "exclude", all(self.exclude), "one file or more")
        require_seed(self)
