"""A stage in two processes under torchrun's launcher."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

from tests.stages.test_sft import ROOT


def run_on_two_ranks(script: str, cfg, timeout: float = 240) -> subprocess.CompletedProcess:
    """Runs Python code on 2 gloo ranks, the config as JSON in its first argument; asserts that it ended well."""
    path = Path(cfg.out).parent / "worker.py"
    path.write_text(script)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run = subprocess.run(
        [sys.executable, *launch, str(path), json.dumps(dataclasses.asdict(cfg))], capture_output=True, text=True,
        timeout=timeout, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-6000:]
    return run
