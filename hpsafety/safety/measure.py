"""What a checkpoint does on held-out sets: greedy answers, refusals, loss per response token, reward scores."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from hpsafety.data.batches import micro_batches
from hpsafety.data.chat import encode_dialogue, encode_prompt, encode_response
from hpsafety.data.groups import PromptGroup, pack
from hpsafety.model.reward_io import load_reward_model
from hpsafety.rollout.engine import Engine, Request
from hpsafety.rollout.sampler import Settings, stop_ids
from hpsafety.rollout.scoring import probabilities
from hpsafety.safety.intervals import Rate, wilson
from hpsafety.safety.judges import judge_refusal
from hpsafety.train.metrics import Progress

JUDGED = (("safety", "adversarial"), ("helpful", "helpful"), ("helpful", "borderline"))  # reward model, set
SETS = ("adversarial", "borderline", "helpful")  # what should happen: refused, answered, answered


@dataclass(frozen=True)
class Measured:
    """One checkpoint on the held-out sets: loss on their own good answers; refusals, answers and verdicts by set."""

    name: str
    loss: float  # nats per response token
    refused: dict[str, Rate]
    answers: dict[str, list[str]]
    verdicts: dict[str, list[str]]
    scores: dict[str, dict[str, list[float]]] = field(
        default_factory=dict
    )  # set -> safety, helpful: R per answer


def measure(model, name: str, prompts: dict[str, list[dict]], answer_tokens: int) -> Measured:
    """Greedy answers, cut at answer_tokens tokens, and refusals on every set; the loss on the sets' own answers."""
    rows = [row for part in prompts.values() for row in part]
    groups = [encode_dialogue(model.tokenizer, row["prompt"], row["response"]) for row in rows]
    loss = loss_per_token(model, groups, 1024)
    progress, started = Progress(f"asking the {name} model", len(rows)), time.monotonic()

    def report(done: int, tokens: int) -> None:
        progress.update(done, f"{tokens / max(1e-9, time.monotonic() - started):.0f} tokens/s")

    texts = iter(greedy_answers(model, rows, answer_tokens, report))
    progress.close()
    answers = {part: [next(texts) for _ in prompts[part]] for part in prompts}
    verdicts = {
        part: [
            judge_refusal(row["prompt"], text) for row, text in zip(prompts[part], answers[part], strict=True)
        ]
        for part in prompts
    }
    refused = {part: wilson(found.count("refusal"), len(found)) for part, found in verdicts.items()}
    return Measured(name, loss, refused, answers, verdicts)


@torch.no_grad()
def score_answers(
    models: list[Measured], prompts: dict[str, list[dict]], judges: dict[str, str], dtype: torch.dtype
) -> list[Measured]:
    """The same measures with the R that JUDGED asks for; a prompt is computed once for all models' answers.

    judges  "safety" and "helpful": directories of reward models
    """
    scores: list[dict] = [{part: {} for part in prompts} for _ in models]
    total, done, started = sum(len(prompts[part]) for _, part in JUDGED), 0, time.monotonic()
    progress = Progress("scoring the answers", total)
    for judge, path in judges.items():
        reward_model = load_reward_model(path, dtype)
        for part in (part for name, part in JUDGED if name == judge):
            groups = [
                PromptGroup(
                    encode_prompt(reward_model.tokenizer, row["prompt"]),
                    [encode_response(reward_model.tokenizer, m.answers[part][i]) for m in models],
                )
                for i, row in enumerate(prompts[part])
            ]
            logits = torch.zeros(len(groups), len(models))
            for indices in micro_batches(groups, 2048):
                logits[indices] = reward_model.rewards(pack([groups[i] for i in indices])).view(
                    -1, len(models)
                )
                done += len(indices)
                progress.update(done, f"{len(models) * done / (time.monotonic() - started):.1f} answers/s")
            for place, out in enumerate(scores):
                out[part][judge] = probabilities(logits[:, place].tolist())
    progress.close()
    return [replace(m, scores=out) for m, out in zip(models, scores, strict=True)]


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


@torch.no_grad()
def loss_per_token(model, groups: list, tokens_per_batch: int) -> float:
    """Mean negative log-probability of the trained response tokens of all groups, nats per token."""
    total, count = 0.0, 0
    for indices in micro_batches(groups, tokens_per_batch):
        batch = pack([groups[i] for i in indices]).to(model.embed.device)
        total += float(model.nll(batch, 1.0))
        count += batch.num_trained
    return total / max(1, count)
