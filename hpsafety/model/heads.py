"""Models that end in one number instead of a token: the reward model, and PPO's critic.

Legend: T tokens, D width, N predicted tokens, R responses.
"""

import dataclasses

import torch
from torch import nn

from hpsafety.model.llama import Llama, Trunk


class RewardModel(Trunk):
    """The decoder with a regression head: one score (a logit) per response, read at its last token.

    config  the chat model's, with tied=True: there is no token head
    """

    def __init__(self, config, tokenizer=None, generation: dict | None = None):
        super().__init__(dataclasses.replace(config, tied=True), tokenizer, generation)
        self.score = nn.Parameter(torch.empty(1, config.width))

    def rewards(self, batch) -> torch.Tensor:
        """(R,) fp32 logits, in the batch's order of responses; a prompt is computed once for all of its responses."""
        hidden_RD = self(batch, batch.last_rows)
        return (hidden_RD.float() * self.score.float()).sum(1)


def reward_model_from(chat: Llama, seed: int = 0) -> RewardModel:
    """A reward model on the chat model's own weights (shared, not copied), its token head dropped (RM-4).

    The head is drawn from a normal distribution with std 1/sqrt(D+1) under `seed`.
    """
    with torch.device("meta"):
        model = RewardModel(chat.config, chat.tokenizer, chat.generation)
    width = chat.config.width
    score = torch.randn(1, width, generator=torch.Generator().manual_seed(seed)) / (width + 1) ** 0.5
    state = {name: p for name, p in chat.named_parameters() if name != "head"}
    state["score"] = nn.Parameter(score.to(chat.embed.device, chat.embed.dtype))
    model.load_state_dict(state, assign=True)
    return model


class ValueModel(Trunk):
    """The decoder with a value head: what PPO's critic expects of every state, that is before each response token.

    config  the model's it is made from, with tied=True: there is no token head
    """

    def __init__(self, config, tokenizer=None, generation: dict | None = None):
        super().__init__(dataclasses.replace(config, tied=True), tokenizer, generation)
        self.value = nn.Parameter(torch.empty(1, config.width))

    def values(self, batch) -> torch.Tensor:
        """(N,) fp32: the value of the state that predicts response token n; the first ones of a group are one state."""
        hidden_ND = self(batch, batch.predict_rows)
        return (hidden_ND.float() * self.value.float()).sum(1)


def value_model_from(model: Llama | RewardModel, share: bool = False) -> ValueModel:
    """A critic on a copy of the model's weights, or on the very weights (share). The head starts as a reward model's
    score, else as zeros: whitened rewards have mean 0, and a random head would only add noise to the first advantages.
    """
    with torch.device("meta"):
        critic = ValueModel(model.config, model.tokenizer, model.generation)
    trunk = {n: p for n, p in model.named_parameters() if n not in ("head", "score")}
    state = trunk if share else {n: nn.Parameter(p.detach().clone()) for n, p in trunk.items()}
    head = model.score if isinstance(model, RewardModel) else torch.zeros_like(model.embed[:1])
    critic.load_state_dict(state | {"value": nn.Parameter(head.detach().clone())}, assign=True)
    return critic


def same_trunk(a: Trunk, b: Trunk) -> bool:
    """Whether two models differ in nothing but their heads, so that one pass serves both."""
    others = {name: p for name, p in b.named_parameters() if name != "score"}
    mine = {name: p for name, p in a.named_parameters() if name != "score"}
    return (
        a.config == b.config
        and mine.keys() == others.keys()
        and all(torch.equal(p, others[name]) for name, p in mine.items())
    )
