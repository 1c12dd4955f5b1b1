"""Distillation on two ranks. The bug this file must catch: ranks that draw other samples, or a teacher that is sharded
apart from its student."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hpsafety.stages import distill
from tests.stages.test_distill import config, data, judges, model_dir
from tests.stages.test_sft import ROOT

__all__ = ["data", "judges", "model_dir"]  # fixtures

SCRIPT = """
import json, sys
from hpsafety.config import DistillConfig
from hpsafety.stages import distill
values = json.loads(sys.argv[1])
distill.run(DistillConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("target", ["text", "kl"])
def test_two_ranks_give_the_same_samples(model_dir, judges, data, tmp_path, target):
    """Issue 7: under torchrun with 2 gloo ranks, samples, scores and decisions byte-equal, losses within rounding."""
    one = config(model_dir, judges, data, tmp_path / "one", target=target)
    two = dataclasses.replace(one, out=str(tmp_path / "two"))
    distill.run(one)
    script = tmp_path / "worker.py"
    script.write_text(SCRIPT)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(script),
    ]
    run = subprocess.run(
        [*command, json.dumps(dataclasses.asdict(two))], capture_output=True, text=True, timeout=400, cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-6000:]
    names = [f"samples/{n}.jsonl" for n in ("plain", "none", "generic", "template", "scores")]
    for name in (*names, "decisions.jsonl", "train.jsonl"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes(), name
    assert (tmp_path / "two" / "report.html").is_file()

    def losses(out):
        return [json.loads(line)["loss"] for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]

    assert losses(two.out) == pytest.approx(losses(one.out), abs=1e-4) and len(losses(one.out)) > 1
