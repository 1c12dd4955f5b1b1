"""Log-probabilities of given answers: a context is computed once for all its answers, packed with others, no padding.

Contexts and answers are split into tokens as lm-evaluation-harness does it, so that figures compare: an answer is what
the whole text has beyond the context's own tokens; white space at the context's end goes to the answer; without a
context the answer follows the bos (or eos) token.
"""

import dataclasses
import itertools
import time
from collections.abc import Sequence

import torch

from hpsafety.data.batches import micro_batches
from hpsafety.data.groups import PromptGroup, pack
from hpsafety.errors import InputError
from hpsafety.safety.item_job import begin_items
from hpsafety.safety.sampling_job import goes_on
from hpsafety.train.lines import LineJob
from hpsafety.train.metrics import Progress

WINDOW = 256  # items in memory at a time, from which micro-batches are made


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ChoiceSettings:
    """A file of items {text, choices} to a file of {id, logprobs}; what LineJob needs to know of it."""

    model: str
    out: str
    seed: int = 0
    precision: str
    tokens_per_batch: int
    resume: bool


def encode_choices(tokenizer, context: str, choices: Sequence[str]) -> PromptGroup:
    """The context's tokens and, as responses, each choice's. Raises InputError for a choice without a token."""
    if not context.strip():
        start = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
        if start is None:
            raise InputError(
                "the model's tokenizer has neither bos nor eos, which a text without context needs"
            )
        return PromptGroup([start], [_some(tokenizer.encode_plain(context + c), c) for c in choices])
    spaces = context[len(context.rstrip()) :]
    context = context.rstrip()
    prompt = tokenizer.encode_text(context)
    responses = [
        _some(tokenizer.encode_text(context + spaces + choice)[len(prompt) :], choice) for choice in choices
    ]
    return PromptGroup(prompt, responses)


def _some(tokens: list[int], choice: str) -> list[int]:
    if not tokens:
        raise InputError(f"the answer {choice!r} has no token of its own after its context")
    return tokens


@torch.no_grad()
def choice_logprobs(model, groups: Sequence[PromptGroup], tokens_per_batch: int) -> list[list[float]]:
    """Per group the sum of each response's log-probabilities, in nats, the sums in double."""
    out: list[list[float]] = [[] for _ in groups]
    device = model.embed.device
    for part in micro_batches(groups, tokens_per_batch):
        batch = pack([groups[i] for i in part]).to(device)
        logprobs = model.logprobs(batch).double()
        responses = torch.repeat_interleave(
            torch.arange(batch.last_rows.numel(), device=device), batch.cu_responses.diff()
        )
        sums = torch.zeros(batch.last_rows.numel(), dtype=torch.float64, device=device)
        sums = iter(sums.index_add_(0, responses, logprobs).tolist())
        for i in part:
            out[i] = [next(sums) for _ in groups[i].responses]
    return out


def check_length(model, row: dict) -> None:
    """InputError for an item that is longer than the model's context."""
    group = encode_choices(model.tokenizer, row["text"], row["choices"])
    length = len(group.prompt) + max(map(len, group.responses))
    if length > model.config.max_positions:
        raise InputError(
            f"item {row['id']!r} has {length} tokens with its longest answer, more than the model's context of "
            f"{model.config.max_positions}; take it out"
        )


def answer_file(cfg: ChoiceSettings, items: str, world, title: str) -> None:
    """The items' log-probabilities, a line each, in their order; resumable, over ranks (a collective call)."""
    cfg, job, model = begin_items(cfg, items, world)
    if model is None:
        return
    job.check_rows(lambda row: check_length(model, row))
    with job.working(goes_on(job, model, cfg.resume)):
        _answer_lines(job, model, cfg.tokens_per_batch, title)
        job.finish({})


def _answer_lines(job: LineJob, model, tokens_per_batch: int, title: str) -> None:
    before, rows = len(job.done), job.rows()
    progress, started, lines, tokens = Progress(title, job.total, before), time.monotonic(), 0, 0
    try:
        while window := list(itertools.islice(rows, WINDOW)):
            groups = [encode_choices(model.tokenizer, row["text"], row["choices"]) for _, row in window]
            for indices in micro_batches(groups, tokens_per_batch):
                chosen = [groups[i] for i in indices]
                for i, logprobs in zip(
                    indices, choice_logprobs(model, chosen, tokens_per_batch), strict=True
                ):
                    index, row = window[i]
                    job.add(index, {"id": row["id"], "logprobs": logprobs})
                lines += len(indices)
                tokens += sum(len(g.responses) * len(g.prompt) + sum(map(len, g.responses)) for g in chosen)
                if job.world.is_main:
                    done = min(job.total, before + lines * job.world.size)  # the other ranks are about as far
                    rate = job.world.size * tokens / (time.monotonic() - started)
                    progress.update(done, f"{rate:.0f} tokens/s")
    finally:
        progress.close()
