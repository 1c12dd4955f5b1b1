"""hpsafety: the SFT stage's own step on prompt groups."""

import torch

from bench.end_to_end.common import BETAS, EPS, MAX_NORM, WEIGHT_DECAY, Group, Run, Settings, steps, timed_run
from hpsafety import PromptGroup, load_model
from hpsafety.train import distributed
from hpsafety.train.finetune import count_trained
from hpsafety.train.optim import AdamW
from hpsafety.train.step import train_step


def _loss(model, batch, denominator):
    return model.nll(batch, denominator)


def run(settings: Settings) -> Run:
    world = distributed.init("cpu")
    model = load_model(settings.model)
    dtype = torch.bfloat16 if settings.precision == "bf16" else torch.float32
    optimizer = AdamW(model, dtype, BETAS, EPS, WEIGHT_DECAY, MAX_NORM)

    def step(pairs: list[Group], lr: float) -> float:
        groups = [PromptGroup(prompt, responses) for prompt, responses in pairs]
        budget = settings.tokens_per_batch
        return train_step(model, groups, _loss, count_trained(groups), optimizer, lr, budget, world).loss

    note = "prompt groups in one ragged row, head on response rows without logits"
    return timed_run(step, steps(settings), settings.lr, note)
