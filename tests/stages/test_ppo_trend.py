"""PPO learns (PPO-11). The bug this file must catch: an advantage or a KL penalty of the wrong sign."""

import pytest

from hpsafety.stages import ppo
from tests.stages.test_ppo import config, prompts, rig
from tests.stages.test_sft import metrics

__all__ = ["prompts"]  # fixture
WANTED = 20  # a letter


def share(tokens) -> float:
    """The rigged reward's logit: twice the share of the wanted letter, less one."""
    return 2.0 * sum(token == WANTED for token in tokens) / len(tokens) - 1.0


@pytest.fixture
def trained(model_dir, judges, prompts, tmp_path, monkeypatch):
    """trained(seed, kl_coef) -> metrics of 30 iterations with the rigged reward."""
    rig(monkeypatch, share)

    def train(seed: int, kl_coef: float, **changes) -> list[dict]:
        out = tmp_path / f"run-{seed}-{kl_coef:g}"
        settings = {
            "seed": seed, "kl_coef": kl_coef, "iterations": 30, "batch": 64, "minibatch": 16, "k": 1, "lr": 2e-3,
            "max_new_tokens": 10, "tokens_per_batch": 4096, "eval_every": 30, "checkpoint_every": 0,
        }  # fmt: skip
        ppo.run(config(model_dir, judges, prompts, out, **(settings | changes)))
        return metrics(out)

    return train


def mean(rows, name) -> float:
    return sum(row[name] for row in rows) / len(rows)


ADAPTERS = {"lora_rank": 4, "lr": 2e-2}  # ten times the rate of whole weights


@pytest.mark.parametrize("seed, changes", [(0, {}), (1, {}), (2, {}), (0, ADAPTERS)])
def test_a_rigged_reward_rises(trained, seed, changes):
    """PPO-11: the mean reward of the last five of 30 iterations lies above the first five's, by more than noise."""
    rows = trained(seed, 0.01, **changes)
    first, last = mean(rows[:5], "reward"), mean(rows[-5:], "reward")
    assert last > first + 0.2, (first, last)
    assert mean(rows[-5:], "kl") > 0.05 and {row["ratio_max_first"] for row in rows} == {1.0}


def test_a_larger_coefficient_ends_nearer_to_the_start(trained):
    """PPO-11: a larger KL coefficient ends at a smaller KL."""
    ends = [mean(trained(0, kl_coef)[-5:], "kl") for kl_coef in (0.01, 0.3, 1.0)]
    assert ends[0] > 1.2 * ends[1] and ends[1] > 1.2 * ends[2] > 0, ends
