"""A plain transformers loop, written with care: what a good engineer gets without a trainer.

Micro-batches sorted by length and padded to their longest pair within the token budget, the head on response rows
only, fused AdamW. Padding stands on the right and attention is causal, so that no token attends to padding and sdpa
keeps its fast path without a mask.
"""

import contextlib

import torch
import torch.nn.functional as nnf
from transformers import AutoModelForCausalLM

from bench.end_to_end.common import BETAS, EPS, MAX_NORM, WEIGHT_DECAY, Pair, Run, Settings, steps, timed_run


def _micro_batches(pairs: list[Pair], tokens_per_batch: int) -> list[list[Pair]]:
    """Longest first; a micro-batch's padded rectangle stays within the budget, a longer pair is alone."""
    batches: list[list[Pair]] = []
    longest = 0
    for pair in sorted(pairs, key=lambda pair: -len(pair[0]) - len(pair[1])):
        if not batches or longest * (len(batches[-1]) + 1) > tokens_per_batch:
            batches.append([])
            longest = len(pair[0]) + len(pair[1])
        batches[-1].append(pair)
    return batches


def _tensors(pairs: list[Pair]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(tokens (B, L), rows that predict a response token (B, L) bool, those tokens (N,))."""
    length = max(len(prompt) + len(response) for prompt, response in pairs)
    tokens = torch.zeros(len(pairs), length, dtype=torch.long)
    predicts = torch.zeros(len(pairs), length, dtype=torch.bool)
    for i, (prompt, response) in enumerate(pairs):
        end = len(prompt) + len(response)
        tokens[i, :end] = torch.tensor(prompt + response)
        predicts[i, len(prompt) - 1 : end - 1] = True
    return tokens, predicts, torch.tensor([token for _, response in pairs for token in response])


def _optimizer(model) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=BETAS, eps=EPS, fused=True)


def run(settings: Settings) -> Run:
    model = AutoModelForCausalLM.from_pretrained(
        settings.model, dtype=torch.float32, attn_implementation="sdpa"
    )
    model.train()
    optimizer = _optimizer(model)
    low = settings.precision == "bf16"

    def step(pairs: list[Pair], lr: float) -> float:
        denominator = sum(len(response) for _, response in pairs)
        total = 0.0
        for batch in _micro_batches(pairs, settings.peer_tokens_per_batch):
            tokens, predicts, targets = _tensors(batch)
            with torch.autocast("cpu", torch.bfloat16) if low else contextlib.nullcontext():
                hidden = model.model(tokens, use_cache=False).last_hidden_state
                logits = model.lm_head(hidden[predicts])
                loss = nnf.cross_entropy(logits.float(), targets, reduction="sum") / denominator
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        return total

    note = "length-sorted padded micro-batches, sdpa, head on response rows, fused AdamW"
    return timed_run(step, steps(settings), settings.lr, note + (", bf16 autocast" if low else ""))
