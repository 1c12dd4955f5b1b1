"""Scores of groups. The bug this file must catch: a score that changes with what else is in the batch, for example
because a single response shares its prompt's attention segment, or because the last block is not padded to 16 rows."""

import math

import pytest
import torch

from hpsafety.data.groups import PromptGroup, pack
from hpsafety.errors import InputError
from hpsafety.model import gemm
from hpsafety.model.heads import RewardModel, reward_model_from
from hpsafety.model.io import load_model
from hpsafety.model.llama import Block
from hpsafety.rollout import scoring
from hpsafety.rollout.scoring import GroupScore, Scorer, probabilities
from tests.stages.conftest import model_dir
from tests.tiny import random_groups, tiny_model

__all__ = ["model_dir"]  # fixture


@pytest.fixture(scope="module")
def tokenizer(model_dir):
    return load_model(model_dir).tokenizer


def reward_model(tokenizer, seed=0, head=0, dtype=torch.float32, **changes) -> RewardModel:
    chat = tiny_model(seed, dtype, **changes)
    chat.tokenizer = tokenizer
    return reward_model_from(chat, head)


@pytest.fixture(scope="module")
def scorer(tokenizer) -> Scorer:
    return Scorer(reward_model(tokenizer), reward_model(tokenizer, seed=1, width=40, num_layers=3))


def logits(scores: list[GroupScore]) -> torch.Tensor:
    """(2, groups, K) of groups of one K."""
    return torch.tensor([[s.safety for s in scores], [s.helpful for s in scores]], dtype=torch.float64)


def tags(groups) -> list[bool]:
    return [i % 3 == 0 for i in range(len(groups))]


def views(scorer, groups, safe) -> dict[str, list[GroupScore]]:
    """The same groups scored in other surroundings; the last entry is what each response gets without the others."""
    count, k = len(groups), len(groups[0].responses)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
    shuffled = scorer.score([groups[i] for i in order], [safe[i] for i in order], 2000)
    backwards = scorer.score([PromptGroup(g.prompt, g.responses[::-1]) for g in groups], safe, 2000)
    pairs = list(zip(groups, safe, strict=True))
    singles = [[scorer.score([PromptGroup(g.prompt, [r])], [s], 1)[0] for r in g.responses] for g, s in pairs]
    return {
        "2000 tokens": scorer.score(groups, safe, 2000), "500 tokens": scorer.score(groups, safe, 500),
        "each group alone": [scorer.score([g], [s], 1)[0] for g, s in pairs],
        "another order": [shuffled[order.index(i)] for i in range(count)],
        "responses backwards": [
            GroupScore(s.safety[::-1], s.helpful[::-1], s.combined[::-1], k - 1 - s.best) for s in backwards
        ],
        "each response alone": [
            GroupScore([x.safety[0] for x in s], [x.helpful[0] for x in s], [x.combined[0] for x in s], 0)
            for s in singles
        ],
    }  # fmt: skip


def check_independence(scorer, groups, dtype) -> None:
    safe = tags(groups)
    whole = logits(scorer.score(groups, safe, 10**6))
    bound = 0.0 if scorer.row_difference() == 0 else 1e-5 if dtype == torch.float32 else 0.05
    for name, scores in views(scorer, groups, safe).items():
        other = logits(scores)
        equal, worst = float((other == whole).double().mean()), float((other - whole).abs().max())
        assert worst <= bound, f"{name}: {equal:.1%} bit-equal, largest difference {worst:.2e}, bound {bound}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_score_depends_on_nothing_else_in_the_batch(tokenizer, dtype):
    """Design section 7: 64 groups of 8, alone, in any batch and in any order: bit-equal where products' rows are."""
    scorer = Scorer(reward_model(tokenizer, dtype=dtype), reward_model(tokenizer, 1, dtype=dtype, width=40))
    check_independence(scorer, random_groups(64, k=8, longest=40), dtype)


@pytest.mark.slow
def test_nor_does_a_score_of_the_built_in_model():
    """Issue 5: 64 groups of 8 at a real model's widths, two heads on one trunk."""
    chat = load_model("smollm2")
    scorer = Scorer(reward_model_from(chat, 0), reward_model_from(chat, 1))
    assert scorer.one_trunk
    check_independence(scorer, random_groups(64, k=8, longest=12, vocab=40_000), torch.float32)


def test_threads_change_rounding_only(scorer):
    """Our own kernels keep every bit; a BLAS without oneDNN's route may split its sums by threads."""
    groups, threads = random_groups(12, k=4, longest=40), torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(logits(scorer.score(groups, tags(groups), 1000)))
    finally:
        torch.set_num_threads(threads)
    assert torch.allclose(found[0], found[1], atol=1e-5) and torch.allclose(found[0], found[2], atol=1e-5)


def test_routing_and_the_best(tokenizer):
    """PPO-1: tagged goes to R_s; untagged to R_h unless sigmoid(R_s) is below 0.15. best is within the group."""
    scorer = Scorer(reward_model(tokenizer), reward_model(tokenizer, 1))
    with torch.no_grad():
        scorer.safety.score.mul_(20)  # spread, so that both routes are taken
    groups = random_groups(30, k=5)
    groups += [PromptGroup(groups[0].prompt, [groups[0].responses[0]] * 3)]
    safe = tags(groups)
    scores = scorer.score(groups, safe, 300)
    routes = set()
    for score, tag in zip(scores, safe, strict=True):
        expected = [s if tag or 1 / (1 + math.exp(-s)) < 0.15 else h
                    for s, h in zip(score.safety, score.helpful, strict=True)]  # fmt: skip
        routes |= {(tag, c == s) for c, s in zip(expected, score.safety, strict=True)}
        assert score.combined == expected and score.best == expected.index(max(expected))
    assert routes == {(True, True), (False, True), (False, False)}
    assert scores[-1].best == 0, "the lowest index of equals"


def test_scores_are_the_models_own(scorer):
    groups = random_groups(7, k=3)
    expected = [model.rewards(pack(groups)).view(7, 3).double() for model in (scorer.safety, scorer.helpful)]
    assert torch.allclose(logits(scorer.score(groups, [False] * 7, 300)), torch.stack(expected), atol=1e-5)


def count_calls(monkeypatch) -> list[tuple[int, int]]:
    """(rows in, rows of its mlp) of each block that runs from here on."""
    calls, mlp = [], Block.mlp
    forward = Block.forward

    def counted(self, x, *args):
        calls.append([x.shape[0], 0])
        return forward(self, x, *args)

    def counted_mlp(self, x, delta):
        calls[-1][1] = x.shape[0]
        return mlp(self, x, delta)

    monkeypatch.setattr(Block, "forward", counted)
    monkeypatch.setattr(Block, "mlp", counted_mlp)
    return calls


def test_one_trunk_is_run_once_and_gives_the_same_bits(tokenizer, monkeypatch):
    """One pass serves two heads on one trunk; the scores are those of two passes."""
    models = reward_model(tokenizer, head=0), reward_model(tokenizer, head=1)
    one = Scorer(*models)
    with monkeypatch.context() as patch:
        patch.setattr(scoring, "same_trunk", lambda a, b: False)
        two = Scorer(*models)
    groups = random_groups(9, k=4)
    calls = count_calls(monkeypatch)
    first = one.score(groups, tags(groups), 10**6)
    once = len(calls)
    assert (one.one_trunk, two.one_trunk) == (True, False)
    assert first == two.score(groups, tags(groups), 10**6)
    assert once == 2 and len(calls) == 3 * once, "two layers, once or twice"


def test_what_is_computed(scorer, monkeypatch):
    """A prompt enters the first block once for its K responses; the last block's mlp sees last rows only."""
    groups = random_groups(6, k=8, longest=30)
    calls = count_calls(monkeypatch)
    scorer.score(groups, [False] * 6, 10**6)
    tokens = sum(len(g.prompt) + sum(map(len, g.responses)) for g in groups)
    layers = [len(scorer.safety.blocks), len(scorer.helpful.blocks)]
    assert len(calls) == sum(layers) and all(rows == tokens for rows, _ in calls)
    expected = [tokens] * (layers[0] - 1) + [48] + [tokens] * (layers[1] - 1) + [48]
    assert [rows for _, rows in calls] == expected


def test_few_last_rows_are_padded(scorer, monkeypatch):
    """Design section 7: no product has fewer than 16 rows, not even with one response."""
    seen, linear = [], gemm.nnf.linear
    onednn = gemm._onednn()
    monkeypatch.setattr(gemm.nnf, "linear", lambda x, *a: (seen.append(x.shape[0]), linear(x, *a))[1])
    if onednn:
        monkeypatch.setattr(
            gemm, "_onednn", lambda: lambda x, *a: (seen.append(x.shape[0]), onednn(x, *a))[1]
        )
    scorer.score([PromptGroup([1, 2], [[3]])], [False], 100)
    assert seen and min(seen) == 16


@pytest.mark.parametrize(
    "z, low, high", [(0.0, 0.5, 0.5), (800.0, 0.9999, 1), (-800.0, 0, 1e-30), (17.0, 0.9999, 1)]
)
def test_probabilities_stay_inside(z, low, high):
    """PPO-2: a score that is read as fp32 is neither 0 nor 1."""
    p = probabilities([z])[0]
    assert low <= p <= high and 0 < p < 1 and 0 < float(torch.tensor(p, dtype=torch.float32)) < 1


def test_logits_come_back_from_probabilities():
    """PPO-2: logit(sigmoid(z)) = z within 1e-6 in float64 for |z| <= 15."""
    zs = [z / 10 for z in range(-150, 151)]
    assert all(
        abs(math.log(p) - math.log1p(-p) - z) < 1e-6 for p, z in zip(probabilities(zs), zs, strict=True)
    )


def test_fault_names_the_model_and_the_response(tokenizer):
    broken = reward_model(tokenizer, 1)
    with torch.no_grad():
        broken.score[0, 0] = float("nan")
    scorer = Scorer(reward_model(tokenizer), broken)
    score = scorer.score(random_groups(1, k=2), [True], 100)[0]
    assert "helpfulness reward model gave nan for response 0" in score.fault()
    assert GroupScore([1.0], [2.0], [1.0], 0).fault() is None


def test_models_that_encode_differently(tokenizer, model_dir):
    from hpsafety.model.tokenizer import Tokenizer

    other = Tokenizer(tokenizer._backend, tokenizer._config | {"chat_template": "{{ messages }}"})
    with pytest.raises(InputError, match="rm-a and rm-b differ in their chat template"):
        Scorer(reward_model(tokenizer), reward_model(other), ("rm-a", "rm-b"))
    with pytest.raises(InputError, match="rm-b: holds no tokenizer"):
        Scorer(reward_model(tokenizer), reward_model(None), ("rm-a", "rm-b"))


def test_a_group_longer_than_the_context(scorer):
    """The shorter context of the two models counts."""
    assert scorer.context == 128
    with pytest.raises(InputError, match=r"with response 1 has \d+ tokens, more than .* context of 128"):
        scorer.encode("a question", ["short", "long " * 30])
    group = scorer.encode("a question", ["yes", ""])
    assert group.responses[1] == [scorer.tokenizer.end_of_turn_id], "an empty answer is its end of turn alone"
