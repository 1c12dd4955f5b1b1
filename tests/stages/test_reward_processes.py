"""Reward training in processes of its own: killed and resumed to the bit, and on two ranks. The bug this file must
catch: each rank's loss divided by its own pairs."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hpsafety.model.heads import reward_model_from, same_trunk
from hpsafety.model.io import load_model
from hpsafety.model.reward_io import load_reward_model
from hpsafety.stages import reward
from tests.stages.test_reward import config, data_file, report_of
from tests.stages.test_sft import ROOT, metrics, model_bytes, stable

__all__ = ["data_file"]  # fixture

SCRIPT = """
import json, os, sys
from hpsafety.config import RewardConfig
from hpsafety.stages import reward
from hpsafety.train import loop
cfg, kill_at, number = json.loads(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
cfg["data"] = tuple(cfg["data"])
real, calls = loop.train_step, [0]
def step(*args, **kwargs):
    calls[0] += 1
    if calls[0] == kill_at:
        os.kill(os.getpid(), number)
    return real(*args, **kwargs)
loop.train_step = step
try:
    reward.run(RewardConfig(**cfg))
except KeyboardInterrupt as stop:
    print(stop); sys.exit(130)
"""


def run_script(cfg, kill_at=0, number=signal.SIGKILL, ranks=0) -> subprocess.CompletedProcess:
    script = Path(cfg.out).parent / "worker.py"
    script.write_text(SCRIPT)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks else []
    words = [json.dumps(dataclasses.asdict(cfg)), str(kill_at), str(int(number))]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *launch, str(script), *words],
        capture_output=True,
        text=True,
        timeout=240,
        env=env,
        cwd=ROOT,
    )


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_killed_run_resumes_to_the_bit(number, model_dir, data_file, tmp_path):
    whole = config(model_dir, data_file, tmp_path / "whole")
    reward.run(whole)
    broken = config(model_dir, data_file, tmp_path / "broken")
    killed = run_script(broken, kill_at=5, number=number)
    assert killed.returncode == (-signal.SIGKILL if number == signal.SIGKILL else 130), killed.stderr
    assert not (tmp_path / "broken" / "report.json").exists()
    reward.run(broken)
    step = 3 if number == signal.SIGKILL else 5
    assert f"resumed from step {step}" in (tmp_path / "broken" / "log.txt").read_text()
    assert stable(metrics(tmp_path / "broken")) == stable(metrics(tmp_path / "whole"))
    assert model_bytes(tmp_path / "broken") == model_bytes(tmp_path / "whole")
    for name in ("report.json", "report.html"):
        assert (tmp_path / "broken" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize("head_only", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_two_ranks_give_the_same_losses_and_report(head_only, model_dir, data_file, tmp_path):
    """torchrun with 2 gloo ranks: losses within 1e-4, the held-out scores of one process, the trunk whole."""
    reward.run(config(model_dir, data_file, tmp_path / "alone", head_only=head_only))
    two = config(model_dir, data_file, tmp_path / "two", head_only=head_only)
    done = run_script(two, ranks=2)
    assert done.returncode == 0, done.stderr[-6000:]
    alone, ranks = metrics(tmp_path / "alone"), metrics(tmp_path / "two")
    assert [r["loss"] for r in ranks] == pytest.approx([r["loss"] for r in alone], abs=1e-4)
    assert [r["tokens"] for r in ranks] == [r["tokens"] for r in alone]
    a, b = (report_of(tmp_path / name)["held_out"] for name in ("alone", "two"))
    assert b["loss"] == pytest.approx(a["loss"], abs=1e-4) and b["pairs"] == a["pairs"]
    assert b["mean_score"]["all"] == pytest.approx(a["mean_score"]["all"], abs=1e-4)
    trunk = load_reward_model(tmp_path / "two" / "model")
    assert same_trunk(trunk, reward_model_from(load_model(model_dir))) == head_only
    assert "rank 1: 3 groups" in (tmp_path / "two" / "log.txt").read_text()
