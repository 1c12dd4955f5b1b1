"""hpsafety: the scorer of `hpsafety score` on prompt groups, two reward models."""

import torch

from bench.end_to_end.common import Group, Run, Settings, timed_scores
from hpsafety import PromptGroup
from hpsafety.model.reward_io import load_reward_model
from hpsafety.rollout.scoring import Scorer


def run(settings: Settings) -> Run:
    dtype = torch.bfloat16 if settings.precision == "bf16" else torch.float32
    scorer = Scorer(*(load_reward_model(path, dtype) for path in settings.reward_models))
    if scorer.one_trunk:
        raise RuntimeError("the two reward models share a trunk; the benchmark is about two")

    def score(groups: list[Group]) -> list[float]:
        groups = [PromptGroup(prompt, responses) for prompt, responses in groups]
        found = scorer.score(groups, [False] * len(groups), settings.tokens_per_batch)
        return [z for one in found for z in one.safety] + [z for one in found for z in one.helpful]

    return timed_scores(score, settings, "prompt once per group, last block on last rows only, no token head")
