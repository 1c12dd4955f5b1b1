"""A file of dialogues to play in, a file of what came of them out: resumable by line, over ranks (train/lines.py)."""

import dataclasses
import time
from collections.abc import Callable

import torch

from hpsafety.data.chat import encode_prompt, prompt_messages
from hpsafety.errors import InputError, RunError
from hpsafety.model.io import load_model
from hpsafety.rollout.engine import Engine, NotFinite
from hpsafety.safety.sampling_job import engine_settings, goes_on
from hpsafety.safety.talk import STRIDE, Played, Script, play
from hpsafety.train import distributed, precision
from hpsafety.train.lines import LineJob
from hpsafety.train.metrics import Progress, say
from hpsafety.train.rundir import model_hashes

TEMPLATE_TOKENS = 16  # that a chat template writes around a message, more or less


def play_file(
    cfg, limit: int, script: Callable[[dict], Script], keep: Callable[[dict, Played], dict], title: str, world,
    number: Callable[[int, dict], int] | None = None,
) -> None:  # fmt: skip
    """Plays each row of cfg.data (SampleConfig; prompt records) and writes what `keep` makes of it to cfg.out.

    limit   tokens of a dialogue, at most: where the next turn does not fit, it ends (a collective call)
    script  row -> what the user says;  keep: (row, what came of it) -> the row to write
    number  (line, row) -> the dialogue's number, which keys its draws and is its own; the line if absent
    Raises InputError where the memory of --kv-memory is too small for one such dialogue.
    """
    dtype, _ = precision.choose(cfg.precision, world.device)
    cfg = dataclasses.replace(cfg, precision=precision.name(dtype))
    job = LineJob("dialogues", cfg, cfg.data, "prompt", model_hashes({"model": cfg.model}), world)
    if job.complete:
        return
    model = load_model(cfg.model, dtype, world.device)
    engine = Engine(model, engine_settings(cfg, model))
    job.check_rows(lambda row: check_memory(engine, script(row), limit))
    with job.working(goes_on(job, model, cfg.resume)):
        tokens = _play_lines(job, engine, limit, script, keep, title, number)
        total = distributed.all_sum(torch.tensor([tokens, engine.prefilled_tokens]), world)
        job.finish(dict(zip(("decoded_tokens", "prompt_tokens_computed"), total.tolist(), strict=True)))
    if world.is_main:
        say(f"{title}: wrote {cfg.out}")


def check_memory(engine: Engine, script: Script, limit: int) -> None:
    """InputError where the cache cannot hold the whole dialogue, as long as it may become."""
    tokenizer, new = engine.model.tokenizer, engine.settings.max_new_tokens
    said = [*script.users, *script.asked.values()]
    longest = sum(len(tokenizer.encode_plain(text)) + 2 * TEMPLATE_TOKENS + new for text in said)
    engine.check(max(1, min(longest, limit - new)))


def first_prompt(tokenizer, script: Script) -> int:
    """Tokens of the dialogue's first prompt. Raises InputError where the model has no chat template that takes it."""
    return len(encode_prompt(tokenizer, script.messages([], script.users[0])))


def system_text(prompt: str | list[dict]) -> str | None:
    """The system message that a dialogue begins with."""
    first = prompt_messages(prompt)[0]
    return first["content"] if first["role"] == "system" else None


def user_texts(prompt: str | list[dict]) -> list[str]:
    """The user's turns. Answers that stand between are left out: they are to be sampled."""
    return [m["content"] for m in prompt_messages(prompt) if m["role"] == "user"]


def _play_lines(job: LineJob, engine: Engine, limit: int, script, keep, title: str, number) -> int:
    """Plays what this rank still has to do, each dialogue kept as it ends; tokens decoded by this rank and run."""
    rows: dict[int, tuple[int, dict]] = {}  # dialogue's number -> its line and row

    def scripts():
        for index, row in job.rows():
            mine = index if number is None else number(index, row)
            rows[mine] = index, row
            yield mine, script(row)

    before, size = len(job.done), job.world.size
    progress, started, lines = Progress(title, job.total, before), time.monotonic(), 0
    try:
        for mine, played in play(engine, scripts(), limit):
            index, row = rows.pop(mine)
            job.add(index, keep(row, played))
            lines += 1
            if job.world.is_main:
                done = min(job.total, before + lines * size)  # the other ranks are about as far
                rate = size * engine.decoded_tokens / (time.monotonic() - started)
                progress.update(done, f"{rate:.0f} tokens/s")
    except NotFinite as error:
        raise RunError(f"{job.place(rows[error.prompt_index // STRIDE][0])}: {error}") from None
    finally:
        progress.close()
    return engine.decoded_tokens


def check_chat(model, path: str) -> None:
    if model.tokenizer is None:
        raise InputError(f"{path}: has no tokenizer.json; one is needed for the dialogues' text")
