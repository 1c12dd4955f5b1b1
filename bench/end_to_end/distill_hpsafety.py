"""hpsafety: the step of `hpsafety distill --target kl` on prompt groups."""

import torch

from bench.end_to_end.common import (
    BETAS,
    EPS,
    MAX_NORM,
    WEIGHT_DECAY,
    Group,
    Run,
    Settings,
    preprompt,
    steps,
    timed_run,
)
from hpsafety import PromptGroup, load_model
from hpsafety.train import distributed
from hpsafety.train.distill_step import DistillGroup, divergence_loss
from hpsafety.train.finetune import count_trained
from hpsafety.train.optim import AdamW
from hpsafety.train.step import train_step


def run(settings: Settings) -> Run:
    world = distributed.init("cpu")
    dtype = torch.bfloat16 if settings.precision == "bf16" else torch.float32
    model, before = load_model(settings.model), preprompt(settings)
    teacher = load_model(settings.model, dtype).requires_grad_(False)
    optimizer, loss = (
        AdamW(model, dtype, BETAS, EPS, WEIGHT_DECAY, MAX_NORM),
        divergence_loss(teacher, "forward_kl"),
    )

    def step(batch: list[Group], lr: float) -> float:
        groups = [
            DistillGroup(prompt, responses, teacher=PromptGroup([*before, *prompt], responses))
            for prompt, responses in batch
        ]
        budget = settings.tokens_per_batch
        return train_step(model, groups, loss, count_trained(groups), optimizer, lr, budget, world).loss

    note = "prompt groups for student and teacher, heads on response rows without logits"
    return timed_run(step, steps(settings), settings.lr, note)
