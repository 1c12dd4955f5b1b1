"""A run read: pipelines, directories of runs, single runs; what is missing or broken is told and stops nothing."""

import json

import pytest

from hpsafety.errors import InputError
from hpsafety.report.collect import collect, made_by, prompts_of
from tests.report.fake_run import make_run, write


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "run")


def test_a_pipeline(run):
    found = collect(run)
    assert found.title == "a run" and not found.faults
    assert [s.name for s in found.stages][:3] == ["sft", "reward-safety", "ppo"]
    assert [e.model for e in found.evaluated] == ["original", "sft", "ppo"]
    assert found.stages[-1].hash is None and found.stages[-1].substituted == "no larger model"
    assert all(len(s.hash) == 12 for s in found.stages[:-1])
    asked = list(prompts_of(found))
    assert len(asked) == 36 and [name for name, _ in asked[0][1]] == ["original", "sft", "ppo"]


def test_directories_without_a_pipeline_stand_in_order_of_their_start(run):
    (run / "pipeline.json").unlink()
    found = collect(run)
    assert [s.name for s in found.stages[:3]] == ["sft", "reward-safety", "ppo"] and found.title == "run"
    assert [s.status for s in found.stages] == ["done"] * 7


def test_one_run(run):
    found = collect(run / "eval-sft")
    assert [(s.name, s.command) for s in found.stages] == [("eval-sft", "eval")]
    assert [e.model for e in found.evaluated] == ["sft"]


def test_the_card_is_no_part_of_a_run(run):
    (run / "pipeline.json").unlink()
    write(run / "card" / "manifest.json", {"stage": "card", "started": "0"})
    assert "card" not in [s.name for s in collect(run).stages]


@pytest.mark.parametrize(
    "name", ["pipeline.json", "eval-sft/eval.json", "sft/manifest.json", "redteam/redteam.json"]
)
@pytest.mark.parametrize("content", ["", "[]", "{", "null", "[" * 100_000, '{"a": NaN}', "\ud800"])
def test_a_broken_file_is_a_fault_and_no_exception(run, name, content):
    (run / name).write_bytes(content.encode("utf-8", "surrogatepass"))
    found = collect(run)
    assert found.stages and (found.faults or content == '{"a": NaN}')


def test_a_file_changed_by_hand_is_told(run):
    path = run / "eval-sft" / "eval.json"
    content = json.loads(path.read_text())
    content["refused/adversarial"]["value"] = 1.0
    write(path, content)
    assert any("eval-sft/eval.json has changed" in fault for fault in collect(run).faults)


@pytest.mark.parametrize("out", ["../other", "/etc", ".", "a\0b"])
def test_a_stage_lies_below_the_run(run, out):
    content = json.loads((run / "pipeline.json").read_text())
    content["stages"][0]["out"] = out
    write(run / "pipeline.json", content)
    found = collect(run)
    assert found.stages[0].hash is None and "does not lie below" in found.faults[0]


@pytest.mark.parametrize("missing", ["empty", "nothing"])
def test_no_run_at_all(tmp_path, missing):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="give a run"):
        collect(tmp_path / missing)


def test_models_are_named_by_the_stage_that_made_them():
    assert made_by("out/sft/model") == "sft" and made_by("/x/y/ppo/model") == "ppo"
    assert made_by("smollm2") == made_by("some/base-7b") == made_by(None) == made_by("model") == "original"
