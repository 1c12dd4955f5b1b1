"""Supervised safety fine-tuning: loss = - sum of trained answer tokens' logprobs / their number (spec section 2)."""

import torch

from hpsafety.data.sources import load_rows
from hpsafety.model.io import load_model
from hpsafety.train import distributed, precision, stage
from hpsafety.train.finetune import build_groups, count_trained, finetune, longest, select_rows
from hpsafety.train.metrics import say


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
    done = finetune(model, groups, valid, cfg, dtype, out, world, "sft")
    out.finish(counts | done)
    if world.is_main:
        say(f"sft: wrote {out.path / 'model'}")
    distributed.barrier(world)


def prepare(records, model, cfg) -> tuple[list, list, dict]:
    """(groups to train on, held-out groups, counts) of all rows of the data files."""
    rows, counts = select_rows(list(records), cfg.safety_fraction, cfg.seed, cfg.all_safety)
    max_length = longest(cfg, model)
    groups, dropped = build_groups(rows, model.tokenizer, max_length)
    held = [r for r in records if r.get("split") == "valid"]
    valid, lost = build_groups(held, model.tokenizer, max_length) if held else ([], {"dropped_too_long": 0})
    counts |= dropped | {"valid_dropped_too_long": lost["dropped_too_long"]}
    return groups, valid, counts | stage.plain_counts(records.counts)
