"""Fine-tuning, which several stages do; on demonstrations with the loss on answer tokens only (spec section 2)."""

import dataclasses
import logging
from collections.abc import Callable

import torch

from hpsafety.data.batches import drop_long, nested_subset
from hpsafety.data.chat import encode_dialogue
from hpsafety.data.groups import PromptGroup
from hpsafety.data.records import TRAIN_SPLITS, check_disjoint
from hpsafety.errors import InputError
from hpsafety.model.io import save_state
from hpsafety.train import distributed, stage
from hpsafety.train.loop import fit

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


def build_groups(rows: list[dict], tokenizer, max_length: int, train: str = "all") -> tuple[list, dict]:
    """(groups that fit max_length tokens, counts). Too long a group is dropped and counted, never cut (SFT-3).

    rows   with `prompt` and `response`
    train  "last" learns the response alone, "all" the prompt's own assistant turns too
    Raises InputError when nothing is left.
    """
    return fitting([encode(tokenizer, row, train) for row in rows], max_length)


def fitting(groups: list, max_length: int) -> tuple[list, dict]:
    """(the groups of at most max_length tokens, how many were dropped). Raises InputError when nothing is left."""
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


def encode(tokenizer, row: dict, train: str = "all") -> PromptGroup:
    """A demonstration as a group. Where the sampler cut the answer (`finish` is "length"), the end of turn is not
    trained: the model never said that it had finished."""
    group = encode_dialogue(tokenizer, row["prompt"], row["response"], train)
    if row.get("finish") != "length":
        return group
    mask = [True] * len(group.responses[0]) if group.train is None else list(group.train[0])
    return dataclasses.replace(group, train=[[*mask[:-1], False]])


def longest(cfg, model) -> int:
    """Tokens a group may have: --max-length, at most the model's context."""
    context = model.config.max_positions
    return min(cfg.max_length or context, context)


def count_trained(groups: list) -> int:
    """Trained tokens: SFT's loss denominator."""
    return sum(
        sum(map(len, g.responses)) if g.train is None else sum(sum(map(bool, mask)) for mask in g.train)
        for g in groups
    )


def nll(model, batch, denominator):
    """SFT's loss on one micro-batch (train.step.train_step)."""
    return model.nll(batch, denominator)


def finetune(
    model, groups: list, valid: list, cfg, dtype: torch.dtype, out, world, title: str, loss: Callable = nll
) -> dict:
    """Trains `model` on demonstrations: see train. valid may be empty: no early stopping.

    loss  loss(model, batch, denominator) -> scalar; the denominator counts trained tokens
    """
    if not valid and world.is_main:
        log.info("no held-out rows are watched: early stopping is off")
    return train(model, groups, valid, loss, count_trained, cfg, dtype, out, world, title)


def train(
    model, groups: list, valid: list, loss, count, cfg, dtype: torch.dtype, out, world, title: str
) -> dict:
    """Trains `model` (fp32, whole, on the CPU; it is moved and sharded in place) on `groups`, writes OUT/model; returns
    counts for the manifest.

    valid, loss, count  as train.loop.fit takes them
    cfg  the stage's dataclass with the training flags; out: RunDir, open
    """
    model = distributed.shard(model.to(world.device), world, dtype)
    model.recompute = cfg.recompute
    settings = stage.fit_settings(cfg, dtype, cfg.warmup)
    done = fit(model, groups, valid, loss, count, settings, out, world, title)
    tensors = stage.whole_weights(model)
    if world.is_main:
        save_state(model.config, tensors, model.tokenizer, model.generation, out.path / "model")
    return done
