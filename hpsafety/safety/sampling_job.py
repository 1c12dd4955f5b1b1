"""A file of prompts in, a file of groups out, K responses each: what `sample` and `reject` do (design.md section 8).

A draw is keyed by (seed, line over all files, sample, position), and lines go round the ranks: any number of ranks,
any batch and any interruption give the same bytes.
"""

import dataclasses
import time

import torch

from hpsafety.config import memory_bytes
from hpsafety.data.chat import encode_prompt
from hpsafety.errors import InputError, RunError
from hpsafety.model.io import load_model
from hpsafety.rollout import invariance
from hpsafety.rollout.engine import Engine, NotFinite, Request
from hpsafety.rollout.passes import row_bound
from hpsafety.rollout.sampler import Settings, stop_ids
from hpsafety.train import distributed, precision
from hpsafety.train.lines import LineJob
from hpsafety.train.metrics import Progress, say
from hpsafety.train.rundir import model_hashes

REDO_LINES = 1000


def goes_on(job: LineJob, model, resume: bool) -> bool:
    """Whether what a stopped job has finished is kept.

    Where products change with the rows beside them (bf16), the lines that are left would have other neighbours than
    in an uninterrupted run, and come out in other words. A job of at most REDO_LINES lines is begun anew there, so that
    it ends with the same bytes; a longer one goes on.
    """
    started = job.part.exists()  # only then are the products worth measuring
    return resume and (not started or job.total > REDO_LINES or row_bound(model) == 0)


def sample_file(cfg, world) -> None:
    """Samples the prompts of cfg.data (SampleConfig) into cfg.out and its manifest (a collective call)."""
    dtype, _ = precision.choose(cfg.precision, world.device)
    # What auto chose is part of the job: another machine's choice must not go on with this one's samples.
    cfg = dataclasses.replace(cfg, precision=precision.name(dtype))
    job = LineJob("sample", cfg, cfg.data, "prompt", model_hashes({"model": cfg.model}), world)
    if job.complete:
        if world.is_main:
            say(f"{cfg.out}: this run is complete; nothing to do (--no-resume makes it anew)")
        return
    model = load_model(cfg.model, dtype, world.device)
    if model.tokenizer is None:
        raise InputError(f"{cfg.model}: has no tokenizer.json; sample needs one for the prompts' text")
    engine = Engine(model, engine_settings(cfg, model))
    job.check_rows(lambda row: check_prompt(engine, row))
    try:
        with job.working(goes_on(job, model, cfg.resume)):
            if world.is_main:
                say(headline(job, engine, cfg))
            counts = sample_lines(job, engine, cfg)
            total = distributed.all_sum(torch.tensor(list(counts.values())), world)
            job.finish(dict(zip(counts, total.tolist(), strict=True)))
    except NotFinite as error:
        raise RunError(f"{job.place(error.prompt_index)}: {error}") from None
    if world.is_main:
        say(f"sample: wrote {cfg.out}")


def engine_settings(cfg, model) -> Settings:
    return Settings(
        max_new_tokens=cfg.max_new_tokens, temperature=cfg.temperature, top_p=cfg.top_p, top_k=cfg.top_k,
        seed=cfg.seed, stop=stop_ids(model), max_batch=cfg.max_batch,
        kv_memory=memory_bytes(cfg.kv_memory), batch_invariant=cfg.batch_invariant,
    )  # fmt: skip


def check_prompt(engine: Engine, row: dict) -> None:
    """InputError for a prompt that does not fit the context or the memory, before anything is written."""
    try:
        engine.check(len(encode_prompt(engine.model.tokenizer, row["prompt"])))
    except ValueError as error:
        raise InputError(f"the prompt {error}") from None


def sample_lines(job: LineJob, engine: Engine, cfg) -> dict[str, int]:
    """Samples what this rank still has to do, each line kept as it finishes; counts of this rank and run."""
    tokenizer, rows = engine.model.tokenizer, {}  # rows: those in the engine, by line

    def requests():
        for index, row in job.rows():
            rows[index] = row
            yield Request(encode_prompt(tokenizer, row["prompt"]), cfg.k, index)

    before, size = len(job.done), job.world.size
    progress, started = Progress("sample", job.total, before), time.monotonic()
    lines = tokens = 0
    try:
        for index, rollouts in engine.groups(requests()):
            job.add(index, group_row(rows.pop(index), rollouts, tokenizer, cfg))
            lines += 1
            tokens += sum(len(r.tokens) for r in rollouts)
            if job.world.is_main:
                done = min(job.total, before + lines * size)  # the other ranks are about as far
                progress.update(done, f"{size * tokens / (time.monotonic() - started):.0f} tokens/s")
    finally:
        progress.close()
    return {"sampled_tokens": tokens, "prompt_tokens_computed": engine.prefilled_tokens}


def group_row(row: dict, rollouts, tokenizer, cfg) -> dict:
    """The prompt's row with `responses` and `samples` (design section 8)."""
    samples = [
        {
            "text": tokenizer.decode(r.tokens, skip_special=True), "tokens": r.tokens,
            "logprobs": [float(f"{x:.9g}") for x in r.logprobs],  # the shortest text that is the same fp32 number
            "finish": r.finish, "seed": cfg.seed, "temperature": cfg.temperature,
        }
        for r in rollouts
    ]  # fmt: skip
    return row | {"responses": [s["text"] for s in samples], "samples": samples}


def headline(job: LineJob, engine: Engine, cfg) -> str:
    cache, bound = engine.cache, row_bound(engine.model)
    bits = (
        "a response does not depend on the batch"
        if bound == 0
        else f"products change by {bound:.1e} with the batch, and with them words that are as close"
    )
    if cfg.batch_invariant:
        why = invariance.fault(engine.model)
        bits += (
            "; logprobs are the trainer's to the bit"
            if why is None
            else f"; --batch-invariant cannot hold: {why}"
        )
    room = f"{cache.num_pages} pages of {cache.page_size} tokens, at most {cfg.max_batch} sequences at once"
    return f"sample: {job.total} prompts, {cfg.k} responses each; {cfg.precision}; {room}; {bits}"
