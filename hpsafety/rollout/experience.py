"""One PPO iteration's rollouts: what was sampled, how it was judged, and the numbers per token that the updates need.

Everything stands in one order: group, response, token. G groups, R responses, N sampled tokens.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes

from hpsafety import ops
from hpsafety.data.groups import PromptGroup
from hpsafety.errors import RunError, file_error
from hpsafety.files import atomic_write
from hpsafety.ops.reward_score import THRESHOLD
from hpsafety.rollout.advantages import whiten, without_critic
from hpsafety.rollout.engine import Engine, Request
from hpsafety.rollout.sampler import Rollout, Settings
from hpsafety.rollout.scoring import GroupScore, Scorer

GAMMA, LAM = 1.0, 0.95  # of GAE (spec section 5)


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt's tokens and its tag."""

    tokens: list[int]
    is_safety: bool


@dataclass(frozen=True, slots=True)
class Judged:
    """One group: its prompt, k samples in order, and both reward models' logits of them."""

    prompt: Prompt
    samples: list[Rollout]
    score: GroupScore


@dataclass(frozen=True, slots=True)
class Experience:
    """An iteration's rollouts; all tensors on the CPU. The last four come from `measured`."""

    groups: list[PromptGroup]
    is_safety: torch.Tensor  # (G,) bool
    stopped: torch.Tensor  # (R,) bool: the sample ended by itself, not at the token limit
    sampler_logprobs: torch.Tensor  # (N,) fp32, as the sampler saw them
    safety: torch.Tensor  # (R,) fp32 logits
    helpful: torch.Tensor  # (R,) fp32 logits
    combined: torch.Tensor  # (R,) fp32 logits: R_c, by the route of ops.reward_score
    old_logprobs: torch.Tensor | None = None  # (N,) fp32, of the policy that sampled
    entropy: torch.Tensor | None = None  # (N,) fp32 nats, likewise
    ref_logprobs: torch.Tensor | None = None  # (N,) fp32, of the frozen start
    values: torch.Tensor | None = None  # (N,) fp32, of the critic; None without one

    @property
    def lengths(self) -> torch.Tensor:
        """(R,) int64 tokens of each response."""
        return torch.tensor([len(response) for group in self.groups for response in group.responses])

    @property
    def routed_to_safety(self) -> torch.Tensor:
        """(R,) bool: R_c is the safety score (PPO-1)."""
        tagged = torch.repeat_interleave(
            self.is_safety, torch.tensor([len(group.responses) for group in self.groups])
        )
        return tagged | (torch.sigmoid(self.safety.double()).float() < THRESHOLD)

    def measured(self, old_logprobs, entropy, ref_logprobs, values=None) -> "Experience":
        """With the numbers per token: (N,) fp32 each, in canonical order, on any device; no values without a critic."""
        rows = {
            "old_logprobs": old_logprobs,
            "entropy": entropy,
            "ref_logprobs": ref_logprobs,
            "values": values,
        }
        return replace(self, **{name: row.cpu() for name, row in rows.items() if row is not None})

    def advantages(
        self, kl_coef: float, estimator: str = "gae"
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """(rewards, advantages, returns) (N,) fp32 of every sampled token, by gae, group or rloo
        (hpsafety/rollout/advantages.py); the last two have no returns.

        A token's reward is -kl_coef (old_logprob - ref_logprob), at the last token plus the whitened score. The KL term
        is no part of the whitening (PPO-3), prompts have no rows (PPO-6); advantages are not normalised again.
        """
        lengths, scores = self.lengths, whiten(self.combined)
        penalties = -kl_coef * (self.old_logprobs - self.ref_logprobs)
        rewards = penalties.clone()
        rewards[lengths.cumsum(0) - 1] += scores
        if estimator != "gae":
            sizes = [len(group.responses) for group in self.groups]
            return rewards, without_critic(estimator, scores, penalties, lengths.tolist(), sizes), None
        cu_responses = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
        return rewards, *ops.gae(rewards, self.values, cu_responses, GAMMA, LAM)

    def figures(self, returns: torch.Tensor | None) -> dict[str, float]:
        """The iteration's means, of samples and of sampled tokens. kl: of logp_old - logp_ref; sampler_gap: the largest
        difference between the sampler's logprob and the trainer's; explained_variance: of returns, by the values,
        where there are any."""
        rows = {
            "reward": self.combined.sigmoid(), "reward_safety": self.safety.sigmoid(),
            "reward_helpful": self.helpful.sigmoid(), "share_safety": self.routed_to_safety,
            "kl": self.old_logprobs - self.ref_logprobs, "entropy": self.entropy, "length": self.lengths,
            "share_cut": ~self.stopped,
        }  # fmt: skip
        out = {name: float(row.double().mean()) for name, row in rows.items()}
        if returns is not None:
            spread = returns.double().var(correction=0)
            missed = (returns - self.values).double().var(correction=0)
            out["explained_variance"] = float(1 - missed / spread) if spread > 0 else 0.0
        return out | {"sampler_gap": float((self.sampler_logprobs - self.old_logprobs).abs().max())}


def collect(judged: Iterable[Judged]) -> Experience:
    """Judged groups, in their order, as an Experience that has not been measured yet."""
    judged = list(judged)
    samples = [sample for group in judged for sample in group.samples]

    def logits(name: str) -> torch.Tensor:
        return torch.tensor([z for group in judged for z in getattr(group.score, name)])

    return Experience(
        groups=[PromptGroup(g.prompt.tokens, [s.tokens for s in g.samples]) for g in judged],
        is_safety=torch.tensor([group.prompt.is_safety for group in judged]),
        stopped=torch.tensor([sample.finish == "stop" for sample in samples]),
        sampler_logprobs=torch.tensor([x for sample in samples for x in sample.logprobs]),
        safety=logits("safety"), helpful=logits("helpful"), combined=logits("combined"),
    )  # fmt: skip


# ---- sampling and judging ----


def sample(model, requests: Sequence[tuple[int, Prompt]], k: int, settings: Settings) -> list[list[Rollout]]:
    """k samples for each (prompt_index, prompt), in order, on the model's weights as they are now."""
    engine = Engine(model, settings)
    found = dict(engine.groups(Request(prompt.tokens, k, index) for index, prompt in requests))
    return [found[index] for index, _ in requests]


def check_memory(model, prompt_tokens: int, settings: Settings) -> None:
    """InputError where the memory for keys and values does not hold one sample of a prompt of so many tokens."""
    Engine(model, settings).check(prompt_tokens)


def judge(
    scorer: Scorer, prompts: Sequence[Prompt], samples: Sequence[list[Rollout]], tokens_per_batch: int
) -> list[Judged]:
    """Both reward models' logits of the sampled tokens. Raises RunError for one that is not a number.

    A reward model reads its score at the end of turn: a sample that was cut gets one, for the reward models alone, and
    one that ended with another stop token has it in that one's place.
    """
    end = scorer.tokenizer.end_of_turn_id
    groups = [
        PromptGroup(prompt.tokens, [[*(s.tokens[:-1] if s.finish == "stop" else s.tokens), end] for s in own])
        for prompt, own in zip(prompts, samples, strict=True)
    ]
    scores = scorer.score(groups, [prompt.is_safety for prompt in prompts], tokens_per_batch)
    for own, score in zip(samples, scores, strict=True):
        if why := score.fault():
            raise RunError(f"rollout of prompt draw {own[0].prompt_index}: {why}")
    return [Judged(*triple) for triple in zip(prompts, samples, scores, strict=True)]


# ---- on disk, so that a run can go on in the middle of an iteration ----

_PER_ROW = ("is_safety", "stopped", "sampler_logprobs", "safety", "helpful", "combined", "old_logprobs", "entropy",
            "ref_logprobs", "values")  # fmt: skip


def save(experience: Experience, path: Path) -> None:
    """Writes a measured Experience as one safetensors file, whole or not at all."""
    groups = experience.groups
    pieces = [piece for group in groups for piece in (group.prompt, *group.responses)]
    rows = {name: getattr(experience, name) for name in _PER_ROW}
    tensors = {name: row.contiguous() for name, row in rows.items() if row is not None} | {
        "tokens": torch.tensor([token for piece in pieces for token in piece]),
        "piece_lengths": torch.tensor([len(piece) for piece in pieces]),
        "group_sizes": torch.tensor([len(group.responses) for group in groups]),
    }
    with atomic_write(path, "wb") as handle:
        handle.write(to_bytes(tensors))


def load(path: Path) -> Experience:
    """What save wrote, bit by bit. Raises InputError for a file that is not whole."""
    try:
        with safe_open(path, "pt") as handle:
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118  no mapping
        pieces = iter(tensors["tokens"].split(tensors["piece_lengths"].tolist()))
        groups = [
            PromptGroup(next(pieces).tolist(), [next(pieces).tolist() for _ in range(size)])
            for size in tensors["group_sizes"].tolist()
        ]
        rows = {name: tensors[name] for name in _PER_ROW if name in tensors or name != "values"}
        return Experience(groups=groups, **rows)
    except (SafetensorError, KeyError, RuntimeError, StopIteration) as error:
        raise file_error(path, f"cannot be read ({error}); start anew with --no-resume") from error
