"""What `hpsafety ppo` can be told. The defaults are the Llama 2 paper's settings (spec section 5).

It shares no base with the other training configs: PPO has iterations instead of passes over the data, and a constant
rate. hpsafety.config hands PPOConfig out with the others.
"""

import dataclasses
import math
from typing import Literal

from hpsafety.config import (
    Precision,
    option,
    require,
    require_at_least,
    require_device,
    require_kv_memory,
    require_precision,
    require_seed,
)
from hpsafety.errors import InputError

# --preset llama2: the paper's settings (spec section 5), which are the defaults too; kl_coef None follows the size.
LLAMA2 = {
    "batch": 512, "minibatch": 64, "k": 1, "lr": 1e-6, "kl_coef": None, "adaptive_kl": None, "clip_ratio": 0.2,
    "weight_decay": 0.1, "clip": 1.0, "beta1": 0.9, "beta2": 0.95, "eps": 1e-5,
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PPOConfig:
    """PPO from a chat model with a safety and a helpfulness reward model."""

    model: str = option(
        "policy to start from, and the frozen reference: HF directory, .gguf file, or smollm2"
    )
    safety_rm: str = option("directory of the safety reward model")
    helpful_rm: str = option("directory of the helpfulness reward model")
    advantages: Literal["gae", "group", "rloo"] = option(
        "gae: with a critic; group (GRPO) and rloo: against the prompt's other samples, without one, --k 2 or more",
        "gae",
    )
    critic_from: str | None = option("reward model the critic starts from; the policy if absent", None)
    data: tuple[str, ...] = option("JSON-lines files of prompts, or folders of the datasets library")
    out: str = option("run directory to write; a run found there is resumed")
    preset: Literal["llama2"] | None = option(
        "llama2: the paper's settings, said and recorded with the flags that depart from them", None
    )
    iterations: int = option("rounds of sampling and updating", 200)
    batch: int = option("rollouts per iteration, over all ranks", LLAMA2["batch"])
    minibatch: int = option("rollouts per optimiser step, over all ranks", LLAMA2["minibatch"])
    k: int = option("samples per prompt, of which each iteration draws batch / k", LLAMA2["k"])
    max_new_tokens: int = option("tokens per sample, at most", 256)
    temperature: float = option("of sampling and training; the whole vocabulary is drawn from", 1.0)
    lr: float = option("learning rate of policy and critic, constant", LLAMA2["lr"])
    kl_coef: float | None = option(
        "weight of the per-token KL to the start; 0.01 up to 13B parameters, 0.005 above, if absent", None
    )
    adaptive_kl: float | None = option(
        "nats per sampled token: the KL coefficient is moved by at most 2 % an iteration towards this KL",
        None,
    )
    clip_ratio: float = option(
        "the ratio to the sampling policy counts within 1 - X and 1 + X", LLAMA2["clip_ratio"]
    )
    kl_stop: float = option("nats per sampled token from the start at which the run stops as degenerate", 1.0)
    eval_every: int = option("iterations between held-out rewards, on rows with split valid", 10)
    patience: int = option("held-out rewards in a row without a new best that stop the run early", 3)
    all_safety: bool = option("take rows without is_safety as safety rows", False)
    seed: int = option("seed of everything that is drawn: prompts and samples", 0)
    device: str = option("auto, cpu, cuda or cuda:N", "auto")
    precision: Precision = option("bf16 only where it is faster when auto", "auto")
    tokens_per_batch: int = option(
        "tokens per micro-batch and rank; changes memory and speed, not the result", 1024
    )
    kv_memory: str | None = option(
        "memory for keys and values, as 2GB; a quarter of what is free if absent", None
    )
    max_batch: int = option("sequences decoded at once, at most", 64)
    batch_invariant: bool = option(
        "sampler and trainer take every sum in one order: the same logprobs to the bit", False
    )
    weight_decay: float = option(
        "decoupled weight decay, on all but norms and biases", LLAMA2["weight_decay"]
    )
    clip: float = option("largest global gradient norm, of policy and critic each", LLAMA2["clip"])
    beta1: float = option("AdamW: decay of the first moment per step", LLAMA2["beta1"])
    beta2: float = option("AdamW: decay of the second moment per step", LLAMA2["beta2"])
    eps: float = option("AdamW: added to the root of the second moment", LLAMA2["eps"])
    checkpoint_every: int = option("optimiser steps between checkpoints; 0: only when interrupted", 8)
    resume: bool = option("go on from the checkpoint that OUT holds", True)
    recompute: bool = option("recompute blocks in backward: less memory, a third more work", False)
    frozen: Literal["resident", "bf16", "mapped"] = option(
        "the start and the reward models: in memory, in memory as bf16, or in files mapped in turn",
        "resident",
    )
    lora_rank: int = option(
        "train adapters of this rank on one frozen trunk instead of all weights; 0: all weights", 0
    )

    @property
    def updates(self) -> int:
        """Optimiser steps per iteration."""
        return self.batch // self.minibatch

    @property
    def has_critic(self) -> bool:
        """Whether the advantages are estimated with a critic."""
        return self.advantages == "gae"

    @property
    def departures(self) -> dict:
        """Settings of the preset that were given another value."""
        return {k: getattr(self, k) for k, v in LLAMA2.items() if self.preset and getattr(self, k) != v}

    def __post_init__(self):
        for field in ("model", "safety_rm", "helpful_rm", "out"):
            require(self, field, bool(getattr(self, field)), "a directory")
        require(self, "advantages", self.advantages in ("gae", "group", "rloo"), "gae, group or rloo")
        require(self, "preset", self.preset in (None, "llama2"), "llama2")
        require(self, "critic_from", self.critic_from != "", "the directory of a reward model")
        if not self.has_critic and self.critic_from:
            raise InputError(f"--critic-from needs --advantages gae: {self.advantages} has no critic")
        if not self.has_critic and self.k == 1:
            raise InputError(f"--k must be at least 2 with --advantages {self.advantages}, got 1")
        require(self, "data", len(self.data) > 0 and all(self.data), "one file or more")
        require_at_least(self, 1, "iterations", "batch", "minibatch", "k", "max_batch", "tokens_per_batch")
        require_at_least(self, 1, "eval_every", "patience")
        require_at_least(self, 0, "checkpoint_every")
        whole = self.batch % self.minibatch == 0
        require(self, "minibatch", whole, f"a divisor of --batch {self.batch}")
        require(self, "k", self.minibatch % self.k == 0, f"a divisor of --minibatch {self.minibatch}")
        require_at_least(self, 1, "max_new_tokens")
        for field in ("lr", "eps", "clip", "temperature", "kl_stop"):
            value = getattr(self, field)
            require(self, field, math.isfinite(value) and value > 0, "a number greater than 0")
        target = self.adaptive_kl
        above = target is None or 0 < target < math.inf
        require(self, "adaptive_kl", above, "a number greater than 0")
        if target and self.kl_coef == 0:
            raise InputError(
                "--adaptive-kl scales the KL coefficient, so --kl-coef must be greater than 0, got 0"
            )
        for field in ("kl_coef", "weight_decay"):
            value = getattr(self, field)
            require(self, field, value is None or 0 <= value < math.inf, "a number, 0 or greater")
        for field in ("clip_ratio", "beta1", "beta2"):
            require(self, field, 0 <= getattr(self, field) < 1, "from 0 to below 1")
        require(self, "clip_ratio", self.clip_ratio > 0, "greater than 0 and below 1")
        require_kv_memory(self)
        require_seed(self)
        require_device(self)
        require(self, "frozen", self.frozen in ("resident", "bf16", "mapped"), "resident, bf16 or mapped")
        require_at_least(self, 0, "lora_rank")
        require(self, "critic_from", not (self.lora_rank and self.critic_from), "absent with --lora-rank")
        require_precision(self)
