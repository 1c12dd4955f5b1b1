"""An iteration's rollouts. The bug this file must catch: rewards whitened with their KL term, or a cut sample scored at
a token that is no end of turn."""

import dataclasses
import math

import pytest
import torch

from hpsafety.data.groups import PromptGroup
from hpsafety.errors import InputError, RunError
from hpsafety.rollout import experience as rollouts
from hpsafety.rollout.advantages import whiten
from hpsafety.rollout.experience import Experience, Judged, Prompt
from hpsafety.rollout.sampler import Rollout, Settings
from hpsafety.rollout.scoring import GroupScore
from tests.tiny import tiny_model


def make(lengths=((3, 1), (2, 4)), seed=0, **changes) -> Experience:
    """A measured Experience of groups with these response lengths and random numbers."""
    g = torch.Generator().manual_seed(seed)
    groups = [PromptGroup([1, 2], [[5] * n for n in own]) for own in lengths]
    responses, tokens = sum(map(len, lengths)), sum(map(sum, lengths))
    per_token = [torch.randn(tokens, generator=g) for _ in range(5)]
    logits = [torch.randn(responses, generator=g) for _ in range(3)]
    values = dict(
        groups=groups, is_safety=torch.zeros(len(groups), dtype=torch.bool),
        stopped=torch.ones(responses, dtype=torch.bool), sampler_logprobs=per_token[0], safety=logits[0],
        helpful=logits[1], combined=logits[2], old_logprobs=per_token[1], entropy=per_token[2],
        ref_logprobs=per_token[3], values=per_token[4],
    )  # fmt: skip
    return Experience(**(values | changes))


def test_whitening():
    """PPO-3: mean 0, population std 1; a constant batch gives exact zeros; far from 0 nothing cancels."""
    x = torch.randn(512, generator=torch.Generator().manual_seed(0)) * 3 + 1000
    white = whiten(x).double()
    assert abs(float(white.mean())) < 1e-5 and abs(float(white.std(correction=0)) - 1) < 1e-4
    assert torch.equal(whiten(torch.full((7,), 0.1)), torch.zeros(7)) and torch.equal(
        whiten(x[:1]), torch.zeros(1)
    )
    pair = whiten(torch.tensor([1.0, 3.0]))
    assert torch.allclose(pair, torch.tensor([-1.0, 1.0]))  # the sample std would give 0.707


def test_routing_at_the_threshold():
    """PPO-1: tagged to R_s; untagged at 0.1499 to R_s, at exactly 0.15 to R_h. The shares that are reported agree with
    the op that routes."""
    logits = torch.tensor([math.log(0.15 / 0.85), math.log(0.1499 / 0.8501), 2.0, 2.0])
    e = make(((1,), (1,), (1,), (1,)), safety=logits, is_safety=torch.tensor([False, False, True, False]))
    assert e.routed_to_safety.tolist() == [False, True, True, False]


def test_whitening_comes_after_routing_and_leaves_the_kl_out():
    """PPO-3: a fixture where the order matters. The KL of one response is large; the whitened scores do not see it."""
    e = make(((2,), (1,)), combined=torch.tensor([1.0, 3.0]))
    old, ref = torch.tensor([-1.0, -2.0, -0.5]), torch.tensor([-1.5, -52.0, -0.5])
    e = e.measured(old, torch.zeros(3), ref, torch.zeros(3))
    rewards, _, _ = e.advantages(0.1)
    assert torch.allclose(rewards, torch.tensor([-0.05, -5.0 - 1.0, 1.0]), atol=1e-6)
    assert torch.equal(e.advantages(0.0)[0], torch.tensor([0.0, -1.0, 1.0]))


def test_advantages_are_gae_of_each_response():
    """Spec section 5: discount 1, lambda 0.95, the score at the last token; a response ends with value 0."""
    e = make(((3, 1), (2, 4)), seed=5)
    rewards, advantages, returns = e.advantages(0.02)
    ends, at = e.lengths.cumsum(0).tolist(), 0
    white = whiten(e.combined)
    for number, end in enumerate(ends):
        future = next_value = 0.0
        for t in reversed(range(at, end)):
            reward = -0.02 * float(e.old_logprobs[t] - e.ref_logprobs[t])
            reward += float(white[number]) if t + 1 == end else 0.0
            assert float(rewards[t]) == pytest.approx(reward, abs=1e-6)
            delta = reward + next_value - float(e.values[t])
            future = delta + 0.95 * future
            assert float(advantages[t]) == pytest.approx(future, abs=1e-5)
            assert float(returns[t]) == pytest.approx(future + float(e.values[t]), abs=1e-5)
            next_value = float(e.values[t])
        at = end


def test_constant_scores_leave_the_kl_alone():
    e = make(combined=torch.full((4,), 0.7))
    assert torch.equal(e.advantages(0.5)[0], -0.5 * (e.old_logprobs - e.ref_logprobs))


@pytest.mark.parametrize("critic", [True, False])
def test_written_and_read_to_the_bit(critic, tmp_path):
    e = make(stopped=torch.tensor([True, False, True, True]))
    e.entropy[0], e.entropy[1] = -0.0, float("nan")
    e = e if critic else dataclasses.replace(e, values=None)
    rollouts.save(e, tmp_path / "experience-3.safetensors")
    back = rollouts.load(tmp_path / "experience-3.safetensors")
    assert back.groups == e.groups
    for name in rollouts._PER_ROW:
        a, b = getattr(e, name), getattr(back, name)
        if a is None:
            assert b is None and name == "values"
            continue
        assert a.dtype == b.dtype and a.numpy().tobytes() == b.numpy().tobytes(), name
    whole = (tmp_path / "experience-3.safetensors").read_bytes()
    (tmp_path / "cut").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="cannot be read"):
        rollouts.load(tmp_path / "cut")


class Listener:
    """Stands for a Scorer: keeps the groups it is given."""

    tokenizer = type("T", (), {"end_of_turn_id": 9})

    def __init__(self, logit=0.0):
        self.logit = logit

    def score(self, groups, is_safety, tokens_per_batch):
        self.groups, self.is_safety = groups, is_safety
        return [GroupScore(*[[self.logit] * len(g.responses)] * 3, 0) for g in groups]


def test_a_cut_sample_is_ended_for_the_reward_models_alone():
    """A stop token other than the end of turn stands for it; what is trained stays as sampled."""
    samples = [
        Rollout(4, 0, [5, 9], [-1.0, -1.0], "stop"), Rollout(4, 1, [5, 6], [-1.0, -1.0], "length"),
        Rollout(4, 2, [5, 0], [-1.0, -1.0], "stop"),
    ]  # fmt: skip
    scorer = Listener()
    judged = rollouts.judge(scorer, [Prompt([1, 2], True)], [samples], 64)
    assert scorer.groups[0].responses == [[5, 9], [5, 6, 9], [5, 9]] and scorer.is_safety == [True]
    e = rollouts.collect(judged)
    assert e.groups == [PromptGroup([1, 2], [[5, 9], [5, 6], [5, 0]])]
    assert e.stopped.tolist() == [True, False, True] and len(e.sampler_logprobs) == 6
    with pytest.raises(RunError, match="prompt draw 4: the safety reward model gave nan"):
        rollouts.judge(Listener(math.nan), [Prompt([1, 2], True)], [samples], 64)


def test_samples_depend_on_the_draw_alone():
    """A prompt drawn again, or beside others, or on another rank has the samples of its own draw."""
    model = tiny_model(seed=1)
    prompt, other = Prompt([3, 4, 5], False), Prompt([6, 7], False)
    settings = Settings(max_new_tokens=6, seed=2, kv_memory=2**20)
    both = rollouts.sample(model, [(10, prompt), (11, other), (12, prompt)], 2, settings)
    alone = rollouts.sample(model, [(12, prompt)], 2, settings)
    assert alone[0] == both[2]
    assert [s.tokens for s in both[0]] != [s.tokens for s in both[2]]


def test_figures():
    """Explained variance is 1 for a critic that knows the returns; kl is the mean over sampled tokens."""
    e = make(stopped=torch.tensor([True, True, True, False]), safety=torch.full((4,), -9.0))
    figures = e.figures(e.values)
    assert (
        figures["explained_variance"] == 1.0
        and figures["share_cut"] == 0.25
        and figures["share_safety"] == 1.0
    )
    assert figures["length"] == 2.5 and e.figures(torch.ones(10))["explained_variance"] == 0.0
    assert figures["kl"] == pytest.approx(float((e.old_logprobs - e.ref_logprobs).mean()), abs=1e-6)
    assert figures["reward_safety"] == pytest.approx(1 / (1 + math.exp(9)))
    judged = [
        Judged(Prompt([1], False), [Rollout(0, 0, [5], [-1.0], "stop")], GroupScore([1.0], [2.0], [2.0], 0))
    ]
    assert rollouts.collect(judged).combined.tolist() == [2.0]
