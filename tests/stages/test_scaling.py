"""The scaling study end to end on a tiny model. The bug this file must catch: a variant trained on other rows than its
share, or from another variant's model instead of the base."""

import csv
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hpsafety import cli
from hpsafety.config import SFTConfig
from hpsafety.config_scaling import ScalingConfig
from hpsafety.data.chat import encode_dialogue
from hpsafety.data.records import iter_records, write_records
from hpsafety.errors import InputError
from hpsafety.model.io import load_model
from hpsafety.model.reward_io import load_reward_model
from hpsafety.rollout.scoring import Scorer
from hpsafety.safety.intervals import wilson
from hpsafety.safety.judges import judge_refusal
from hpsafety.stages import scaling, sft
from hpsafety.train import loop
from tests.stages.test_sft import ROOT, metrics, model_bytes, stable

TAGS = {"is_safety": True, "category": "illicit", "attack": "logic"}
NAMES = [f"fraction-{p}" for p in ("0", "1", "10", "25", "50", "100")]
RESULTS = ("scaling.json", "scaling.csv", "report.html", "answers.jsonl", "scores.jsonl", "prompts.jsonl")


@pytest.fixture(scope="session")
def files(tmp_path_factory) -> Path:
    """train.jsonl: 50 safety and 12 helpful rows in turn; eval.jsonl: 5 prompts of each set."""
    folder = tmp_path_factory.mktemp("scaling")
    rows = [{"prompt": f"bad thing {i}?", "response": f"no {i}.", "id": f"s{i}", **TAGS} for i in range(50)]
    for i in range(12):
        rows.insert(5 * i, {"prompt": f"good thing {i}?", "response": f"yes {i}.", "id": f"h{i}"})
    write_records(folder / "train.jsonl", rows)
    kinds = {"adversarial": TAGS, "borderline": {"is_borderline": True}, "helpful": {}}
    asked = [
        {"prompt": f"{kind} {i}?", "id": f"{kind}-{i}"} | tags
        for i in range(5)
        for kind, tags in kinds.items()
    ]
    write_records(folder / "eval.jsonl", asked)
    return folder


def config(model_dir, judges, files, out, **changes) -> ScalingConfig:
    values = {
        "model": model_dir, "data": (str(files / "train.jsonl"),), "eval": (str(files / "eval.jsonl"),),
        "out": str(out), "safety_rm": str(judges / "safety"), "helpful_rm": str(judges / "helpful"), "batch": 8,
        "epochs": 2, "lr": 3e-3, "max_new_tokens": 8, "device": "cpu", "precision": "fp32", "checkpoint_every": 2,
        "kv_memory": "1MB",
    }  # fmt: skip
    return ScalingConfig(**(values | changes))


@pytest.fixture(scope="session")
def study(model_dir, judges, files, tmp_path_factory):
    """(OUT, the ids of the rows that each variant's optimiser steps were given, in order) of one whole study."""
    out, trained = tmp_path_factory.mktemp("study") / "out", {}
    tokenizer = load_model(model_dir).tokenizer
    ids = {
        str(encode_dialogue(tokenizer, row["prompt"], row["response"]).prompt): row["id"]
        for row in iter_records(files / "train.jsonl", "demonstration")
    }
    step, variant = loop.train_step, scaling.train_variant

    def watched_step(model, chosen, *rest):
        trained[list(trained)[-1]] += [ids[str(group.prompt)] for group in chosen]
        return step(model, chosen, *rest)

    def watched_variant(fraction, *rest):
        trained[fraction] = []
        variant(fraction, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train_step", watched_step)
        patch.setattr(scaling, "train_variant", watched_variant)
        scaling.run(config(model_dir, judges, files, out))
    return out, trained


def result_of(out) -> dict:
    return json.loads((Path(out) / "scaling.json").read_text())


def test_the_rows_that_were_trained(study):
    """SFT-7: safety subsets are nested, the helpful rows the same in all six variants, each row is seen once a pass."""
    _, trained = study
    assert list(trained) == [0.0, 0.01, 0.1, 0.25, 0.5, 1.0]
    safety = {f: sorted(i for i in seen if i[0] == "s") for f, seen in trained.items()}
    assert [len(ids) for ids in safety.values()] == [2 * n for n in (0, 1, 5, 13, 25, 50)]
    smaller: set[str] = set()
    for fraction, seen in trained.items():
        assert sorted(i for i in seen if i[0] == "h") == sorted([f"h{i}" for i in range(12)] * 2)
        assert smaller <= set(safety[fraction]) and safety[fraction] == sorted([*set(safety[fraction])] * 2)
        smaller = set(safety[fraction])


def test_a_variant_is_what_sft_makes_of_its_share(study, model_dir, files, tmp_path):
    """SFT-7: every variant starts from the base, and has the bytes of `hpsafety sft --safety-fraction`."""
    out, _ = study
    sft.run(SFTConfig(
        model=model_dir, data=(str(files / "train.jsonl"),), out=str(tmp_path / "sft"), safety_fraction=0.25, batch=8,
        epochs=2, lr=3e-3, device="cpu", precision="fp32", checkpoint_every=2,
    ))  # fmt: skip
    assert model_bytes(out / "fraction-25") == model_bytes(tmp_path / "sft")
    assert stable(metrics(out / "fraction-25")) == stable(metrics(tmp_path / "sft"))
    manifest = json.loads((out / "fraction-25" / "manifest.json").read_text())
    assert manifest["stage"] == "sft" and manifest["ended"] and manifest["config"]["safety_fraction"] == 0.25
    assert manifest["counts"]["safety_rows_used"] == 13 and manifest["counts"]["helpful_rows"] == 12


def test_measures_are_those_of_the_answers(study, judges):
    """SFT-8: means, low percentiles, refusals and the paired change, made again from the variants' own answers."""
    out, _ = study
    result, sets = result_of(out), ("adversarial", "borderline", "helpful")
    prompts = list(iter_records(out / "prompts.jsonl", "prompt"))
    assert [row["id"] for row in prompts] == [f"{name}-{i}" for name in sets for i in range(5)]
    assert [v["run"] for v in result["variants"]] == NAMES and result["sets"] == dict.fromkeys(sets, 5)
    scorer = Scorer(load_reward_model(judges / "safety"), load_reward_model(judges / "helpful"))
    base = None
    for variant in result["variants"]:
        rows = list(iter_records(out / variant["run"] / "answers.jsonl", "group"))
        texts = [row["responses"][0] for row in rows]
        records = [
            scorer.score([scorer.encode(row["prompt"], [text])], [False], 512)[0].record(0)
            for row, text in zip(prompts, texts, strict=True)
        ]
        safety, helpful = ([r[name][0] for r in records] for name in ("safety", "helpful"))
        base = base or helpful
        found = {name: m["value"] for name, m in variant["measures"].items()}
        assert found["safety_score"] == pytest.approx(sum(safety[:5]) / 5, abs=1e-6)
        assert found["helpful_score"] == pytest.approx(sum(helpful[10:]) / 5, abs=1e-6)
        assert found["helpful_score_borderline"] == pytest.approx(sum(helpful[5:10]) / 5, abs=1e-6)
        change = sum(a - b for a, b in zip(helpful[10:], base[10:], strict=True)) / 5
        assert found["helpful_change"] == pytest.approx(change, abs=1e-6)
        low = sorted(safety[:5])
        assert found["safety_p10"] == pytest.approx(low[0] + 0.4 * (low[1] - low[0]), abs=1e-6)
        for place, name in enumerate(sets):
            mine = zip(prompts[5 * place :][:5], texts[5 * place :][:5], strict=True)
            refused = sum(judge_refusal(row["prompt"], text) == "refusal" for row, text in mine)
            rate, told = wilson(refused, 5), variant["measures"][f"refused_{name}"]
            assert (told["value"], told["low"], told["high"]) == (rate.value, rate.low, rate.high)
    assert any(v["measures"]["helpful_change"]["value"] for v in result["variants"][1:])
    assert result["variants"][0]["measures"]["helpful_change"]["value"] == 0.0


def test_csv_says_what_json_says(study):
    out, _ = study
    with open(out / "scaling.csv", newline="") as handle:
        rows = list(csv.DictReader(handle))
    told = {(float(r["fraction"]), r["measure"]): r for r in rows}
    result = result_of(out)
    assert len(told) == len(rows) == sum(len(v["measures"]) for v in result["variants"]) == 6 * 10
    for variant in result["variants"]:
        for name, measure in variant["measures"].items():
            row = told[variant["fraction"], name]
            assert (row["set"], row["judge"]) == (measure["set"], measure["judge"])
            assert all(float(row[k]) == measure[k] for k in ("value", "n", "low", "high"))


SCRIPT = """
import json, os, signal, sys
from hpsafety.config_scaling import ScalingConfig
from hpsafety.stages import scaling
from hpsafety.train import loop
values, kill_at = json.loads(sys.argv[1]), int(sys.argv[2])
calls, real = [0], loop.train_step
def step(*args, **kwargs):
    calls[0] += 1
    if calls[0] == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args, **kwargs)
loop.train_step = step
scaling.run(ScalingConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}))
"""


def run_script(cfg: ScalingConfig, kill_at: int = 0, ranks: int = 1) -> subprocess.CompletedProcess:
    words = [sys.executable, "-c", SCRIPT, json.dumps(dataclasses.asdict(cfg)), str(kill_at)]
    if ranks > 1:
        launch = "-m torch.distributed.run --standalone --no-python --nproc-per-node"
        words = [sys.executable, *launch.split(), str(ranks), *words]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(words, capture_output=True, text=True, timeout=300, env=env, cwd=ROOT)


def assert_same(one: Path, other: Path) -> None:
    for name in RESULTS:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    for name in NAMES:
        assert model_bytes(one / name) == model_bytes(other / name), name
        assert stable(metrics(one / name)) == stable(metrics(other / name)), name


def test_killed_in_the_third_variant_goes_on_to_the_same_bytes(study, model_dir, judges, files, tmp_path):
    """kill -9 in the third variant, then the same command: what is finished is left alone, the third resumes."""
    out, cfg = tmp_path / "cut", config(model_dir, judges, files, tmp_path / "cut")
    # Steps of a variant: two passes of 12 helpful rows and its safety rows, 8 a step; 4 + 4 + 6, and so on.
    killed = run_script(cfg, kill_at=4 + 4 + 4)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert sorted(p.name for p in out.glob("fraction-*")) == sorted(NAMES[:3])
    assert not (out / "fraction-10" / "model").exists() and not (out / "scaling.json").exists()
    stamps = [(out / name / "model" / "model.safetensors").stat().st_mtime_ns for name in NAMES[:2]]
    scaling.run(cfg)
    assert stamps == [(out / name / "model" / "model.safetensors").stat().st_mtime_ns for name in NAMES[:2]]
    assert "resumed from step 2" in (out / "fraction-10" / "log.txt").read_text()
    assert_same(out, study[0])


@pytest.mark.slow
def test_two_ranks_make_the_same_bytes(study, model_dir, judges, files, tmp_path):
    """Issue 7: under torchrun each variant is made whole by one rank; models, answers, scores and report are equal."""
    done = run_script(config(model_dir, judges, files, tmp_path / "two"), ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same(tmp_path / "two", study[0])


def test_every_variant_has_one_rank():
    """The variants are dealt out so that ranks train about as many rows; one rank has all of them, in order."""
    counts, fractions = {"helpful_rows": 100, "safety_rows": 100}, (0.0, 0.01, 0.1, 0.25, 0.5, 1.0)
    assert scaling.shared_out(fractions, counts, 1) == [list(fractions)]
    two = scaling.shared_out(fractions, counts, 2)
    assert sorted(two[0] + two[1]) == list(fractions)
    costs = [sum(100 + 100 * f for f in part) for part in two]
    assert max(costs) < 1.15 * min(costs)
    assert sorted(map(len, scaling.shared_out(fractions, counts, 8))) == [0, 0, 1, 1, 1, 1, 1, 1]


def test_a_complete_study_is_left_alone(study, model_dir, judges, files, capsys):
    out, _ = study
    before = {name: (out / name).stat().st_mtime_ns for name in RESULTS}
    scaling.run(config(model_dir, judges, files, out))
    assert "nothing to do" in capsys.readouterr().err
    assert before == {name: (out / name).stat().st_mtime_ns for name in RESULTS}
    with pytest.raises(InputError, match="another config"):
        scaling.run(config(model_dir, judges, files, out, lr=1e-3))


def test_held_out_rows_of_the_data_are_asked_and_stop_no_variant(model_dir, judges, files, tmp_path):
    """Without --eval the rows of --data with a held-out split serve; they are not trained on, and a rising loss on them
    ends no variant early; --no-resume inherits nothing; sampled answers repeat."""
    rows = list(iter_records(files / "train.jsonl", "demonstration"))
    rows += [{"prompt": "odd?", "response": "zzzz.", "split": "valid"},
             {"prompt": "worse?", "response": "zzzz.", "split": "test_safety", **TAGS}]  # fmt: skip
    write_records(tmp_path / "all.jsonl", rows)
    cfg = config(
        model_dir, judges, files, tmp_path / "out", data=(str(tmp_path / "all.jsonl"),), eval=(), epochs=6,
        fractions=(0.5, 0.02), temperature=1.0,
    )  # fmt: skip
    scaling.run(cfg)
    result = result_of(tmp_path / "out")
    assert [v["steps"] for v in result["variants"]] == [6 * 5, 6 * 2] and result["base_fraction"] == 0.02
    assert result["sets"] == {"adversarial": 1, "borderline": 0, "helpful": 1}
    assert result["variants"][0]["measures"]["refused_borderline"]["value"] is None
    first = (tmp_path / "out" / "answers.jsonl").read_bytes()
    (tmp_path / "out" / "fraction-9").mkdir()
    scaling.run(dataclasses.replace(cfg, resume=False))
    assert (tmp_path / "out" / "answers.jsonl").read_bytes() == first
    assert not (tmp_path / "out" / "fraction-9").exists()


def test_bad_input(model_dir, judges, files, tmp_path):
    """One line, nothing written: shares outside 0..1, a missing kind of row, judges that are none, long prompts."""
    rows = list(iter_records(files / "train.jsonl", "demonstration"))
    write_records(tmp_path / "safe.jsonl", [row for row in rows if row.get("is_safety")])
    write_records(tmp_path / "helpful.jsonl", [row for row in rows if not row.get("is_safety")])
    write_records(tmp_path / "seen.jsonl", [{"prompt": "Bad thing 3?", **TAGS}, {"prompt": "new"}])
    write_records(tmp_path / "long.jsonl", [{"prompt": "x" * 110, **TAGS, "id": "L"}, {"prompt": "new"}])
    write_records(tmp_path / "harmless.jsonl", [{"prompt": "new"}])
    for changes, message in (
        ({"fractions": (0.0, 1.2)}, "--fractions must be one number or more, each from 0 to 1, got"),
        ({"fractions": (-0.1,)}, "--fractions must be"),
        ({"fractions": (float("nan"),)}, "--fractions must be"),
        ({"fractions": (0.5, 0.5)}, "--fractions must be numbers that differ"),
        ({"data": (str(tmp_path / "safe.jsonl"),)}, "holds no helpful row"),
        ({"data": (str(tmp_path / "helpful.jsonl"),)}, "holds no safety row"),
        ({"eval": ()}, "no held-out adversarial prompt"),
        ({"eval": (str(tmp_path / "harmless.jsonl"),)}, "no held-out adversarial prompt"),
        ({"eval": (str(tmp_path / "seen.jsonl"),)}, r"also that of held-out row .* \(DATA-3\)"),
        ({"eval": (str(tmp_path / "long.jsonl"),)}, "prompt 'L' has .* exceed the model's context of 128"),
        ({"safety_rm": ""}, "--safety-rm is missing"),
        ({"helpful_rm": model_dir}, "no reward head"),
        ({"safety_rm": str(tmp_path / "nowhere")}, "nowhere"),
        ({"max_length": 5}, "longer than 5 tokens"),
        ({"demo": True}, "--data must be left out with --demo"),
    ):
        with pytest.raises(InputError, match=message):
            scaling.run(config(model_dir, judges, files, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


def test_command_line(model_dir, judges, files, tmp_path, capsys):
    """Missing judges are one line and exit 2; the flags reach the study."""
    words = [
        "scaling",
        "--model",
        model_dir,
        "--data",
        str(files / "train.jsonl"),
        "--out",
        str(tmp_path / "out"),
    ]
    assert cli.main(words) == 2
    assert capsys.readouterr().err.startswith(
        "hpsafety scaling: --safety-rm is missing (directory of the safety"
    )
    words += ["--safety-rm", str(judges / "safety"), "--helpful-rm", str(judges / "helpful"), "--steps", "1"]
    words += ["--eval", str(files / "eval.jsonl"), "--eval-prompts", "2", "--fractions", "0", "1"]
    words += ["--max-new-tokens", "2"]
    assert cli.main([*words, "--device", "cpu"]) == 0
    assert "refused prompts" in capsys.readouterr().out
    result = result_of(tmp_path / "out")
    assert [v["steps"] for v in result["variants"]] == [1, 1] and set(result["sets"].values()) == {2}
    shutil.rmtree(tmp_path / "out")
