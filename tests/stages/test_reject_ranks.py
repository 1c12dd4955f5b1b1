"""Rejection sampling on two ranks. The bug this file must catch: ranks that draw other samples than one process."""

import dataclasses
import json
from pathlib import Path

import pytest

from hpsafety.stages import reject
from tests.stages.ranks import run_on_two_ranks
from tests.stages.test_reject import config, prompts

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
    run_on_two_ranks(SCRIPT, two)
    for name in ("search-0.5", "search-1", "samples", "scores", "selected"):
        path = Path("iteration-1") / f"{name}.jsonl"
        assert (tmp_path / "two" / path).read_bytes() == (tmp_path / "one" / path).read_bytes(), name

    def losses(out):
        return [json.loads(line)["loss"] for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]

    assert losses(two.out) == pytest.approx(losses(one.out), abs=1e-4)
