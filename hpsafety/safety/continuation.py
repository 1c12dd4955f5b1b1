"""Texts that a model goes on with, without a chat template: what ToxiGen, BOLD and TruthfulQA's generation ask for."""

import dataclasses
import time

from hpsafety.errors import InputError, RunError
from hpsafety.rollout.engine import Engine, NotFinite, Request
from hpsafety.safety.item_job import begin_items
from hpsafety.safety.sampling_job import engine_settings, goes_on
from hpsafety.train.lines import LineJob
from hpsafety.train.metrics import Progress


def continue_file(cfg, items: str, one_line: bool, world, title: str) -> None:
    """What cfg.model says after each item's `text`: a line {id, text, tokens, finish} per item (a collective call).

    cfg       SampleConfig: its model, out and decoding settings; k is 1
    one_line  stop at the first line break, which is left out
    """
    cfg, job, model = begin_items(cfg, items, world)
    if model is None:
        return
    settings = engine_settings(cfg, model)
    if one_line:
        settings = dataclasses.replace(settings, stop=settings.stop | line_breaks(model.tokenizer))
    engine = Engine(model, settings)
    job.check_rows(lambda row: _check(engine, row))
    try:
        with job.working(goes_on(job, model, cfg.resume)):
            _continue_lines(job, engine, one_line, title)
            job.finish({})
    except NotFinite as error:
        raise RunError(f"{job.place(error.prompt_index)}: {error}") from None


def line_breaks(tokenizer) -> frozenset[int]:
    """Ids of tokens that hold a line break."""
    spelled = ((index, tokenizer.decode([index], skip_special=False)) for index in range(len(tokenizer)))
    return frozenset(index for index, text in spelled if "\n" in text)


def first_line(text: str) -> str:
    """The text up to its first line break, trimmed."""
    return text.strip(" ").partition("\n")[0].strip()


def _check(engine: Engine, row: dict) -> None:
    try:
        engine.check(len(engine.model.tokenizer.encode_text(row["text"])))
    except ValueError as error:
        raise InputError(f"the text of item {row['id']!r} {error}") from None


def _continue_lines(job: LineJob, engine: Engine, one_line: bool, title: str) -> None:
    tokenizer, rows = engine.model.tokenizer, {}

    def requests():
        for index, row in job.rows():
            rows[index] = row
            yield Request(tokenizer.encode_text(row["text"]), 1, index)

    before, size = len(job.done), job.world.size
    progress, started, lines, tokens = Progress(title, job.total, before), time.monotonic(), 0, 0
    try:
        for rollout in engine.rollouts(requests()):
            text = tokenizer.decode(rollout.tokens, skip_special=True)
            text = first_line(text) if one_line else text
            row = rows.pop(rollout.prompt_index)
            job.add(rollout.prompt_index, {
                "id": row["id"], "text": text, "tokens": len(rollout.tokens), "finish": rollout.finish,
            })  # fmt: skip
            lines, tokens = lines + 1, tokens + len(rollout.tokens)
            if job.world.is_main:
                done = min(job.total, before + lines * size)  # the other ranks are about as far
                progress.update(done, f"{size * tokens / (time.monotonic() - started):.0f} tokens/s")
    finally:
        progress.close()
