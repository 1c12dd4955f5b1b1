"""A plain transformers loop over preference pairs: sorted, padded on the right, the sequence classifier's own head."""

import contextlib

import torch
import torch.nn.functional as nnf
from transformers import AutoModelForSequenceClassification

from bench.end_to_end.common import MAX_NORM, Group, Run, Settings, steps, timed_run
from bench.end_to_end.padded import adamw, micro_batches, right_padded


def _length(pair: Group) -> int:
    """Tokens of both rows of the rectangle."""
    return 2 * (len(pair[0]) + max(map(len, pair[1])))


def run(settings: Settings) -> Run:
    model = AutoModelForSequenceClassification.from_pretrained(
        settings.reward_models[0], dtype=torch.float32, attn_implementation="sdpa"
    ).train()
    optimizer = adamw(model)
    low = settings.precision == "bf16"

    def step(pairs: list[Group], lr: float) -> float:
        total = 0.0
        for batch in micro_batches(pairs, _length, settings.peer_tokens_per_batch):
            texts = [prompt + responses[side] for side in (0, 1) for prompt, responses in batch]
            tokens = right_padded(texts, model.config.pad_token_id)
            with torch.autocast("cpu", torch.bfloat16) if low else contextlib.nullcontext():
                chosen, rejected = model(input_ids=tokens, use_cache=False).logits[:, 0].float().chunk(2)
            loss = -nnf.logsigmoid(chosen - rejected).sum() / len(pairs)
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        return total

    note = "LlamaForSequenceClassification, length-sorted padded pairs, maskless sdpa, fused AdamW"
    return timed_run(step, steps(settings), settings.lr, note + (", bf16 autocast" if low else ""))
