"""Reward models: their score, and that transformers reads the same. The bug this file must catch: the score read one
token early, because the saved model pads with its own end of turn."""

import json

import pytest
import torch

from hpsafety.data.groups import PromptGroup, pack
from hpsafety.errors import InputError
from hpsafety.model.heads import RewardModel, reward_model_from, same_trunk
from hpsafety.model.io import load_model, save_model
from hpsafety.model.reward_io import load_reward_model, save_reward_model
from tests.stages.conftest import write_tokenizer
from tests.tiny import random_groups, tiny_model


@pytest.mark.parametrize("tied", [True, False])
def test_chat_weights_without_the_token_head(tied):
    """RM-4: no token head, and the other weights equal the chat checkpoint's."""
    chat = tiny_model(tied=tied)
    model = reward_model_from(chat, seed=3)
    weights = dict(model.named_parameters())
    assert "head" not in weights and weights.keys() == {*dict(chat.named_parameters()), "score"} - {"head"}
    assert all(torch.equal(p, weights[n]) for n, p in chat.named_parameters() if n != "head")
    again, other = reward_model_from(chat, seed=3), reward_model_from(chat, seed=4)
    assert torch.equal(model.score, again.score) and not torch.equal(model.score, other.score)


def test_head_is_drawn_with_the_stated_spread():
    """design section 8: normal, std 1/sqrt(D+1)."""
    score = reward_model_from(tiny_model(width=4096)).score
    assert float(score.detach().std() * 4097**0.5) == pytest.approx(1.0, abs=0.05)
    assert abs(float(score.detach().mean())) < 0.002


def test_rewards_are_the_head_on_the_last_rows():
    model, batch = reward_model_from(tiny_model()), pack(random_groups(5, k=3))
    expected = (model(batch).double()[batch.last_rows] @ model.score.double().t())[:, 0]
    assert torch.allclose(model.rewards(batch).double(), expected, atol=1e-5)


def test_one_response_suffices_and_neighbours_change_no_bit():
    """RM-5: one (prompt, response) is enough; other groups and responses beside it change nothing."""
    model, groups = reward_model_from(tiny_model()), random_groups(12, k=4, seed=1)
    together = model.rewards(pack(groups)).view(12, 4)
    for g, group in enumerate(groups):
        for k in range(4):
            alone = model.rewards(pack([PromptGroup(group.prompt, [group.responses[k]])]))
            assert torch.allclose(alone, together[g, k], atol=1e-5)
        assert torch.equal(model.rewards(pack([group])), together[g])


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_reads_the_same_scores(tmp_path, tied):
    """design section 4: LlamaForSequenceClassification, one label, right padding; RM-5's padding bound."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    save_model(tiny_model(tied=tied), tmp_path / "chat")
    write_tokenizer(tmp_path / "chat")
    model = reward_model_from(load_model(str(tmp_path / "chat")))
    save_reward_model(model, tmp_path / "rm")
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "rm")
    end = model.tokenizer.end_of_turn_id
    assert type(theirs).__name__ == "LlamaForSequenceClassification"
    assert (
        theirs.config.id2label == {0: "reward"}
        and theirs.config.pad_token_id == tokenizer.pad_token_id != end
    )
    groups = [
        PromptGroup(g.prompt, [[*r, end] for r in g.responses]) for g in random_groups(6, k=3, vocab=50)
    ]
    groups = [
        PromptGroup([t + 2 for t in g.prompt], [[t + 2 for t in r[:-1]] + [end] for r in g.responses])
        for g in groups
    ]
    rows = [list(g.prompt) + list(r) for g in groups for r in g.responses]
    longest = max(map(len, rows))
    pad = theirs.config.pad_token_id
    ids = torch.tensor([row + [pad] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    with torch.no_grad():
        expected = theirs(input_ids=ids, attention_mask=mask).logits[:, 0]
        assert torch.allclose(model.rewards(pack(groups)), expected, atol=1e-5)


def test_saved_and_loaded_again(tmp_path):
    model = reward_model_from(tiny_model())
    save_reward_model(model, tmp_path / "rm")
    again = load_reward_model(tmp_path / "rm")
    assert (
        isinstance(again, RewardModel) and same_trunk(model, again) and torch.equal(model.score, again.score)
    )
    assert not same_trunk(model, reward_model_from(tiny_model(seed=1)))


def test_what_is_no_reward_model(tmp_path):
    save_model(tiny_model(), tmp_path / "chat")
    with pytest.raises(InputError, match="no reward head .*hpsafety reward"):
        load_reward_model(tmp_path / "chat")
    save_reward_model(reward_model_from(tiny_model()), tmp_path / "rm")
    path = tmp_path / "rm" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"id2label": {"0": "a", "1": "b"}}))
    with pytest.raises(InputError, match="one label, this one has 2"):
        load_reward_model(tmp_path / "rm")
