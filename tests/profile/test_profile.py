"""hpsafety profile end to end on a tiny model: the sums add up, the trace is one, nothing else is left, exit codes."""

import gzip
import json
import os
import subprocess
import sys

import pytest

from hpsafety import cli
from hpsafety.config import SFTConfig
from hpsafety.data.groups import PromptGroup
from hpsafety.model.heads import reward_model_from
from hpsafety.profile import command
from hpsafety.train.work import count_tokens, forward_flops, model_flops, passes
from tests.stages.conftest import model_dir
from tests.stages.test_sft import ROOT, data_file
from tests.tiny import tiny_config, tiny_model

__all__ = ["data_file", "model_dir"]  # fixtures


def words(model, data, out, *more) -> list[str]:
    flags = ["--model", model, "--data", data, "--out", str(out), "--batch", "8", "--tokens-per-batch", "128"]
    return ["profile", "sft", *flags, "--device", "cpu", "--precision", "fp32", *more]


def one_line(capsys) -> str:
    err = capsys.readouterr().err
    assert err.endswith("\n") and err.count("\n") == 1, err
    return err.strip()


@pytest.fixture(scope="module")
def profiled(model_dir, tmp_path_factory):
    """(OUT, its profile.json), made with held-out rows and checkpoints asked for, which might leave files."""
    folder = tmp_path_factory.mktemp("profile")
    rows = [{"prompt": f"question {i}?", "response": f"answer {i}.", "split": ("train", "valid")[i % 6 == 0]}
            for i in range(24)]  # fmt: skip
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = (
        "--batch",
        "4",
        "--checkpoint-every",
        "1",
        "--profile-steps=2",
        "--profile-warmup",
        "1",
        "--epochs",
        "1",
    )
    assert cli.main(words(model_dir, str(data), folder / "out", *more)) == 0
    return folder / "out", json.loads((folder / "out" / "profile.json").read_text())


def test_what_is_left(profiled):
    """One trace, one text, one JSON: no model, no checkpoint, no run directory."""
    out, _ = profiled
    assert sorted(p.name for p in out.iterdir()) == ["profile.json", "profile.txt", "trace.json.gz"]
    text = (out / "profile.txt").read_text()
    for word in ("attention_backward", "Python between ops", "share of the limit", "page faults", "tokens/s"):
        assert word in text, text


def test_the_trace_is_chrome_trace_json(profiled):
    out, _ = profiled
    with gzip.open(out / "trace.json.gz", "rt") as handle:
        trace = json.load(handle)
    events = [e for e in trace["traceEvents"] if e["ph"] == "X"]
    names = {e["name"] for e in events}
    assert {"hpsafety_cpu::attention", "hpsafety phase: forward", "hpsafety step", "aten::mm"} <= names
    assert all(
        e["dur"] >= 0 and isinstance(e["ts"], (int, float)) and "pid" in e and "tid" in e for e in events
    )


def test_the_accounting_adds_up(profiled):
    """Kinds sum to the steps' time within 2 %, and that is the steps' wall time within 10 % and 2 ms."""
    rank = profiled[1]["ranks"][0]
    account = rank["account"]
    assert sum(row["us"] for row in account["host"]) == pytest.approx(account["steps_us"], rel=0.02)
    wall = sum(step["seconds"] for step in rank["steps"]) * 1e6
    assert account["steps_us"] == pytest.approx(wall, rel=0.1, abs=2e3)
    phases = {row["phase"] for row in account["host"]}
    assert {"data", "forward", "backward", "optimiser", "metrics"} <= phases and "validation" not in phases
    assert account["communication_us"] == 0 and account["device"] is None


def test_forward_and_backward_are_told_apart(profiled):
    found = {(row["name"], row["phase"]) for row in profiled[1]["ranks"][0]["account"]["host"]}
    assert {("attention", "forward"), ("attention_backward", "backward"), ("rms_norm", "forward")} <= found
    assert ("attention_backward", "forward") not in found and ("attention", "backward") not in found


def test_counts(profiled):
    rank = profiled[1]["ranks"][0]
    assert len(rank["steps"]) == 2 and profiled[1]["stage"] == "sft"
    for step in rank["steps"]:
        assert step["tokens_equiv"] == step["tokens"] > step["trained"] > 0
        assert step["flops"] > 3 * 2 * step["tokens"] * 2 * 24 * 40
    total, seconds = rank["totals"], sum(step["seconds"] for step in rank["steps"])
    assert total["tokens_per_s"] == pytest.approx(sum(s["tokens_equiv"] for s in rank["steps"]) / seconds)
    share = sum(s["flops"] for s in rank["steps"]) / seconds / rank["gemm"]["gflops"] / 1e9
    assert 0 < total["limit_share"] == pytest.approx(share)
    assert len(rank["gemm"]["single_gflops"]) == 2 and rank["gemm"]["rows"] <= 128
    assert max(rank["gemm"]["single_gflops"]) <= rank["gemm"]["gflops"] * 1.001


def test_work_is_counted_from_groups():
    groups = [PromptGroup([1, 2, 3], [[4, 5], [6]]), PromptGroup([1], [[2, 3]], [[False, True]])]
    assert count_tokens(groups) == {"tokens": 9, "tokens_equiv": 12, "trained": 4}
    config = tiny_config()
    linear = 2 * 3 * (24 * 6 * (2 * 4 + 2 * 2) + 3 * 24 * 40)
    attention = 4 * 4 * 6 * 6
    assert forward_flops(config, groups[1]) == 2 * (linear + attention) + 2 * 24 * 67
    chat, model = tiny_model(), reward_model_from(tiny_model())
    assert model_flops(chat, groups[1]) == forward_flops(config, groups[1])
    assert model_flops(model, groups[1]) == 2 * (linear + attention), "a reward model has no token head"
    assert passes(model) == 3
    for block in model.blocks:
        block.requires_grad_(False)
    assert passes(model) == 1, "backward does not run through a frozen trunk"


def test_an_earlier_profile_is_written_over(profiled, model_dir, data_file):
    out, before = profiled
    assert cli.main(words(model_dir, data_file, out, "--profile-steps", "1", "--profile-warmup", "0")) == 0
    assert len(json.loads((out / "profile.json").read_text())["ranks"][0]["steps"]) == 1
    (out / "profile.json").write_text(json.dumps(before))  # the other tests of this module read it


@pytest.mark.parametrize(
    "args, expected",
    [
        (["profile"], "give a stage after hpsafety profile: sft"),
        (["profile", "--model", "m"], "give a stage after hpsafety profile: sft"),
        (["profile", "stf"], "no stage 'stf' to profile; did you mean sft? See hpsafety profile --help"),
        (["profile", "bench"], "no stage 'bench' to profile; there are: "),
        (["profile", "sft"], "--model is missing"),
        (["profile", "sft", "--profile-steps", "0"], "--profile-steps must be at least 1, got 0"),
        (["profile", "sft", "--profile-steps"], "--profile-steps: expected one argument"),
        (["profile", "sft", "--profile-stpes", "2"], "unknown flag --profile-stpes"),
    ],
)
def test_usage_errors_are_one_line_and_exit_2(capsys, args, expected):
    assert cli.main(args) == 2
    line = one_line(capsys)
    assert line.startswith("hpsafety profile: ") and expected in line


def test_out_that_is_no_profile_is_left_alone(model_dir, data_file, tmp_path, capsys):
    for out in (tmp_path / "run", tmp_path / "file"):
        if out.name == "run":
            out.mkdir()
            (out / "manifest.json").write_text("{}")
        else:
            out.write_text("x")
        assert cli.main(words(model_dir, data_file, out)) == 2
        assert f"{out}: --out " in one_line(capsys)
    assert (tmp_path / "run" / "manifest.json").read_text() == "{}"


def test_a_stage_that_ends_too_early(model_dir, data_file, tmp_path, monkeypatch, capsys):
    """A stage whose loop has fewer steps than are wanted: one line, exit 2, no scratch left."""
    import types

    from hpsafety.train import phases

    def short(cfg):
        for _ in phases.steps(range(2)):
            pass

    module = types.ModuleType("hpsafety.planted")
    module.run = short
    monkeypatch.setitem(sys.modules, "hpsafety.planted", module)
    monkeypatch.setitem(cli.COMMANDS, "sft", ("summary", "SFTConfig", "hpsafety.planted:run"))
    monkeypatch.setattr(command, "stage_names", lambda commands: ["sft"])
    assert cli.main(words(model_dir, data_file, tmp_path / "out")) == 2
    assert "sft ended after 2 steps, but 4 were to be run" in one_line(capsys)
    assert list((tmp_path / "out").iterdir()) == []


def test_help(capsys):
    assert cli.main(["profile", "--help"]) == 0
    text = capsys.readouterr().out
    assert "stages: sft" in text and "--profile-steps N" in text
    assert cli.main(["profile", "sft", "--help"]) == 0
    assert "--tokens-per-batch" in capsys.readouterr().out


def test_our_flags_are_taken_out_of_the_stages():
    stage, settings, cfg = command.parse(
        ["sft", "--model", "m", "--profile-steps", "5", "--data", "a", "b", "--out", "o"], cli.COMMANDS
    )
    assert (stage, settings.profile_steps, settings.profile_warmup) == ("sft", 5, 1)
    assert cfg == SFTConfig(model="m", data=("a", "b"), out="o")


def test_two_ranks(model_dir, data_file, tmp_path):
    """gloo: a trace of each rank, a table over ranks, the slowest named, exposed communication between 0 and 1."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    args = words(model_dir, data_file, tmp_path / "out", "--profile-steps", "2")
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, "-m", "hpsafety", *args], cwd=ROOT, env=env, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-2000:]
    names = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert names == ["profile.json", "profile.txt", "trace_rank0.json.gz", "trace_rank1.json.gz"]
    assert done.stdout.count("slowest: rank ") == 1
    found = json.loads((tmp_path / "out" / "profile.json").read_text())
    assert [rank["rank"] for rank in found["ranks"]] == [0, 1] and found["slowest_rank"] in (0, 1)
    for rank in found["ranks"]:
        assert 0 < rank["totals"]["exposed_communication_share"] < 1
        assert sum(r["us"] for r in rank["account"]["host"]) == pytest.approx(
            rank["account"]["steps_us"], rel=0.02
        )
    tokens = [sum(s["tokens"] for s in rank["steps"]) for rank in found["ranks"]]
    assert all(tokens)
