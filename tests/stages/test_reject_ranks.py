"""Rejection sampling on two ranks. The bug this file must catch: ranks that draw other samples than one process."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hpsafety.stages import reject
from tests.stages.test_reject import config, prompts
from tests.stages.test_sft import ROOT

__all__ = ["prompts"]  # fixture

SCRIPT = """
import json, sys
from hpsafety.config import RejectConfig
from hpsafety.stages import reject
values = json.loads(sys.argv[1])
reject.run(RejectConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}))
"""


def test_two_ranks_give_the_same_samples(model_dir, judges, prompts, tmp_path):
    """Issue 5: under torchrun with 2 gloo ranks, samples and scores byte-equal, the losses within rounding."""
    one = config(model_dir, judges, prompts, tmp_path / "one", temperatures=(0.5, 1.0))
    two = dataclasses.replace(one, out=str(tmp_path / "two"))
    reject.run(one)
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
        [*command, json.dumps(dataclasses.asdict(two))], capture_output=True, text=True, timeout=240, cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    for name in ("search-0.5", "search-1", "samples", "scores", "selected"):
        path = Path("iteration-1") / f"{name}.jsonl"
        assert (tmp_path / "two" / path).read_bytes() == (tmp_path / "one" / path).read_bytes(), name

    def losses(out):
        return [json.loads(line)["loss"] for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]

    assert losses(two.out) == pytest.approx(losses(one.out), abs=1e-4)
