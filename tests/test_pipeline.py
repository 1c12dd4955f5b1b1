"""`hpsafety pipeline`: order and references, what is skipped, done anew and refused, resuming after a kill (DATA-5).

The bug this file must catch: a stage that is taken for done though what it was told or reads is another.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hpsafety import cli
from hpsafety.errors import InputError
from hpsafety.model.io import save_model
from hpsafety.pipeline_file import read_pipeline
from hpsafety.pipeline_state import read_state, standings
from hpsafety.train.rundir import sha256
from tests.stages.conftest import write_tokenizer
from tests.tiny import tiny_model

ROOT = Path(__file__).resolve().parent.parent
TOML = """
[pipeline]
title = "tiny"
out = "{out}"
device = "cpu"
precision = "fp32"

[[stage]]
name = "rows"
run = "select"
data = ["{{demo}}/train.jsonl"]
model = "{model}"
tokens = 3000

[[stage]]
name = "pairs"
run = "select"
record = "preference"
data = ["{{demo}}/preferences.jsonl"]
model = "{model}"
tokens = 6000
shares = [1, 1]
valid = 4

[[stage]]
name = "sft"
run = "sft"
model = "{model}"
data = ["{{rows}}/rows.jsonl"]
batch = 2
epochs = 1
lr = 1e-3
checkpoint_every = 2

[[stage]]
name = "rm"
run = "reward"
kind = "safety"
model = "{{sft}}/model"
data = ["{{pairs}}/rows.jsonl"]
batch = 4
steps = 2
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny"
    save_model(tiny_model(seed=2, max_positions=2048), str(folder))
    write_tokenizer(folder)
    return str(folder)


@pytest.fixture
def file(tmp_path, model):
    path = tmp_path / "tiny.toml"
    path.write_text(TOML.format(out=tmp_path / "out", model=model))
    return path


@pytest.fixture(scope="module")
def done(tmp_path_factory, model):
    """A pipeline that has ended: its file, in a folder that a test may copy."""
    folder = tmp_path_factory.mktemp("done")
    path = folder / "tiny.toml"
    path.write_text(TOML.format(out=folder / "out", model=model))
    assert cli.main(["pipeline", str(path)]) == 0
    return path


@pytest.fixture
def copy(done, tmp_path):
    """The ended pipeline, to be changed."""
    import shutil

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


# ---- the file ----

STAGE = '[[stage]]\nname = "{}"\nrun = "sft"\nmodel = "{}"\ndata = ["d.jsonl"]\n'


@pytest.mark.parametrize(
    "text, told",
    [
        ("", "a pipeline needs stages"),
        ("[[stage]\n", "is not valid TOML"),
        ("[pipelines]\n", "unknown table 'pipelines'; did you mean 'pipeline'?"),
        ("[[stage]]\nrun = 'sft'\n", "stage number 1: name is missing"),
        ("[[stage]]\nname = '../x'\nrun = 'sft'\n", "name must be small letters"),
        ("[[stage]]\nname = 'out'\nrun = 'sft'\n", "the name is taken"),
        ("[[stage]]\nname = 'a'\n", "stage 'a': run is missing"),
        ("[[stage]]\nname = 'a'\nrun = 'stf'\n", "names no command of a pipeline: 'stf'; did you mean 'sft'?"),
        ("[[stage]]\nname = 'a'\nrun = 'chat'\n", "names no command of a pipeline: 'chat'"),
        (STAGE.format("a", "m") + "lrr = 1.0\n", "stage 'a': unknown key 'lrr'; did you mean 'lr'?"),
        (STAGE.format("a", "m") + "lr = 'x'\n", "stage 'a': key 'lr' must be a number, got 'x'"),
        (STAGE.format("a", "m") + "lr = -1.0\n", "stage 'a': --lr must be a number greater than 0, got -1.0"),
        (STAGE.format("a", "m") + "out = 'x'\n", "stage 'a': out is given by the pipeline"),
        ("[[stage]]\nname = 'a'\nrun = 'sft'\n", "stage 'a': model is missing"),
        (STAGE.format("a", "{b}/model"), "stage 'a': model = {b}: no such stage"),
        (STAGE.format("a", "m") + STAGE.format("a", "m"), "stage 'a': the name is used twice"),
        (STAGE.format("a", "{b}") + STAGE.format("b", "m"), "model = {b}: 'b' stands after it; move it before"),
        (STAGE.format("a", "{b}") + STAGE.format("b", "{a}"), "model = {b}: a ring: a needs b needs a"),
        (STAGE.format("a", "{a}"), "a ring: a needs a"),
        ("[pipeline]\nsede = 1\n" + STAGE.format("a", "m"), "no stage has a flag 'sede'; did you mean 'seed'?"),
        ("[pipeline]\nseed = 'x'\n" + STAGE.format("a", "m"), "key 'seed' must be a whole number, got 'x'"),
        (STAGE.format("a", "m"), "stage 'a': data: d.jsonl: no such file"),
        ("[plan]\nshapes = 'x'\n" + STAGE.format("a", "m"), "[plan]: unknown key 'shapes'; did you mean 'shape'?"),
        ("[plan]\nshape = 'llama9'\n" + STAGE.format("a", "m"), "[plan]: no shape 'llama9'"),
    ],
)  # fmt: skip
def test_bad_files(text, told, tmp_path, capsys, model):
    """One line with file, stage and field, exit 2, and nothing is written."""
    path = tmp_path / "bad.toml"
    path.write_text(text.replace('"m"', f'"{model}"'))
    plan = ["--plan"] if "[plan]" in text else []
    assert cli.main(["pipeline", str(path), "--out", str(tmp_path / "out"), *plan]) == 2
    line = capsys.readouterr().err
    assert told in line and str(path) in line and line.count("\n") == 1, line
    assert not (tmp_path / "out").exists()


def test_references_and_defaults(tmp_path):
    """{stage}, {out} and {demo} become paths; defaults reach the stages that have such a flag, their own flags win."""
    path = tmp_path / "a.toml"
    head = f'[pipeline]\nout = "{tmp_path}/o"\nseed = 3\nlr = 5e-4\nk = 2\n'
    second = '[[stage]]\nname = "b"\nrun = "eval"\nmodel = "{a}/model"\ndata = ["{demo}/heldout_helpful.jsonl", "{out}/x"]\n'
    path.write_text(head.replace("k = 2\n", "") + STAGE.format("a", "m") + second + "seed = 7\n")
    a, b = read_pipeline(str(path), {"out": "elsewhere", "seed": 4, "device": None}).stages
    assert (a.cfg.seed, a.cfg.lr, a.cfg.out, b.cfg.seed) == (4, 5e-4, "elsewhere/a", 7)
    assert (
        b.cfg.model == "elsewhere/a/model"
        and b.cfg.data[1] == "elsewhere/x"
        and Path(b.cfg.data[0]).is_file()
    )
    assert b.needs == ("a",) and a.needs == ()


def test_a_directory_of_others(file, capsys):
    (file.parent / "out").mkdir()
    (file.parent / "out" / "thesis.tex").write_text("mine")
    assert (
        cli.main(["pipeline", str(file)]) == 2
        and "holds files but no pipeline.json" in capsys.readouterr().err
    )
    assert [p.name for p in (file.parent / "out").iterdir()] == ["thesis.tex"]


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
