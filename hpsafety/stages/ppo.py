"""PPO with a safety and a helpfulness reward model (spec section 5, PPO-1..11).

One iteration: sample from the live policy; score by both reward models (R_c, whitened over the whole batch); pack the
minibatches once and take old and reference logprobs and values on them; one optimiser step per minibatch. What an
iteration sampled and measured is kept in checkpoints/experience-I.safetensors, so that a run goes on in its middle.

Steps count optimiser steps, as in the other stages: iteration I of `updates` minibatches ends at step I * updates.
"""

import logging

import torch

from hpsafety.data.sources import load_rows
from hpsafety.model import lora
from hpsafety.model.io import save_state
from hpsafety.model.mapped import present
from hpsafety.rollout import experience as rollouts
from hpsafety.rollout import invariance
from hpsafety.rollout.advantages import adapted
from hpsafety.rollout.experience import Experience
from hpsafety.safety.ppo_frozen import load_reference, park_judges
from hpsafety.safety.ppo_health import degenerate, held_out, hold_out, last_good, refuse_degenerate
from hpsafety.safety.ppo_memory import check_memory, peak_bytes, plan_of
from hpsafety.safety.ppo_page import write_page
from hpsafety.safety.ppo_run import Run, drawn, sample_and_judge, sampling, timed
from hpsafety.safety.ppo_setup import encode_prompts, kl_coefficient, load_models, place
from hpsafety.train import checkpoint, distributed, phases, precision, stage
from hpsafety.train.loop import checkpoint_if_due, stop_signals
from hpsafety.train.metrics import Metrics, Progress, peak_rss_mb, read_metrics, say
from hpsafety.train.ppo_step import MEANS, Part, TokenRows, measure, pack_minibatches, update
from hpsafety.train.rundir import model_hashes

log = logging.getLogger("hpsafety")

PHASES = ("rollout", "score", "logprobs", "update")


def run(cfg) -> None:
    """hpsafety ppo: see PPOConfig. Writes the run directory of design.md section 8 to cfg.out."""
    with stage.ranks(cfg.device) as world:
        _run(cfg, world)


def _run(cfg, world) -> None:
    records = load_rows(cfg.data, "prompt")
    named = {"model": cfg.model, "safety_rm": cfg.safety_rm, "helpful_rm": cfg.helpful_rm}
    named |= {"critic_from": cfg.critic_from} if cfg.critic_from else {}
    out = stage.run_directory(cfg, "ppo", cfg.data, world, model_hashes(named))
    if out is None:
        return
    dtype, why = precision.choose(cfg.precision, world.device)
    torch.manual_seed(cfg.seed)
    policy, critic, scorer = load_models(cfg, dtype, world)
    train, valid, counts = encode_prompts(list(records), policy, scorer, cfg)
    parameters = sum(p.numel() for p in policy.parameters())
    kl_coef = kl_coefficient(cfg, parameters)
    headline = f"ppo: {len(train)} prompts, {cfg.iterations} iterations of {cfg.batch} samples"
    headline += (
        f", {cfg.updates} optimiser steps each; advantages {cfg.advantages}; KL coefficient {kl_coef:g}"
    )
    headline += f" at first, moved towards a KL of {cfg.adaptive_kl:g}" if cfg.adaptive_kl else ""
    headline += f"; {preset_note(cfg)}{why}"
    actor, sampler = place(policy, critic, cfg, dtype, world)
    r = Run(cfg, actor, sampler, None, scorer, train, valid, kl_coef, out, world)
    longest = max(len(prompt.tokens) for prompt in train + valid)
    rollouts.check_memory(sampler, longest, sampling(r, cfg.temperature, 0))
    memory, before = plan_of(cfg, actor, sampler, scorer, longest, dtype, world), peak_bytes(world.device)
    counts |= stage.plain_counts(records.counts) | {"parameters": parameters, "kl_coef": kl_coef}
    stage.begin(out, headline, counts, world)
    if world.is_main:
        warn(counts, cfg, dtype)
        if cfg.batch_invariant and (why := invariance.fault(sampler)):
            say(f"ppo: --batch-invariant cannot hold to the bit here: {why}")
        say("\n".join(memory.lines()))
    park_judges(cfg, scorer, out.checkpoints, world)
    r.reference = load_reference(cfg, policy, dtype, out.checkpoints, world)
    done = iterate(r)
    tensors = lora.Merged(policy) if cfg.lora_rank else stage.whole_weights(actor.policy)
    if world.is_main:
        save_state(policy.config, tensors, policy.tokenizer, policy.generation, out.path / "model")
        write_page(read_metrics(out.path), counts | done, out.path / "report.html")
    out.finish(counts | done | {"memory": check_memory(memory, before, world)})
    if world.is_main:
        say(f"ppo: wrote {out.path / 'model'} and report.html")
    distributed.barrier(world)


def preset_note(cfg) -> str:
    """Which preset holds, and the settings that were given another value."""
    changed = ", ".join(f"{name} {value}" for name, value in cfg.departures.items())
    return f"preset {cfg.preset}{', but for ' if changed else ''}{changed}; " if cfg.preset else ""


def warn(counts: dict, cfg, dtype) -> None:
    """Says what was assumed for want of data, and what a setting costs."""
    if cfg.frozen == "bf16" and dtype != torch.bfloat16 and not cfg.lora_rank:
        say("ppo: the start is computed in bf16, the policy in fp32: their KL is not exactly 0 at first")
    if counts["without_is_safety"]:
        taken = "safety" if cfg.all_safety else "helpfulness"
        say(f"ppo: {counts['without_is_safety']} prompts without is_safety are taken as {taken} prompts")
    if not counts["valid_prompts"]:
        say("ppo: no rows with split valid, so early stopping is off and the last model is kept")


# ---- the iterations ----


def iterate(r: Run) -> dict:
    """All iterations from where the run stands; counts for the manifest. The policy ends with its best held-out
    reward's weights where there are held-out prompts."""
    cfg, out, world = r.cfg, r.out, r.world
    totals = {
        "step": 0, "tokens": 0, "tokens_equiv": 0, "elapsed_s": 0.0, "sums": {}, "times": {}, "first_length": None,
        "best": None, "worse": 0, "over": False, "said_equal": False, "kl_coef": r.kl_coef, "held": [],
    }  # fmt: skip
    modules = r.actor.modules()
    if out.resume_step:
        totals |= checkpoint.load(out.checkpoints / f"step-{out.resume_step}", modules, r.actor, world)
        log.info("resumed from step %d", out.resume_step)
    elif r.valid:
        hold_out(r, totals, 0)
    metrics = Metrics(out.path, out.resume_step) if world.is_main else None
    progress = Progress("ppo", cfg.iterations, totals["step"] // cfg.updates) if world.is_main else None
    try:
        with stop_signals() as caught:
            for index in phases.steps(range(totals["step"] // cfg.updates, cfg.iterations)):
                if totals["over"]:
                    break
                iteration(r, index, totals, modules, metrics, progress, lambda: bool(caught))
    finally:
        if world.is_main:
            metrics.close()
            progress.close()
    if totals["best"] is not None:
        checkpoint.load_best(out.checkpoints, r.actor.policy, world)
    names = ("tokens", "tokens_equiv")
    counts = {"steps": totals["step"], "best_valid_reward": totals["best"]} | held_out(totals)
    return counts | {n: totals[n] for n in names}


def iteration(r: Run, index: int, totals: dict, modules, metrics, progress, stop) -> None:
    """One iteration, or what is left of it; totals are brought up to date and a checkpoint written where it is due."""
    cfg, world = r.cfg, r.world
    experience, minibatches = experience_of(r, index, totals)
    _, advantages, returns = experience.advantages(totals["kl_coef"], cfg.advantages)
    if bool((experience.combined == experience.combined[0]).all()) and not totals["said_equal"]:
        totals["said_equal"] = True
        if world.is_main:
            say(
                f"ppo: all rewards of iteration {index + 1} are equal and count as 0: only the KL term is left"
            )
    figures = experience.figures(returns)
    refuse_degenerate(r, index, totals, figures)
    if distributed.all_sum(torch.tensor(float(stop()), device=world.device), world) and totals["step"]:
        checkpoint_if_due(totals, True, False, 0, r.out, modules, r.actor, world)
    columns = (experience.old_logprobs, experience.values, advantages, returns)
    rows = TokenRows(*(None if column is None else column.to(world.device) for column in columns))
    healthy = last_good(r, index)  # kept until the samples of its successor have been seen
    for number in range(totals["step"] % cfg.updates, cfg.updates):
        last = number + 1 == cfg.updates
        stopped = one_step(r, index, number, minibatches[number], rows, experience, totals, stop)
        if last:
            finish_iteration(r, index, totals, experience, figures, metrics, progress)
        ends = last and (totals["over"] or index + 1 == cfg.iterations)
        checkpoint_if_due(
            totals, stopped, ends, cfg.checkpoint_every, r.out, modules, r.actor, world, healthy
        )


def one_step(r: Run, index, number, parts, rows, experience: Experience, totals: dict, stop) -> bool:
    """One minibatch's update, added to the totals; whether the run has been told to stop."""
    cfg = r.cfg
    per_step = cfg.minibatch // cfg.k
    chosen = experience.groups[number * per_step : (number + 1) * per_step]
    tokens = sum(len(response) for group in chosen for response in group.responses)
    groups = [group for part in parts for group in part.batch.groups]
    passes = 2 if cfg.lora_rank else 3  # a frozen trunk has no weight gradients
    phases.work(r.actor.policy, groups, passes * len(r.actor.optimizers()))
    try:
        with timed(totals, "update"):
            result = update(
                r.actor, parts, rows, tokens, cfg.lr, cfg.temperature, cfg.clip_ratio, r.world, stop
            )
    except FloatingPointError as error:
        raise degenerate(r, index, index, str(error)) from None
    r.actor.zero_grad()  # memory that checkpoints and sampling need not find taken
    sums = totals["sums"]
    for name in (name for name in MEANS if name in result):
        sums[name] = sums.get(name, 0.0) + result[name] / cfg.updates
    sums["ratio_max"] = max(sums.get("ratio_max", 0.0), result["ratio_max"])
    sums.setdefault("ratio_max_first", result["ratio_max"])
    totals["step"] += 1
    return result["stop"]


def experience_of(r: Run, index: int, totals: dict) -> tuple[Experience, list[list[Part]]]:
    """The iteration's rollouts, measured, and its packed minibatches: taken over where a file holds them, else made."""
    path = r.out.checkpoints / f"experience-{index}.safetensors"
    found = path.is_file() and r.out.resume_step > 0
    if distributed.broadcast_object(found, r.world):
        experience = rollouts.load(path)
        log.info("iteration %d goes on with the samples it had", index + 1)
        return experience, packed(r, experience)
    totals["times"] = {}
    settings = sampling(r, r.cfg.temperature, r.cfg.seed)
    experience = rollouts.collect(sample_and_judge(r, drawn(r, index), r.cfg.k, settings, totals))
    with timed(totals, "logprobs"):
        minibatches = packed(r, experience)
        experience = measured(r, experience, minibatches)
    if r.world.is_main:
        keep = {step // r.cfg.updates for step in checkpoint.steps(r.out.checkpoints)}
        for old in r.out.checkpoints.glob("experience-*.safetensors"):
            if int(old.stem.split("-")[1]) not in keep:
                old.unlink()
        rollouts.save(experience, path)
    distributed.barrier(r.world)
    return experience, minibatches


def packed(r: Run, experience: Experience) -> list[list[Part]]:
    """This rank's micro-batches of every minibatch."""
    per_step = r.cfg.minibatch // r.cfg.k
    return pack_minibatches(
        r.actor.policy, experience.groups, per_step, r.cfg.tokens_per_batch, r.world,
        join_single=not r.cfg.batch_invariant,
    )  # fmt: skip


def measured(r: Run, experience: Experience, minibatches) -> Experience:
    """The experience with old and reference logprobs, entropy and a critic's values: one packed pass of each model."""
    cfg, world = r.cfg, r.world
    mine = [group for parts in minibatches for part in parts for group in part.batch.groups]
    phases.work(r.actor.policy, mine, 1 + len(r.actor.optimizers()))
    size = int(experience.lengths.sum())

    def taken(call, columns: int = 1):
        return measure(minibatches, call, columns, size, world)

    old, entropy = taken(lambda batch: r.actor.policy.logprobs(batch, cfg.temperature, True), 2)
    with present(r.reference, world.device) as model:
        (reference,) = taken(lambda batch: (model.logprobs(batch, cfg.temperature),))
    if r.actor.critic is None:
        return experience.measured(old, entropy, reference)
    (values,) = taken(lambda batch: (r.actor.critic.values(batch),))
    return experience.measured(old, entropy, reference, values)


# ---- the end of an iteration ----


def finish_iteration(r: Run, index, totals, experience: Experience, figures, metrics, progress) -> None:
    """Counters, the held-out reward where it is due, and the iteration's line of metrics."""
    cfg = r.cfg
    responses = int(experience.lengths.sum())
    equiv = responses + sum(len(group.prompt) * len(group.responses) for group in experience.groups)
    totals["tokens"] += responses + sum(len(group.prompt) for group in experience.groups)
    totals["tokens_equiv"] += equiv
    seconds = sum(totals["times"].values())
    totals["elapsed_s"] += seconds
    if totals["first_length"] is None:
        totals["first_length"] = figures["length"]
    held = {}
    if r.valid and ((index + 1) % cfg.eval_every == 0 or index + 1 == cfg.iterations):
        held = {"valid_reward": hold_out(r, totals, index + 1)}
    for rank in range(r.world.size):
        log.info("rank %d: %d groups", rank, len(range(rank, len(experience.groups), r.world.size)))
    if r.world.is_main:
        # A resumed iteration counts what this process has done of it.
        times = {f"time_{name}_s": round(totals["times"].get(name, 0.0), 4) for name in PHASES}
        metrics.write({
            "step": totals["step"], "iteration": index + 1, "lr": cfg.lr, **totals["sums"], **figures, **held,
            "kl_coef": totals["kl_coef"], "tokens": totals["tokens"], "tokens_equiv": totals["tokens_equiv"],
            "tokens_per_s": round(equiv / max(seconds, 1e-9), 3), "elapsed_s": round(totals["elapsed_s"], 3),
            "peak_rss_mb": peak_rss_mb(), **times,
        })  # fmt: skip
        note = f"reward {figures['reward']:.4f}  kl {figures['kl']:.4f}  length {figures['length']:.1f}"
        progress.update(index + 1, f"{note}  {equiv / max(seconds, 1e-9):.0f} tokens/s")
    totals["sums"], totals["times"] = {}, {}
    if cfg.adaptive_kl:
        totals["kl_coef"] = adapted(totals["kl_coef"], figures["kl"], cfg.adaptive_kl)
