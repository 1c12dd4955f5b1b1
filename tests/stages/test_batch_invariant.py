"""ppo and sample with --batch-invariant (issue 6, Build 6). The bug this file must catch: a side that does not hear the
flag, so that sampled and trained logprobs are not the same bits."""

import dataclasses

import pytest
import torch

from hpsafety.config import SampleConfig
from hpsafety.data.chat import encode_prompt
from hpsafety.data.groups import PromptGroup, pack
from hpsafety.data.records import read_records
from hpsafety.model.io import load_model
from hpsafety.rollout import invariance
from hpsafety.stages import ppo, sample
from tests.stages.test_ppo import config, prompts
from tests.stages.test_sft import metrics

__all__ = ["prompts"]  # fixture


@pytest.fixture(autouse=True)
def rows_are_bit_equal(model_dir):
    for dtype in (torch.float32, torch.bfloat16):
        if why := invariance.fault(load_model(model_dir, dtype)):
            pytest.skip(why)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("k", [1, 2])
def test_the_sampler_gap_is_zero(precision, k, model_dir, judges, prompts, tmp_path, capsys):
    """PPO-4: in every iteration, on weights that were just updated; the default's is not."""
    flags = {"precision": precision, "k": k, "max_new_tokens": 30, "iterations": 2, "eval_every": 9}
    ppo.run(config(model_dir, judges, prompts, tmp_path / "run", batch_invariant=True, **flags))
    rows = metrics(tmp_path / "run")
    assert [row["sampler_gap"] for row in rows] == [
        0.0
    ] * 2 and "--batch-invariant" not in capsys.readouterr().err
    assert [row["ratio_max_first"] for row in rows] == [1.0] * 2 and all(row["ratio_max"] > 1 for row in rows)
    ppo.run(config(model_dir, judges, prompts, tmp_path / "default", **flags))
    assert metrics(tmp_path / "default")[0]["sampler_gap"] > 0


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_tokens_per_batch_changes_no_logprob(precision, model_dir, judges, prompts, tmp_path, monkeypatch):
    """Old and reference logprobs, entropies and values: the same bits for any micro-batches, also with k = 1."""
    real, taken = ppo.measured, []

    def measured(r, experience, minibatches):
        sizes = [len(part.batch.groups) for parts in minibatches for part in parts]
        taken.append((sizes, real(r, experience, minibatches)))
        return taken[-1][1]

    monkeypatch.setattr(ppo, "measured", measured)
    cfg = config(
        model_dir, judges, prompts, tmp_path / "a", k=1, iterations=1, precision=precision, batch_invariant=True,
        tokens_per_batch=1, max_new_tokens=30,
    )  # fmt: skip
    ppo.run(cfg)
    ppo.run(dataclasses.replace(cfg, out=str(tmp_path / "b"), tokens_per_batch=4096))
    (alone, one), (together, other) = taken
    assert set(alone) == {1} and set(together) == {4} and one.groups == other.groups
    for name in ("sampler_logprobs", "old_logprobs", "entropy", "ref_logprobs", "values"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name


def test_ppo_says_what_cannot_hold(model_dir, judges, prompts, tmp_path, monkeypatch, capsys):
    """One line, and the run goes on."""
    monkeypatch.setattr(invariance, "fault", lambda model: "rows depend on the weather")
    for invariant, count in ((True, 1), (False, 0)):
        out = tmp_path / str(count)
        ppo.run(config(model_dir, judges, prompts, out, iterations=1, batch_invariant=invariant))
        assert (
            capsys.readouterr().err.count("cannot hold to the bit here: rows depend on the weather") == count
        )
        assert (out / "model" / "config.json").exists()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_written_logprobs_are_the_trainers(precision, model_dir, prompts, tmp_path, capsys):
    """What `sample` writes is the fp32 number of the training pass, to the last bit, at the sampling temperature."""
    cfg = SampleConfig(
        model=model_dir, data=(prompts,), out=str(tmp_path / "groups.jsonl"), k=3, max_new_tokens=30, device="cpu",
        precision=precision, temperature=0.7, top_p=0.9, batch_invariant=True,
    )  # fmt: skip
    sample.run(cfg)
    assert "logprobs are the trainer's to the bit" in capsys.readouterr().err
    model = load_model(model_dir, torch.float32 if precision == "fp32" else torch.bfloat16)
    rows = read_records(cfg.out, "group").rows
    tokens = [[sample["tokens"] for sample in row["samples"]] for row in rows]
    prompt_ids = [encode_prompt(model.tokenizer, row["prompt"]) for row in rows]
    groups = [PromptGroup(*pair) for pair in zip(prompt_ids, tokens, strict=True)]
    written = torch.tensor([x for row in rows for s in row["samples"] for x in s["logprobs"]])
    with torch.no_grad():
        assert torch.equal(written, model.logprobs(pack(groups, join_single=False), 0.7))
