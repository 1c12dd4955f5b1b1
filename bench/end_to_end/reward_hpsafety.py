"""hpsafety: a reward model's optimiser step, both responses of a pair in one prompt group."""

import torch

from bench.end_to_end.common import BETAS, EPS, MAX_NORM, WEIGHT_DECAY, Group, Run, Settings, steps, timed_run
from hpsafety import PromptGroup, ops
from hpsafety.model.reward_io import load_reward_model
from hpsafety.train import distributed
from hpsafety.train.optim import AdamW
from hpsafety.train.step import train_step


def _loss(model, batch, num_pairs):
    chosen, rejected = model.rewards(batch).view(-1, 2).unbind(1)
    return ops.pair_loss(chosen, rejected, torch.zeros_like(chosen), num_pairs=num_pairs)


def run(settings: Settings) -> Run:
    world = distributed.init("cpu")
    model = load_reward_model(settings.reward_models[0])
    dtype = torch.bfloat16 if settings.precision == "bf16" else torch.float32
    optimizer = AdamW(model, dtype, BETAS, EPS, WEIGHT_DECAY, MAX_NORM)

    def step(pairs: list[Group], lr: float) -> float:
        groups = [PromptGroup(prompt, responses) for prompt, responses in pairs]
        budget = settings.tokens_per_batch
        return train_step(model, groups, _loss, len(groups), optimizer, lr, budget, world).loss

    note = "a pair's prompt once, last block on last rows only, no token head"
    return timed_run(step, steps(settings), settings.lr, note)
