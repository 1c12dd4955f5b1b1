"""PPO end to end on a tiny model. The bug this file must catch: old logprobs taken by other calls than those that are
trained (other batches, or the reference's), so that the first ratio is not exactly 1."""

import dataclasses
import json

import pytest
import torch

from hpsafety.config import PPOConfig
from hpsafety.data.records import write_records
from hpsafety.errors import InputError, RunError
from hpsafety.model.heads import reward_model_from
from hpsafety.model.io import load_model
from hpsafety.model.reward_io import save_reward_model
from hpsafety.rollout import experience as rollouts
from hpsafety.safety import ppo_health
from hpsafety.stages import ppo
from hpsafety.train.rundir import tree_hashes
from tests.stages.interrupt import stop_at
from tests.stages.test_sft import metrics, model_bytes, stable


@pytest.fixture
def prompts(tmp_path):
    rows = [{"prompt": f"question {i}?", "id": f"p{i}"} for i in range(7)]
    rows[2] |= {"is_safety": True, "category": "illicit", "attack": "logic"}
    rows += [{"prompt": f"held out {i}?", "id": f"v{i}", "split": "valid"} for i in range(3)]
    rows.append({"prompt": "a test", "split": "test_help"})
    path = tmp_path / "prompts.jsonl"
    write_records(path, rows)
    return str(path)


def config(model_dir, judges, prompts, out, **changes) -> PPOConfig:
    values = {
        "model": model_dir, "data": (prompts,), "out": str(out), "safety_rm": str(judges / "safety"),
        "helpful_rm": str(judges / "helpful"), "iterations": 3, "batch": 8, "minibatch": 4, "k": 2,
        "max_new_tokens": 12, "lr": 1e-3, "device": "cpu", "precision": "fp32", "checkpoint_every": 2,
        "kv_memory": "1MB", "tokens_per_batch": 128, "eval_every": 2, "kl_stop": 50.0,
    }  # fmt: skip
    return PPOConfig(**(values | changes))


def test_run_directory(model_dir, judges, prompts, tmp_path):
    """PPO-4, PPO-9, PPO-10: the first ratio is exactly 1 and the KL of the start exactly 0; frozen models keep their
    bytes; the fields of the contract."""
    before = tree_hashes(judges)
    out = tmp_path / "run"
    ppo.run(config(model_dir, judges, prompts, out))
    rows = metrics(out)
    assert [row["step"] for row in rows] == [2, 4, 6] and [row["iteration"] for row in rows] == [1, 2, 3]
    fields = (
        "step loss lr grad_norm tokens tokens_equiv tokens_per_s elapsed_s peak_rss_mb ratio_max ratio_max_first kl "
        "approx_kl clip_fraction reward_safety reward_helpful share_safety entropy length explained_variance "
        "value_loss time_rollout_s time_score_s time_logprobs_s time_update_s"
    )
    assert all(set(fields.split()) <= row.keys() for row in rows)
    assert [row["ratio_max_first"] for row in rows] == [1.0] * 3 and all(row["ratio_max"] > 1 for row in rows)
    assert rows[0]["kl"] == 0.0 and rows[1]["kl"] != 0.0
    assert [row["lr"] for row in rows] == [1e-3] * 3
    assert max(row["sampler_gap"] for row in rows) < 1e-4
    assert before == tree_hashes(judges)
    manifest = json.loads((out / "manifest.json").read_text())
    counts = manifest["counts"]
    assert manifest["ended"] and counts["prompts"] == 7 and counts["valid_prompts"] == 3
    assert counts["without_is_safety"] == 9 and counts["other_splits"] == 1 and counts["kl_coef"] == 0.01
    assert not list((out / "checkpoints").glob("*/optimizer")) + list((out / "checkpoints").glob("exp*"))
    trained, start = load_model(str(out / "model")), load_model(model_dir)
    assert trained.tokenizer.chat_template == start.tokenizer.chat_template


def rig(monkeypatch, score):
    """Puts `score(tokens) -> logit` in the reward models' place."""

    def judge(scorer, prompts, samples, tokens_per_batch):
        logits = [[score(s.tokens) for s in own] for own in samples]
        scores = [rollouts.GroupScore(row, row, row, 0) for row in logits]
        return [rollouts.Judged(*triple) for triple in zip(prompts, samples, scores, strict=True)]

    monkeypatch.setattr(rollouts, "judge", judge)


def test_full_settings_take_eight_steps_at_a_constant_rate(model_dir, judges, prompts, tmp_path, monkeypatch):
    """PPO-7: with the defaults an iteration is 512 samples, one per prompt draw, in 8 optimiser steps of 64."""
    defaults = {f.name: f.default for f in dataclasses.fields(PPOConfig)}
    names = ("batch", "minibatch", "k", "lr", "clip_ratio", "weight_decay", "clip", "beta1", "beta2", "eps")
    assert [defaults[n] for n in names] == [512, 64, 1, 1e-6, 0.2, 0.1, 1.0, 0.9, 0.95, 1e-5]
    steps, drawn, real, measure = [], [], ppo.update, ppo.measured

    def update(actor, parts, rows, num_tokens, lr, *rest):
        steps.append((lr, sum(len(part.batch.last_rows) for part in parts), num_tokens))
        assert num_tokens == sum(len(part.rows) for part in parts)
        return real(actor, parts, rows, num_tokens, lr, *rest)

    def measured(r, experience, minibatches):
        drawn.append(len(experience.groups))
        return measure(r, experience, minibatches)

    monkeypatch.setattr(ppo, "update", update)
    monkeypatch.setattr(ppo, "measured", measured)
    ppo.run(config(
        model_dir, judges, prompts, tmp_path / "run", batch=512, minibatch=64, k=1, iterations=1, max_new_tokens=2,
        lr=1e-6, tokens_per_batch=2048,
    ))  # fmt: skip
    assert drawn == [512] and [(lr, n) for lr, n, _ in steps] == [(1e-6, 64)] * 8
    (row,) = metrics(tmp_path / "run")
    assert row["step"] == 8 and row["ratio_max_first"] == 1.0


def test_every_prompt_draw_is_its_own(model_dir, judges, prompts, tmp_path):
    """Prompts go round the data in a new seeded order each time; no draw is repeated over the iterations."""
    cfg = config(model_dir, judges, prompts, tmp_path / "run")
    r = ppo.Run(cfg, *[None] * 4, train=list(range(7)), valid=[], kl_coef=0.0, out=None, world=None)
    draws = [draw for index in range(7) for draw in ppo.drawn(r, index)]
    assert [number for number, _ in draws] == list(range(28))
    passes = [[prompt for _, prompt in draws[i : i + 7]] for i in range(0, 28, 7)]
    assert all(sorted(p) == list(range(7)) for p in passes) and len(set(map(tuple, passes))) > 1


def test_kl_coefficient_follows_the_size(model_dir, judges, prompts, tmp_path):
    """PPO-8: 0.01 up to 13B, 0.005 above, a flag overrides; a 13B model has 13.02e9 parameters."""
    cfg = config(model_dir, judges, prompts, tmp_path / "run")
    sizes = (135e6, 6.74e9, 13.02e9, 33.7e9, 69e9)
    assert [ppo.kl_coefficient(cfg, n) for n in sizes] == [0.01, 0.01, 0.01, 0.005, 0.005]
    assert ppo.kl_coefficient(dataclasses.replace(cfg, kl_coef=0.0), 69e9) == 0.0


@pytest.mark.parametrize("interrupted", ["rollout", "minibatch", "boundary"])
def test_interrupted_run_goes_on_to_the_same_bytes(
    interrupted, model_dir, judges, prompts, tmp_path, monkeypatch
):
    """Issue 6: resume after the rollouts of an iteration, after a minibatch in its middle, and between two."""
    cfg = config(model_dir, judges, prompts, tmp_path / "whole", batch=12, checkpoint_every=1)
    ppo.run(cfg)
    cut = dataclasses.replace(cfg, out=str(tmp_path / "cut"))
    at = {"rollout": 3, "minibatch": 5, "boundary": 6}[interrupted]
    made = ppo.sample_and_judge
    stop_at(at, ppo, "update", lambda: ppo.run(cut), monkeypatch)
    sampled = []
    with monkeypatch.context() as patch:
        for module in (ppo, ppo_health):
            patch.setattr(module, "sample_and_judge", lambda *args: sampled.append(1) or made(*args))
        ppo.run(cut)
    log = (tmp_path / "cut" / "log.txt").read_text()
    assert f"resumed from step {at}" in log and "goes on with the samples it had" in log
    # Three iterations and two held-out rewards; what was sampled before is not sampled again.
    assert len(sampled) == {"rollout": 3, "minibatch": 3, "boundary": 1}[interrupted]
    assert model_bytes(tmp_path / "cut") == model_bytes(tmp_path / "whole")
    assert stable(metrics(tmp_path / "cut")) == stable(metrics(tmp_path / "whole"))


def test_early_stopping_restores_the_best(model_dir, judges, prompts, tmp_path, monkeypatch, capsys):
    """PPO-10: greedy answers to the held-out prompts; --patience rewards without a new best end the run."""
    rewards, seen = iter([0.1, 0.4, 0.3, 0.2]), []
    real_best, weights = ppo.checkpoint.save_best, []

    def judge(scorer, prompts_, samples, tokens_per_batch):
        held = len(samples) == 3
        z = next(rewards) if held else 0.0
        if held:
            seen.append([s.tokens for own in samples for s in own])
        logit = [
            torch.logit(torch.tensor(z)).item() if held else float(len(s.tokens))
            for own in samples
            for s in own
        ]
        size = len(samples[0])
        scores = [rollouts.GroupScore(*[logit[i : i + size]] * 3, 0) for i in range(0, len(logit), size)]
        return [rollouts.Judged(*triple) for triple in zip(prompts_, samples, scores, strict=True)]

    def save_best(folder, policy, world):
        weights.append(policy.embed.detach().clone())
        real_best(folder, policy, world)

    monkeypatch.setattr(rollouts, "judge", judge)
    monkeypatch.setattr(ppo.checkpoint, "save_best", save_best)
    cfg = config(model_dir, judges, prompts, tmp_path / "run", iterations=9, eval_every=1, patience=2)
    ppo.run(cfg)
    rows = metrics(tmp_path / "run")
    assert [round(row["valid_reward"], 4) for row in rows] == [0.4, 0.3, 0.2] and len(weights) == 2
    assert torch.equal(load_model(str(tmp_path / "run" / "model")).embed, weights[-1])
    assert "stopping early" in capsys.readouterr().err and seen[0] != seen[-1]
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["counts"]["steps"] == 6 and manifest["counts"]["best_valid_reward"] == pytest.approx(0.4)
    held = manifest["counts"]["held_out"]
    assert [round(held[name]["mean"], 4) for name in ("before", "best", "change")] == [0.1, 0.4, 0.3]
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert (
        page.count("<svg") == 2 and "R_c, held out from 0.400 to 0.200" in page and "0.3000 to 0.3000" in page
    )
    greedy = load_model(model_dir).generate(
        [p.tokens for p in held_out(model_dir, judges, prompts, cfg)], 1, 12, 0.0
    )
    assert seen[0] == [r.tokens for r in greedy]


def held_out(model_dir, judges, prompts, cfg):
    policy, _, scorer = ppo.load_models(cfg, torch.float32, ppo.distributed.World(0, 1, torch.device("cpu")))
    return ppo.encode_prompts(list(ppo.load_rows([prompts], "prompt")), policy, scorer, cfg)[1]


def test_equal_rewards_are_said_once(model_dir, judges, prompts, tmp_path, monkeypatch, capsys):
    """Bad input, issue 6: whitened zeros. With no KL term either, the policy stays as it is."""
    rig(monkeypatch, lambda tokens: 0.7)
    ppo.run(config(model_dir, judges, prompts, tmp_path / "run", kl_coef=0.0, weight_decay=0.0))
    assert capsys.readouterr().err.count("are equal") == 1
    trained, start = load_model(str(tmp_path / "run" / "model")), load_model(model_dir)
    assert all(torch.equal(a, b) for a, b in zip(trained.parameters(), start.parameters(), strict=True))
    assert [row["grad_norm"] for row in metrics(tmp_path / "run")] == [0.0] * 3


@pytest.mark.parametrize("how", ["kl", "nan", "length"])
def test_a_degenerate_run_stops_with_its_last_checkpoint(
    how, model_dir, judges, prompts, tmp_path, monkeypatch
):
    """Issue 6, Build 3: KL over the bound, a loss that is not a number, answers that collapse."""
    cfg = config(model_dir, judges, prompts, tmp_path / "run", iterations=9, eval_every=9, checkpoint_every=1)
    # Each end of an iteration and each middle: without care, only the bad policy's would be left.
    if how == "kl":
        cfg, message = dataclasses.replace(cfg, kl_stop=1e-4), "over --kl-stop 0.0001"
        figures = rollouts.Experience.figures
        kls = iter([0.0, 5e-5, 2e-4])
        monkeypatch.setattr(rollouts.Experience, "figures", lambda *a: figures(*a) | {"kl": next(kls)})
    elif how == "nan":
        real, calls, message = ppo.update, [], "the loss is nan"

        def update(actor, parts, rows, *rest):
            calls.append(1)
            if len(calls) == 4:
                rows.advantages.fill_(float("nan"))
            return real(actor, parts, rows, *rest)

        monkeypatch.setattr(ppo, "update", update)
    else:
        message = "answers have collapsed from 12.0 to 1.0 tokens"
        figures = rollouts.Experience.figures
        lengths = iter([12.0, 12.0, 1.0])
        monkeypatch.setattr(
            rollouts.Experience, "figures", lambda *a: figures(*a) | {"length": next(lengths)}
        )
    with pytest.raises(RunError, match=f"{message}.*the last good one is .*step-2\\."):
        ppo.run(cfg)
    checkpoints = tmp_path / "run" / "checkpoints"
    assert (checkpoints / "step-2" / "optimizer").is_dir() and metrics(tmp_path / "run")
    assert not (tmp_path / "run" / "model").exists()


def test_the_start_and_both_judges_stay_as_they_are(model_dir, judges, prompts, tmp_path, monkeypatch):
    """PPO-9: every byte of the three frozen models in memory is what it was, while policy and critic have moved."""
    kept, real = [], ppo.iterate

    def digest(module):
        return [p.detach().numpy().tobytes() for p in module.parameters()]

    def iterate(r):
        kept.append((r, [digest(m) for m in (r.reference, *r.scorer.trunks, r.actor.policy, r.actor.critic)]))
        return real(r)

    monkeypatch.setattr(ppo, "iterate", iterate)
    path = (
        tmp_path / "unheld.jsonl"
    )  # no held-out rows: else the policy may end as the start, as the best there was
    write_records(path, [{"prompt": f"question {i}?"} for i in range(5)])
    ppo.run(config(model_dir, judges, str(path), tmp_path / "run"))
    ((r, before),) = kept
    assert len(r.scorer.trunks) == 1 and not any(torch.equal(a, b) for a, b in [r.scorer.heads])
    after = [digest(m) for m in (r.reference, *r.scorer.trunks, r.actor.policy, r.actor.critic)]
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, True, False, False]
    assert not any(p.requires_grad for m in (r.reference, *r.scorer.trunks) for p in m.parameters())


def test_critic_from_a_reward_model(model_dir, judges, prompts, tmp_path):
    ppo.run(config(model_dir, judges, prompts, tmp_path / "own", iterations=1))
    ppo.run(config(
        model_dir, judges, prompts, tmp_path / "judge", iterations=1, critic_from=str(judges / "safety")
    ))  # fmt: skip
    own, judge = metrics(tmp_path / "own")[0], metrics(tmp_path / "judge")[0]
    assert own["length"] == judge["length"] and own["value_loss"] != judge["value_loss"]


def test_bad_input(model_dir, judges, prompts, tmp_path):
    def run(**changes):
        ppo.run(config(model_dir, judges, prompts, tmp_path / "run", **changes))

    other = tmp_path / "other"
    save_reward_model(reward_model_from(load_model(model_dir)), other)
    settings = json.loads((other / "tokenizer_config.json").read_text())
    settings["chat_template"] = settings["chat_template"].replace("assistant", "helper")
    (other / "tokenizer_config.json").write_text(json.dumps(settings))
    for changes, message in (
        ({"minibatch": 3}, "--minibatch must be a divisor of --batch 8, got 3"),
        ({"k": 3}, "--k must be a divisor of --minibatch 4, got 3"),
        ({"kl_coef": -0.1}, "--kl-coef must be a number, 0 or greater, got -0.1"),
        ({"temperature": 0.0}, "--temperature must be a number greater than 0"),
        ({"clip_ratio": 0.0}, "--clip-ratio must be greater than 0"),
        ({"kv_memory": "4KB"}, "too small for one sequence.*--kv-memory"),
        ({"max_new_tokens": 500}, "exceed the context"),
        ({"helpful_rm": model_dir}, "no reward head"),
        ({"helpful_rm": str(other)}, "differ in their chat template"),
        ({"safety_rm": str(other), "helpful_rm": str(other)}, "--model .* differ in their chat template"),
        ({"critic_from": str(other)}, "--critic-from .* differ in their chat template"),
    ):
        with pytest.raises(InputError, match=message):
            run(**changes)
        assert not (tmp_path / "run").exists()
    path = tmp_path / "test.jsonl"
    write_records(path, [{"prompt": "a test", "split": "test_help"}])
    with pytest.raises(InputError, match="no prompt is left to train on"):
        run(data=(str(path),))
