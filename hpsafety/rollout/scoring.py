"""Scores of groups of responses by two reward models, a safety and a helpfulness one (spec section 5, PPO-1..3).

A prompt is computed once for its K responses; the last block computes its o-projection and mlp for the responses' last
rows only, and there is no token head. Two models that differ in nothing but their heads share one pass.

A response's score has the same bits alone, among others of its group, and in any batch and order, wherever
`row_difference` is 0.0: a row of a product does not depend on the rows beside it, and no other op mixes rows but
attention, which sees a segment and its prefix only. (That is why a single response stays a segment of its own.)

R responses, D width.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from hpsafety import ops
from hpsafety.data.batches import micro_batches
from hpsafety.data.chat import encode_prompt, encode_response
from hpsafety.data.groups import Batch, PromptGroup, pack
from hpsafety.errors import InputError
from hpsafety.model.gemm import row_difference
from hpsafety.model.heads import RewardModel, same_trunk
from hpsafety.model.mapped import present

# A sigmoid is written within these, so that it stays inside (0, 1) when it is read as fp32.
LOWEST, HIGHEST = 2.0**-126, 1.0 - 2.0**-24


@dataclass(frozen=True, slots=True)
class GroupScore:
    """Logits of one group's responses, in their order. combined: R_c's; best: the index of its highest, within the
    group, the lowest index of equals."""

    safety: list[float]
    helpful: list[float]
    combined: list[float]
    best: int

    def record(self, id) -> dict:
        """The `score` record of design.md section 8."""
        return {
            "id": id, "safety": probabilities(self.safety), "helpful": probabilities(self.helpful),
            "safety_logit": self.safety, "helpful_logit": self.helpful,
            "combined": probabilities(self.combined), "best": self.best,
        }  # fmt: skip

    def fault(self) -> str | None:
        """What is wrong with a score that is NaN or infinite; None when all are numbers."""
        for kind, logits in (("safety", self.safety), ("helpfulness", self.helpful)):
            for k, logit in enumerate(logits):
                if not math.isfinite(logit):
                    return (
                        f"the {kind} reward model gave {logit} for response {k}; its weights may be damaged, or too "
                        "large for bf16 (--precision fp32)"
                    )
        return None


def sigmoid(z: float) -> float:
    """1 / (1 + exp(-z)) without overflow."""
    return 1 / (1 + math.exp(-z)) if z >= 0 else math.exp(z) / (1 + math.exp(z))


def probabilities(logits: Sequence[float]) -> list[float]:
    """sigmoid in double, kept inside (0, 1)."""
    return [min(max(sigmoid(z), LOWEST), HIGHEST) for z in logits]


class Scorer:
    """Two reward models as one judge of groups.

    safety, helpful  on one device; widths may differ, the text encoding may not
    one_trunk        whether one pass serves both: found by comparing the weights
    context          the longest prompt and response together, in tokens
    Raises InputError, naming both, for models that encode text differently.
    """

    def __init__(
        self, safety: RewardModel, helpful: RewardModel, names=("the safety RM", "the helpfulness RM")
    ):
        check_encoding(safety, helpful, names)
        self.one_trunk = same_trunk(safety, helpful)
        # With one trunk the second copy of the weights can go: only its head is kept.
        self.safety, self.helpful = safety, None if self.one_trunk else helpful
        self.heads = safety.score.detach()[0], helpful.score.detach()[0]
        self.tokenizer = safety.tokenizer
        self.context = min(safety.config.max_positions, helpful.config.max_positions)

    @property
    def trunks(self) -> list[RewardModel]:
        """The models whose blocks run: one or two."""
        return [self.safety] if self.helpful is None else [self.safety, self.helpful]

    def encode(self, prompt: str | list[dict], responses: Sequence[str]) -> PromptGroup:
        """Texts to tokens, every response ended by its end-of-turn token. Raises InputError beyond the context."""
        group = PromptGroup(
            encode_prompt(self.tokenizer, prompt),
            [encode_response(self.tokenizer, text) for text in responses],
        )
        longest = max(range(len(responses)), key=lambda k: len(group.responses[k]))
        length = len(group.prompt) + len(group.responses[longest])
        if length > self.context:
            raise InputError(
                f"the prompt ({len(group.prompt)} tokens) with response {longest} has {length} tokens, more than the "
                f"reward models' context of {self.context}; shorten the row or take it out"
            )
        return group

    @torch.no_grad()
    def last_rows(self, batches: Sequence[Batch]) -> list[list[torch.Tensor]]:
        """Per trunk, every batch's hidden rows (R, D) at its responses' last tokens. A model goes over all batches
        before the next one does, so that parked ones (model/mapped.py) are in memory one after the other."""
        out = []
        for trunk in self.trunks:
            with present(trunk, self.heads[0].device):
                out.append([trunk(batch, batch.last_rows) for batch in batches])
        return out

    def rewards(self, batch: Batch, is_safety: torch.Tensor, rows: Sequence[torch.Tensor]) -> ops.RewardScore:
        """Logits and the best of each group (ops.reward_score) of a packed batch on the models' device.

        is_safety  (R,) bool: the prompt's tag, for each response
        rows       (R, D) of each trunk
        """
        responses = torch.arange(batch.last_rows.numel(), device=batch.last_rows.device)
        sizes = torch.bincount(batch.group_of, minlength=len(batch.groups))
        cu_groups = torch.nn.functional.pad(sizes.cumsum(0), (1, 0)).int()
        return ops.reward_score(rows[0], rows[-1], responses, *self.heads, is_safety, cu_groups)

    def score(
        self, groups: Sequence[PromptGroup], is_safety: Sequence[bool], tokens_per_batch: int
    ) -> list[GroupScore]:
        """One GroupScore per group, in order, from micro-batches of whole groups. is_safety: each prompt's tag."""
        parts = micro_batches(groups, tokens_per_batch)
        split = [([groups[i] for i in part], [is_safety[i] for i in part]) for part in parts]
        out: list[GroupScore | None] = [None] * len(groups)
        for indices, scores in zip(parts, self.score_parts(split), strict=True):
            for i, score in zip(indices, scores, strict=True):
                out[i] = score
        return out

    def score_part(self, groups: Sequence[PromptGroup], is_safety: Sequence[bool]) -> list[GroupScore]:
        """`score` of groups that form one micro-batch."""
        return self.score_parts([(groups, is_safety)])[0]

    @torch.no_grad()
    def score_parts(
        self, parts: Sequence[tuple[Sequence[PromptGroup], Sequence[bool]]]
    ) -> list[list[GroupScore]]:
        """`score_part` of each (groups, is_safety)."""
        device = self.heads[0].device
        batches = [pack(groups, join_single=False).to(device) for groups, _ in parts]
        rows = self.last_rows(batches)
        out = []
        for batch, (_, is_safety), *own in zip(batches, parts, *rows, strict=True):
            tags = torch.tensor(is_safety, device=device)[batch.group_of]
            scores = self.rewards(batch, tags, own)
            columns = torch.stack([scores.r_safety, scores.r_helpful, scores.combined]).tolist()
            ends = list(accumulate(len(group.responses) for group in batch.groups))
            out.append([
                GroupScore(*(column[start:end] for column in columns), winner - start)
                for start, end, winner in zip([0, *ends], ends, scores.best_of_group.tolist(), strict=False)
            ])  # fmt: skip
        return out

    def row_difference(self) -> float:
        """How much a row of a product may change with the rows beside it: 0.0 where scores are bit-equal in any batch.

        Relative to the product's largest element, the worst over the models' shapes (model.gemm.row_difference).
        """
        shapes = {
            (weight.numel() // inputs, inputs, weight.dtype, str(weight.device))
            for model in self.trunks
            for block in model.blocks[:1]
            for weight, inputs in _products(block)
        }
        return max(row_difference(*shape) for shape in shapes)


def _products(block) -> list[tuple[torch.Tensor, int]]:
    """(weight, its input width) of a block's four products."""
    width = block.config.width
    return [(block.qkv, width), (block.o, block.o.shape[1]), (block.gate_up, width),
            (block.down, block.down.shape[1])]  # fmt: skip


def check_encoding(a: RewardModel, b: RewardModel, names) -> None:
    """InputError unless both models turn a chat into the same tokens."""
    for model, name in zip((a, b), names, strict=True):
        if model.tokenizer is None:
            raise InputError(
                f"{name}: holds no tokenizer; a reward model needs the chat model's tokenizer.json"
            )
    mine, others = a.tokenizer, b.tokenizer
    for what, x, y in (
        ("vocabulary", mine.vocab_hash, others.vocab_hash),
        ("chat template", mine.chat_template, others.chat_template),
        ("end-of-turn token", mine.end_of_turn_id, others.end_of_turn_id),
        ("bos or eos token", (mine.bos_token, mine.eos_token), (others.bos_token, others.eos_token)),
    ):
        if x != y:
            raise InputError(
                f"{names[0]} and {names[1]} differ in their {what}; they must come from chat models with one "
                "tokenizer"
            )
