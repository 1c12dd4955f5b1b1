"""Distillation on two ranks. The bug this file must catch: ranks that draw other samples, or a teacher that is sharded
apart from its student."""

import dataclasses
import json
from pathlib import Path

import pytest

from hpsafety.stages import distill
from tests.stages.ranks import run_on_two_ranks
from tests.stages.test_distill import config, data, judges, model_dir

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
    run_on_two_ranks(SCRIPT, two, timeout=400)
    names = [f"samples/{n}.jsonl" for n in ("plain", "none", "generic", "template", "scores")]
    for name in (*names, "decisions.jsonl", "train.jsonl"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes(), name
    assert (tmp_path / "two" / "report.html").is_file()

    def losses(out):
        return [json.loads(line)["loss"] for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]

    assert losses(two.out) == pytest.approx(losses(one.out), abs=1e-4) and len(losses(one.out)) > 1
