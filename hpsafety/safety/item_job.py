"""How the evaluation's jobs over items begin: precision, the resumable line job, and the model if there is work."""

import dataclasses

from hpsafety.errors import InputError
from hpsafety.model.io import load_model
from hpsafety.train import precision
from hpsafety.train.lines import LineJob
from hpsafety.train.rundir import model_hashes


def begin_items(cfg, items: str, world):
    """(cfg in the precision that was chosen, the job, its model; None where the job is complete). A collective call.

    InputError for a model without a tokenizer.
    """
    dtype, _ = precision.choose(cfg.precision, world.device)
    cfg = dataclasses.replace(cfg, precision=precision.name(dtype))
    job = LineJob("eval", cfg, (items,), "document", model_hashes({"model": cfg.model}), world)
    if job.complete:
        return cfg, job, None
    model = load_model(cfg.model, dtype, world.device)
    if model.tokenizer is None:
        raise InputError(f"{cfg.model}: has no tokenizer.json; an evaluation needs one for its texts")
    return cfg, job, model
