"""What PPO's contenders are given, and the FLOPs that its phases strictly need.

The update gets the same numbers per sampled token in every contender: old logprobs, old values, advantages, returns.
They are made once (ppo_prepare.py): old logprobs and values are the models' own with a little noise, so that ratios
and values lie on both sides of the clip range; advantages and returns are drawn.

N sampled tokens, in the order group, response, token.
"""

from dataclasses import dataclass

import torch
from safetensors.torch import load_file, save_file

from bench.end_to_end.common import Group, Settings, make_groups, warm_up_groups
from hpsafety import PromptGroup
from hpsafety.model.config import from_hf
from hpsafety.train.work import forward_flops

PHASES = ("rollout", "score", "logprobs", "update")
CLIP_RATIO, VALUE_CLIP, VALUE_COEF, KL_COEF = 0.2, 0.2, 0.5, 0.01
WARM_UP_TOKENS, NO_RATE = (
    2,
    1e-30,
)  # of the untimed iteration: tokens of a sample, and a rate that changes no weight
NOISE = (
    0.15  # of old logprobs and values, where 0.2 is the clip range: about a fifth of the tokens lie outside
)


@dataclass(frozen=True)
class Minibatch:
    """One optimiser step. rows (4, N) fp32: old logprobs, old values, advantages, returns."""

    groups: list[Group]
    rows: torch.Tensor


def warm_up_prompts(settings: Settings) -> list[list[int]]:
    """As many prompts as an iteration has, of the shortest."""
    short = [prompt for prompt, _ in warm_up_groups(settings)]
    return [short[i % len(short)] for i in range(settings.groups)]


def prompt_groups(groups: list[Group]) -> list[PromptGroup]:
    return [PromptGroup(prompt, responses) for prompt, responses in groups]


def num_sampled(groups: list[Group]) -> int:
    return sum(len(response) for _, responses in groups for response in responses)


def save_rows(settings: Settings, logprobs: torch.Tensor, values: torch.Tensor) -> None:
    """Writes the experience file from the models' own logprobs and values (N,) of make_groups(settings)."""
    g = torch.Generator().manual_seed(settings.seed + 2)
    drawn = torch.randn(4, logprobs.shape[0], generator=g)
    rows = torch.stack([logprobs + NOISE * drawn[0], values + NOISE * drawn[1], drawn[2], values + drawn[3]])
    save_file({"rows": rows}, settings.experience)


def minibatches(settings: Settings) -> list[Minibatch]:
    """A step of the shortest groups to warm up with, then the data in order, `batch` groups a step."""
    warm, groups = warm_up_groups(settings), make_groups(settings)
    out, at = [Minibatch(warm, torch.zeros(4, num_sampled(warm)))], 0
    rows = load_file(settings.experience)["rows"]
    for i in range(0, len(groups), settings.batch):
        chosen = groups[i : i + settings.batch]
        out.append(Minibatch(chosen, rows[:, at : at + num_sampled(chosen)]))
        at += num_sampled(chosen)
    return out


def needed_flops(settings: Settings, critic: bool) -> dict[str, float]:
    """Phase -> strictly needed FLOPs, nothing recomputed or padded; training is 3 x forward.

    A prompt counts once for its samples, linear layers once per token, attention's causal pairs, the token head on
    sampled tokens only. Reward models and critic have no token head.
    """
    config = from_hf(settings.config)
    head, plain = (
        sum(forward_flops(config, group, token_head) for group in prompt_groups(make_groups(settings)))
        for token_head in (True, False)
    )
    trained = head + critic * plain
    return {
        "rollout": head,
        "score": len(settings.reward_models) * plain,
        "logprobs": head + trained,
        "update": 3 * trained,
    }
