"""Distillation's batches and loss: a student learns, token by token, what a teacher says who reads another prompt.

Student and teacher get the same responses behind different prompts, so their trained rows correspond one to one in the
order of the batch (group, response, token); no prompt row meets a head, and no (tokens x vocabulary) tensor is made.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from hpsafety.data.chat import encode_prompt, encode_response
from hpsafety.data.groups import PromptGroup, pack
from hpsafety.train import phases


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillGroup(PromptGroup):
    """What the student reads, and the same responses behind what the teacher reads."""

    teacher: PromptGroup


def distill_group(tokenizer, prompt, teacher_prompt, rows: Sequence[dict]) -> DistillGroup:
    """The responses to one prompt, computed once for all of them by either model.

    prompt, teacher_prompt  strings or messages: what the student and what the teacher reads before the response
    rows                    with `response`; where `finish` is "length", the end of turn is not trained
    """
    responses = [encode_response(tokenizer, row["response"]) for row in rows]
    train = [[True] * (len(tokens) - 1) + [row.get("finish") != "length"]
             for tokens, row in zip(responses, rows, strict=True)]  # fmt: skip
    behind = PromptGroup(encode_prompt(tokenizer, teacher_prompt), responses, train)
    return DistillGroup(encode_prompt(tokenizer, prompt), responses, train, teacher=behind)


def divergence_loss(teacher, kind: str) -> Callable:
    """The loss of a micro-batch of DistillGroups (train.step.train_step); its denominator counts trained tokens.

    teacher  a frozen model on the batch's device, one rank's or sharded as the student is
    kind     forward_kl, reverse_kl or jsd (ops.distill_loss)
    """

    def loss(model, batch, num_tokens):
        with phases.phase("data"):
            others = pack([group.teacher for group in batch.groups]).to(batch.tokens.device)
        with torch.no_grad():
            hidden, weight = teacher.trained_rows(others)
        return model.divergence(batch, hidden, weight, kind, num_tokens)

    return loss
