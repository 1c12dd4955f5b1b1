"""`hpsafety pipeline`: what is skipped, done anew and refused, resuming after a kill, two ranks (DATA-5).

The bug this file must catch: a stage that is taken for done though what it was told or reads is another.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hpsafety import cli
from hpsafety.errors import InputError
from hpsafety.pipeline_file import read_pipeline
from hpsafety.pipeline_state import read_state, standings
from hpsafety.train.rundir import sha256
from tests.pipeline.conftest import ROOT


@pytest.fixture
def copy(done, tmp_path):
    """The ended pipeline, to be changed."""
    shutil.copytree(done.parent / "out", tmp_path / "out")
    path = tmp_path / "tiny.toml"
    path.write_text(done.read_text().replace(str(done.parent / "out"), str(tmp_path / "out")))
    return path


def stand(path: Path, force: str | None = None) -> dict[str, str]:
    pipeline = read_pipeline(str(path))
    return {k: str(v) for k, v in standings(pipeline, read_state(pipeline), force).items()}


def models(out: Path) -> dict[str, str]:
    return {
        str(p.relative_to(out)): sha256(p)
        for s in ("sft", "rm")
        for p in sorted((out / s / "model").iterdir())
    }


# ---- running ----


def test_state_and_manifests(done):
    """pipeline.json holds every stage in order with its needs; each has a manifest of its own (DATA-5)."""
    state = json.loads((done.parent / "out" / "pipeline.json").read_text())
    assert [s["name"] for s in state["stages"]] == ["rows", "pairs", "sft", "rm"]
    assert [s["needs"] for s in state["stages"]] == [[], [], ["rows"], ["pairs", "sft"]]
    assert all(s["status"] == "done" and s["seconds"] > 0 for s in state["stages"]) and state["ended"]
    assert state["title"] == "tiny" and state["config"] == done.read_text() and state["machine"]["cpus"]
    manifests = [
        json.loads((done.parent / "out" / s["out"] / "manifest.json").read_text()) for s in state["stages"]
    ]
    assert [m["stage"] for m in manifests] == ["select", "select", "sft", "reward"]
    rows = sha256(done.parent / "out" / "rows" / "rows.jsonl")
    assert manifests[0]["output_hashes"] == {"rows.jsonl": rows} == manifests[2]["input_hashes"]


def test_a_second_call_does_nothing(copy, capsys):
    out = copy.parent / "out"
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file() and p.name != "pipeline.json"}
    assert cli.main(["pipeline", str(copy)]) == 0
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert "0 of 4 stages to do" in capsys.readouterr().err


def test_another_setting_and_all_that_depends_on_it(copy):
    """A stage that was told something else is done anew with its dependents; others stay, execution flags too."""
    text = copy.read_text()
    copy.write_text(text.replace("lr = 1e-3", "lr = 2e-3"))
    found = stand(copy)
    assert found["rows"] == found["pairs"] == "done"
    assert found["sft"] == "anew: lr was 0.001, now 0.002" and found["rm"] == "anew: sft is"
    copy.write_text(text.replace("checkpoint_every = 2", "checkpoint_every = 5"))
    assert set(stand(copy).values()) == {"done"}
    old = models(copy.parent / "out")
    copy.write_text(text.replace("lr = 1e-3", "lr = 2e-3"))
    assert cli.main(["pipeline", str(copy)]) == 0 and set(stand(copy).values()) == {"done"}
    new = models(copy.parent / "out")
    assert new["sft/model/model.safetensors"] != old["sft/model/model.safetensors"]
    copy.write_text(text)
    assert cli.main(["pipeline", str(copy)]) == 0 and models(copy.parent / "out") == old


def test_a_change_that_was_not_come_to_is_not_forgotten(copy, monkeypatch):
    """Killed after the new settings were read and before their stage began, it is still to be done anew."""
    from hpsafety import pipeline

    copy.write_text(copy.read_text().replace("lr = 1e-3", "lr = 2e-3"))
    monkeypatch.setattr(pipeline, "run_stage", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    assert cli.main(["pipeline", str(copy)]) == 130
    assert stand(copy)["sft"].startswith("anew: lr") and stand(copy)["rm"] == "anew: sft is"


def test_another_input(copy, model, tmp_path):
    """DATA-5: a stage whose input files are others is done anew."""
    own = tmp_path / "rows.jsonl"
    own.write_text((copy.parent / "out" / "rows" / "rows.jsonl").read_text())
    copy.write_text(copy.read_text().replace("{rows}/rows.jsonl", str(own)))
    assert cli.main(["pipeline", str(copy)]) == 0 and stand(copy)["sft"] == "done"
    own.write_text("".join(own.read_text().splitlines(keepends=True)[:-1]))
    assert stand(copy)["sft"] == f"anew: {own} has changed" and stand(copy)["rm"] == "anew: sft is"


def test_an_output_changed_by_hand(copy, capsys):
    """It is refused with the file's name and a way on; --force-from does the stage anew, and its dependents."""
    path = copy.parent / "out" / "sft" / "model" / "config.json"
    old = models(copy.parent / "out")
    path.write_text(path.read_text() + " ")
    assert cli.main(["pipeline", str(copy)]) == 2
    line = capsys.readouterr().err
    assert (
        str(path) in line
        and "has been changed" in line
        and "--force-from sft" in line
        and line.count("\n") == 1
    )
    found = stand(copy, "sft")
    assert found["sft"] == "anew: --force-from" and found["rm"] == "anew: sft is" and found["rows"] == "done"
    assert (
        cli.main(["pipeline", str(copy), "--force-from", "sft"]) == 0 and models(copy.parent / "out") == old
    )
    path.unlink()
    assert cli.main(["pipeline", str(copy)]) == 2 and "has gone" in capsys.readouterr().err
    assert cli.main(["pipeline", str(copy), "--force-from", "nothing"]) == 2
    assert "no such stage; stages: rows, pairs, sft, rm" in capsys.readouterr().err


def test_a_failing_stage_is_named_and_goes_on(file, capsys, monkeypatch):
    from hpsafety.stages import reward

    def fails(cfg):
        raise InputError("no such thing")

    real = reward.run
    monkeypatch.setattr(reward, "run", fails)
    assert cli.main(["pipeline", str(file)]) == 2
    assert "hpsafety pipeline: stage rm: no such thing" in capsys.readouterr().err
    state = json.loads((file.parent / "out" / "pipeline.json").read_text())
    assert [s["status"] for s in state["stages"]] == ["done", "done", "done", "failed"] and state[
        "ended"
    ] is None
    monkeypatch.setattr(reward, "run", real)
    assert cli.main(["pipeline", str(file)]) == 0 and stand(file)["rm"] == "done"


@pytest.mark.parametrize("stage", ["rows", "sft", "rm"])
def test_killed_and_run_again(stage, file, done, tmp_path):
    """SIGKILL in a stage; the same command goes on and ends with the same bytes (DATA-5)."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "hpsafety", "pipeline", str(file)]
    child = subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    sign = {
        "rows": out / "rows",
        "sft": out / "sft" / "checkpoints" / "step-4",
        "rm": out / "rm" / "manifest.json",
    }
    deadline = time.monotonic() + 120
    while not sign[stage].exists() and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert "done" not in {
        v for k, v in stand(file).items() if k in ("sft", "rm") and k >= stage and k == "rm"
    }
    assert cli.main(["pipeline", str(file)]) == 0
    assert set(stand(file).values()) == {"done"}
    assert models(out) == models(done.parent / "out")
    assert (out / "rows" / "rows.jsonl").read_bytes() == (
        done.parent / "out" / "rows" / "rows.jsonl"
    ).read_bytes()


def test_what_an_optional_stage_lacks(file, capsys, monkeypatch):
    """A stage whose package is missing is left out and told as skipped; without `optional` it stops the run."""
    from hpsafety.stages import sft

    def lacks(cfg):
        try:
            raise ModuleNotFoundError("No module named 'thing'", name="thing")
        except ModuleNotFoundError:
            raise InputError("it needs the package thing") from None

    monkeypatch.setattr(sft, "run", lacks)
    text = file.read_text().split('[[stage]]\nname = "rm"')[0]
    file.write_text(text)
    assert cli.main(["pipeline", str(file)]) == 2
    file.write_text(text.replace('name = "sft"', 'name = "sft"\noptional = true'))
    assert cli.main(["pipeline", str(file)]) == 0 and "is left out" in capsys.readouterr().err
    entry = json.loads((file.parent / "out" / "pipeline.json").read_text())["stages"][2]
    assert entry["status"] == "skipped" and entry["substituted"] == "it needs the package thing"


def test_two_ranks(file, done):
    """Under torchrun every rank walks the list, and one process group serves all stages."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "hpsafety"]
    run = subprocess.run(
        [sys.executable, *launch, "pipeline", str(file)], cwd=ROOT, capture_output=True, text=True, timeout=240,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    assert set(stand(file).values()) == {"done"}
    rows = [p.parent / "out" / "rows" / "rows.jsonl" for p in (file, done)]
    assert rows[0].read_bytes() == rows[1].read_bytes()
