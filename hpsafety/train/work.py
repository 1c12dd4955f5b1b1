"""What training has to compute at the least, counted from its groups; a step is measured against it."""

from collections.abc import Iterable

from hpsafety.data.batches import predicted_flops
from hpsafety.data.groups import PromptGroup

_SHAPE = ("num_layers", "width", "mlp_width", "num_heads", "num_kv_heads", "head_dim", "vocab_size")


def forward_flops(config, group: PromptGroup, token_head: bool = True) -> float:
    """FLOPs of one forward pass over a group: nothing padded, the head on trained rows only. Training takes 3 of it.

    token_head  False for a model that ends in one score per response, whose head costs next to nothing
    """
    shape = {name: getattr(config, name) for name in _SHAPE}
    return predicted_flops(group, **shape | ({} if token_head else {"vocab_size": 0}))


def model_flops(model, group: PromptGroup) -> float:
    """forward_flops of a group by this model."""
    return forward_flops(model.config, group, hasattr(model, "head_weight"))


def passes(model) -> int:
    """What a training step costs in forward passes: 3, or 1 where the trunk is frozen and backward ends above it."""
    return 3 if any(p.requires_grad for p in model.blocks.parameters()) else 1


def count_tokens(groups: Iterable[PromptGroup]) -> dict[str, int]:
    """tokens (computed), tokens_equiv (the prompt once per response) and trained (rows that reach the head)."""
    out = {"tokens": 0, "tokens_equiv": 0, "trained": 0}
    for group in groups:
        answers = sum(map(len, group.responses))
        out["tokens"] += len(group.prompt) + answers
        out["tokens_equiv"] += len(group.prompt) * len(group.responses) + answers
        out["trained"] += (
            answers if group.train is None else sum(sum(map(bool, mask)) for mask in group.train)
        )
    return out
