"""What training has to compute at the least, counted from its groups; a step is measured against it."""

from collections.abc import Iterable

from hpsafety.data.batches import predicted_flops
from hpsafety.data.groups import PromptGroup

_SHAPE = ("num_layers", "width", "mlp_width", "num_heads", "num_kv_heads", "head_dim", "vocab_size")


def forward_flops(config, group: PromptGroup) -> float:
    """FLOPs of one forward pass over a group: nothing padded, the head on trained rows only. Training takes 3 of it."""
    return predicted_flops(group, **{name: getattr(config, name) for name in _SHAPE})


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
