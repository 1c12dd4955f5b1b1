"""What PPO needs before its first iteration: five models that go together, prompts that fit, the KL coefficient."""

import torch

from hpsafety.data.chat import encode_prompt
from hpsafety.errors import InputError
from hpsafety.model import lora
from hpsafety.model.heads import value_model_from
from hpsafety.model.io import load_model
from hpsafety.model.reward_io import load_reward_model
from hpsafety.rollout.experience import Prompt
from hpsafety.rollout.scoring import Scorer, check_encoding
from hpsafety.safety.ppo_frozen import load_judges
from hpsafety.safety.scoring_job import is_safety
from hpsafety.train import distributed
from hpsafety.train.optim import AdamW
from hpsafety.train.ppo_step import ActorCritic

LARGE = 20e9  # parameters: the paper's coefficient changes between its 13B and its 34B models (PPO-8)


def load_models(cfg, dtype: torch.dtype, world):
    """(policy, critic, scorer): fp32 masters on the CPU (with --lora-rank one trunk for both, in `dtype`), and both
    reward models, frozen, on the device. critic: None where the advantages need none.

    Raises InputError for models that do not encode text alike: what the policy samples is scored as it is.
    """
    scorer = load_judges(cfg, dtype, world.device)
    policy = load_model(cfg.model, dtype if cfg.lora_rank else torch.float32)
    check_encoding(policy, scorer.safety, (f"--model {cfg.model}", f"--safety-rm {cfg.safety_rm}"))
    if not cfg.has_critic:
        return policy, None, scorer
    source = policy
    if cfg.critic_from:
        source = load_reward_model(cfg.critic_from)
        check_encoding(policy, source, (f"--model {cfg.model}", f"--critic-from {cfg.critic_from}"))
    return policy, value_model_from(source, share=cfg.lora_rank > 0), scorer


def place(policy, critic, cfg, dtype: torch.dtype, world):
    """(actor, sampler) on the device. Sharded over the ranks, or with --lora-rank whole on each of them: two sets of
    adapters on one frozen trunk, whose gradients are summed."""
    optimizers, sharded = [], world.size > 1 and not cfg.lora_rank
    sampler = load_model(cfg.model, dtype, world.device).requires_grad_(False) if sharded else None
    for number, model in enumerate((policy, critic)):
        if model is None:
            optimizers.append(None)
            continue
        model.to(world.device).recompute = cfg.recompute
        if cfg.lora_rank:
            lora.add_adapters(model, cfg.lora_rank, cfg.seed + number)
        else:
            distributed.shard(model, world, dtype)
        betas = (cfg.beta1, cfg.beta2)
        optimizers.append(AdamW(model, dtype, betas, cfg.eps, cfg.weight_decay, cfg.clip))
    return ActorCritic(policy, critic, *optimizers), sampler or policy


def encode_prompts(rows: list[dict], policy, scorer: Scorer, cfg) -> tuple[list[Prompt], list[Prompt], dict]:
    """(prompts to sample from, held-out prompts, counts). Rows of other held-out splits are left out.

    Raises InputError for a prompt that leaves no room for an answer, and where none is left.
    """
    # A reward model reads one token more than was sampled where the answer was cut.
    room = min(policy.config.max_positions, scorer.context - 1) - cfg.max_new_tokens
    train, valid, others, untagged = [], [], 0, 0
    for row in rows:
        split = row.get("split")
        if split not in (None, "train", "rt_train", "valid"):
            others += 1
            continue
        tokens = encode_prompt(policy.tokenizer, row["prompt"])
        if len(tokens) > room:
            raise InputError(
                f"prompt {row.get('id', row['prompt'])!r} has {len(tokens)} tokens, which with {cfg.max_new_tokens} "
                f"new ones exceed the context; shorten it to {room} or lower --max-new-tokens"
            )
        untagged += row.get("is_safety") is None
        prompt = Prompt(tokens, is_safety(row, cfg.all_safety))
        (valid if split == "valid" else train).append(prompt)
    if not train:
        raise InputError("no prompt is left to train on: every row is held out by its split")
    counts = {"prompts": len(train), "valid_prompts": len(valid), "other_splits": others}
    return train, valid, counts | {"without_is_safety": untagged}


def kl_coefficient(cfg, parameters: int) -> float:
    """--kl-coef, or the paper's for the model's size (PPO-8)."""
    if cfg.kl_coef is not None:
        return cfg.kl_coef
    return 0.005 if parameters > LARGE else 0.01
