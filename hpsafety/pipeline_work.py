"""What a stage has to compute and to hold: FLOPs, decoding steps, bytes read and written, memory, from shapes and rows.

Training counts three forward passes (two on a frozen trunk with adapters, one more with --recompute), scoring one,
sampling its prompts' forward pass and a step per new token. Answers that are not written yet count as long as they may
get: max_new_tokens. Memory is hpsafety/safety/ppo_memory.py's.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from hpsafety.config import memory_bytes
from hpsafety.data.groups import PromptGroup
from hpsafety.model import lora
from hpsafety.model.config import LlamaConfig
from hpsafety.pipeline_file import Stage
from hpsafety.pipeline_sizes import Rows, Sizes
from hpsafety.safety.ppo_memory import (
    gathered_bytes,
    make_plan,
    num_parameters,
    passing_per_token,
    saved_per_token,
    training,
)
from hpsafety.train.work import forward_flops

PREPROMPT = 150  # tokens of a preprompt, about
LIBRARIES = 500 * 2**20  # torch, tokenizer and libraries in the host's memory
KV_MEMORY = 2**31  # keys and values, where the stage's kv_memory says nothing
FP32 = 4
UPDATE = 32  # bytes of a parameter that an optimiser step moves: gradient, weight and two moments read, three written


@dataclass(frozen=True)
class Decoding:
    """Sampling: `samples` answers of `new` tokens by a model behind prompts of `prompt` tokens, `batch` at once."""

    config: LlamaConfig
    samples: float
    new: float
    prompt: float
    batch: int


@dataclass
class Work:
    """train, forward: FLOPs. updates: bytes that optimiser steps move. disk: bytes of weights read and written.
    text: bytes of a corpus. tokens: computed in all, for the table. memory: bytes of one rank at the peak."""

    train: float = 0.0
    forward: float = 0.0
    updates: float = 0.0
    disk: float = 0.0
    text: float = 0.0
    tokens: float = 0.0
    memory: float = 0.0
    decoding: list[Decoding] = field(default_factory=list)
    assumed: bool = False


@dataclass(frozen=True)
class Place:
    """What the memory is counted for: dtype of the computation, ranks, and whether models are in the host's memory."""

    dtype: torch.dtype
    ranks: int
    host: bool


def work_of(stage: Stage, sizes: Sizes, place: Place) -> Work:
    """The work of a stage."""
    work = Work(memory=LIBRARIES if place.host else 0)
    COUNT[stage.run](stage, sizes, place, work)
    return work


# ---- pieces ----


def forward(config: LlamaConfig, prompt: float, answers: list[float], head: bool = True) -> float:
    """FLOPs of a forward pass over a prompt and its answers."""
    group = PromptGroup([0] * max(1, round(prompt)), [[0] * max(1, round(n)) for n in answers])
    return forward_flops(config, group, head)


def train_on(
    work: Work, cfg, config: LlamaConfig, rows: float, prompt, answers, place: Place, passes=3, head=True
):
    """Adds a fine-tuning: cfg has epochs, steps, batch, tokens_per_batch and recompute."""
    seen = rows * cfg.epochs if cfg.steps is None else cfg.steps * cfg.batch
    work.train += (
        idle(cfg.batch, place) * (passes + cfg.recompute) * seen * forward(config, prompt, answers, head)
    )
    work.updates += math.ceil(seen / cfg.batch) * UPDATE * num_parameters(config)
    work.tokens += seen * (prompt + sum(answers))
    work.disk += 2 * FP32 * num_parameters(config)
    hold(work, training_bytes(config, cfg, place, prompt + sum(answers)), place)


def idle(batch: float, place: Place) -> float:
    """How much longer a step takes because it has fewer examples than there are ranks."""
    return place.ranks / min(place.ranks, max(1, batch))


def training_bytes(config: LlamaConfig, cfg, place: Place, longest: float) -> float:
    """A model that trains, and what its backward keeps of a micro-batch."""
    role = training(num_parameters(config) + config.width, place.dtype, place.ranks)
    size, tokens = place.dtype.itemsize, max(cfg.tokens_per_batch, longest)
    kept = 2 * config.width * size * config.num_layers if cfg.recompute else 0
    kept += saved_per_token(config, size) * (1 if cfg.recompute else config.num_layers)
    gathered = gathered_bytes(config, size) if place.ranks > 1 else 0
    held = role.weights + role.optimiser + role.gradients
    return held + tokens * (kept + passing_per_token(config, size)) + gathered


def sample_from(work: Work, cfg, config: LlamaConfig, samples: float, prompt: float, place: Place, new=None):
    """Adds sampling; the whole model is on every rank."""
    new = cfg.max_new_tokens if new is None else new
    work.decoding.append(Decoding(config, samples, new, prompt, cfg.max_batch))
    work.tokens += samples * new
    size = place.dtype.itemsize
    per_token = 2 * config.num_layers * config.num_kv_heads * config.head_dim * size
    running = min(cfg.max_batch, math.ceil(samples / place.ranks))
    cache = min(memory_bytes(cfg.kv_memory) or KV_MEMORY, running * (2 * prompt + new) * per_token)
    words = running * config.vocab_size * FP32
    hold(work, num_parameters(config) * size + cache + words, place)
    work.disk += FP32 * num_parameters(config)


def score_with(
    work: Work, configs: list[LlamaConfig], rows: float, prompt: float, answers: list[float], place: Place
):
    """Adds the scores of reward models, whole on every rank, one after the other."""
    for config in configs:
        work.forward += rows * forward(config, prompt, answers, head=False)
        work.disk += FP32 * num_parameters(config)
    work.tokens += len(configs) * rows * (prompt + sum(answers))
    if configs:
        weights = sum(num_parameters(config) for config in configs) * place.dtype.itemsize
        hold(work, weights + 4096 * passing_per_token(configs[0], place.dtype.itemsize), place)


def hold(work: Work, size: float, place: Place) -> None:
    work.memory = max(work.memory, size + (LIBRARIES if place.host else 0))


def judges(stage: Stage, sizes: Sizes) -> list[LlamaConfig]:
    """The shapes of the reward models a stage is given."""
    return [c for c in (sizes.of(stage, name) for name in ("safety_rm", "helpful_rm")) if c is not None]


# ---- the commands ----


def tune(stage: Stage, sizes: Sizes, place: Place, work: Work) -> None:
    """sft, reward, dpo: a pass over rows with one answer, or with two of a pair."""
    rows, cfg, config = sizes.data(stage), stage.cfg, sizes.of(stage, "model")
    work.assumed |= rows.assumed
    answers = [rows.answer] * (1 if stage.run == "sft" else 2)
    passes = 4 if stage.run == "dpo" else 3  # the reference's logprobs
    train_on(work, cfg, config, rows.count, rows.prompt, answers, place, passes, stage.run != "reward")


def reject(stage: Stage, sizes: Sizes, place: Place, work: Work) -> None:
    """Per iteration: a search of temperatures, K samples a prompt, their scores, a fine-tuning on the best."""
    rows, cfg, new = sizes.data(stage), stage.cfg, stage.cfg.max_new_tokens
    sampler = sizes.of(stage, "model")
    tuned = sizes.of(stage, "student") or sizes.of(stage, "base") or sampler
    work.assumed |= rows.assumed
    searched = min(cfg.search_prompts, rows.count) * len(cfg.temperatures) if len(cfg.temperatures) > 1 else 0
    for _ in range(cfg.iterations):
        sample_from(work, cfg, sampler, (rows.count + searched) * cfg.k, rows.prompt, place)
        score_with(work, judges(stage, sizes), rows.count + searched, rows.prompt, [new] * cfg.k, place)
        train_on(work, cfg, tuned, rows.count, rows.prompt, [new], place)
    score_with(work, judges(stage, sizes), rows.count * len(cfg.pool_from), rows.prompt, [new] * cfg.k, place)


def ppo(stage: Stage, sizes: Sizes, place: Place, work: Work) -> None:
    """Per iteration: rollouts, two scores, logprobs of policy and start, values, one update of policy and critic."""
    rows, cfg, policy = sizes.data(stage), stage.cfg, sizes.of(stage, "model")
    critic = (sizes.of(stage, "critic_from") or policy) if cfg.has_critic else None
    scorers, new = judges(stage, sizes), cfg.max_new_tokens
    work.assumed |= rows.assumed
    prompts, answers = cfg.iterations * cfg.batch / cfg.k, [new] * cfg.k
    work.decoding.append(Decoding(policy, cfg.batch, new, rows.prompt, cfg.max_batch))
    work.decoding *= cfg.iterations
    passes = (2 if cfg.lora_rank else 3) + cfg.recompute
    one, valued = (
        forward(policy, rows.prompt, answers),
        critic and forward(critic, rows.prompt, answers, False),
    )
    work.forward += prompts * (2 * one + (valued or 0))
    work.forward += prompts * sum(forward(config, rows.prompt, answers, False) for config in scorers)
    work.train += idle(cfg.minibatch / cfg.k, place) * prompts * passes * (one + (valued or 0))
    trained = [
        lora.num_parameters(c, cfg.lora_rank) if cfg.lora_rank else num_parameters(c)
        for c in (policy, critic)
        if c
    ]
    work.updates += cfg.iterations * cfg.updates * UPDATE * sum(trained)
    work.tokens += prompts * (rows.prompt + sum(answers)) * (4 + bool(critic))
    reads = cfg.iterations if cfg.frozen == "mapped" else 1
    work.disk += FP32 * (3 * num_parameters(policy) + reads * sum(map(num_parameters, scorers)))
    plan = make_plan(
        cfg, policy, critic, scorers, place.dtype, longest=math.ceil(2 * rows.prompt),
        kv_memory=memory_bytes(cfg.kv_memory) or KV_MEMORY, ranks=place.ranks, host=place.host,
    )  # fmt: skip
    hold(work, plan.peak[1], place)


def distill(stage: Stage, sizes: Sizes, place: Place, work: Work) -> None:
    """Four arms of k samples, two of them behind a preprompt; their scores; a fine-tuning on those that are kept."""
    rows, cfg, config = sizes.data(stage), stage.cfg, sizes.of(stage, "model")
    work.assumed |= rows.assumed
    sample_from(work, cfg, config, 4 * cfg.k * rows.count, rows.prompt + PREPROMPT / 2, place)
    scored = [cfg.max_new_tokens] * (4 * cfg.k)
    score_with(work, judges(stage, sizes), rows.count, rows.prompt, scored, place)
    passes = 4 if cfg.target == "kl" else 3  # the teacher's pass
    train_on(work, cfg, config, rows.count * cfg.k, rows.prompt, [cfg.max_new_tokens], place, passes)


def gatt(stage: Stage, sizes: Sizes, place: Place, work: Work) -> None:
    """Dialogues played turn by turn, a fine-tuning on their last answers, probes of both models."""
    rows, cfg, config = sizes.data(stage), stage.cfg, sizes.of(stage, "model")
    work.assumed |= rows.assumed
    dialogues = min(rows.count, cfg.dialogues or rows.count)
    whole = cfg.turns * (rows.prompt + cfg.max_new_tokens)
    sample_from(work, cfg, config, dialogues * (cfg.turns - 1 + cfg.k), whole / 2, place)
    train_on(work, cfg, config, dialogues, whole - cfg.max_new_tokens, [cfg.max_new_tokens], place)
    probes, turns = 4 * cfg.eval_dialogues, max(cfg.eval_turns)
    for _ in range(2):
        sample_from(work, cfg, config, probes * turns, turns * cfg.eval_tokens / 2, place, cfg.eval_tokens)


def evaluate(stage: Stage, sizes: Sizes, place: Place, work: Work) -> None:
    """Answers of one model or two, and their scores."""
    rows, cfg = sizes.data(stage), stage.cfg
    work.assumed |= rows.assumed
    count = min(rows.count, 3 * cfg.limit) if cfg.limit else rows.count
    models = [c for c in (sizes.of(stage, name) for name in ("model", "base")) if c is not None]
    for config in models:
        sample_from(work, cfg, config, count, rows.prompt, place)
    score_with(work, judges(stage, sizes), count, rows.prompt, [cfg.max_new_tokens] * len(models), place)


def redteam(stage: Stage, sizes: Sizes, place: Place, work: Work) -> None:
    """Attempts of one turn or more, and their scores."""
    rows, cfg = sizes.data(stage), stage.cfg
    work.assumed |= rows.assumed
    turns = 1 + (cfg.max_turns > 1)  # of a dialogue, about
    sample_from(work, cfg, sizes.of(stage, "model"), turns * cfg.attempts, 2 * rows.prompt, place)
    score_with(work, judges(stage, sizes)[:1], cfg.attempts, 2 * rows.prompt, [cfg.max_new_tokens], place)


def scaling(stage: Stage, sizes: Sizes, place: Place, work: Work) -> None:
    """A fine-tuning for each share of the safety rows, and answers to the held-out prompts."""
    rows, cfg, config = sizes.data(stage), stage.cfg, sizes.of(stage, "model")
    held = sizes.data(stage, "eval") if cfg.eval else rows
    work.assumed |= rows.assumed or held.assumed
    asked = min(held.count, 3 * cfg.eval_prompts) if cfg.eval_prompts else held.count
    for share in cfg.fractions:
        used = rows.count * (1 - rows.safety * (1 - share))
        train_on(work, cfg, config, used, rows.prompt, [rows.answer], place)
        sample_from(work, cfg, config, asked, held.prompt, place)
    score_with(
        work, judges(stage, sizes), asked, held.prompt, [cfg.max_new_tokens] * len(cfg.fractions), place
    )


def read_text(stage: Stage, sizes: Sizes, place: Place, work: Work) -> None:
    """audit and select read text; report and card read what other stages wrote."""
    if stage.run in ("audit", "select"):
        rows: Rows = sizes.data(stage)
        work.text += rows.size
        work.tokens += rows.count * (rows.prompt + rows.answer)
        work.assumed |= rows.assumed


COUNT: dict[str, Callable] = {
    "sft": tune, "reward": tune, "dpo": tune, "reject": reject, "ppo": ppo, "distill": distill, "gatt": gatt,
    "eval": evaluate, "redteam": redteam, "scaling": scaling, "audit": read_text, "select": read_text,
    "report": read_text, "card": read_text,
}  # fmt: skip
