"""A plain torch loop, written with care: sorted micro-batches, both models' logits over the whole vocabulary on
response rows only, torch's kl_div, fused AdamW. Padding stands on the right, so that sdpa needs no mask.
"""

import contextlib

import torch
import torch.nn.functional as nnf
from transformers import AutoModelForCausalLM

from bench.end_to_end.common import MAX_NORM, Group, Run, Settings, preprompt, rows, steps, timed_run
from bench.end_to_end.padded import adamw, micro_batches, right_padded


def _length(pair: tuple[list[int], list[int]]) -> int:
    return len(pair[0]) + len(pair[1])


def _logits(model, pairs: list[tuple[list[int], list[int]]], before: list[int]) -> torch.Tensor:
    """(N, V): logits at the rows that predict a response token, in the order of the pairs."""
    tokens = right_padded([before + prompt + response for prompt, response in pairs], 0)
    predicts = torch.zeros(tokens.shape, dtype=torch.bool)
    for i, (prompt, response) in enumerate(pairs):
        start = len(before) + len(prompt) - 1
        predicts[i, start : start + len(response)] = True
    return model.lm_head(model.model(tokens, use_cache=False).last_hidden_state[predicts])


def run(settings: Settings) -> Run:
    low, before = settings.precision == "bf16", preprompt(settings)
    model, teacher = (
        AutoModelForCausalLM.from_pretrained(settings.model, dtype=dtype, attn_implementation="sdpa")
        for dtype in (torch.float32, torch.bfloat16 if low else torch.float32)
    )
    model.train()
    teacher.requires_grad_(False)
    optimizer = adamw(model)

    def step(groups: list[Group], lr: float) -> float:
        pairs = rows(groups)
        denominator = sum(len(response) for _, response in pairs)
        total = 0.0
        for batch in micro_batches(pairs, _length, settings.peer_tokens_per_batch):
            with torch.no_grad():
                logp = _logits(teacher, batch, before).float().log_softmax(-1)
            with torch.autocast("cpu", torch.bfloat16) if low else contextlib.nullcontext():
                logits = _logits(model, batch, [])
            logq = logits.float().log_softmax(-1)
            loss = nnf.kl_div(logq, logp, reduction="sum", log_target=True) / denominator
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        return total

    note = "length-sorted padded micro-batches, sdpa, full logits of both models on response rows, kl_div, fused AdamW"
    return timed_run(step, steps(settings), settings.lr, note + (", bf16 autocast" if low else ""))
