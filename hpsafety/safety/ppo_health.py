"""Whether a PPO run is well: its held-out reward (PPO-10), and the signs of one that has gone wrong."""

import logging
import math
from dataclasses import asdict

from hpsafety.errors import RunError
from hpsafety.rollout import experience as rollouts
from hpsafety.safety.intervals import mean_interval
from hpsafety.safety.ppo_run import Run, sample_and_judge, sampling
from hpsafety.train import checkpoint
from hpsafety.train.metrics import say

log = logging.getLogger("hpsafety")

SHORTEST = 0.1  # of the first iteration's mean length: below it the policy has stopped answering


def hold_out(r: Run, totals: dict, iterations: int) -> float:
    """Mean R_c in (0, 1) of greedy answers to the held-out prompts; keeps the best policy's weights, and ends the run
    after --patience such rewards without a new best (PPO-10)."""
    judged = sample_and_judge(r, list(enumerate(r.valid)), 1, sampling(r, 0.0, 0), {"times": {}})
    rewards = rollouts.collect(judged).combined.double().sigmoid()
    value = float(rewards.mean())
    better = totals["best"] is None or value > totals["best"]
    if better:
        totals["best"], totals["worse"] = value, 0
        totals["held"] = [*totals["held"][:1], rewards.tolist()]
        checkpoint.save_best(r.out.checkpoints, r.actor.policy, r.world)
    else:
        totals["worse"] += 1
        totals["over"] = totals["worse"] >= r.cfg.patience
    if r.world.is_main:
        log.info("held-out reward after %d iterations: %.4f (best %.4f)", iterations, value, totals["best"])
        if totals["over"]:
            say(
                f"ppo: stopping early: {r.cfg.patience} held-out rewards in a row are not above {totals['best']:.4f}"
            )
    return value


def held_out(totals: dict) -> dict:
    """Held-out R_c of the start and of the best policy, and its change prompt by prompt, with 95 % intervals; {} where
    no prompt is held out."""
    if not totals["held"]:
        return {}
    before, after = totals["held"][0], totals["held"][-1]
    changes = [b - a for a, b in zip(before, after, strict=True)]
    parts = {"before": before, "best": after, "change": changes}
    return {"held_out": {name: asdict(mean_interval(values)) for name, values in parts.items()}}


def refuse_degenerate(r: Run, index: int, totals: dict, figures: dict) -> None:
    """RunError where the samples show that training has gone wrong: the updates before them were the bad ones."""
    why, first = None, totals["first_length"]
    broken = [name for name in ("kl", "reward", "entropy") if not math.isfinite(figures[name])]
    if broken:
        why = f"{broken[0]} is {figures[broken[0]]}"
    elif figures["kl"] > r.cfg.kl_stop:
        why = f"the KL to the start is {figures['kl']:.3f} nats per token, over --kl-stop {r.cfg.kl_stop:g}"
    elif first is not None and first >= 1 / SHORTEST and figures["length"] < SHORTEST * first:
        why = f"answers have collapsed from {first:.1f} to {figures['length']:.1f} tokens"
    if why:
        raise degenerate(r, index, index - 1, why)


def last_good(r: Run, index: int) -> int | None:
    """The newest checkpoint not younger than the policy that sampled iteration `index`, if there is one."""
    return max((s for s in checkpoint.steps(r.out.checkpoints) if s <= index * r.cfg.updates), default=None)


def degenerate(r: Run, index: int, healthy: int, why: str) -> RunError:
    """healthy: the last iteration whose samples were as they should be"""
    step = last_good(r, healthy)
    left = (
        "no checkpoint is older than that"
        if step is None
        else f"the last good one is {r.out.checkpoints}/step-{step}"
    )
    return RunError(f"iteration {index + 1}: {why}; {left}. Lower --lr or raise --kl-coef")
