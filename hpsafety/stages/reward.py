"""Reward models from preference pairs: a ranking loss with a margin by rating, and an auxiliary loss by safety bin
(spec section 3: PREF, RM)."""

import json
import math

import torch

from hpsafety import ops
from hpsafety.data.preferences import mix
from hpsafety.data.sources import load_rows
from hpsafety.files import atomic_write
from hpsafety.model.heads import reward_model_from
from hpsafety.model.io import load_model
from hpsafety.model.reward_io import save_reward_state
from hpsafety.safety.reward_page import show_table, write_page
from hpsafety.safety.reward_report import summarise
from hpsafety.train import distributed, precision, stage
from hpsafety.train.loop import fit
from hpsafety.train.metrics import say
from hpsafety.train.pairs import measure_pairs, plan, prepare_pairs


def run(cfg) -> None:
    """hpsafety reward: see RewardConfig. Writes the run directory of design.md section 8 to cfg.out, and beside the
    model report.json and report.html: what the model is worth on held-out pairs (RM-9)."""
    with stage.ranks(cfg.device) as world:
        _run(cfg, world)


def _run(cfg, world) -> None:
    records = load_rows(cfg.data, "preference")
    out = stage.run_directory(cfg, "reward", cfg.data, world)
    if out is None:
        return
    dtype, why = precision.choose(cfg.precision, world.device)
    torch.manual_seed(cfg.seed)
    model = reward_model_from(load_model(cfg.model), cfg.seed)  # fp32: the masters of a bf16 run
    pairs, held, counts, found = prepare(records, model, cfg)
    headline = (
        f"reward: {len(pairs)} pairs for {cfg.kind}, margin {cfg.margin}, auxiliary weight {cfg.aux_weight:g}"
    )
    stage.begin(out, f"{headline}; {why}", counts, world)
    total, one_pass = plan(len(pairs), cfg)
    warmup = warmup_steps(total) if cfg.warmup is None else cfg.warmup
    if world.is_main:
        warn(cfg, pairs, held, counts)
        if total <= warmup:
            say(
                f"reward: all of the {total} optimiser steps are warm-up; a smaller --batch makes more of them"
            )
    if cfg.head_only:
        freeze_trunk(model)
    model = distributed.shard(model.to(world.device), world, dtype)
    model.recompute = cfg.recompute
    settings = stage.fit_settings(cfg, dtype, warmup)
    watched = held if total > one_pass else []  # one pass cannot stop early, so it is spared the measurement
    done = fit(model, pairs, watched, pair_loss(cfg.aux_weight), len, settings, out, world, "reward")
    save(model, cfg, out, world)
    report(model, held, found, cfg, out, world)
    out.finish(counts | done)
    if world.is_main:
        say(f"reward: wrote {out.path / 'model'} and {out.path / 'report.html'}")
    distributed.barrier(world)


def prepare(records, model, cfg) -> tuple[list, list, dict, dict]:
    """(pairs to train on, pairs held out, counts, what the loader found) of all rows of the data files; the two kinds
    of data in the kind's mix (RM-6).

    Raises InputError when nothing is left to train on.
    """
    pairs, held, counts, found = prepare_pairs(records, model, cfg, cfg.margin)
    mixed, shares = mix(pairs, cfg.kind, cfg.seed)
    return mixed, held, counts | shares, found


def warn(cfg, pairs, held, counts) -> None:
    """Says what the data has kept the run from doing."""
    left_out = {name: n for name, n in counts.items() if name.endswith("left_out_of_mix") and n}
    for name, number in left_out.items():
        kind = name.split("_")[0]
        say(f"reward: {number} {kind} pairs are left out, so that the mix for {cfg.kind} holds")
    if len({pair.is_safety for pair in pairs}) == 1:
        which = "safety" if pairs[0].is_safety else "helpfulness"
        say(f"reward: all pairs are {which} data, so nothing is mixed")
    if cfg.aux_weight and all(pair.safety_bin is None for pair in pairs):
        say("reward: no pair has a safety bin, so the auxiliary loss is 0 throughout")
    if cfg.margin != "none" and all(pair.rating is None for pair in pairs):
        say("reward: no pair has a rating, so every margin is 0")
    if not held:
        say("reward: nothing is held out (too few rows, none with split valid); the report stays empty")


def freeze_trunk(model) -> None:
    """Leaves the score head as the only parameter that is trained; backward ends at its input."""
    model.requires_grad_(False)
    model.score.requires_grad_(True)


def warmup_steps(total: int) -> int:
    """RM-7: 3 % of the optimiser steps, at least 5."""
    return max(5, math.ceil(0.03 * total))


def pair_loss(aux_weight: float):
    """The loss of a micro-batch of Pairs (train.step.train_step); its denominator counts pairs (RM-8)."""
    return lambda model, batch, num_pairs: loss_of(model.rewards(batch), batch.groups, aux_weight, num_pairs)


def loss_of(scores, pairs, aux_weight: float, num_pairs):
    """Both losses of P Pairs: scalar fp32.

    scores  (2P,) logits, chosen and rejected of each pair in turn; num_pairs: of the step, over micro-batches and ranks
    """
    chosen, rejected = scores.view(len(pairs), 2).t().contiguous()
    margin = torch.tensor([pair.margin for pair in pairs], device=scores.device)
    safe = torch.tensor([pair.safe for pair in pairs], dtype=torch.int8, device=scores.device)
    safe_chosen, safe_rejected = safe.view(len(pairs), 2).t().contiguous()
    return ops.pair_loss(chosen, rejected, margin, safe_chosen, safe_rejected, aux_weight, num_pairs)


def save(model, cfg, out, world) -> None:
    """OUT/model as a sequence classifier; all ranks gather, rank 0 writes.

    With --head-only the trunk is read again: what trained may hold it rounded to bf16, and two heads on one model
    shall share their trunk to the bit.
    """
    tensors = stage.whole_weights(model)
    if not world.is_main:
        return
    if cfg.head_only:
        fresh = reward_model_from(load_model(cfg.model))
        score = tensors["score"].to(fresh.score.dtype)
        tensors = {name: p.detach() for name, p in fresh.named_parameters()} | {"score": score}
    save_reward_state(model.config, tensors, model.tokenizer, model.generation, out.path / "model")


def report(model, held, found: dict, cfg, out, world) -> None:
    """OUT/report.json, OUT/report.html and a table on the terminal: the held-out pairs under the trained model."""
    loss, scores = score_held_out(model, held, cfg, world)
    if not world.is_main:
        return
    settings = {name: getattr(cfg, name) for name in ("kind", "margin", "aux_weight", "head_only")}
    result = settings | {"data": found, "held_out": {"loss": loss} | summarise(held, scores)}
    with atomic_write(out.path / "report.json") as handle:
        json.dump(result, handle, indent=1, allow_nan=False)
        handle.write("\n")
    write_page(result, out.path / "report.html")
    show_table(result)


def score_held_out(model, held, cfg, world) -> tuple[float | None, list[tuple[float, float]]]:
    """(loss per pair, [(chosen, rejected) logits]) of the held-out pairs, the ranks sharing the work; the same on all.

    Raises RunError, naming the pair, for a score that is not finite.
    """
    fault = "the scores of held-out pair {name} are {row}; lower --lr"
    title = "scoring held-out pairs"
    scores = measure_pairs(model, held, model.rewards, cfg.tokens_per_batch, world, title, fault)
    loss = float(loss_of(scores.float().flatten(), held, cfg.aux_weight, len(held))) if held else None
    return loss, [tuple(row) for row in scores.tolist()]
