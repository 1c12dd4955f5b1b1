"""hpsafety: an iteration by the functions of `hpsafety ppo`, its update alone, its logprobs and values alone."""

import dataclasses
import time
from collections.abc import Callable

import torch

from bench.end_to_end.common import (
    BETAS,
    EPS,
    MAX_NORM,
    WEIGHT_DECAY,
    Group,
    Run,
    Settings,
    make_groups,
    timed_run,
    timed_scores,
)
from bench.end_to_end.ppo_data import (
    CLIP_RATIO,
    KL_COEF,
    NO_RATE,
    PHASES,
    WARM_UP_TOKENS,
    Minibatch,
    minibatches,
    num_sampled,
    prompt_groups,
    warm_up_prompts,
)
from hpsafety.config import PPOConfig
from hpsafety.model.heads import value_model_from
from hpsafety.model.io import load_model
from hpsafety.model.names import hf_names, split
from hpsafety.model.reward_io import load_reward_model
from hpsafety.rollout import experience as rollouts
from hpsafety.rollout import sampler
from hpsafety.safety import ppo_run
from hpsafety.safety.ppo_frozen import load_reference
from hpsafety.safety.ppo_setup import load_models, place
from hpsafety.stages import ppo
from hpsafety.train import distributed, ppo_step
from hpsafety.train.optim import AdamW
from hpsafety.train.ppo_step import ActorCritic, TokenRows

NOTE = "prompt once per group, whole groups packed without padding, head on sampled rows"


def run(settings: Settings, advantages: str = "rloo") -> Run:
    """advantages  of an iteration, as hpsafety ppo --advantages"""
    if settings.part == "iteration":
        return iteration(settings, advantages)
    return {"update": update, "logprobs": logprobs}[settings.part](settings)


def _dtype(settings: Settings) -> torch.dtype:
    return torch.bfloat16 if settings.precision == "bf16" else torch.float32


# ---- one iteration ----


def iteration(settings: Settings, advantages: str) -> Run:
    """The phases of one iteration, after one of the shortest prompts and two tokens that is not timed."""
    r = prepared(settings, advantages, NO_RATE)
    iterate(r, warm_up_prompts(settings), WARM_UP_TOKENS)
    r = dataclasses.replace(r, cfg=dataclasses.replace(r.cfg, lr=settings.lr))
    prompts = [prompt for prompt, _ in make_groups(settings)]
    start, cpu_start = time.perf_counter(), time.process_time()
    experience, seconds = iterate(r, prompts, settings.response_tokens)
    total, cpu = time.perf_counter() - start, time.process_time() - cpu_start
    critic = "a critic as large as the policy" if advantages == "gae" else "no critic"
    note = f"advantages {advantages}, {critic}; {NOTE}"
    return Run(judged(experience), total, cpu, note, seconds, samples_of(experience))


def samples_of(experience) -> list[list[int]]:
    return [response for group in experience.groups for response in group.responses]


def judged(experience) -> list[float]:
    """Both reward models' scores of every sample, then the sum of its old logprobs."""
    sums = [float(row.double().sum()) for row in experience.old_logprobs.split(experience.lengths.tolist())]
    return [*experience.safety.tolist(), *experience.helpful.tolist(), *sums]


def prepared(settings: Settings, advantages: str, lr: float) -> ppo_run.Run:
    """The stage's run without a run directory."""
    world = distributed.init("cpu")
    safety, helpful = settings.reward_models
    cfg = PPOConfig(
        model=settings.model, safety_rm=safety, helpful_rm=helpful, advantages=advantages, data=("-",), out="-",
        batch=settings.groups * settings.k, minibatch=settings.batch * settings.k, k=settings.k,
        max_new_tokens=settings.response_tokens, lr=lr, tokens_per_batch=settings.tokens_per_batch,
        precision=settings.precision, kl_coef=KL_COEF, seed=settings.seed,
        beta1=BETAS[0], beta2=BETAS[1], eps=EPS, weight_decay=WEIGHT_DECAY, clip=MAX_NORM, clip_ratio=CLIP_RATIO,
    )  # fmt: skip
    policy, critic, scorer = load_models(cfg, _dtype(settings), world)
    actor, sampling_model = place(policy, critic, cfg, _dtype(settings), world)
    reference = load_reference(cfg, policy, _dtype(settings), None, world)
    return ppo_run.Run(cfg, actor, sampling_model, reference, scorer, [], [], KL_COEF, None, world)


def iterate(r: ppo_run.Run, prompts: list[list[int]], new_tokens: int):
    """(experience, seconds of each phase) of one iteration in which every sample has `new_tokens` tokens."""
    totals = {"times": {}, "sums": {}, "step": 0}
    settings = sampler.Settings(
        max_new_tokens=new_tokens, temperature=1.0, seed=r.cfg.seed, max_batch=r.cfg.max_batch
    )
    draws = [(i, rollouts.Prompt(prompt, False)) for i, prompt in enumerate(prompts)]
    experience = rollouts.collect(ppo_run.sample_and_judge(r, draws, r.cfg.k, settings, totals))
    with ppo_run.timed(totals, "logprobs"):
        parts = ppo.packed(r, experience)
        experience = ppo.measured(r, experience, parts)
        _, advantages, returns = experience.advantages(r.kl_coef, r.cfg.advantages)
        rows = TokenRows(experience.old_logprobs, experience.values, advantages, returns)
    for number, minibatch in enumerate(parts):
        ppo.one_step(r, 0, number, minibatch, rows, experience, totals, lambda: False)
    return experience, {name: totals["times"][name] for name in PHASES}


# ---- the update alone ----


def _actor(settings: Settings) -> ActorCritic:
    policy = load_model(settings.model)
    critic = value_model_from(load_reward_model(settings.reward_models[0]))
    optimizers = (
        AdamW(model, _dtype(settings), BETAS, EPS, WEIGHT_DECAY, MAX_NORM) for model in (policy, critic)
    )
    return ActorCritic(policy, critic, *optimizers)


def _stepper(settings: Settings, actor: ActorCritic) -> Callable:
    world = distributed.init("cpu")

    def step(minibatch: Minibatch, lr: float) -> float:
        groups = prompt_groups(minibatch.groups)
        (parts,) = ppo_step.pack_minibatches(
            actor.policy, groups, len(groups), settings.tokens_per_batch, world
        )
        tokens = num_sampled(minibatch.groups)
        rows = TokenRows(*minibatch.rows)
        figures = ppo_step.update(actor, parts, rows, tokens, lr, 1.0, CLIP_RATIO, world, lambda: False)
        return figures["loss"]

    return step


def update(settings: Settings) -> Run:
    return timed_run(_stepper(settings, _actor(settings)), minibatches(settings), settings.lr, NOTE)


def gradients(settings: Settings) -> tuple[float, dict[str, torch.Tensor]]:
    """(loss, gradient of every parameter by role and Hugging Face name) of one minibatch of all the data."""
    actor = _actor(settings)
    loss = _stepper(settings, actor)(minibatches(settings)[1], 0.0)
    out = {}
    optimizers = {"policy": actor.policy_optimizer, "critic": actor.critic_optimizer}
    for role, optimizer in optimizers.items():
        grads = optimizer.main_grads or [p.grad for p in optimizer.params]
        named = dict(zip(optimizer.names, grads, strict=True))
        places = hf_names(getattr(actor, role).config)
        out |= {f"{role}.{name}": split(named[place.parameter], place) for name, place in places.items()}
    return loss, out | {"critic.value": named["value"]}


# ---- logprobs and values alone ----


def taker(settings: Settings, policy, groups: list[Group]) -> Callable:
    """taken(call, columns) -> (columns, N) of one pass over the groups' minibatches (train/ppo_step.py: measure)."""
    world = distributed.init("cpu")
    budget = settings.tokens_per_batch
    parts = ppo_step.pack_minibatches(policy, prompt_groups(groups), settings.batch, budget, world)
    return lambda call, columns=1: ppo_step.measure(parts, call, columns, num_sampled(groups), world)


def logprobs(settings: Settings) -> Run:
    dtype = _dtype(settings)
    policy, reference = (load_model(settings.model, dtype) for _ in range(2))
    critic = value_model_from(load_reward_model(settings.reward_models[0], dtype))

    def score(groups: list[Group]) -> list[float]:
        taken = taker(settings, policy, groups)
        old, _ = taken(lambda batch: policy.logprobs(batch, 1.0, True), 2)
        (ref,) = taken(lambda batch: (reference.logprobs(batch),))
        (values,) = taken(lambda batch: (critic.values(batch),))
        return torch.cat([old, ref, values]).tolist()

    return timed_scores(score, settings, NOTE + "; the entropies too")
