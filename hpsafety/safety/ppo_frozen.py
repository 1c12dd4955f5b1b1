"""PPO's models that never train, by --frozen: the reference and both reward models (PPO-9).

resident  in memory throughout, in the dtype of the computation
bf16      in memory, computed in bf16 whatever the policy trains in
mapped    in files below OUT/checkpoints, each mapped for its own phase: the reference while logprobs are taken, the
          reward models one after the other while samples are scored; the same bits as resident
"""

import functools
from collections.abc import Callable
from pathlib import Path

import torch

from hpsafety.model import lora, mapped
from hpsafety.model.io import load_model
from hpsafety.model.llama import Llama, Trunk
from hpsafety.model.reward_io import load_reward_model
from hpsafety.rollout.scoring import Scorer
from hpsafety.safety.scoring_job import load_scorer
from hpsafety.train import distributed


def frozen_dtype(cfg, dtype: torch.dtype) -> torch.dtype:
    """What the frozen models are computed in, where the policy is computed in `dtype`."""
    return torch.bfloat16 if cfg.frozen == "bf16" else dtype


def load_judges(cfg, dtype: torch.dtype, device) -> Scorer:
    """Both reward models as one judge; with --frozen mapped they have been read and compared, and let go again."""
    scorer = load_scorer(cfg, frozen_dtype(cfg, dtype), device)
    if cfg.frozen == "mapped":
        for model in scorer.trunks:
            mapped.empty(model)
    return scorer


def park_judges(cfg, scorer: Scorer, folder: Path, world) -> None:
    """With --frozen mapped: writes the reward models' files where they are not there yet (a collective call)."""
    if cfg.frozen == "mapped":
        for model, name in zip(scorer.trunks, ("safety_rm", "helpful_rm"), strict=False):
            path, source, dtype = folder / f"frozen-{name}.safetensors", getattr(cfg, name), model.embed.dtype
            _park(model, path, functools.partial(load_reward_model, source, dtype), world)


def load_reference(cfg, policy: Llama, dtype: torch.dtype, folder: Path | None, world) -> Trunk:
    """The frozen start: a collective call. With adapters it is the policy's own trunk.

    folder  where its file goes with --frozen mapped
    """
    if cfg.lora_rank:
        return lora.without_adapters(policy)
    dtype = frozen_dtype(cfg, dtype)
    if cfg.frozen == "mapped":
        with torch.device("meta"):
            reference = Llama(policy.config, policy.tokenizer, policy.generation).to(dtype)
        path = folder / "frozen-reference.safetensors"
        _park(reference, path, functools.partial(load_model, cfg.model, dtype), world)
        return reference
    whole = world.size == 1 or cfg.frozen == "bf16"  # else fp32 shards, cast as they are gathered
    reference = load_model(cfg.model, dtype if whole else torch.float32, world.device)
    return distributed.shard(reference.requires_grad_(False), world, dtype)


def _park(model: Trunk, path: Path, load: Callable[[], Trunk], world) -> None:
    if world.is_main and not mapped.holds(path, model):
        mapped.write(load(), path)
        mapped.give_back()
    distributed.barrier(world)
    model.requires_grad_(False).weights_file = path
