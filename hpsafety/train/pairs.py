"""What the stages on preference pairs share (reward models, DPO): their rows, their steps, one number per response.

P pairs; a pair is a prompt group of two responses, [chosen, rejected] (hpsafety/data/preferences.py).
"""

import math
import time
from collections.abc import Callable, Sequence

import torch

from hpsafety.data.batches import drop_long
from hpsafety.data.preferences import Pair, describe, drop_equal, encode_pairs, hold_out
from hpsafety.errors import InputError, RunError
from hpsafety.train import distributed, phases, stage
from hpsafety.train.finetune import longest
from hpsafety.train.metrics import Progress
from hpsafety.train.step import assign, local_batches


def prepare_pairs(records, model, cfg, margin: str = "none") -> tuple[list[Pair], list[Pair], dict, dict]:
    """(pairs to train on, pairs held out, counts, what the loader found) of all rows of the data files.

    Raises InputError when nothing is left to train on.
    """
    rows, equal = drop_equal(list(records))
    if not rows:
        raise InputError("no pair is left: in every row chosen and rejected are the same text")
    train_rows, held_rows, counts = hold_out(rows, cfg.seed)
    max_length = longest(cfg, model)
    pairs, held = (encode_pairs(model.tokenizer, part, margin) for part in (train_rows, held_rows))
    found = describe([*train_rows, *held_rows], [*pairs, *held])
    kept, dropped = drop_long(pairs, max_length)
    kept_held, dropped_held = drop_long(held, max_length)
    if not kept:
        raise InputError(
            f"no pair is left to train on: all {len(pairs)} are longer than {max_length} tokens; raise --max-length "
            "(at most the model's context) or give shorter data"
            if pairs
            else "no pair is left to train on: every row is held out by its split"
        )
    counts = stage.plain_counts(records.counts) | {"rows": len(rows)} | counts | equal
    counts |= {"dropped_too_long": dropped, "valid_dropped_too_long": dropped_held}
    return [pairs[i] for i in kept], [held[i] for i in kept_held], counts, found


def plan(num_pairs: int, cfg) -> tuple[int, int]:
    """(optimiser steps in all, optimiser steps of one pass over the pairs)."""
    one_pass = math.ceil(num_pairs / cfg.batch)
    return cfg.steps or cfg.epochs * one_pass, one_pass


@torch.no_grad()
def measure_pairs(
    model, pairs: Sequence[Pair], call: Callable, tokens_per_batch: int, world, title: str, fault: str
) -> torch.Tensor:
    """(P, 2) fp64 on the CPU: a number of each pair's chosen and rejected response, the ranks sharing the work; the
    same on every rank.

    call   call(batch) -> (2p,) of the pairs packed in it, chosen and rejected in turn
    fault  what is said of a pair whose numbers are not finite, with {name} and {row} in it: RunError
    """
    values = torch.zeros(len(pairs), 2, dtype=torch.float64, device=world.device)
    place = {id(pair): i for i, pair in enumerate(pairs)}
    progress = Progress(title, len(pairs)) if world.is_main and pairs else None
    done, started = 0, time.perf_counter()
    for batch in local_batches(assign(model, list(pairs), world), tokens_per_batch, world):
        with phases.phase("validation"):
            got = call(batch).view(len(batch.groups), 2)
        values[[place[id(pair)] for pair in batch.groups]] = got.double()
        done += len(batch.groups)
        if progress:
            all_done = min(len(pairs), done * world.size)  # the ranks have about equal shares
            progress.update(all_done, f"{all_done / (time.perf_counter() - started):.1f} pairs/s")
    if progress:
        progress.close()
    values = distributed.all_sum(values, world).cpu()
    for pair, row in zip(pairs, values.tolist(), strict=True):
        if not all(map(math.isfinite, row)):
            raise RunError(fault.format(name=pair.name, row=row))
    return values
