"""A plain transformers loop, written with care: what a good engineer gets without a trainer.

Micro-batches sorted by length and padded to their longest pair within the token budget, the head on response rows
only, fused AdamW. Padding stands on the right and attention is causal, so that no token attends to padding and sdpa
keeps its fast path without a mask.
"""

import contextlib

import torch
import torch.nn.functional as nnf
from transformers import AutoModelForCausalLM

from bench.end_to_end.common import MAX_NORM, Group, Run, Settings, rows, steps, timed_run
from bench.end_to_end.padded import adamw, micro_batches, right_padded


def _length(pair: tuple[list[int], list[int]]) -> int:
    return len(pair[0]) + len(pair[1])


def _tensors(pairs: list[tuple[list[int], list[int]]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(tokens (B, L), rows that predict a response token (B, L) bool, those tokens (N,))."""
    tokens = right_padded([prompt + response for prompt, response in pairs], 0)
    predicts = torch.zeros(tokens.shape, dtype=torch.bool)
    for i, (prompt, response) in enumerate(pairs):
        predicts[i, len(prompt) - 1 : len(prompt) + len(response) - 1] = True
    return tokens, predicts, torch.tensor([token for _, response in pairs for token in response])


def run(settings: Settings) -> Run:
    model = AutoModelForCausalLM.from_pretrained(
        settings.model, dtype=torch.float32, attn_implementation="sdpa"
    )
    model.train()
    optimizer = adamw(model)
    low = settings.precision == "bf16"

    def step(groups: list[Group], lr: float) -> float:
        pairs = rows(groups)
        denominator = sum(len(response) for _, response in pairs)
        total = 0.0
        for batch in micro_batches(pairs, _length, settings.peer_tokens_per_batch):
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
