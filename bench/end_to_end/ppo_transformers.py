"""PPO's update in plain transformers, the way OpenRLHF does it on padded samples, and its logprobs and values alone.

Samples stand in a rectangle: prompts padded on the left, responses on the right, an attention mask, position ids that
count from each prompt's first token. The policy's logits are those of the whole rectangle, made fp32, and log_softmax
is gathered; the critic is the decoder with a linear head on every row. Micro-batches are sorted by length, each model
has its own backward, denominators are the minibatch's. `transformers-rows` asks for the responses' logits alone.
"""

import contextlib
from dataclasses import dataclass

import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from bench.end_to_end.common import (
    MAX_NORM,
    Group,
    Run,
    Settings,
    rows,
    timed_run,
    timed_scores,
)
from bench.end_to_end.padded import adamw, micro_batches
from bench.end_to_end.ppo_data import (
    CLIP_RATIO,
    VALUE_CLIP,
    VALUE_COEF,
    Minibatch,
    minibatches,
    num_sampled,
)


class Critic(torch.nn.Module):
    """The classifier's decoder with its score as the value head."""

    def __init__(self, path: str, dtype: torch.dtype):
        super().__init__()
        self.model = AutoModel.from_pretrained(path, dtype=dtype, attn_implementation="sdpa")
        whole = AutoModelForSequenceClassification.from_pretrained(path, dtype=dtype)
        self.value = torch.nn.Parameter(whole.score.weight.detach().clone())

    def forward(self, **inputs) -> torch.Tensor:
        """(B, L) values."""
        hidden = self.model(**inputs, use_cache=False).last_hidden_state
        return torch.nn.functional.linear(hidden, self.value)[..., 0]


@dataclass(frozen=True)
class Rectangle:
    """A micro-batch. inputs (B, L): tokens, mask, positions; width: columns of responses, at the end;
    sampled (B, width) bool; places (n,): its sampled tokens among the minibatch's."""

    inputs: dict[str, torch.Tensor]
    width: int
    sampled: torch.Tensor
    places: torch.Tensor

    @property
    def targets(self) -> torch.Tensor:
        """(B, width)."""
        return self.inputs["input_ids"][:, -self.width :]


def rectangles(groups: list[Group], tokens_per_batch: int) -> list[Rectangle]:
    """The groups' samples in micro-batches whose rectangles stay within the budget."""
    items, at = [], 0
    for prompt, response in rows(groups):
        items.append((prompt, response, at))
        at += len(response)
    return [_rectangle(batch) for batch in micro_batches(items, _length, tokens_per_batch)]


def _length(item) -> int:
    return len(item[0]) + len(item[1])


def _rectangle(batch: list) -> Rectangle:
    left, width = (max(len(item[side]) for item in batch) for side in (0, 1))
    tokens = torch.zeros(len(batch), left + width, dtype=torch.long)
    mask = torch.zeros_like(tokens)
    for i, (prompt, response, _) in enumerate(batch):
        begin, end = left - len(prompt), left + len(response)
        tokens[i, begin:end] = torch.tensor(prompt + response)
        mask[i, begin:end] = 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    inputs = {"input_ids": tokens, "attention_mask": mask, "position_ids": positions}
    places = torch.cat([torch.arange(at, at + len(response)) for _, response, at in batch])
    return Rectangle(inputs, width, mask[:, -width:].bool(), places)


def policy_logprobs(policy, batch: Rectangle, response_rows: bool) -> torch.Tensor:
    """(n,) fp32 logprobs of the sampled tokens."""
    keep = batch.width + 1 if response_rows else 0
    logits = policy(**batch.inputs, use_cache=False, logits_to_keep=keep).logits.float()
    every = torch.log_softmax(logits[:, -batch.width - 1 : -1], -1)
    return every.gather(-1, batch.targets[..., None])[..., 0][batch.sampled]


def critic_values(critic, batch: Rectangle) -> torch.Tensor:
    """(n,) fp32 values of the states before the sampled tokens."""
    return critic(**batch.inputs)[:, -batch.width - 1 : -1].float()[batch.sampled]


def policy_loss(logprobs, old, advantages) -> torch.Tensor:
    """The sum over tokens; so is value_loss."""
    ratio = (logprobs - old).exp()
    clipped = ratio.clamp(1 - CLIP_RATIO, 1 + CLIP_RATIO)
    return -torch.min(ratio * advantages, clipped * advantages).sum()


def value_loss(values, old, returns) -> torch.Tensor:
    clipped = old + (values - old).clamp(-VALUE_CLIP, VALUE_CLIP)
    return 0.5 * torch.max((values - returns) ** 2, (clipped - returns) ** 2).sum()


def load(settings: Settings, dtype: torch.dtype = torch.float32):
    policy = AutoModelForCausalLM.from_pretrained(settings.model, dtype=dtype, attn_implementation="sdpa")
    return policy, Critic(settings.reward_models[0], dtype)


def backward(policy, critic, minibatch: Minibatch, settings: Settings, response_rows: bool) -> float:
    """Adds the minibatch's gradients to both models' and returns its loss."""
    low, count, total = settings.precision == "bf16", num_sampled(minibatch.groups), 0.0
    for batch in rectangles(minibatch.groups, settings.peer_tokens_per_batch):
        old, old_values, advantages, returns = minibatch.rows[:, batch.places]
        with torch.autocast("cpu", torch.bfloat16) if low else contextlib.nullcontext():
            logprobs = policy_logprobs(policy, batch, response_rows)
        loss = policy_loss(logprobs, old, advantages) / count
        loss.backward()
        with torch.autocast("cpu", torch.bfloat16) if low else contextlib.nullcontext():
            values = critic_values(critic, batch)
        worth = VALUE_COEF * value_loss(values, old_values, returns) / count
        worth.backward()
        total += loss.item() + worth.item()
    return total


def run(settings: Settings, response_rows: bool = False) -> Run:
    return {"update": update, "logprobs": logprobs}[settings.part](settings, response_rows)


def _note(settings: Settings, response_rows: bool) -> str:
    logits = "logits of response rows" if response_rows else "logits of all rows"
    return f"left-padded prompts, right-padded responses, sorted, sdpa with a mask, {logits}, log_softmax" + (
        ", bf16" if settings.precision == "bf16" else ""
    )


def update(settings: Settings, response_rows: bool) -> Run:
    policy, critic = load(settings)
    optimizers = [adamw(policy.train()), adamw(critic.train())]

    def step(minibatch: Minibatch, lr: float) -> float:
        loss = backward(policy, critic, minibatch, settings, response_rows)
        for model, optimizer in zip((policy, critic), optimizers, strict=True):
            torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad()
        return loss

    note = _note(settings, response_rows) + (" autocast" if settings.precision == "bf16" else "")
    return timed_run(step, minibatches(settings), settings.lr, note + ", fused AdamW")


def gradients(settings: Settings, response_rows: bool = False) -> tuple[float, dict[str, torch.Tensor]]:
    """As ppo_hpsafety.gradients."""
    policy, critic = load(settings)
    loss = backward(policy, critic, minibatches(settings)[1], settings, response_rows)
    named = {f"policy.{name}": p.grad for name, p in policy.named_parameters()}
    named |= {f"critic.{name}": p.grad for name, p in critic.named_parameters()}
    return loss, named


def logprobs(settings: Settings, response_rows: bool) -> Run:
    dtype = torch.bfloat16 if settings.precision == "bf16" else torch.float32
    policy, critic = load(settings, dtype)
    reference = AutoModelForCausalLM.from_pretrained(settings.model, dtype=dtype, attn_implementation="sdpa")

    @torch.inference_mode()
    def score(groups: list[Group]) -> list[float]:
        out = torch.zeros(3, num_sampled(groups))
        for batch in rectangles(groups, settings.peer_tokens_per_batch):
            for row, model in enumerate((policy, reference)):
                out[row, batch.places] = policy_logprobs(model, batch, response_rows)
            out[2, batch.places] = critic_values(critic, batch)
        return out.flatten().tolist()

    return timed_scores(score, settings, _note(settings, response_rows))
