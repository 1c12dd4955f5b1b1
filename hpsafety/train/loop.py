"""Passes over a fixed list of prompt groups (SFT, reward models, distillation): order, checkpoints, metrics, resume."""

import contextlib
import logging
import math
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from hpsafety.data.batches import epoch_order, step_slices
from hpsafety.train import checkpoint, phases
from hpsafety.train.metrics import Metrics, Progress, peak_rss_mb
from hpsafety.train.optim import AdamW, learning_rate
from hpsafety.train.step import evaluate, train_step

log = logging.getLogger("hpsafety")


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop and has written a checkpoint: the CLI exits with 130."""


@dataclass(frozen=True, kw_only=True)
class FitSettings:
    """Counts in groups and steps; lr is the peak rate. steps (if set) overrides epochs."""

    batch: int
    epochs: int
    steps: int | None
    lr: float
    warmup: int
    tokens_per_batch: int
    seed: int
    checkpoint_every: int
    dtype: torch.dtype = torch.float32  # of the computation; masters, reductions and the optimiser stay fp32
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-5
    weight_decay: float = 0.1
    clip: float = 1.0


def plan_steps(num_groups: int, settings: FitSettings) -> list[tuple[int, slice]]:
    """(pass over the data, slice of that pass's order) of every step; a step never spans two passes."""
    one_pass = list(step_slices(num_groups, settings.batch))
    total = settings.steps if settings.steps is not None else settings.epochs * len(one_pass)
    return [(i // len(one_pass), one_pass[i % len(one_pass)]) for i in range(total)]


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM in a list instead of dying at once; a second signal kills as usual."""
    caught: list[int] = []

    def handler(number, _frame):
        caught.append(number)
        signal.signal(number, signal.SIG_DFL)

    try:
        old = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: the caller handles signals
        old = {}
    try:
        yield caught
    finally:
        for number, previous in old.items():
            signal.signal(number, previous)


def fit(
    model, groups: list, valid: list, loss: Callable, count: Callable[[list], float], settings: FitSettings, run,
    world, title: str,
) -> dict:  # fmt: skip
    """Trains `model` on `groups` and returns counts for the manifest.

    valid  held-out groups: their loss is taken after each pass, training stops at the first pass that raises it, and
           the model ends with the best pass's weights; empty for no early stopping
    loss   loss(model, batch, denominator) -> scalar, or with figures for metrics (train.step.train_step)
    count  the loss denominator of a list of groups (trained tokens, pairs ...)
    run    RunDir, open; the run goes on from run.resume_step
    Raises Interrupted after SIGINT or SIGTERM, FloatingPointError after three non-finite gradients in a row.
    """
    optimizer = AdamW(
        model, settings.dtype, settings.betas, settings.eps, settings.weight_decay, settings.clip
    )
    steps = plan_steps(len(groups), settings)
    totals = {"tokens": 0, "tokens_equiv": 0, "elapsed_s": 0.0, "skipped": 0, "best": None, "over": False}
    if run.resume_step:
        totals |= checkpoint.load(run.checkpoints / f"step-{run.resume_step}", model, optimizer, world)
        log.info("resumed from step %d", run.resume_step)
    totals["step"] = run.resume_step
    metrics = Metrics(run.path, run.resume_step) if world.is_main else None
    progress = Progress(title, len(steps), run.resume_step) if world.is_main else None
    try:
        with stop_signals() as caught:
            for t in phases.steps(range(run.resume_step, len(steps))):
                if totals["over"]:
                    break
                order = epoch_order(len(groups), steps[t][0], settings.seed)
                chosen = [groups[i] for i in np.asarray(order)[steps[t][1]]]
                started = time.perf_counter()
                lr = learning_rate(t, len(steps), settings.lr, settings.warmup)
                result = train_step(
                    model, chosen, loss, count(chosen), optimizer, lr, settings.tokens_per_batch, world,
                    lambda: bool(caught),
                )  # fmt: skip
                seconds = time.perf_counter() - started
                last = t + 1 == len(steps)
                pass_ends = last or steps[t + 1][0] != steps[t][0]
                measured = (
                    _validate(model, valid, loss, count, settings, totals, run, world)
                    if valid and pass_ends
                    else {}
                )
                with phases.phase("metrics"):
                    totals = _after_step(totals | measured, result, lr, seconds, metrics, progress, world)
                every, ends = settings.checkpoint_every, last or totals["over"]
                checkpoint_if_due(totals, result.stop, ends, every, run, model, optimizer, world)
    finally:
        if world.is_main:
            metrics.close()
            progress.close()
    if totals["over"]:
        checkpoint.load_best(run.checkpoints, model, world)
    done = {k: totals[k] for k in ("tokens", "tokens_equiv", "skipped")}
    return {"steps": totals["step"], "groups": len(groups), "best_valid_loss": totals["best"]} | done


def _validate(model, valid, loss, count, settings, totals, run, world) -> dict:
    """What the end of a pass adds to the totals: valid_loss, the best one, and whether training is over."""
    value = evaluate(model, valid, loss, count(valid), settings.tokens_per_batch, world)
    best = totals["best"]
    if not math.isfinite(value):
        raise FloatingPointError(f"the held-out loss is {value} after step {totals['step'] + 1}; lower --lr")
    if best is not None and value >= best:
        log.info("stopping early: the held-out loss rose to %.4f from its best, %.4f", value, best)
        return {"valid_loss": value, "over": True}
    checkpoint.save_best(run.checkpoints, model, world)
    return {"valid_loss": value, "best": value}


def checkpoint_if_due(totals, stop, ends, every, run, model, optimizer, world, spared=None) -> None:
    """Saves every `every` steps (0: never), where the run ends, and on stop; raises Interrupted after a stop.

    spared  the step of a checkpoint to keep beside the last two
    """
    step = totals["step"]
    if stop or (every and (step % every == 0 or ends)):
        checkpoint.save(run.checkpoints, step, model, optimizer, totals, world, spared)
    if stop and not ends:
        log.info("stopped at step %d after a signal; the same command goes on from there", step)
        raise Interrupted(f"stopped at step {step}; the same command goes on from there")


def _after_step(totals, result, lr, seconds, metrics, progress, world) -> dict:
    """Counters after a step; metrics and progress are written on rank 0."""
    finite = math.isfinite(result.grad_norm)
    valid = {"valid_loss": totals["valid_loss"]} if "valid_loss" in totals else {}
    new = {
        "step": totals["step"] + 1,
        "tokens": totals["tokens"] + result.tokens,
        "tokens_equiv": totals["tokens_equiv"] + result.tokens_equiv,
        "elapsed_s": totals["elapsed_s"] + seconds,
        "skipped": 0 if finite else totals["skipped"] + 1,
        "best": totals["best"],
        "over": totals["over"],
    }
    for rank, groups in enumerate(result.groups_per_rank):
        log.info("rank %d: %d groups", rank, groups)
    if not finite:
        log.info("step %d skipped: the gradient norm is %s", new["step"], result.grad_norm)
    if new["skipped"] >= 3:
        raise FloatingPointError(f"three non-finite gradients in a row at step {new['step']}; lower --lr")
    if world.is_main:
        rate = result.tokens_equiv / seconds
        metrics.write({
            "step": new["step"], "loss": result.loss, "lr": lr, "grad_norm": result.grad_norm,
            "tokens": new["tokens"], "tokens_equiv": new["tokens_equiv"], "tokens_per_s": round(rate, 3),
            "elapsed_s": round(new["elapsed_s"], 3), "peak_rss_mb": peak_rss_mb(), **result.figures, **valid,
        })  # fmt: skip
        progress.update(new["step"], f"loss {result.loss:.4f}  {rate:.0f} tokens/s")
    return new
