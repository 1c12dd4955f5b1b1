"""hpsafety sample end to end (issue 5, design section 8): the record, resume to the byte, ranks, bad input.

The bug this file must catch: draws keyed by the place in this rank's or this run's queue instead of the line.
"""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from hpsafety import cli
from hpsafety.config import SampleConfig
from hpsafety.data.chat import encode_prompt
from hpsafety.data.records import read_records
from hpsafety.errors import InputError
from hpsafety.model.io import load_model, save_model
from hpsafety.safety import sampling_job
from hpsafety.stages import sample
from tests.stages.conftest import write_tokenizer

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def prompts(tmp_path):
    """12 lines in two files: strings and dialogues, and fields of their own."""
    dialogue = [
        {"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello"}, {"role": "user", "content": "and you?"},
    ]  # fmt: skip
    rows = [{"prompt": "a b c"[: 1 + i % 5] + f" {i}?", "id": f"row-{i}", "note": i} for i in range(12)]
    rows[3]["prompt"] = dialogue
    files = []
    for name, part in (("a", rows[:5]), ("b", rows[5:])):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in part))
        files.append(str(path))
    return tuple(files)


def config(model_dir, prompts, out, **changes) -> SampleConfig:
    values = {
        "model": model_dir, "data": prompts, "out": str(out), "k": 3, "max_new_tokens": 20, "device": "cpu",
        "precision": "fp32", "seed": 5, "temperature": 0.9, "top_p": 0.95,
    }  # fmt: skip
    return SampleConfig(**(values | changes))


def words(cfg) -> list[str]:
    """The command line of a config."""
    out = ["sample"]
    for field in dataclasses.fields(cfg):
        value = getattr(cfg, field.name)
        flag = "--" + field.name.replace("_", "-")
        if isinstance(value, bool):
            out.append(flag if value else "--no-" + flag[2:])
        elif value is not None:
            out += [flag, *value] if isinstance(value, tuple) else [flag, str(value)]
    return out


def test_the_record(model_dir, prompts, tmp_path):
    """Prompt fields kept; responses; samples with text, tokens, logprobs, finish, seed, temperature."""
    cfg = config(model_dir, prompts, tmp_path / "out.jsonl")
    sample.run(cfg)
    model = load_model(model_dir)
    given = [row for path in prompts for row in read_records(path, "prompt")]
    ids = [encode_prompt(model.tokenizer, row["prompt"]) for row in given]
    rollouts = iter(model.generate(ids, k=3, max_new_tokens=20, seed=5, temperature=0.9, top_p=0.95))
    rows = read_records(cfg.out, "group").rows
    assert len(rows) == 12
    for row, old in zip(rows, given, strict=True):
        assert row | {"responses": None, "samples": None} == old | {"responses": None, "samples": None}
        assert row["responses"] == [s["text"] for s in row["samples"]] and len(row["samples"]) == 3
        for made in row["samples"]:
            rollout = next(rollouts)
            assert made["tokens"] == rollout.tokens and made["finish"] == rollout.finish
            assert torch.equal(torch.tensor(made["logprobs"]), torch.tensor(rollout.logprobs))
            assert made["text"] == model.tokenizer.decode(rollout.tokens) and "<|" not in made["text"]
            assert (made["seed"], made["temperature"]) == (5, 0.9)
    assert {s["finish"] for row in rows for s in row["samples"]} == {"stop", "length"}
    manifest = json.loads(Path(cfg.out + ".manifest.json").read_text())
    tokens = sum(len(s["tokens"]) for row in rows for s in row["samples"])
    counts = {"lines": 12, "sampled_tokens": tokens, "prompt_tokens_computed": sum(map(len, ids))}
    assert manifest["counts"] == counts and "model/model.safetensors" in manifest["input_hashes"]


def test_batch_and_memory_are_execution_details(model_dir, prompts, tmp_path):
    texts = []
    for i, changes in enumerate(({}, {"max_batch": 2}, {"kv_memory": "64KB"})):
        cfg = config(model_dir, prompts, tmp_path / f"{i}.jsonl", **changes)
        sample.run(cfg)
        texts.append(Path(cfg.out).read_bytes())
    assert texts[0] == texts[1] == texts[2]
    sample.run(config(model_dir, prompts, tmp_path / "other.jsonl", seed=6))
    assert (tmp_path / "other.jsonl").read_bytes() != texts[0]


def heed_sigint() -> None:
    """A shell starts background jobs with SIGINT ignored, which children inherit; the command shall hear it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start(cfg, ranks: int = 1, **options) -> subprocess.Popen:
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    launch = (
        ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m"] if ranks > 1 else []
    )
    command = [sys.executable, "-m", *launch, "hpsafety", *words(cfg)]
    return subprocess.Popen(
        command, env=env, cwd=ROOT, stderr=subprocess.PIPE, text=True, preexec_fn=heed_sigint, **options
    )


def wait_for_lines(process, out: Path, lines: int) -> None:
    part = out.with_name(out.name + ".part") / "rank-0.jsonl"
    end = time.monotonic() + 120
    while not part.is_file() or part.read_bytes().count(b"\n") < lines:
        assert process.poll() is None and time.monotonic() < end, process.stderr.read()
        time.sleep(0.002)


def interrupt(cfg, lines: int, sent: int) -> tuple[int, str]:
    """Starts the command and sends it a signal once `lines` lines are finished: (exit code, stderr)."""
    process = start(cfg)
    wait_for_lines(process, Path(cfg.out), lines)
    process.send_signal(sent)
    _, stderr = process.communicate(timeout=60)
    assert not Path(cfg.out).exists()
    return process.returncode, stderr


def test_resume_is_byte_equal(model_dir, tmp_path, monkeypatch):
    """After kill -9 and after Ctrl-C the same command goes on, and OUT is what an uninterrupted run writes."""
    path = tmp_path / "many.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"question {i}", "id": i}) + "\n" for i in range(90)))
    cfg = config(model_dir, (str(path),), tmp_path / "broken.jsonl", max_new_tokens=40, max_batch=6)
    part = tmp_path / "broken.jsonl.part" / "rank-0.jsonl"
    assert interrupt(cfg, 5, signal.SIGKILL)[0] == -signal.SIGKILL
    killed = part.read_bytes()[: part.read_bytes().rfind(b"\n") + 1]
    code, stderr = interrupt(cfg, killed.count(b"\n") + 5, signal.SIGINT)
    assert code == 130 and "interrupted; what is finished is kept in" in stderr and "Traceback" not in stderr
    kept = part.read_bytes()
    assert kept.startswith(killed) and kept.endswith(b"\n") and 10 <= kept.count(b"\n") < 90
    engines, original = [], sampling_job.sample_lines
    monkeypatch.setattr(
        sampling_job,
        "sample_lines",
        lambda job, engine, *rest: engines.append(engine) or original(job, engine, *rest),
    )
    sample.run(cfg)
    whole = dataclasses.replace(cfg, out=str(tmp_path / "whole.jsonl"))
    sample.run(whole)
    assert engines[0].prefilled_tokens < engines[1].prefilled_tokens  # what was kept was not done again
    assert Path(cfg.out).read_bytes() == Path(whole.out).read_bytes()


def test_two_ranks_are_byte_equal(model_dir, prompts, tmp_path):
    """Issue 5: sample under torchrun with 2 gloo ranks gives the same samples; the prompt's index is its line."""
    cfg = config(model_dir, prompts, tmp_path / "two.jsonl")
    process = start(cfg, ranks=2)
    _, stderr = process.communicate(timeout=240)
    assert process.returncode == 0, stderr[-2000:]
    alone = dataclasses.replace(cfg, out=str(tmp_path / "one.jsonl"))
    sample.run(alone)
    assert Path(cfg.out).read_bytes() == Path(alone.out).read_bytes()
    counts = [json.loads(Path(c.out + ".manifest.json").read_text())["counts"] for c in (cfg, alone)]
    assert counts[0] == counts[1]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"k": 0}, "--k must be at least 1, got 0"),
        ({"temperature": -1.0}, "--temperature must be a number, 0 (greedy) or greater, got -1.0"),
        ({"temperature": float("nan")}, "--temperature must be a number"),
        ({"top_p": 0.0}, "--top-p must be greater than 0 and at most 1, got 0.0"),
        ({"top_p": 1.5}, "--top-p must be"),
        ({"top_p": float("nan")}, "--top-p must be"),
        ({"top_k": -1}, "--top-k must be at least 0"),
        ({"max_new_tokens": 0}, "--max-new-tokens must be at least 1"),
        ({"kv_memory": "much"}, "--kv-memory must be a size such as 512MB or 2GB, got 'much'"),
        ({"seed": -1}, "--seed must be"),
    ],
)
def test_settings_refuse(model_dir, prompts, tmp_path, changes, message):
    with pytest.raises(InputError) as caught:
        config(model_dir, prompts, tmp_path / "out.jsonl", **changes)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "line, changes, message",
    [
        ('{"prompt": "' + "a" * 100 + '"}', {}, r"b.jsonl:8: the prompt has 1\d\d tokens, which with 20 new ones ex"),
        ('{"prompt": ""}', {}, 'b.jsonl:8: field "prompt" is empty'),
        ('{"text": "x"}', {}, 'b.jsonl:8: field "prompt" is missing'),
        ('{"prompt": "' + "a" * 75 + '"}', {"kv_memory": "22KB"}, r"b.jsonl:8: .*too small.*needs .* are there; raise"),
        ('{"prompt": "a"}', {"kv_memory": "1KB"}, "--kv-memory of 1,024 bytes holds not one page"),
    ],
)  # fmt: skip
def test_bad_lines(model_dir, prompts, tmp_path, capsys, line, changes, message):
    """Exit 2 with one line that names the row; nothing is written."""
    with open(prompts[1], "a") as handle:
        handle.write(line + "\n")
    cfg = config(model_dir, prompts, tmp_path / "out.jsonl", **changes)
    assert cli.main(words(cfg)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    assert re.search(message, error), error
    assert not list(tmp_path.glob("out.jsonl*"))


def test_damaged_weights_stop_the_run(model_dir, prompts, tmp_path, capsys, monkeypatch):
    """A NaN is exit 1 with the prompt's line, not a row of nulls."""
    model = load_model(model_dir)
    with torch.no_grad():
        model.blocks[0].down[0] = float("nan")
    monkeypatch.setattr(sampling_job, "load_model", lambda *_: model)
    assert cli.main(words(config(model_dir, prompts, tmp_path / "out.jsonl"))) == 1
    assert (
        "a.jsonl:1: prompt 0, sample 0: the logits of new token 0 are not finite" in capsys.readouterr().err
    )


def test_a_model_without_a_tokenizer(prompts, tmp_path):
    from tests.tiny import tiny_model

    save_model(tiny_model(), str(tmp_path / "bare"))
    cfg = config(str(tmp_path / "bare"), prompts, tmp_path / "out.jsonl")
    with pytest.raises(InputError, match="has no tokenizer.json"):
        sample.run(cfg)
    write_tokenizer(tmp_path / "bare")
    sample.run(cfg)


def test_another_model_is_refused(model_dir, prompts, tmp_path):
    """What is finished belongs to one model: the same path with other weights does not go on."""
    from tests.tiny import tiny_model

    save_model(tiny_model(seed=2), str(tmp_path / "m"))
    write_tokenizer(tmp_path / "m")
    cfg = config(str(tmp_path / "m"), prompts, tmp_path / "out.jsonl")
    sample.run(cfg)
    sample.run(cfg)  # complete: nothing to do
    job_part = tmp_path / "out.jsonl.part"
    job_part.mkdir()
    (job_part / "manifest.json").write_bytes(Path(cfg.out + ".manifest.json").read_bytes())
    save_model(tiny_model(seed=3), str(tmp_path / "m"))
    write_tokenizer(tmp_path / "m")
    with pytest.raises(InputError, match="another data .*has changed"):
        sample.run(cfg)
