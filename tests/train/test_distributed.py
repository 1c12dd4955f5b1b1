"""torchrun on gloo: more ranks change the result by rounding only, and a checkpoint fits any number of ranks."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest

from hpsafety.train.distributed import _shard_dim
from tests.stages.conftest import model_dir
from tests.stages.test_sft import ROOT, SCRIPT, config, data_file, metrics, model_bytes, run_script
from tests.tiny import tiny_model

__all__ = ["data_file", "model_dir"]  # fixtures


def torchrun(ranks: int, cfg, kill_at: int = 0, number: int = 15) -> subprocess.CompletedProcess:
    script = os.path.join(os.path.dirname(cfg.data[0]), "worker.py")
    with open(script, "w") as handle:
        handle.write(SCRIPT)
    words = [json.dumps(dataclasses.asdict(cfg)), str(kill_at), str(number)]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, script, *words], capture_output=True, text=True, timeout=240, env=env, cwd=ROOT
    )


def losses(out) -> list[float]:
    return [row["loss"] for row in metrics(out)]


def test_ranks_change_rounding_only(model_dir, data_file, tmp_path):
    """2 gloo ranks give the single-process losses over 10 steps within 1e-4; global counts are equal."""
    alone = config(model_dir, data_file, tmp_path / "alone", steps=10)
    assert run_script(alone).returncode == 0
    two = config(model_dir, data_file, tmp_path / "two", steps=10)
    result = torchrun(2, two)
    assert result.returncode == 0, result.stderr[-2000:]
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "alone"), abs=1e-4)
    for a, b in zip(metrics(tmp_path / "two"), metrics(tmp_path / "alone"), strict=True):
        assert (a["tokens"], a["tokens_equiv"]) == (b["tokens"], b["tokens_equiv"])
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
    assert "rank 1: 2 groups" in (tmp_path / "two" / "log.txt").read_text()
    assert model_bytes(tmp_path / "two").keys() == model_bytes(tmp_path / "alone").keys()


def test_ranks_in_bf16(model_dir, data_file, tmp_path):
    """Sharded in bf16 the losses are those of one process as far as bf16 goes: gradients are reduced in fp32."""
    alone = config(model_dir, data_file, tmp_path / "alone", steps=6, precision="bf16")
    assert run_script(alone).returncode == 0
    result = torchrun(2, config(model_dir, data_file, tmp_path / "two", steps=6, precision="bf16"))
    assert result.returncode == 0, result.stderr[-2000:]
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "alone"), rel=2e-2)
    assert metrics(tmp_path / "two")[0]["loss"] == pytest.approx(
        metrics(tmp_path / "alone")[0]["loss"], rel=2e-3
    )


def test_two_rank_checkpoint_resumes_on_one(model_dir, data_file, tmp_path):
    """A run of 2 ranks, stopped by SIGTERM on one of them, goes on alone to the same losses."""
    alone = config(model_dir, data_file, tmp_path / "alone", steps=10)
    assert run_script(alone).returncode == 0
    broken = config(model_dir, data_file, tmp_path / "broken", steps=10)
    stopped = torchrun(2, broken, kill_at=5)
    assert stopped.returncode != 0
    assert (tmp_path / "broken" / "checkpoints" / "step-5" / "trainer.json").exists(), stopped.stderr[-2000:]
    resumed = run_script(broken)
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    assert "resumed from step 5" in (tmp_path / "broken" / "log.txt").read_text()
    assert losses(tmp_path / "broken") == pytest.approx(losses(tmp_path / "alone"), abs=1e-4)


@pytest.mark.slow
def test_four_ranks(model_dir, data_file, tmp_path):
    alone = config(model_dir, data_file, tmp_path / "alone", steps=10, batch=6)
    assert run_script(alone).returncode == 0
    four = config(model_dir, data_file, tmp_path / "four", steps=10, batch=6)
    result = torchrun(4, four)
    assert result.returncode == 0, result.stderr[-2000:]
    assert losses(tmp_path / "four") == pytest.approx(losses(tmp_path / "alone"), abs=1e-4)


def test_shards_are_even_where_they_can_be():
    """qkv (G, J+2, K, D) and gate_up (2, F, D) are cut along a long dimension, not along a short first one."""
    shapes = dict(tiny_model(num_heads=6, num_kv_heads=3).named_parameters())
    for size in (2, 4):
        for name in ("blocks.0.qkv", "blocks.0.gate_up", "embed", "blocks.0.down"):
            p = shapes[name]
            placement = _shard_dim(p, size)
            dim = 0 if placement is None else placement.dim
            assert placement is None or p.shape[dim] % size == 0
            if name != "embed":
                assert p.shape[dim] >= 8, name
