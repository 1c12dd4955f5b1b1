"""A file of groups in, a file of scores out, one line per line (design.md section 8): what `score` and `reject` do."""

import dataclasses
import time
from collections.abc import Iterator
from itertools import islice

from hpsafety.data.batches import micro_batches
from hpsafety.data.groups import PromptGroup
from hpsafety.errors import InputError, RunError
from hpsafety.model.reward_io import load_reward_model
from hpsafety.rollout.scoring import Scorer
from hpsafety.train import phases, precision
from hpsafety.train.lines import LineJob
from hpsafety.train.metrics import Progress, say
from hpsafety.train.rundir import model_hashes

WINDOW = 256  # groups in memory at a time, from which micro-batches are made


def score_file(cfg, world) -> None:
    """Scores the groups of cfg.data (ScoreConfig) into cfg.out, the ranks sharing the lines (a collective call)."""
    dtype, why = precision.choose(cfg.precision, world.device)
    # The precision that was chosen is part of the job: another machine's choice must not go on with this one's scores.
    settled = dataclasses.replace(cfg, precision=precision.name(dtype))
    job = LineJob("score", settled, cfg.data, "group", judge_hashes(cfg), world)
    if job.complete:
        if world.is_main:
            say(f"{cfg.out}: this run is complete; nothing to do (--no-resume makes it anew)")
        return
    scorer = load_scorer(cfg, dtype, world.device)
    job.check_rows(lambda row: check_length(scorer, row))
    job.open(cfg.resume)
    try:
        if world.is_main:
            say(headline(job, scorer, why))
        score_rows(job, scorer, cfg, world)
        job.finish({})
    finally:
        job.close()
    if world.is_main:
        say(f"score: wrote {cfg.out}")


def judge_hashes(cfg) -> dict[str, str]:
    """Checksums of both models' files, under names that tell which model they belong to."""
    return model_hashes({"safety_rm": cfg.safety_rm, "helpful_rm": cfg.helpful_rm})


def load_scorer(cfg, dtype, device) -> Scorer:
    """Both reward models on `device`, frozen; InputError when they do not go together."""
    names = (f"--safety-rm {cfg.safety_rm}", f"--helpful-rm {cfg.helpful_rm}")
    paths = dict.fromkeys((cfg.safety_rm, cfg.helpful_rm))  # one model in both places is read once
    models = {path: load_reward_model(path, dtype, device).requires_grad_(False) for path in paths}
    return Scorer(models[cfg.safety_rm], models[cfg.helpful_rm], names)


def check_length(scorer: Scorer, row: dict) -> None:
    """InputError for a row longer than the context, before anything is scored.

    A token is at least a byte of text, so that short rows need not be encoded here; the template's own text is left out
    of the guess, and each row is checked exactly when its turn comes.
    """
    prompt = row["prompt"]
    texts = [prompt] if isinstance(prompt, str) else [message["content"] for message in prompt]
    longest = sum(map(_bytes, texts)) + max(map(_bytes, row["responses"]))
    if longest > scorer.context // 2:
        scorer.encode(prompt, row["responses"])


def _bytes(text: str) -> int:
    return len(text.encode("utf-8", "surrogatepass"))


def headline(job: LineJob, scorer: Scorer, why: str) -> str:
    trunks = "two heads on one trunk, one pass" if scorer.one_trunk else "two reward models, two passes"
    change = scorer.row_difference()
    bits = (
        "scores do not depend on the batch"
        if change == 0
        else f"products change by {change:.1e} with the batch"
    )
    before = f", {len(job.done)} of them done before" if job.done else ""
    return f"score: {job.total} groups{before}; {trunks}; {why}; {bits}"


def score_rows(job: LineJob, scorer: Scorer, cfg, world) -> None:
    """Scores what is left of the job, micro-batch after micro-batch; each line is kept as soon as it is scored."""
    before = len(job.done)
    progress, started = Progress("score", job.total, before), time.monotonic()
    lines = responses = tokens_equiv = 0
    try:
        for part in phases.steps(micro_batches_of(job, scorer, cfg.tokens_per_batch)):
            groups = [group for _, _, group in part]
            # Counted as if both models had the safety model's shape, and every row went through the last block.
            phases.work(scorer.safety, list(map(_untrained, groups)), len(scorer.trunks))
            with phases.phase("forward"):
                scores = scorer.score_part(groups, [is_safety(row, cfg.all_safety) for _, row, _ in part])
            for (index, row, group), score in zip(part, scores, strict=True):
                if why := score.fault():
                    raise RunError(f"{job.place(index)}: group {row.get('id')!r}: {why}")
                job.add(index, score.record(row.get("id")))
                tokens_equiv += len(group.prompt) * len(group.responses) + sum(map(len, group.responses))
                responses += len(group.responses)
            lines += len(part)
            if world.is_main:
                took = time.monotonic() - started
                done = min(job.total, before + lines * world.size)  # the other ranks are about as far
                progress.update(
                    done, f"{responses / took:.1f} responses/s  {tokens_equiv / took:.0f} tokens/s"
                )
    finally:
        progress.close()


def micro_batches_of(job: LineJob, scorer: Scorer, tokens_per_batch: int) -> Iterator[list[tuple]]:
    """[(line index, row, its PromptGroup), ...] per micro-batch; at most WINDOW rows are held at a time."""
    rows = job.rows()
    while window := [(index, row, _encode(job, scorer, index, row)) for index, row in islice(rows, WINDOW)]:
        for indices in micro_batches([group for _, _, group in window], tokens_per_batch):
            yield [window[i] for i in indices]


def _encode(job: LineJob, scorer: Scorer, index: int, row: dict) -> PromptGroup:
    with phases.phase("data"):
        try:
            return scorer.encode(row["prompt"], row["responses"])
        except InputError as error:
            raise InputError(f"{job.place(index)}: {error}") from None


def is_safety(row: dict, default: bool) -> bool:
    """The row's tag; `default` (--all-safety) where it has none."""
    tag = row.get("is_safety")
    return default if tag is None else tag


def _untrained(group: PromptGroup) -> PromptGroup:
    """The group for counting work: no row reaches a token head."""
    return dataclasses.replace(group, train=[[False] * len(response) for response in group.responses])
