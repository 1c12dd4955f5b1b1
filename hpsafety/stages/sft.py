"""Supervised safety fine-tuning: loss = - sum of trained answer tokens' logprobs / their number (spec section 2)."""

import logging

import torch

from hpsafety.data.batches import drop_long, nested_subset
from hpsafety.data.chat import encode_dialogue
from hpsafety.data.records import TRAIN_SPLITS, check_disjoint
from hpsafety.data.sources import load_rows
from hpsafety.errors import InputError
from hpsafety.model.io import load_model, save_state
from hpsafety.train import distributed, precision, stage
from hpsafety.train.loop import fit
from hpsafety.train.metrics import say

log = logging.getLogger("hpsafety")


def select_rows(
    rows: list[dict], safety_fraction: float, seed: int, all_safety: bool
) -> tuple[list[dict], dict]:
    """(rows to train on, in the order given; counts). All helpful rows, and a nested share of the safety rows.

    Rows of a held-out split never train. Raises InputError when a prompt is both trained on and held out (DATA-3).
    """
    trained = [r for r in rows if r.get("split") in (None, *TRAIN_SPLITS)]
    check_disjoint(trained, [r for r in rows if r.get("split") not in (None, "valid", *TRAIN_SPLITS)])
    is_safety = [bool(r.get("is_safety", all_safety)) for r in trained]
    safety = [i for i, flag in enumerate(is_safety) if flag]
    used = {safety[i] for i in nested_subset(len(safety), safety_fraction, seed)}
    kept = [r for i, r in enumerate(trained) if not is_safety[i] or i in used]
    counts = {
        "rows": len(rows), "held_out": len(rows) - len(trained), "safety_rows": len(safety),
        "safety_rows_used": len(used), "helpful_rows": len(trained) - len(safety),
    }  # fmt: skip
    return kept, counts


def build_groups(rows: list[dict], tokenizer, max_length: int) -> tuple[list, dict]:
    """(groups that fit max_length tokens, counts). Too long a group is dropped and counted, never cut (SFT-3)."""
    groups = [encode_dialogue(tokenizer, row["prompt"], row["response"]) for row in rows]
    kept, dropped = drop_long(groups, max_length)
    if not kept:
        raise InputError(
            f"no example is left to train on: all {len(groups)} are longer than {max_length} tokens; raise "
            "--max-length (at most the model's context) or give shorter data"
            if groups
            else "no example is left to train on: every row is held out or excluded; see split, checks and "
            "--safety-fraction"
        )
    return [groups[i] for i in kept], {"dropped_too_long": dropped}


def count_trained(groups: list) -> int:
    """Trained tokens: SFT's loss denominator."""
    return sum(
        sum(map(len, g.responses)) if g.train is None else sum(sum(map(bool, mask)) for mask in g.train)
        for g in groups
    )


def nll(model, batch, denominator):
    """SFT's loss on one micro-batch (train.step.train_step)."""
    return model.nll(batch, denominator)


def run(cfg) -> None:
    """hpsafety sft: see SFTConfig. Writes the run directory of design.md section 8 to cfg.out."""
    with stage.ranks(cfg.device) as world:
        _run(cfg, world)


def _run(cfg, world) -> None:
    records = load_rows(cfg.data, "demonstration")
    out = stage.run_directory(cfg, "sft", cfg.data, world)
    if out is None:
        return
    dtype, why = precision.choose(cfg.precision, world.device)
    torch.manual_seed(cfg.seed)
    model = load_model(cfg.model)  # fp32: the masters of a bf16 run
    groups, valid, counts = prepare(records, model, cfg)
    stage.begin(
        out, f"sft: {len(groups)} examples, {count_trained(groups)} trained tokens; {why}", counts, world
    )
    if not valid and world.is_main:
        log.info("no rows with split valid: early stopping is off")
    model = distributed.shard(model.to(world.device), world, dtype)
    model.recompute = cfg.recompute
    settings = stage.fit_settings(cfg, dtype, cfg.warmup)
    done = fit(model, groups, valid, nll, count_trained, settings, out, world, "sft")
    save(model, out, world)
    out.finish(counts | done)
    if world.is_main:
        say(f"sft: wrote {out.path / 'model'}")
    distributed.barrier(world)


def prepare(records, model, cfg) -> tuple[list, list, dict]:
    """(groups to train on, held-out groups, counts) of all rows of the data files."""
    rows, counts = select_rows(list(records), cfg.safety_fraction, cfg.seed, cfg.all_safety)
    context = model.config.max_positions
    max_length = min(cfg.max_length or context, context)
    groups, dropped = build_groups(rows, model.tokenizer, max_length)
    held = [r for r in records if r.get("split") == "valid"]
    valid, lost = build_groups(held, model.tokenizer, max_length) if held else ([], {"dropped_too_long": 0})
    counts |= dropped | {"valid_dropped_too_long": lost["dropped_too_long"]}
    return groups, valid, counts | stage.plain_counts(records.counts)


def save(model, out, world) -> None:
    """OUT/model in HF layout; all ranks gather, rank 0 writes."""
    tensors = stage.whole_weights(model)
    if world.is_main:
        save_state(model.config, tensors, model.tokenizer, model.generation, out.path / "model")
