"""What PPO's iterations share, and how they draw and judge samples (spec section 5)."""

import dataclasses
import time
from contextlib import contextmanager

import torch

from hpsafety.config import memory_bytes
from hpsafety.data.batches import epoch_order
from hpsafety.rollout import experience as rollouts
from hpsafety.rollout.experience import Prompt
from hpsafety.rollout.sampler import Settings, stop_ids
from hpsafety.rollout.scoring import Scorer
from hpsafety.train import distributed, phases
from hpsafety.train.ppo_step import ActorCritic
from hpsafety.train.rundir import RunDir


@dataclasses.dataclass(slots=True)
class Run:
    """What the iterations share. sampler: the policy itself, or under ranks a whole copy of it, refreshed each time."""

    cfg: object
    actor: ActorCritic
    sampler: torch.nn.Module
    reference: torch.nn.Module
    scorer: Scorer
    train: list[Prompt]
    valid: list[Prompt]
    kl_coef: float
    out: RunDir
    world: distributed.World


@contextmanager
def timed(totals: dict, name: str):
    """Marks a phase for the profiler and adds its seconds to this iteration's times."""
    started = time.perf_counter()
    with phases.phase(name):
        yield
    totals["times"][name] = totals["times"].get(name, 0.0) + time.perf_counter() - started


def drawn(r: Run, index: int) -> list[tuple[int, Prompt]]:
    """(number of the draw over the whole run, prompt) of each of the iteration's groups: one seeded order after the
    other, whatever the ranks."""
    count, size = r.cfg.batch // r.cfg.k, len(r.train)
    numbers = range(index * count, (index + 1) * count)
    orders = {p: epoch_order(size, p, r.cfg.seed) for p in {n // size for n in numbers}}
    return [(n, r.train[orders[n // size][n % size]]) for n in numbers]


def sampling(r: Run, temperature: float, seed: int) -> Settings:
    return Settings(
        max_new_tokens=r.cfg.max_new_tokens, temperature=temperature, seed=seed, stop=stop_ids(r.actor.policy),
        max_batch=r.cfg.max_batch, kv_memory=memory_bytes(r.cfg.kv_memory),
        batch_invariant=r.cfg.batch_invariant,
    )  # fmt: skip


def sample_and_judge(r: Run, draws, k: int, settings: Settings, totals: dict) -> list[rollouts.Judged]:
    """Every draw's samples with their scores, in order, on every rank; the ranks share the work draw by draw."""
    world = r.world
    mine = draws[world.rank :: world.size]
    with timed(totals, "rollout"):
        if r.sampler is not r.actor.policy:
            distributed.copy_whole(r.actor.policy, r.sampler)
        samples = rollouts.sample(r.sampler, mine, k, settings)
    with timed(totals, "score"):
        judged = rollouts.judge(r.scorer, [p for _, p in mine], samples, r.cfg.tokens_per_batch)
        parts = distributed.all_objects(judged, world)
    return [parts[i % world.size][i // world.size] for i in range(len(draws))]
