"""What a checkpoint does on held-out sets: greedy answers, refusal rates, loss per response token."""

from collections.abc import Callable

import torch

from hpsafety.data.batches import micro_batches
from hpsafety.data.chat import encode_prompt
from hpsafety.data.groups import pack
from hpsafety.rollout.engine import Engine, Request
from hpsafety.rollout.sampler import Settings, stop_ids
from hpsafety.safety.intervals import Rate, wilson
from hpsafety.safety.judges import judge_refusal


def greedy_answers(
    model, rows: list[dict], max_new_tokens: int, on_progress: Callable[[int, int], None] | None = None
) -> list[str]:
    """One greedy answer per prompt record, cut at max_new_tokens tokens; special tokens are left out.

    on_progress  called with (prompts done, tokens generated so far)
    """
    engine = Engine(model, Settings(max_new_tokens=max_new_tokens, temperature=0.0, stop=stop_ids(model)))
    texts, done, tokens = [""] * len(rows), 0, 0
    requests = (Request(encode_prompt(model.tokenizer, row["prompt"]), 1, i) for i, row in enumerate(rows))
    for rollout in engine.rollouts(requests):
        texts[rollout.prompt_index] = model.tokenizer.decode(rollout.tokens, skip_special=True).strip()
        done, tokens = done + 1, tokens + len(rollout.tokens)
        if on_progress:
            on_progress(done, tokens)
    return texts


def refusal_rate(rows: list[dict], answers: list[str]) -> Rate:
    """Share of answers that judge_refusal calls a refusal; an inability is none (spec EVAL-5)."""
    refused = sum(
        judge_refusal(row["prompt"], text) == "refusal" for row, text in zip(rows, answers, strict=True)
    )
    return wilson(refused, len(rows))


@torch.no_grad()
def loss_per_token(model, groups: list, tokens_per_batch: int) -> float:
    """Mean negative log-probability of the trained response tokens of all groups, nats per token."""
    total, count = 0.0, 0
    for indices in micro_batches(groups, tokens_per_batch):
        batch = pack([groups[i] for i in indices]).to(model.embed.device)
        total += float(model.nll(batch, 1.0))
        count += batch.num_trained
    return total / max(1, count)
