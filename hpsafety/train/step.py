"""One optimiser step: micro-batches of whole groups, one global loss denominator, one update."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from hpsafety.data.batches import balance, micro_batches
from hpsafety.data.groups import Batch, PromptGroup, pack
from hpsafety.train import distributed, phases
from hpsafety.train.work import model_flops, passes


@dataclass(frozen=True)
class StepResult:
    """loss: mean over the global denominator; tokens, tokens_equiv: over all ranks; stop: some rank was signalled."""

    loss: float
    grad_norm: float
    tokens: int
    tokens_equiv: int
    groups_per_rank: list[int]
    stop: bool
    figures: dict[str, float]  # what the loss gave beside itself, summed likewise


def assign(model, groups: list[PromptGroup], world) -> list[list[PromptGroup]]:
    """Groups of each rank, balanced by predicted FLOPs. Every rank computes the same answer."""
    if world.size == 1:
        return [groups]
    costs = [model_flops(model, group) for group in groups]
    return [[groups[i] for i in part] for part in balance(costs, world.size)]


def local_batches(parts: list[list[PromptGroup]], tokens_per_batch: int, world) -> Iterator[Batch]:
    """This rank's micro-batches; empty ones at the end where another rank has more, since sharded parameters are
    gathered by all ranks together."""
    with phases.phase("data"):
        splits = [micro_batches(part, tokens_per_batch) for part in parts]
    mine, split = parts[world.rank], splits[world.rank]
    for i in range(max(map(len, splits))):
        indices = split[i] if i < len(split) else []
        with phases.phase("data"):
            batch = pack([mine[j] for j in indices]).to(world.device)
        yield batch


@torch.no_grad()
def evaluate(
    model, groups: list[PromptGroup], loss: Callable, denominator: float, tokens_per_batch: int, world
) -> float:
    """The loss of `groups` under one global denominator, without gradients; the same on every rank."""
    total = torch.zeros((), dtype=torch.float64, device=world.device)
    parts = assign(model, groups, world)
    phases.work(model, parts[world.rank], 1)
    for batch in local_batches(parts, tokens_per_batch, world):
        with phases.phase("validation"):
            total += split_loss(loss(model, batch, denominator))[0]
    return float(distributed.all_sum(total, world))


def split_loss(given) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """(loss, figures): a loss function gives a scalar, or a pair of it and figures by name that add up as it does."""
    return given if isinstance(given, tuple) else (given, {})


def train_step(
    model, groups: list[PromptGroup], loss: Callable, denominator: float, optimizer, lr: float,
    tokens_per_batch: int, world, stop: Callable[[], bool] = lambda: False,
) -> StepResult:  # fmt: skip
    """Forward and backward of `groups` in micro-batches of at most tokens_per_batch tokens, then one AdamW update.

    loss         loss(model, batch, denominator) -> scalar; its sum over micro-batches and ranks is the step's loss.
                 Or (scalar, {name: 0-dim tensor}), figures that are summed alike
    denominator  what the loss is divided by, counted over the whole step on all ranks
    stop         asked after the update: has this rank been told to stop? All ranks share the answer and stop together
    The micro-batch split and the number of ranks change the result by rounding only.
    """
    with phases.phase("data"):
        parts = assign(model, groups, world)
    phases.work(model, parts[world.rank], passes(model))
    total = torch.zeros((), dtype=torch.float64, device=world.device)
    tokens = tokens_equiv = 0
    figures: dict[str, torch.Tensor] = {}
    with phases.phase("optimiser"):
        optimizer.zero_grad()
    for batch in local_batches(parts, tokens_per_batch, world):
        with phases.phase("forward"):
            value, given = split_loss(loss(model, batch, denominator))
        with phases.phase("backward"):
            value.backward()
        total += value.detach()
        figures = {name: figures.get(name, 0.0) + x.detach().double() for name, x in given.items()}
        tokens, tokens_equiv = tokens + batch.tokens_computed, tokens_equiv + batch.tokens_equiv
        del value, batch
    with phases.phase("optimiser"):
        norm = optimizer.step(lr, world)
    sums = torch.stack([total, *(torch.tensor(float(x), dtype=torch.float64, device=world.device)
                                 for x in (tokens, tokens_equiv, stop())), *figures.values()])  # fmt: skip
    loss_sum, tokens, tokens_equiv, stops, *means = distributed.all_sum(sums, world).tolist()
    named = dict(zip(figures, means, strict=True))
    groups_per_rank = list(map(len, parts))
    return StepResult(
        loss_sum, float(norm), int(tokens), int(tokens_equiv), groups_per_rank, stops > 0, named
    )
