"""`hpsafety sample`: K responses per prompt, a group record per line of the prompt files.

A draw is keyed by (seed, line over all files, sample, position), and lines go round the ranks: any number of ranks,
any batch and any interruption give the same bytes.
"""

import dataclasses
import logging
import time

import torch

from hpsafety.config import memory_bytes
from hpsafety.data.chat import encode_prompt
from hpsafety.data.records import iter_json_lines
from hpsafety.errors import InputError, file_error
from hpsafety.model.io import load_model, locate
from hpsafety.rollout.engine import Engine, Request
from hpsafety.rollout.passes import row_bound
from hpsafety.rollout.sampler import Settings, stop_ids
from hpsafety.train import distributed, precision, stage
from hpsafety.train.lines import LineJob
from hpsafety.train.metrics import Progress, say
from hpsafety.train.rundir import input_hashes

log = logging.getLogger("hpsafety")


def run(cfg) -> None:
    """hpsafety sample: see SampleConfig. Writes cfg.out and its manifest."""
    with stage.ranks(cfg.device) as world:
        _run(cfg, world)


def _run(cfg, world) -> None:
    dtype, _ = precision.choose(cfg.precision, world.device)
    name = "bf16" if dtype == torch.bfloat16 else "fp32"
    cfg = dataclasses.replace(cfg, precision=name)  # what auto chose is part of what is resumed
    model_hashes = {f"model/{k}": v for k, v in input_hashes([locate(cfg.model)]).items()}
    job = LineJob("sample", cfg, cfg.data, "prompt", model_hashes, world)
    if job.complete:
        if world.is_main:
            say(f"{cfg.out}: is complete; nothing to do (--no-resume makes it anew)")
        return
    model = load_model(cfg.model, dtype, world.device)
    engine = Engine(model, engine_settings(cfg, model))
    check_prompts(cfg, model, engine)
    job.open(cfg.resume)
    if world.is_main:
        say(f"sample: {job.total} prompts, {cfg.k} responses each; {_describe(engine, name)}")
        say(f"sample: {_bound_line(model)}")
    try:
        counts = sample_lines(job, engine, model.tokenizer, cfg)
    except KeyboardInterrupt:
        job.close()
        raise KeyboardInterrupt(
            f"interrupted; what is finished is kept in {job.part}: run the same command again to go on"
        ) from None
    except BaseException:
        job.close()
        raise
    total = distributed.all_sum(torch.tensor(list(counts.values())), world)
    job.finish(dict(zip(counts, total.tolist(), strict=True)))
    if world.is_main:
        say(f"sample: wrote {cfg.out}")


def engine_settings(cfg, model) -> Settings:
    return Settings(
        max_new_tokens=cfg.max_new_tokens, temperature=cfg.temperature, top_p=cfg.top_p, top_k=cfg.top_k,
        seed=cfg.seed, stop=stop_ids(model), max_batch=cfg.max_batch,
        kv_memory=None if cfg.kv_memory is None else memory_bytes(cfg.kv_memory),
    )  # fmt: skip


def check_prompts(cfg, model, engine: Engine) -> None:
    """Raises InputError, with file and line, for a prompt that cannot be sampled; before anything is written."""
    if model.tokenizer is None:
        raise InputError(f"{cfg.model}: has no tokenizer.json; sample needs one for the prompts' text")
    for path in cfg.data:
        for line, row in iter_json_lines(path):
            try:
                engine.check(len(encode_prompt(model.tokenizer, row["prompt"])))
            except ValueError as error:
                raise file_error(path, f"the prompt {error}", line) from None
            except InputError as error:
                raise file_error(path, str(error), line) from None


def sample_lines(job: LineJob, engine: Engine, tokenizer, cfg) -> dict[str, int]:
    """Samples what this rank still has to do, each line kept as it finishes; counts of this run."""
    rows: dict[int, dict] = {}  # those in the engine

    def requests():
        for index, row in job.rows():
            rows[index] = row
            yield Request(encode_prompt(tokenizer, row["prompt"]), cfg.k, index)

    own = sum(1 for _ in job.rows())
    progress, started, done, tokens = Progress("sample", own), time.monotonic(), 0, 0
    try:
        for index, rollouts in engine.groups(requests()):
            job.add(index, group_row(rows.pop(index), rollouts, tokenizer, cfg))
            done += 1
            tokens += sum(len(r.tokens) for r in rollouts)
            if job.world.is_main:
                progress.update(done, f"{tokens / (time.monotonic() - started):.0f} tokens/s")
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


def _describe(engine: Engine, name: str) -> str:
    cache = engine.cache
    return f"{name}, {cache.num_pages} pages of {cache.page_size} tokens, at most {engine.settings.max_batch} at once"


def _bound_line(model) -> str:
    bound = row_bound(model)
    if bound == 0.0:
        return "a response does not depend on the batch: the products' rows are bit-equal on this machine"
    return (
        f"this machine's products move a row by up to {bound:.1e} of the largest element with the rows beside it; a "
        "response may differ in another batch where two words are that close"
    )
