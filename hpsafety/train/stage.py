"""What every training stage does around its own work: ranks, run directory, log, settings, the weights at the end."""

import contextlib
import logging
from collections import Counter
from collections.abc import Iterator

import torch

from hpsafety.train import distributed
from hpsafety.train.loop import FitSettings
from hpsafety.train.metrics import close_log, open_log, say
from hpsafety.train.rundir import RunDir, input_hashes

log = logging.getLogger("hpsafety")


@contextlib.contextmanager
def ranks(device: str) -> Iterator[distributed.World]:
    """This process among its peers, for as long as the stage runs; its log files are closed at the end."""
    try:
        yield distributed.init(device)
    finally:
        for handler in list(log.handlers):
            close_log(handler)
        distributed.close()


def run_directory(cfg, stage: str, data, world, models: dict[str, str] | None = None) -> RunDir | None:
    """OUT of this stage, not yet opened; None, and a line that says so, when the run is complete.

    data    the files and folders whose checksums belong to the run
    models  checksums of more inputs by name (rundir.model_hashes)
    """
    out = RunDir(cfg.out, stage, cfg, input_hashes(data) | (models or {}), world)
    if not out.complete:
        return out
    if world.is_main:
        say(f"{cfg.out}: this run is complete; nothing to do (--no-resume makes it anew)")
    return None


def begin(out: RunDir, headline: str, counts: dict, world) -> None:
    """Makes OUT and its log: the headline is also shown, the counts are logged line by line."""
    distributed.barrier(world)  # rank 0 writes OUT only when every rank has looked at it
    out.open()
    if world.is_main:
        out.log = open_log(out.path / "log.txt")
        say(headline)
        for name, number in counts.items():
            log.info("%s: %s", name, number)
    distributed.barrier(world)


def fit_settings(cfg, dtype: torch.dtype, warmup: int) -> FitSettings:
    """The training flags every stage shares, and its warm-up in steps."""
    return FitSettings(
        batch=cfg.batch, epochs=cfg.epochs, steps=cfg.steps, lr=cfg.lr, warmup=warmup,
        tokens_per_batch=cfg.tokens_per_batch, seed=cfg.seed, checkpoint_every=cfg.checkpoint_every, dtype=dtype,
        betas=(cfg.beta1, cfg.beta2), eps=cfg.eps, weight_decay=cfg.weight_decay, clip=cfg.clip,
    )  # fmt: skip


def plain_counts(counts: Counter) -> dict[str, int]:
    """A reader's counts for the manifest."""
    return {str(name): number for name, number in counts.items()}


def whole_weights(model) -> dict[str, torch.Tensor]:
    """Every parameter, gathered from the ranks (a collective call), on the CPU."""
    return {name: distributed.full(p.detach()).cpu() for name, p in model.named_parameters()}
