"""PPO's passes over one iteration's rollouts: packed once, measured by the old policy, then one update per minibatch.

The same packed micro-batches go through the same ops when old logprobs are taken and when they are trained, so that in
fp32 the ratio of an unchanged policy is exactly 1. Numbers per sampled token stand in the canonical order of the
iteration (group, response, token), whatever the ranks and micro-batches; each micro-batch knows its rows of them.

N sampled tokens of the iteration, n of a micro-batch.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from hpsafety import ops
from hpsafety.data.groups import Batch, PromptGroup
from hpsafety.train import distributed, phases
from hpsafety.train.optim import AdamW
from hpsafety.train.step import assign, local_batches

VALUE_COEF = 0.5  # of the value loss beside the policy loss (spec section 5)
# What update gives of a minibatch and an iteration averages; those of the value only where there is a critic.
MEANS = ("loss", "policy_loss", "value_loss", "clip_fraction", "approx_kl", "grad_norm", "grad_norm_value")


@dataclass(frozen=True, slots=True)
class Part:
    """A micro-batch of this rank, and where its tokens stand among the iteration's: rows (n,) int64."""

    batch: Batch
    rows: torch.Tensor


@dataclass(frozen=True, slots=True)
class TokenRows:
    """What the updates need to know of every sampled token: (N,) fp32 each, on the device."""

    old_logprobs: torch.Tensor
    old_values: torch.Tensor | None  # None without a critic, as returns
    advantages: torch.Tensor
    returns: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class ActorCritic:
    """The two models that train, each with its own optimiser; critic and its optimiser are None where the advantages
    need none."""

    policy: torch.nn.Module
    critic: torch.nn.Module | None
    policy_optimizer: AdamW
    critic_optimizer: AdamW | None

    def modules(self) -> torch.nn.Module:
        """Both as one module, for a checkpoint."""
        roles = {"policy": self.policy, "critic": self.critic}
        return torch.nn.ModuleDict({role: model for role, model in roles.items() if model is not None})

    def optimizers(self) -> dict[str, AdamW]:
        """policy, and critic where there is one."""
        parts = {"policy": self.policy_optimizer, "critic": self.critic_optimizer}
        return {role: part for role, part in parts.items() if part is not None}

    def zero_grad(self) -> None:
        """Lets all gradients go."""
        for optimizer in self.optimizers().values():
            optimizer.zero_grad()

    def state(self) -> dict[str, torch.Tensor]:
        """Both optimisers' state, as AdamW.state()."""
        parts = self.optimizers().items()
        return {f"{role}.{name}": t for role, part in parts for name, t in part.state().items()}


def pack_minibatches(
    model,
    groups: list[PromptGroup],
    groups_per_step: int,
    tokens_per_batch: int,
    world,
    join_single: bool = True,
) -> list[list[Part]]:
    """This rank's micro-batches of every minibatch: whole groups, in the iteration's order, balanced over the ranks.

    join_single  as of `pack`; False gives logprobs the same bits for any k and any tokens_per_batch
    """
    starts, end = {}, 0  # of each group's tokens; a group is the same object wherever it is packed
    for group in groups:
        starts[id(group)] = end
        end += sum(map(len, group.responses))
    minibatches = []
    for first in range(0, len(groups), groups_per_step):
        split = assign(model, groups[first : first + groups_per_step], world)
        batches = local_batches(split, tokens_per_batch, world, join_single)
        minibatches.append([Part(batch, _rows(batch, starts).to(world.device)) for batch in batches])
    return minibatches


def _rows(batch: Batch, starts: dict[int, int]) -> torch.Tensor:
    spans = [(starts[id(group)], sum(map(len, group.responses))) for group in batch.groups]
    return torch.cat([torch.arange(0), *(torch.arange(start, start + size) for start, size in spans)])


@torch.no_grad()
def measure(
    minibatches: list[list[Part]], call: Callable, columns: int, num_tokens: int, world
) -> torch.Tensor:
    """(columns, N) fp32 in canonical order, on every rank, of one pass over all micro-batches without gradients.

    call  call(batch) -> a tuple of `columns` tensors (n,)
    """
    out = torch.zeros(columns, num_tokens, device=world.device)
    for part in (part for parts in minibatches for part in parts):
        with phases.phase("forward"):
            out[:, part.rows] = torch.stack(call(part.batch))
    return distributed.all_sum(out, world)  # every token is measured on one rank; the others add zeros


def update(
    actor: ActorCritic, parts: list[Part], rows: TokenRows, num_tokens: int, lr: float, temperature: float,
    clip_ratio: float, world, stop: Callable[[], bool],
) -> dict[str, float]:  # fmt: skip
    """One optimiser step of policy and critic on a minibatch: MEANS, ratio_max and stop, the same on every rank.

    num_tokens  the minibatch's sampled tokens over all micro-batches and ranks: the denominator of both losses
    stop        has this rank been told to stop?
    The loss is split at the models' border (it is a sum), so that only one model's activations are held at a time.
    Without a critic the loss is the policy's, and MEANS lacks value_loss and grad_norm_value.
    Raises FloatingPointError for a loss or gradient that is not finite.
    """
    sums = torch.zeros(5, dtype=torch.float64, device=world.device)
    ratio_max = torch.zeros((), device=world.device)
    settings = {"clip_ratio": clip_ratio, "num_tokens": num_tokens}
    with phases.phase("optimiser"):
        actor.zero_grad()
    for part in parts:
        old, advantages = rows.old_logprobs[part.rows], rows.advantages[part.rows]
        mask, nothing = part.batch.train_mask, torch.zeros_like(old)  # as values: a value loss of 0
        with phases.phase("forward"):
            logprobs = actor.policy.logprobs(part.batch, temperature)
            policy = ops.ppo_loss(logprobs, old, advantages, nothing, nothing, nothing, mask,
                                  value_coef=0.0, **settings)  # fmt: skip
        with phases.phase("backward"):
            policy.loss.backward()
        figures = (policy.policy_loss, policy.clip_fraction, policy.approx_kl)
        sums[:3] += torch.stack(figures).double()
        ratio_max = torch.maximum(ratio_max, policy.ratio_max)
        if actor.critic is not None:
            sums[3] += _value_backward(actor.critic, part, rows, settings)
    sums[4] = float(stop())
    policy_loss, clipped, approx_kl, value_loss, stops = distributed.all_sum(sums, world).tolist()
    total = policy_loss + VALUE_COEF * value_loss
    if not math.isfinite(total):
        raise FloatingPointError(f"the loss is {total} (policy {policy_loss}, value {value_loss})")
    norm, *norm_value = _step(actor, lr, world)
    figures = {"loss": total, "policy_loss": policy_loss, "clip_fraction": clipped, "approx_kl": approx_kl}
    figures |= {"grad_norm": norm}
    if norm_value:
        figures |= {"value_loss": value_loss, "grad_norm_value": norm_value[0]}
    return figures | {"ratio_max": float(distributed.all_max(ratio_max, world)), "stop": stops > 0}


def _value_backward(critic, part: Part, rows: TokenRows, settings: dict) -> torch.Tensor:
    """Forward and backward of the critic on one micro-batch; its value loss, 0-dim."""
    old, old_values, advantages, returns = (
        row[part.rows] for row in (rows.old_logprobs, rows.old_values, rows.advantages, rows.returns)
    )
    with phases.phase("forward"):
        values = critic.values(part.batch)
        value = ops.ppo_loss(old, old, advantages, values, old_values, returns, part.batch.train_mask,
                             value_coef=VALUE_COEF, **settings)  # fmt: skip
    with phases.phase("backward"):
        value.loss.backward()
    return value.value_loss.double()


def _step(actor: ActorCritic, lr: float, world) -> list[float]:
    """Updates the models: the gradient norm of each. A model whose norm is not finite is left as it was."""
    with phases.phase("optimiser"):
        norms = {role: float(o.step(lr, world)) for role, o in actor.optimizers().items()}
    if not all(map(math.isfinite, norms.values())):
        raise FloatingPointError(f"the gradient norms are {norms}")
    return list(norms.values())
