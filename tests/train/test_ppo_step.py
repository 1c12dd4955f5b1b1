"""PPO's step: the same bits where one policy is measured and trained, and the plain formula. The bug this file must
catch: a minibatch's loss divided by each micro-batch's own tokens, or prompt rows in a loss."""

import copy

import pytest
import torch

from hpsafety.data.groups import pack
from hpsafety.model.heads import reward_model_from, value_model_from
from hpsafety.train import distributed
from hpsafety.train.optim import AdamW
from hpsafety.train.ppo_step import ActorCritic, TokenRows, measure, pack_minibatches, update
from tests.tiny import random_groups, tiny_model

WORLD = distributed.World(0, 1, torch.device("cpu"))
TEMPERATURE = 0.8


def actor_of(policy, critic, dtype=torch.float32) -> ActorCritic:
    return ActorCritic(policy, critic, AdamW(policy, dtype), AdamW(critic, dtype))


def critic_of(policy):
    """A critic with a head that is not zero."""
    return value_model_from(reward_model_from(policy, seed=3))


def measured(actor, minibatches, size):
    old, entropy = measure(minibatches, lambda b: actor.policy.logprobs(b, TEMPERATURE, True), 2, size, WORLD)
    (values,) = measure(minibatches, lambda b: (actor.critic.values(b),), 1, size, WORLD)
    return old, entropy, values


def rows_for(old, values, seed=0, drift=0.0) -> TokenRows:
    g = torch.Generator().manual_seed(seed)
    noise = [torch.randn(len(old), generator=g) for _ in range(3)]
    return TokenRows(old + drift * noise[2], values, noise[0], values + noise[1])


def step(actor, groups, rows, tokens_per_batch=64, lr=1e-3):
    (parts,) = pack_minibatches(actor.policy, groups, len(groups), tokens_per_batch, WORLD)
    size = sum(len(response) for group in groups for response in group.responses)
    return update(actor, parts, rows, size, lr, TEMPERATURE, 0.2, WORLD, lambda: False)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize(
    "changes", [{}, {"tied": False, "qkv_bias": True, "o_bias": True, "num_kv_heads": 4}]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recompute", [False, True])
def test_an_unchanged_policy_has_ratio_one_to_the_bit(k, changes, dtype, recompute):
    """PPO-4, design section 1.3: with gradients and without, the same packed batch gives the same bits, so the first
    minibatch's largest ratio is 1.0 and its KL and clipping exactly 0."""
    policy, groups = tiny_model(**changes), random_groups(9, k)
    actor = actor_of(policy, critic_of(policy), dtype)
    policy.recompute = actor.critic.recompute = recompute
    size = sum(len(response) for group in groups for response in group.responses)
    minibatches = pack_minibatches(policy, groups, 3, 64, WORLD)
    assert len(minibatches) == 3 and max(map(len, minibatches)) > 1
    old, _, values = measured(actor, minibatches, size)
    for part in (part for parts in minibatches for part in parts):
        assert torch.equal(policy.logprobs(part.batch, TEMPERATURE).detach(), old[part.rows])
        assert torch.equal(actor.critic.values(part.batch).detach(), values[part.rows])
    rows = rows_for(old, values)
    first = update(actor, minibatches[0], rows, 50, 1e-2, TEMPERATURE, 0.2, WORLD, lambda: False)
    assert (first["ratio_max"], first["approx_kl"], first["clip_fraction"]) == (1.0, 0.0, 0.0)
    later = update(actor, minibatches[1], rows, 50, 1e-2, TEMPERATURE, 0.2, WORLD, lambda: False)
    assert later["ratio_max"] > 1.0 and later["approx_kl"] > 0.0


def test_every_token_has_its_own_row():
    """Rows are in the canonical order, and all of them are measured once, whatever the packing."""
    groups, policy = random_groups(11, 2), tiny_model()
    size = sum(len(response) for group in groups for response in group.responses)
    whole = policy.logprobs(pack(groups), TEMPERATURE).detach()
    for budget in (1, 64, 10_000):
        minibatches = pack_minibatches(policy, groups, 4, budget, WORLD)
        (got,) = measure(minibatches, lambda b: (policy.logprobs(b, TEMPERATURE),), 1, size, WORLD)
        assert torch.allclose(got, whole, atol=1e-5)
        rows = torch.cat([part.rows for parts in minibatches for part in parts])
        assert torch.equal(rows.sort().values, torch.arange(size))


def plain_loss(policy, critic, groups, rows):
    """The losses of spec section 5, one response at a time, nothing packed: (policy loss, value loss); fp64 models."""
    at, policy_sum, value_sum = 0, 0.0, 0.0
    for group in groups:
        for response in group.responses:
            alone = pack([type(group)(group.prompt, [response])])
            logits = (policy(alone) @ policy.head_weight.t())[alone.predict_rows] / TEMPERATURE
            logprobs = logits.log_softmax(-1).gather(1, alone.targets[:, None])[:, 0]
            values = critic(alone)[alone.predict_rows] @ critic.value[0]
            here = slice(at, at + len(response))
            at += len(response)
            old, v_old, a, r = (
                getattr(rows, name)[here].double()
                for name in ("old_logprobs", "old_values", "advantages", "returns")
            )
            ratio = (logprobs - old).exp()
            policy_sum -= torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a).sum()
            clipped = v_old + (values - v_old).clamp(-0.2, 0.2)
            value_sum += torch.maximum((values - r) ** 2, (clipped - r) ** 2).sum() / 2
    return policy_sum / at, value_sum / at


@pytest.mark.parametrize("budget", [1, 64, 10_000])
def test_losses_and_gradients_are_the_plain_formula(budget, monkeypatch):
    """PPO-5, PPO-6: loss and gradient of both models equal the formula over sampled tokens alone, with
    ratios on both sides of the clip range, for any micro-batch budget."""
    policy, groups = tiny_model(), random_groups(5, 2, seed=4)
    actor = actor_of(policy, critic_of(policy))
    batch = pack(groups)
    old = policy.logprobs(batch, TEMPERATURE).detach()
    values = actor.critic.values(batch).detach()
    rows = rows_for(old, values, drift=0.3)
    twins = {name: copy.deepcopy(getattr(actor, name)).double() for name in ("policy", "critic")}
    with monkeypatch.context() as patch:
        patch.setenv("HPSAFETY_IMPL", "reference")  # which takes fp64
        expected = plain_loss(twins["policy"], twins["critic"], groups, rows)
        (expected[0] + 0.5 * expected[1]).backward()
    got = step(actor, groups, rows, budget, lr=1e-30)
    assert got["policy_loss"] == pytest.approx(float(expected[0].detach()), abs=1e-5)
    assert got["value_loss"] == pytest.approx(float(expected[1].detach()), rel=1e-5)
    assert got["loss"] == pytest.approx(got["policy_loss"] + 0.5 * got["value_loss"], abs=1e-9)
    assert 0.1 < got["clip_fraction"] < 0.9
    for name, twin in twins.items():
        for p, wanted in zip(getattr(actor, name).parameters(), twin.parameters(), strict=True):
            assert torch.allclose(p.grad.double(), wanted.grad, atol=1e-5, rtol=1e-4)


def test_without_a_critic_the_policy_is_trained_alike():
    """No critic: the policy's loss and gradients to the bit, no figures of a value, and nothing of it to be kept."""
    groups, results = random_groups(5, 2, seed=4), []
    for with_critic in (True, False):
        policy = tiny_model()
        actor = (
            actor_of(policy, critic_of(policy))
            if with_critic
            else ActorCritic(policy, None, AdamW(policy), None)
        )
        old = policy.logprobs(pack(groups), TEMPERATURE).detach()
        rows = rows_for(old, torch.zeros_like(old), drift=0.3)
        if not with_critic:
            rows = TokenRows(rows.old_logprobs, None, rows.advantages, None)
        results.append((step(actor, groups, rows), list(policy.parameters()), actor))
    (both, _, _), (alone, _, actor) = results
    assert (
        both.keys() - alone.keys() == {"value_loss", "grad_norm_value"}
        and alone["loss"] == both["policy_loss"]
    )
    assert [alone[n] for n in alone if n != "loss"] == [both[n] for n in alone if n != "loss"]
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1], strict=True))
    assert {name.split(".")[0] for name, _ in actor.modules().named_parameters()} == {"policy"}
    assert {name.split(".")[0] for name in actor.state()} == {"policy"}


def test_a_loss_that_is_not_finite_updates_nothing():
    policy, groups = tiny_model(), random_groups(3)
    actor = actor_of(policy, critic_of(policy))
    before = [p.detach().clone() for p in actor.modules().parameters()]
    size = sum(len(group.responses[0]) for group in groups)
    rows = rows_for(torch.zeros(size), torch.zeros(size))
    rows.advantages[1] = float("nan")
    with pytest.raises(FloatingPointError, match="the loss is nan"):
        step(actor, groups, rows)
    assert all(torch.equal(a, b) for a, b in zip(before, actor.modules().parameters(), strict=True))


def test_critic_starts_from_a_reward_model_or_from_zero():
    """A critic shares no memory with what it came from; its head is the reward model's, or zero."""
    chat = tiny_model(tied=False)
    judge = reward_model_from(chat, seed=1)
    own, other = value_model_from(chat), value_model_from(judge)
    assert not own.value.any() and torch.equal(other.value, judge.score)
    assert {*dict(own.named_parameters())} == {*dict(chat.named_parameters()), "value"} - {"head"}
    assert torch.equal(own.embed, chat.embed) and own.embed.data_ptr() != chat.embed.data_ptr()
    batch = pack(random_groups(4, 2))
    expected = (judge(batch)[batch.predict_rows] * judge.score).sum(1)
    assert torch.allclose(other.values(batch), expected, atol=1e-5) and not own.values(batch).any()
