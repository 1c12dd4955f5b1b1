"""The SFT stage end to end on a tiny model: run directory, resume to the bit, signals, bad input."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from hpsafety.config import SFTConfig
from hpsafety.data.groups import pack
from hpsafety.errors import InputError
from hpsafety.model.io import load_model
from hpsafety.stages import sft
from hpsafety.train.loop import FitSettings, plan_steps
from tests.stages.conftest import TEMPLATE

ROOT = Path(__file__).resolve().parents[2]
VOLATILE = ("_s", "_mb")


@pytest.fixture
def data_file(tmp_path):
    rows = []
    for i in range(24):
        row = {"prompt": f"question {i} please?", "response": f"answer {i % 7} is {i}.", "id": f"row-{i}"}
        if i % 2:
            row |= {"is_safety": True, "category": "illicit", "attack": "logic"}
        rows.append(row)
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def config(model_dir, data_file, out, **changes) -> SFTConfig:
    values = {
        "model": model_dir, "data": (data_file,), "out": str(out), "batch": 4, "epochs": 2, "lr": 1e-3,
        "checkpoint_every": 3, "device": "cpu", "precision": "fp32", "tokens_per_batch": 256,
    }  # fmt: skip
    return SFTConfig(**(values | changes))


def metrics(out) -> list[dict]:
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def stable(rows):
    return [{k: v for k, v in r.items() if k != "tokens_per_s" and not k.endswith(VOLATILE)} for r in rows]


def model_bytes(out) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted((Path(out) / "model").iterdir())}


def test_run_directory(model_dir, data_file, tmp_path):
    """design.md section 8: files, metrics fields, manifest; the loss falls."""
    out = tmp_path / "run"
    sft.run(config(model_dir, data_file, out, epochs=6))
    rows = metrics(out)
    assert [r["step"] for r in rows] == list(range(1, 37))
    fields = {
        "step",
        "loss",
        "lr",
        "grad_norm",
        "tokens",
        "tokens_equiv",
        "tokens_per_s",
        "elapsed_s",
        "peak_rss_mb",
    }
    assert all(fields <= r.keys() for r in rows)
    assert rows[0]["lr"] == 1e-3 and rows[-1]["loss"] < 0.7 * rows[0]["loss"]
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["stage"] == "sft" and manifest["ended"] and manifest["seed"] == 0
    assert set(manifest["output_hashes"]) == {f"model/{name}" for name in model_bytes(out)}
    assert list(manifest["input_hashes"]) == ["train.jsonl"]
    kept = sorted(p.name for p in (out / "checkpoints").iterdir())
    assert kept == ["step-33", "step-36"]
    assert not (out / "checkpoints" / "step-36" / "optimizer").exists()
    log = (out / "log.txt").read_text()
    assert "rank 0: 4 groups" in log
    assert list((out / "tb").iterdir())
    trained, start = load_model(str(out / "model")), load_model(model_dir)
    assert not torch.equal(trained.embed, start.embed)
    assert trained.tokenizer.chat_template == TEMPLATE


def test_same_seed_same_run(model_dir, data_file, tmp_path):
    """DATA-5: the same config and seed give identical losses and byte-equal models; another seed does not."""
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        sft.run(config(model_dir, data_file, tmp_path / name, seed=seed))
    a, b, c = (stable(metrics(tmp_path / name)) for name in "abc")
    assert a == b and model_bytes(tmp_path / "a") == model_bytes(tmp_path / "b")
    assert a != c


def test_micro_batch_budget_is_an_execution_detail(model_dir, data_file, tmp_path):
    for budget in (40, 10_000):
        sft.run(config(model_dir, data_file, tmp_path / str(budget), tokens_per_batch=budget))
    small, large = metrics(tmp_path / "40"), metrics(tmp_path / "10000")
    for a, b in zip(small, large, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4) and a["tokens"] == b["tokens"]


def test_each_example_twice():
    """SFT-6: two epochs see each example id exactly twice; no step spans two passes."""
    from hpsafety.data.batches import epoch_order

    settings = FitSettings(
        batch=5, epochs=2, steps=None, lr=1.0, warmup=0, tokens_per_batch=1, seed=3, checkpoint_every=0
    )
    seen = [int(i) for epoch, part in plan_steps(23, settings) for i in epoch_order(23, epoch, 3)[part]]
    assert sorted(seen) == sorted(list(range(23)) * 2)
    assert sorted(seen[:23]) == list(range(23))
    whole = plan_steps(
        3,
        FitSettings(
            batch=64, epochs=1, steps=4, lr=1, warmup=0, tokens_per_batch=1, seed=0, checkpoint_every=0
        ),
    )
    assert [e for e, _ in whole] == [0, 1, 2, 3], "a batch larger than the data is the whole data"


@pytest.mark.parametrize("fraction", [0, 0.01, 0.1, 0.25, 0.5, 1])
def test_safety_fraction(fraction):
    """SFT-7: nested safety subsets of one seed; the helpful rows are the same in all variants."""
    rows = [{"prompt": f"p{i}", "response": "r", "is_safety": i % 2 == 0} for i in range(400)]
    kept, counts = sft.select_rows(rows, fraction, 5, False)
    more, _ = sft.select_rows(rows, min(1, fraction + 0.2), 5, False)
    helpful = [r["prompt"] for r in kept if not r["is_safety"]]
    assert helpful == [r["prompt"] for r in rows if not r["is_safety"]]
    assert counts["safety_rows_used"] == round(200 * fraction)
    assert {r["prompt"] for r in kept} <= {r["prompt"] for r in more}


def test_held_out_rows_never_train():
    """DATA-3 and split: test rows are left out; a prompt in both stops the stage."""
    rows = [
        {"prompt": "a", "response": "r", "split": "train"},
        {"prompt": "b", "response": "r", "split": "test_help"},
    ]
    kept, counts = sft.select_rows(rows, 1.0, 0, False)
    assert [r["prompt"] for r in kept] == ["a"] and counts["held_out"] == 1
    with pytest.raises(InputError, match="(?i)a"):
        sft.select_rows([*rows, {"prompt": " A ", "response": "r", "split": "test_safety"}], 1.0, 0, False)


def test_early_stopping_keeps_the_best_pass(model_dir, data_file, tmp_path):
    """Rows with split valid never train; training stops when their loss rises, with the best pass's weights."""
    lines = Path(data_file).read_text().splitlines()
    wrong = [
        {"prompt": f"question {i} please?", "response": "zzz zz z."} | {"split": "valid"}
        for i in range(30, 36)
    ]
    Path(data_file).write_text("\n".join([*lines, *map(json.dumps, wrong)]) + "\n")
    out = tmp_path / "run"
    sft.run(config(model_dir, data_file, out, epochs=8, lr=3e-3))
    rows = metrics(out)
    values = [r["valid_loss"] for r in rows if "valid_loss" in r]
    assert 2 <= len(values) < 8 and values[-1] > min(values) == values[-2]
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["counts"]["held_out"] == 6 and manifest["counts"]["steps"] == len(rows) == 6 * len(values)
    trained = load_model(str(out / "model"))
    groups, _ = sft.build_groups(wrong, trained.tokenizer, 128)
    batch = pack(groups)
    loss = trained.nll(batch, 1.0).item() / batch.num_trained
    assert loss == pytest.approx(min(values), rel=1e-5)


SCRIPT = """
import sys, json, os, signal
from hpsafety.config import SFTConfig
from hpsafety.stages import sft
from hpsafety.train import loop
cfg, kill_at, number = json.loads(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
cfg["data"] = tuple(cfg["data"])
if kill_at:
    real = loop.train_step
    calls = [0]
    def step(*args, **kwargs):
        calls[0] += 1
        if calls[0] == kill_at:
            os.kill(os.getpid(), number)
        return real(*args, **kwargs)
    loop.train_step = step
from hpsafety import cli
try:
    sft.run(SFTConfig(**cfg))
except KeyboardInterrupt as stop:
    print(stop); sys.exit(130)
"""


def run_script(cfg: SFTConfig, kill_at: int = 0, number: int = signal.SIGKILL) -> subprocess.CompletedProcess:
    import dataclasses

    words = [json.dumps(dataclasses.asdict(cfg)), str(kill_at), str(int(number))]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, *words], capture_output=True, text=True, timeout=120, env=env, cwd=ROOT
    )


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_killed_run_resumes_to_the_bit(number, model_dir, data_file, tmp_path):
    """kill -9 (or SIGTERM) in mid-run, then the same command: same metrics, byte-equal model."""
    whole = config(model_dir, data_file, tmp_path / "whole")
    assert run_script(whole).returncode == 0
    broken = config(model_dir, data_file, tmp_path / "broken")
    killed = run_script(broken, kill_at=8, number=number)
    assert killed.returncode == (-signal.SIGKILL if number == signal.SIGKILL else 130), killed.stderr
    assert not (tmp_path / "broken" / "model").exists()
    resumed = run_script(broken)
    assert resumed.returncode == 0, resumed.stderr
    step = 6 if number == signal.SIGKILL else 8  # the signalled step is finished and checkpointed
    assert f"resumed from step {step}" in (tmp_path / "broken" / "log.txt").read_text()
    assert stable(metrics(tmp_path / "broken")) == stable(metrics(tmp_path / "whole"))
    assert model_bytes(tmp_path / "broken") == model_bytes(tmp_path / "whole")


def test_finished_run_is_left_alone_and_no_resume_starts_anew(model_dir, data_file, tmp_path):
    cfg = config(model_dir, data_file, tmp_path / "run", steps=4)
    sft.run(cfg)
    first, stamp = model_bytes(tmp_path / "run"), os.stat(tmp_path / "run" / "model").st_mtime_ns
    time.sleep(0.01)
    sft.run(cfg)
    assert os.stat(tmp_path / "run" / "model").st_mtime_ns == stamp
    sft.run(config(model_dir, data_file, tmp_path / "run", steps=4, resume=False))
    assert model_bytes(tmp_path / "run") == first and len(metrics(tmp_path / "run")) == 4


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"lr": 2e-3}, r"another config \(lr was 0.001, now 0.002\)"),
        ({"seed": 4}, "seed was 0, now 4"),
    ],
)
def test_out_of_another_run_is_refused(changes, message, model_dir, data_file, tmp_path):
    sft.run(config(model_dir, data_file, tmp_path / "run", steps=2))
    before = model_bytes(tmp_path / "run")
    with pytest.raises(InputError, match=message):
        sft.run(config(model_dir, data_file, tmp_path / "run", steps=2, **changes))
    assert model_bytes(tmp_path / "run") == before


def test_changed_data_is_refused(model_dir, data_file, tmp_path):
    cfg = config(model_dir, data_file, tmp_path / "run", steps=2)
    sft.run(cfg)
    with open(data_file, "a") as handle:
        handle.write(json.dumps({"prompt": "new", "response": "row"}) + "\n")
    with pytest.raises(InputError, match="other data"):
        sft.run(cfg)


def test_foreign_directory_is_refused(model_dir, data_file, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="choose an empty directory"):
        sft.run(config(model_dir, data_file, tmp_path / "mine"))
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_all_rows_too_long(model_dir, data_file, tmp_path):
    """Every row longer than the context: exit 2, nothing written."""
    with pytest.raises(InputError, match="longer than 5 tokens"):
        sft.run(config(model_dir, data_file, tmp_path / "run", max_length=5))
    assert not (tmp_path / "run").exists()


def test_corrupt_checkpoint_is_named(model_dir, data_file, tmp_path):
    cfg = config(model_dir, data_file, tmp_path / "run")
    assert run_script(cfg, kill_at=8).returncode == -signal.SIGKILL
    file = next((tmp_path / "run" / "checkpoints" / "step-6" / "weights").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(InputError, match="step-6.*--no-resume"):
        sft.run(cfg)


def test_failed_checkpoint_leaves_nothing_half_written(model_dir, data_file, tmp_path, monkeypatch):
    """Disk full while a checkpoint is written: the error passes, earlier checkpoints stay, no temporary remains."""
    from hpsafety.train import checkpoint

    real, calls = checkpoint._save_tensors, [0]

    def save(tensors, folder, world):
        calls[0] += 1
        if calls[0] == 4:  # the optimiser's part of the second checkpoint
            raise OSError(28, "No space left on device", str(folder))
        real(tensors, folder, world)

    monkeypatch.setattr(checkpoint, "_save_tensors", save)
    cfg = config(model_dir, data_file, tmp_path / "run")
    with pytest.raises(OSError, match="No space left"):
        sft.run(cfg)
    names = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["step-3"]
    monkeypatch.undo()
    sft.run(cfg)
    shutil.rmtree(tmp_path / "run")
