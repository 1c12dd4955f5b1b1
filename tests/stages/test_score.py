"""The score stage end to end on tiny models. The bug this file must catch: a line lost, done twice or out of order,
or scored otherwise, after a kill, over ranks or under another micro-batch budget."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hpsafety import cli
from hpsafety.config import ScoreConfig
from hpsafety.data.records import read_records
from hpsafety.errors import InputError, RunError
from hpsafety.model.heads import reward_model_from
from hpsafety.model.io import load_model, save_model
from hpsafety.model.reward_io import load_reward_model, save_reward_model
from hpsafety.safety import scoring_job
from hpsafety.stages import score
from tests.stages.conftest import model_dir, write_tokenizer
from tests.tiny import tiny_model

__all__ = ["model_dir"]  # fixture
ROOT = Path(__file__).resolve().parents[2]
ROWS, K = 40, 3


def save_rm(folder, seed=0, head=0, **changes) -> str:
    """A tiny reward model with the tiny tokenizer; other changes than the head make it another trunk."""
    chat = folder.with_name(folder.name + "-chat")
    save_model(tiny_model(seed, **changes), str(chat))
    write_tokenizer(chat)
    save_reward_model(reward_model_from(load_model(str(chat)), head), folder)
    return str(folder)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("rms")
    return save_rm(folder / "safety"), save_rm(folder / "helpful", seed=1, width=32)


def rows(count=ROWS) -> list[dict]:
    out = []
    for i in range(count):
        answers = [f"answer {k} to {i}" + " and more" * ((i * 7 + k) % 5) + "." for k in range(K)]
        out.append({"prompt": f"question {i}" + "?" * (1 + i % 9), "responses": answers})
        if i % 3 == 0:
            out[-1] |= {"is_safety": True, "category": "illicit", "attack": "logic"}
        if i % 2:
            out[-1]["id"] = f"row-{i}"
    return out


def write(path, records) -> str:
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return str(path)


@pytest.fixture
def data(tmp_path) -> str:
    return write(tmp_path / "groups.jsonl", rows())


def config(models, data, out, **changes) -> ScoreConfig:
    values = {
        "safety_rm": models[0], "helpful_rm": models[1], "data": (data,), "out": str(out), "device": "cpu",
        "precision": "fp32", "tokens_per_batch": 300,
    }  # fmt: skip
    return ScoreConfig(**(values | changes))


def test_one_line_per_input_line(models, data, tmp_path):
    """Design section 8: the score record, in input order, whatever the micro-batches; a null id where there is none."""
    outs = [tmp_path / f"{budget}.jsonl" for budget in (1, 300, 100_000)]
    for out in outs:
        score.run(config(models, data, out, tokens_per_batch=int(out.stem)))
    found = read_records(outs[0], "score").rows
    assert [r["id"] for r in found] == [r.get("id") for r in rows()] and len(found) == ROWS
    assert len({out.read_bytes() for out in outs}) == 1, "bytes depend on --tokens-per-batch"
    for row, given in zip(found, rows(), strict=True):
        assert all(
            len(row[f]) == K for f in ("safety", "helpful", "combined", "safety_logit", "helpful_logit")
        )
        assert row["best"] == row["combined"].index(max(row["combined"]))
        if given.get("is_safety"):
            assert row["combined"] == row["safety"]
    assert any(row["combined"] == row["helpful"] for row in found)
    manifest = json.loads((tmp_path / "300.jsonl.manifest.json").read_text())
    assert manifest["stage"] == "score" and manifest["counts"]["lines"] == ROWS
    assert {n.split("/")[0] for n in manifest["input_hashes"]} == {"groups.jsonl", "safety_rm", "helpful_rm"}
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        ["groups.jsonl", *(p.name + end for p in outs for end in ("", ".manifest.json"))]
    )


def transformers_scores(directory, records) -> torch.Tensor:
    """(rows, K) fp32 logits of one padded batch, from the texts, by transformers alone."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(directory).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    end = load_reward_model(directory).tokenizer.end_of_turn_id
    ids = []
    for row in records:
        chat = [{"role": "user", "content": row["prompt"]}]
        head = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        for answer in row["responses"]:
            ids.append(tokenizer(head + answer, add_special_tokens=False)["input_ids"] + [end])
    longest, pad = max(map(len, ids)), model.config.pad_token_id
    tokens = torch.tensor([row + [pad] * (longest - len(row)) for row in ids])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids])
    with torch.no_grad():
        return model(input_ids=tokens, attention_mask=mask).logits.view(len(records), -1)


def test_equals_transformers(models, data, tmp_path):
    """Issue 5: within 1e-4 of transformers' sequence classifier on the exported models, padded, from text."""
    score.run(config(models, data, tmp_path / "out.jsonl"))
    found = read_records(tmp_path / "out.jsonl", "score").rows
    for directory, field in zip(models, ("safety_logit", "helpful_logit"), strict=True):
        theirs = transformers_scores(directory, rows())
        assert (torch.tensor([r[field] for r in found]) - theirs).abs().max() < 1e-4


@pytest.mark.slow
def test_equals_transformers_on_the_built_in_model(tmp_path):
    models = []
    for head, name in enumerate(("safety", "helpful")):
        save_reward_model(reward_model_from(load_model("smollm2"), head), tmp_path / name)
        models.append(str(tmp_path / name))
    data = write(tmp_path / "groups.jsonl", rows(6))
    score.run(config(models, data, tmp_path / "out.jsonl", tokens_per_batch=200))
    found = read_records(tmp_path / "out.jsonl", "score").rows
    for directory, field in zip(models, ("safety_logit", "helpful_logit"), strict=True):
        theirs = transformers_scores(directory, rows(6))
        assert (torch.tensor([r[field] for r in found]) - theirs).abs().max() < 1e-4


def test_all_safety(models, tmp_path):
    data = write(
        tmp_path / "g.jsonl", [{"prompt": "a", "responses": ["b", ""]}, {"prompt": "a", "responses": ["c"]}]
    )
    score.run(config(models, data, tmp_path / "out.jsonl", all_safety=True))
    found = read_records(tmp_path / "out.jsonl", "score").rows
    assert all(row["combined"] == row["safety"] for row in found) and len(found) == 2


SCRIPT = """
import sys, json, os, signal
from hpsafety import cli
from hpsafety.rollout.scoring import Scorer
words, kill_at, number = json.loads(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are started with it ignored
real, calls = Scorer.score_part, [0]
def score_part(self, *args):
    calls[0] += 1
    if calls[0] == kill_at:
        os.kill(os.getpid(), number)
    return real(self, *args)
Scorer.score_part = score_part
sys.exit(cli.main(words))
"""


def words(cfg: ScoreConfig) -> list[str]:
    out = ["score"]
    for field in dataclasses.fields(cfg):
        value = getattr(cfg, field.name)
        flag = "--" + field.name.replace("_", "-")
        if isinstance(value, bool):
            out += [flag] if value else ["--no-" + flag[2:]]
        else:
            out += [flag, *(value if isinstance(value, tuple) else [str(value)])]
    return out


def call(cfg, kill_at=0, number=int(signal.SIGKILL), ranks=1) -> subprocess.CompletedProcess:
    """The command in a process of its own, hit by a signal in its micro-batch `kill_at`."""
    script = Path(cfg.out).with_name("call.py")
    script.write_text(SCRIPT)
    launch = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    )
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launch, str(script), json.dumps(words(cfg)), str(kill_at), str(number)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=env, cwd=ROOT)


@pytest.mark.parametrize("number, code", [(signal.SIGKILL, -9), (signal.SIGINT, 130)])
def test_goes_on_after_a_kill(models, data, tmp_path, capsys, number, code):
    """kill -9 or Ctrl-C in the middle: finished lines are kept, and the same command ends with the same bytes."""
    score.run(config(models, data, tmp_path / "whole.jsonl"))
    cfg = config(models, data, tmp_path / "out.jsonl")
    stopped = call(cfg, kill_at=5, number=int(number))
    assert stopped.returncode == code, stopped.stderr[-2000:]
    part = tmp_path / "out.jsonl.part"
    kept = (part / "rank-0.jsonl").read_bytes().count(b"\n")
    assert 0 < kept < ROWS and not (tmp_path / "out.jsonl").exists()
    capsys.readouterr()
    score.run(cfg)
    assert f"{ROWS} groups, {kept} of them done before" in capsys.readouterr().err and not part.exists()
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_two_ranks_write_the_same_bytes(models, data, tmp_path):
    """torchrun with 2 gloo ranks: the models are replicated, the lines shared."""
    score.run(config(models, data, tmp_path / "alone.jsonl"))
    done = call(config(models, data, tmp_path / "two.jsonl"), ranks=2)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "two.jsonl").read_bytes() == (tmp_path / "alone.jsonl").read_bytes()


def test_rows_are_streamed(models, data, tmp_path, monkeypatch):
    """At most a window of rows is alive at a time."""

    class Row(dict):
        alive = most = 0

        def __init__(self, *args):
            super().__init__(*args)
            Row.alive += 1
            Row.most = max(Row.most, Row.alive)

        def __del__(self):
            Row.alive -= 1

    def rows(self):
        return ((index, Row(row)) for index, row in real(self))

    real = scoring_job.LineJob.rows
    monkeypatch.setattr(scoring_job.LineJob, "rows", rows)
    monkeypatch.setattr(scoring_job, "WINDOW", 4)
    score.run(config(models, data, tmp_path / "out.jsonl", tokens_per_batch=100))
    assert 4 <= Row.most <= 8, f"{Row.most} rows alive with a window of 4"
    assert len(read_records(tmp_path / "out.jsonl", "score")) == ROWS


def test_nan_stops_with_the_groups_id(models, data, tmp_path, monkeypatch):
    """The line is not counted as done, those before it are."""
    real, calls = scoring_job.Scorer.score_part, []

    def score_part(self, groups, tags):
        found = real(self, groups, tags)
        calls.append(len(groups))
        if len(calls) == 3:
            found[0].helpful[1] = float("nan")
        return found

    monkeypatch.setattr(scoring_job.Scorer, "score_part", score_part)
    with pytest.raises(
        RunError, match=r"groups.jsonl:(\d+): group '?(row-\d+|None)'?: the helpfulness .* response 1"
    ):
        score.run(config(models, data, tmp_path / "out.jsonl"))
    assert not (tmp_path / "out.jsonl").exists()
    kept = (tmp_path / "out.jsonl.part" / "rank-0.jsonl").read_text()
    assert kept.count("\n") == sum(calls[:2]) and "NaN" not in kept


def error(capsys, cfg) -> str:
    assert cli.main(words(cfg)) == 2
    err = capsys.readouterr().err.strip()
    assert "\n" not in err, err
    return err


def test_bad_input_exits_2_with_one_line(models, data, tmp_path, capsys, model_dir):
    out = tmp_path / "out.jsonl"
    assert "holds no reward head" in error(capsys, config((models[0], model_dir), data, out))
    assert "/no: no such file or directory" in error(
        capsys, config((str(tmp_path / "no"), models[1]), data, out)
    )
    folder = tmp_path / "folder"
    folder.mkdir()
    assert "must be a file" in error(capsys, config(models, data, folder))
    empty = write(tmp_path / "empty.jsonl", [])
    assert "empty.jsonl" in error(capsys, config(models, empty, out))
    bad = write(tmp_path / "bad.jsonl", [*rows(3), {"prompt": "x", "responses": []}])
    assert 'bad.jsonl:4: field "responses" must be' in error(capsys, config(models, bad, out))
    long = write(tmp_path / "long.jsonl", [*rows(3), {"prompt": "x" * 90, "responses": ["a", "b" * 60]}])
    line = error(capsys, config(models, long, out))
    assert (
        "long.jsonl:4: the prompt (" in line and "with response 1 has " in line and "context of 128" in line
    )
    assert not out.exists() and not (tmp_path / "out.jsonl.part").exists()


def test_other_tokenizer(models, data, tmp_path, capsys):
    other = save_rm(tmp_path / "other")
    path = Path(other) / "tokenizer_config.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"chat_template": "{{ messages[0]['content'] }}"})
    )
    for extra in Path(other).glob("chat_template.jinja"):
        extra.unlink()
    line = error(capsys, config((models[0], other), data, tmp_path / "out.jsonl"))
    assert models[0] in line and other in line and "differ in their chat template" in line


def test_another_model_is_refused(models, data, tmp_path):
    """Scores of two models never end up in one file."""
    call(config(models, data, tmp_path / "out.jsonl"), kill_at=3)
    other = save_rm(tmp_path / "other", head=5)
    with pytest.raises(InputError, match="another config .*safety_rm was"):
        score.run(config((other, models[1]), data, tmp_path / "out.jsonl"))


def test_a_finished_file_is_left_alone(models, data, tmp_path, capsys):
    cfg = config(models, data, tmp_path / "out.jsonl")
    score.run(cfg)
    before = os.stat(cfg.out).st_mtime_ns
    score.run(cfg)
    assert "nothing to do" in capsys.readouterr().err and os.stat(cfg.out).st_mtime_ns == before


def test_one_trunk_is_told(models, data, tmp_path, capsys):
    """Two heads on one trunk: found by itself, and told."""
    folder = tmp_path / "twin"
    cfg = config((models[0], save_rm(folder, head=9)), data, tmp_path / "out.jsonl")
    score.run(cfg)
    assert "two heads on one trunk, one pass" in capsys.readouterr().err
    score.run(config(models, data, tmp_path / "two.jsonl"))
    assert "two passes" in capsys.readouterr().err


def test_can_be_profiled(models, data, tmp_path):
    """hpsafety profile score: a micro-batch is a step, no row counts as one of a token head, no scratch is left."""
    cfg = config(models, data, tmp_path / "prof")
    assert cli.main(["profile", *words(cfg), "--profile-steps", "2", "--profile-warmup", "1"]) == 0
    assert sorted(p.name for p in (tmp_path / "prof").iterdir()) == [
        "profile.json",
        "profile.txt",
        "trace.json.gz",
    ]
    steps = json.loads((tmp_path / "prof" / "profile.json").read_text())["ranks"][0]["steps"]
    assert len(steps) == 2 and all(
        step["tokens_equiv"] > step["tokens"] > 0 == step["trained"] for step in steps
    )
