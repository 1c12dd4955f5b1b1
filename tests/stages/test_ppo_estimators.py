"""PPO without a critic, --preset and --adaptive-kl, end to end on a tiny model. The bug this file must catch: a state
(the coefficient, a critic that is not there) that a resumed run does not find as it was."""

import dataclasses

import pytest

from hpsafety import cli, flags
from hpsafety.config import PPOConfig
from hpsafety.config_ppo import LLAMA2
from hpsafety.errors import InputError
from hpsafety.rollout.advantages import adapted
from hpsafety.safety import ppo_setup
from hpsafety.stages import ppo
from tests.stages.interrupt import stop_at
from tests.stages.test_ppo import config, prompts, rig
from tests.stages.test_ppo_trend import mean, share
from tests.stages.test_sft import metrics, model_bytes, stable

__all__ = ["prompts"]  # fixture


@pytest.mark.parametrize("advantages", ["group", "rloo"])
def test_no_critic_is_made(advantages, model_dir, judges, prompts, tmp_path, monkeypatch):
    """PPO-4 without a critic: ratio exactly 1; nothing of a value in metrics, checkpoints and rollouts."""
    monkeypatch.setattr(ppo_setup, "value_model_from", None)  # loading one would fail
    monkeypatch.setattr(ppo.checkpoint, "drop_training_state", lambda folder: None)
    out = tmp_path / "run"
    ppo.run(config(model_dir, judges, prompts, out, advantages=advantages, eval_every=9))
    rows = metrics(out)
    assert [row["ratio_max_first"] for row in rows] == [1.0] * 3 and rows[0]["kl"] == 0.0 != rows[1]["kl"]
    assert all(row["loss"] == row["policy_loss"] and row["grad_norm"] > 0 for row in rows)
    gone = {"value_loss", "grad_norm_value", "explained_variance"}
    assert not gone & set().union(*rows)
    checkpoints = list((out / "checkpoints").rglob("*.safetensors"))
    assert any(path.name.startswith("experience") for path in checkpoints) and len(checkpoints) > 4
    assert not any(b"critic" in path.read_bytes() or b'"values"' in path.read_bytes() for path in checkpoints)


@pytest.mark.parametrize("advantages", ["gae", "group", "rloo"])
def test_resumes_in_mid_iteration_to_the_same_bytes(
    advantages, model_dir, judges, prompts, tmp_path, monkeypatch
):
    """Stopped after a minibatch in the middle of the third iteration; the KL coefficient has moved by then."""
    cfg = config(
        model_dir, judges, prompts, tmp_path / "whole", advantages=advantages, checkpoint_every=5, adaptive_kl=0.02,
        kl_coef=0.3, eval_every=9,
    )  # fmt: skip
    ppo.run(cfg)
    cut = dataclasses.replace(cfg, out=str(tmp_path / "cut"))
    stop_at(5, ppo, "update", lambda: ppo.run(cut), monkeypatch)
    ppo.run(cut)
    assert "resumed from step 5" in (tmp_path / "cut" / "log.txt").read_text()
    assert model_bytes(tmp_path / "cut") == model_bytes(tmp_path / "whole")
    rows = metrics(tmp_path / "whole")
    assert stable(metrics(tmp_path / "cut")) == stable(rows)
    # kl_coef is the one an iteration used; the next one's follows from this one's KL.
    used = [row["kl_coef"] for row in rows]
    assert used[0] == 0.3 and len(set(used)) > 2
    assert used[1:] == [adapted(row["kl_coef"], row["kl"], 0.02) for row in rows[:-1]]


@pytest.fixture
def trained(model_dir, judges, prompts, tmp_path, monkeypatch):
    """trained(**changes) -> metrics of 12 iterations with the rigged reward of test_ppo_trend."""
    rig(monkeypatch, share)

    def train(**changes) -> list[dict]:
        out = tmp_path / "-".join(map(str, changes.values()))
        ppo.run(config(
            model_dir, judges, prompts, out, iterations=12, batch=64, minibatch=16, k=4, max_new_tokens=10, lr=4e-3,
            tokens_per_batch=4096, eval_every=30, checkpoint_every=0, **changes,
        ))  # fmt: skip
        return metrics(out)

    return train


@pytest.mark.parametrize("advantages", ["group", "rloo"])
def test_learns_and_keeps_near_the_start(advantages, trained):
    """PPO-11 without a critic: the rigged reward rises, by more than noise, and a larger coefficient ends at a smaller
    KL and a smaller reward."""
    near, far = (trained(advantages=advantages, kl_coef=c) for c in (1.0, 0.01))
    first, last = mean(far[:2], "reward"), mean(far[-3:], "reward")
    assert last > first + 0.15, (first, last)
    ends = [mean(rows[-3:], "kl") for rows in (near, far)]
    print(f"{advantages}: reward {first:.3f} to {last:.3f}; KL {ends[1]:.3f} at 0.01, {ends[0]:.3f} at 1")
    assert ends[1] > 1.5 * ends[0] > 0, ends


def test_preset(capsys, model_dir, judges, prompts, tmp_path):
    """PPO-7, PPO-8: the preset is the paper's settings, flags override it, and the log says which."""
    needed = ["--model", "m", "--data", "d", "--out", "o", "--safety-rm", "s", "--helpful-rm", "h"]
    parse = lambda *args: flags.parse(PPOConfig, "hpsafety ppo", "", [*needed, *args])  # noqa: E731
    plain, full = parse(), parse("--preset", "llama2")
    assert {name: getattr(full, name) for name in LLAMA2} == {
        "batch": 512, "minibatch": 64, "k": 1, "lr": 1e-6, "kl_coef": None, "adaptive_kl": None, "clip_ratio": 0.2,
        "weight_decay": 0.1, "clip": 1.0, "beta1": 0.9, "beta2": 0.95, "eps": 1e-5,
    }  # fmt: skip
    assert dataclasses.replace(full, preset=None) == plain and full.preset == "llama2" and not full.departures
    other = parse("--batch", "128", "--preset", "llama2", "--kl-coef", "0.1")
    assert (other.batch, other.minibatch) == (128, 64) and other.departures == {"batch": 128, "kl_coef": 0.1}
    assert ppo.preset_note(plain) == "" and ppo.preset_note(full) == "preset llama2; "
    assert cli.main(["ppo", *needed, "--preset", "llama3"]) == 2 and "--preset" in capsys.readouterr().err
    ppo.run(config(model_dir, judges, prompts, tmp_path / "run", preset="llama2", iterations=1, kl_coef=0.05))
    said = "preset llama2, but for batch 8, minibatch 4, k 2, lr 0.001, kl_coef 0.05;"
    assert said in (tmp_path / "run" / "log.txt").read_text()


def test_bad_input(model_dir, judges, prompts, tmp_path):
    for changes, message in (
        ({"advantages": "group", "k": 1}, "--k must be at least 2 with --advantages group, got 1"),
        (
            {"advantages": "rloo", "critic_from": "d"},
            "--critic-from needs --advantages gae: rloo has no critic",
        ),
        ({"advantages": "gea"}, "--advantages must be gae, group or rloo, got 'gea'"),
        ({"adaptive_kl": 0.0}, "--adaptive-kl must be a number greater than 0, got 0.0"),
        ({"adaptive_kl": float("nan")}, "--adaptive-kl must be a number greater than 0, got nan"),
        ({"adaptive_kl": 0.1, "kl_coef": 0.0}, "--kl-coef must be greater than 0, got 0"),
    ):
        with pytest.raises(InputError, match=message):
            config(model_dir, judges, prompts, tmp_path / "run", **changes)
