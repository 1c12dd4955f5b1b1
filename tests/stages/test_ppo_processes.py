"""PPO in processes of its own: killed and resumed to the bit, and on two ranks. The bug this file must catch: rollouts
or whitening that depend on the rank."""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hpsafety.stages import ppo
from tests.stages.test_ppo import config, prompts
from tests.stages.test_sft import ROOT, metrics, model_bytes, stable

__all__ = ["prompts"]  # fixture

SCRIPT = """
import json, sys
from hpsafety.config import PPOConfig
from hpsafety.rollout import experience
from hpsafety.stages import ppo
values, log = json.loads(sys.argv[1]), sys.argv[2]
real = experience.sample
def sample(model, requests, k, settings):
    out = real(model, requests, k, settings)
    if log:
        with open(log, "a") as handle:  # one short line a write, so that ranks do not cut each other's
            for samples in out:
                for s in samples:
                    handle.write(json.dumps([settings.temperature, s.prompt_index, s.sample_index, s.tokens]) + "\\n")
                    handle.flush()
    return out
experience.sample = sample
try:
    ppo.run(PPOConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}))
except KeyboardInterrupt as stop:
    print(stop); sys.exit(130)
"""
ENV = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def start(cfg, log="", ranks=0, script=SCRIPT) -> subprocess.Popen:
    path = Path(cfg.out).parent / "worker.py"
    path.write_text(script)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks else []
    words = [json.dumps(dataclasses.asdict(cfg)), str(log)]
    return subprocess.Popen(
        [sys.executable, *launch, str(path), *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=ENV, cwd=ROOT,
    )  # fmt: skip


def finish(process: subprocess.Popen) -> None:
    _, err = process.communicate(timeout=240)
    assert process.returncode == 0, err[-3000:]


def kill_somewhere(cfg, number: int, draw: random.Random) -> float:
    """Starts the run, signals it at a random moment after its first metrics line; its exit code."""
    process = start(cfg)
    lines, until = Path(cfg.out) / "metrics.jsonl", time.monotonic() + 60
    before = lines.read_text().count("\n") if lines.exists() else 0
    while process.poll() is None and time.monotonic() < until:
        if lines.exists() and lines.read_text().count("\n") != before:
            time.sleep(draw.uniform(0.0, 0.3))
            break
        time.sleep(0.005)
    process.send_signal(number)
    process.communicate(timeout=60)
    return process.returncode


@pytest.mark.parametrize(
    "number, kills",
    [(signal.SIGKILL, 1), (signal.SIGTERM, 1), pytest.param(signal.SIGKILL, 5, marks=pytest.mark.slow)],
)
def test_killed_at_random_moments_and_resumed(number, kills, model_dir, judges, prompts, tmp_path):
    """Issue 6: kill -9 at five random moments; model/ is byte-equal to the uninterrupted run's, metrics are equal."""
    whole = config(
        model_dir, judges, prompts, tmp_path / "whole", iterations=40, batch=16, checkpoint_every=1, lr=1e-4
    )
    ppo.run(whole)
    broken = dataclasses.replace(whole, out=str(tmp_path / "broken"))
    draw = random.Random(kills)
    codes = [kill_somewhere(broken, number, draw) for _ in range(kills)]
    assert set(codes) == {-signal.SIGKILL if number == signal.SIGKILL else 130}, codes
    ppo.run(broken)
    assert (tmp_path / "broken" / "log.txt").read_text().count("resumed from step") == kills
    assert model_bytes(tmp_path / "broken") == model_bytes(tmp_path / "whole")
    assert stable(metrics(tmp_path / "broken")) == stable(metrics(tmp_path / "whole"))


@pytest.mark.parametrize(
    "advantages", ["gae", *(pytest.param(name, marks=pytest.mark.slow) for name in ("group", "rloo"))]
)
def test_two_ranks_draw_the_same_samples(advantages, model_dir, judges, prompts, tmp_path):
    """Issue 6: under torchrun with 2 gloo ranks the single-process losses over 5 iterations within 1e-4, and the same
    rollouts."""
    one = config(
        model_dir,
        judges,
        prompts,
        tmp_path / "one",
        iterations=5,
        lr=1e-4,
        advantages=advantages,
        critic_from=str(judges / "safety") if advantages == "gae" else None,
        adaptive_kl=0.05,
    )
    two = dataclasses.replace(one, out=str(tmp_path / "two"))
    first, second = start(one, tmp_path / "one.log"), start(two, tmp_path / "two.log", ranks=2)
    finish(first)
    finish(second)

    def drawn(name):
        return sorted((tmp_path / f"{name}.log").read_text().splitlines())

    assert len(drawn("one")) == 5 * 8 + 3 * 4 and drawn("two") == drawn("one")
    alone, ranks = metrics(one.out), metrics(two.out)
    for name in ("loss", "reward", "kl", "kl_coef", "value_loss", "valid_reward", "ratio_max"):
        got, wanted = ([row[name] for row in rows if name in row] for rows in (ranks, alone))
        assert got == pytest.approx(wanted, abs=1e-4), name
    for name in ("tokens", "tokens_equiv", "length", "ratio_max_first"):
        assert [row[name] for row in ranks] == [row[name] for row in alone], name
    assert [row["grad_norm"] for row in ranks] == pytest.approx([row["grad_norm"] for row in alone], rel=1e-3)
    assert "rank 1: 2 groups" in (tmp_path / "two" / "log.txt").read_text()


@pytest.mark.slow
def test_two_rank_checkpoint_resumes_on_one(model_dir, judges, prompts, tmp_path):
    """Stopped in the middle of an iteration on two ranks, the run goes on alone with the samples it had."""
    one = config(
        model_dir, judges, prompts, tmp_path / "one", iterations=60, batch=16, checkpoint_every=1, lr=1e-4
    )
    two = dataclasses.replace(one, out=str(tmp_path / "two"))
    process = start(two, ranks=2)
    until = time.monotonic() + 120
    while not list(Path(two.out).glob("checkpoints/step-*")) and time.monotonic() < until:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    assert process.returncode != 0
    ppo.run(one)
    ppo.run(two)
    assert "resumed from step" in (tmp_path / "two" / "log.txt").read_text()
    assert [r["loss"] for r in metrics(two.out)] == pytest.approx(
        [r["loss"] for r in metrics(one.out)], abs=1e-3
    )
