"""What a checkpoint does on held-out sets: greedy answers, refusal rates, loss per response token."""

from collections.abc import Callable

import torch

from hpsafety.data.batches import micro_batches
from hpsafety.data.chat import encode_prompt
from hpsafety.data.groups import pack
from hpsafety.safety.intervals import Rate, wilson
from hpsafety.safety.judges import judge_refusal

PROMPTS_PER_BATCH = 64


def greedy_answers(
    model, rows: list[dict], max_new_tokens: int, on_progress: Callable[[int, int], None] | None = None
) -> list[str]:
    """One greedy answer per prompt record, cut at max_new_tokens tokens; special tokens are left out.

    on_progress  called with (prompts done, tokens generated so far)
    """
    texts: list[str] = []
    tokens = 0
    for start in range(0, len(rows), PROMPTS_PER_BATCH):
        prompts = [
            encode_prompt(model.tokenizer, row["prompt"]) for row in rows[start : start + PROMPTS_PER_BATCH]
        ]
        rollouts = model.generate(prompts, max_new_tokens=max_new_tokens, temperature=0.0)
        texts += [model.tokenizer.decode(r.tokens, skip_special=True).strip() for r in rollouts]
        tokens += sum(len(r.tokens) for r in rollouts)
        if on_progress:
            on_progress(len(texts), tokens)
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
