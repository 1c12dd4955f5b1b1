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
from hpsafety.model.io import load_model, save_model
from hpsafety.model.reward_io import save_reward_model
from hpsafety.rollout import experience as rollouts
from hpsafety.stages import ppo
from hpsafety.train import ppo_step
from hpsafety.train.rundir import tree_hashes
from tests.stages.test_sft import metrics, model_bytes, stable
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def judges(model_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("judges")
    for seed, name in enumerate(("safety", "helpful")):
        save_reward_model(reward_model_from(load_model(model_dir), seed=seed + 5), folder / name)
    return folder


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
    before = tree_hashes(judges), model_bytes(tmp_path.parent) if False else None
    out = tmp_path / "run"
    ppo.run(config(model_dir, judges, prompts, out))
    rows = metrics(out)
    assert [row["step"] for row in rows] == [2, 4, 6] and [row["iteration"] for row in rows] == [1, 2, 3]
    fields = (
        "step loss lr grad_norm tokens tokens_equiv tokens_per_s elapsed_s peak_rss_mb ratio_max ratio_max_first kl "
        "approx_kl clip_fraction reward_safety reward_helpful share_safety entropy length explained_variance value_loss "
        "time_rollout_s time_score_s time_logprobs_s time_update_s"
    )
    assert all(set(fields.split()) <= row.keys() for row in rows)
    assert [row["ratio_max_first"] for row in rows] == [1.0] * 3 and all(row["ratio_max"] > 1 for row in rows)
    assert rows[0]["kl"] == 0.0 and rows[1]["kl"] != 0.0
    assert [row["lr"] for row in rows] == [1e-3] * 3
    assert max(row["sampler_gap"] for row in rows) < 1e-4
    assert before[0] == tree_hashes(judges)
    manifest = json.loads((out / "manifest.json").read_text())
    counts = manifest["counts"]
    assert manifest["ended"] and counts["prompts"] == 7 and counts["valid_prompts"] == 3
    assert counts["without_is_safety"] == 9 and counts["other_splits"] == 1 and counts["kl_coef"] == 0.01
    assert not list((out / "checkpoints").glob("*/optimizer")) + list((out / "checkpoints").glob("exp*"))
    trained, start = load_model(str(out / "model")), load_model(model_dir)
    assert trained.tokenizer.chat_template == start.tokenizer.chat_template
