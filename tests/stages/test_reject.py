"""Rejection sampling end to end on a tiny model. The bug this file must catch: a model fine-tuned from the version
before instead of from the base weights, or an old sample that keeps the score an older reward model gave it."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from hpsafety.config import RejectConfig, SFTConfig
from hpsafety.data.records import iter_records, write_records
from hpsafety.errors import InputError
from hpsafety.model.io import load_model, save_model
from hpsafety.model.reward_io import load_reward_model
from hpsafety.rollout.scoring import Scorer
from hpsafety.stages import reject, sft
from tests.stages.conftest import write_tokenizer
from tests.tiny import tiny_model

WORDS = ("yes", "no", "maybe", "help", "stop", "a", "cake", "tea")


@pytest.fixture
def prompts(tmp_path):
    rows = [{"prompt": f"question {i}?", "id": f"p{i}"} for i in range(9)]
    rows[2] |= {"is_safety": True, "category": "illicit", "attack": "logic"}
    rows += [{"prompt": f"held out {i}?", "id": f"v{i}", "split": "valid"} for i in range(3)]
    rows.append({"prompt": "a test", "split": "test_help"})
    path = tmp_path / "prompts.jsonl"
    write_records(path, rows)
    return str(path)


def config(model_dir, judges, prompts, out, **changes) -> RejectConfig:
    values = {
        "model": model_dir, "data": (prompts,), "out": str(out), "safety_rm": str(judges / "safety"),
        "helpful_rm": str(judges / "helpful"), "k": 4, "temperatures": (1.0,), "max_new_tokens": 8, "batch": 4,
        "epochs": 1, "lr": 5e-3, "device": "cpu", "precision": "fp32", "checkpoint_every": 2, "kv_memory": "1MB",
    }  # fmt: skip
    return RejectConfig(**(values | changes))


def lines(path, kind="group") -> list[dict]:
    return list(iter_records(path, kind))


def model_bytes(folder) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(Path(folder).iterdir())}


def test_run_directory(model_dir, judges, prompts, tmp_path):
    """RS-1: K samples per prompt with seed, temperature and scores; RS-2's winner; RS-5's curves; the files."""
    out = tmp_path / "run"
    reject.run(config(model_dir, judges, prompts, out))
    groups, scores = (
        lines(out / "iteration-1" / "samples.jsonl"),
        lines(out / "iteration-1" / "scores.jsonl", "score"),
    )
    assert [row["id"] for row in groups] == [f"p{i}" for i in range(9)] == [row["id"] for row in scores]
    for row, score in zip(groups, scores, strict=True):
        assert len(row["samples"]) == len(row["responses"]) == len(score["combined"]) == 4
        assert all(s["temperature"] == 1.0 and isinstance(s["seed"], int) for s in row["samples"])
    scorer = Scorer(load_reward_model(judges / "safety"), load_reward_model(judges / "helpful"))
    for row, score in zip(groups, scores, strict=True):
        group = scorer.encode(row["prompt"], row["responses"])
        assert scorer.score([group], [bool(row.get("is_safety"))], 512)[0].safety == score["safety_logit"]
    selected = {row["id"]: row for row in lines(out / "iteration-1" / "selected.jsonl", "demonstration")}
    for row, score in zip(groups, scores, strict=True):
        best = score["combined"].index(max(score["combined"]))
        if row["responses"][best].strip():
            won = selected.pop(row["id"])
            assert won["response"] == row["responses"][best] and won["sample_index"] == best
            assert (won["r_c"], won["r_s"]) == (score["combined"][best], score["safety"][best])
    assert not selected
    report = json.loads((out / "report.json").read_text())["iterations"][0]
    assert len(report["max"]) == len(report["median"]) == 4 and report["max"] == sorted(report["max"])
    assert (out / "report.html").read_text().count("<svg") == 1
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["stage"] == "reject" and manifest["ended"] and manifest["counts"]["train_prompts"] == 9
    assert {"safety_rm/config.json", "model/config.json", "base/config.json"} <= manifest[
        "input_hashes"
    ].keys()
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3] and {row["iteration"] for row in rows} == {1}
    assert model_bytes(out / "model") == model_bytes(out / "iteration-1" / "tune" / "model")


def test_every_version_starts_from_the_base(model_dir, judges, prompts, tmp_path):
    """RS-7: iteration 2 samples from iteration 1's model, and its own model is the base fine-tuned on its winners."""
    cfg = config(model_dir, judges, prompts, tmp_path / "run", iterations=2)
    reject.run(cfg)
    for v in (1, 2):
        winners = tmp_path / "run" / f"iteration-{v}" / "selected.jsonl"
        sft.run(SFTConfig(
            model=model_dir, data=(str(winners),), out=str(tmp_path / f"sft-{v}"), batch=4, epochs=1, lr=5e-3,
            device="cpu", precision="fp32", checkpoint_every=2,
        ))  # fmt: skip
        ours = model_bytes(tmp_path / "run" / f"iteration-{v}" / "tune" / "model")
        assert ours == model_bytes(tmp_path / f"sft-{v}" / "model")
    manifest = json.loads((tmp_path / "run/iteration-2/samples.jsonl.manifest.json").read_text())
    assert manifest["config"]["model"].endswith("iteration-1/tune/model")
    seeds = {lines(tmp_path / f"run/iteration-{v}/samples.jsonl")[0]["samples"][0]["seed"] for v in (1, 2)}
    assert len(seeds) == 2


def best_text(judges, prompt: str) -> str:
    """A text that the judges prefer by far to what the tiny model says."""
    scorer = Scorer(load_reward_model(judges / "safety"), load_reward_model(judges / "helpful"))
    texts = [f"{a} {b} {c}" for a in WORDS for b in WORDS for c in WORDS]
    return texts[scorer.score([scorer.encode(prompt, texts)], [False], 50_000)[0].best]


def test_pool_of_all_iterations_or_of_the_last(model_dir, judges, prompts, tmp_path, monkeypatch):
    """RS-3: a high scorer planted in iteration 1 is selected at iteration 3, in the old mode it is not."""
    planted, real = best_text(judges, "question 0?"), reject.sample_file

    def sample_and_plant(cfg, world):
        real(cfg, world)
        if "iteration-1" in cfg.out:
            rows = lines(cfg.out)
            rows[0]["responses"][2] = rows[0]["samples"][2]["text"] = planted
            write_records(cfg.out, rows)

    monkeypatch.setattr(reject, "sample_file", sample_and_plant)
    chosen = {}
    for pool in ("all", "last"):
        reject.run(config(model_dir, judges, prompts, tmp_path / pool, iterations=3, pool=pool))
        chosen[pool] = lines(tmp_path / pool / "iteration-3" / "selected.jsonl", "demonstration")[0]
    assert (chosen["all"]["response"], chosen["all"]["iteration"], chosen["all"]["sample_index"]) == (
        planted,
        1,
        2,
    )
    assert all(
        row["iteration"] == 3 for row in lines(tmp_path / "last/iteration-3/selected.jsonl", "demonstration")
    )
    assert chosen["last"]["response"] != planted


def test_earlier_runs_are_scored_again_by_the_newest_judges(model_dir, judges, prompts, tmp_path):
    """RS-3: samples that --pool-from brings get the scores of this run's reward models before they compete."""
    old = config(model_dir, judges, prompts, tmp_path / "old")
    reject.run(old)
    new = dataclasses.replace(
        old,
        out=str(tmp_path / "new"),
        helpful_rm=str(judges / "newer"),
        pool_from=(str(tmp_path / "old"),),
        seed=9,
    )
    reject.run(new)
    rescored = lines(tmp_path / "new" / "pool-scores.jsonl", "score")
    before = lines(tmp_path / "old" / "iteration-1" / "scores.jsonl", "score")
    assert [r["safety_logit"] for r in rescored] == [r["safety_logit"] for r in before]
    assert all(a["helpful_logit"] != b["helpful_logit"] for a, b in zip(rescored, before, strict=True))
    own = lines(tmp_path / "new" / "iteration-1" / "scores.jsonl", "score")
    wins = {
        row["id"]: row for row in lines(tmp_path / "new" / "iteration-1" / "selected.jsonl", "demonstration")
    }
    for old_row, new_row in zip(rescored, own, strict=True):
        if old_row["id"] in wins:
            from_old = max(old_row["combined"]) >= max(new_row["combined"])  # a tie goes to the earlier
            assert wins[old_row["id"]]["iteration"] == (0 if from_old else 1)


def test_temperature_search(model_dir, judges, prompts, tmp_path):
    """RS-4: every iteration, over the whole grid, on validation prompts only; table and choice in the manifest."""
    out = tmp_path / "run"
    reject.run(config(model_dir, judges, prompts, out, iterations=2, temperatures=(1.5, 0.5)))
    manifest = json.loads((out / "manifest.json").read_text())
    for v in (1, 2):
        found = manifest["counts"]["temperature_search"][str(v)]
        assert list(found["mean_best_of_k"]) == ["0.5", "1.5"]
        assert found["chosen"] == float(max(found["mean_best_of_k"], key=found["mean_best_of_k"].get))
        for t in ("0.5", "1.5"):
            searched = lines(out / f"iteration-{v}" / f"search-{t}.jsonl")
            assert [row["id"] for row in searched] == ["v0", "v1", "v2"]
            assert {s["temperature"] for row in searched for s in row["samples"]} == {float(t)}
        used = {
            s["temperature"] for row in lines(out / f"iteration-{v}/samples.jsonl") for s in row["samples"]
        }
        assert used == {found["chosen"]}


def test_search_takes_a_tenth_where_no_prompt_is_marked_valid():
    rows = [{"prompt": f"question {i}"} for i in range(40)] + [{"prompt": "Question  3"}]
    cfg = config("m", Path("j"), "p", "o", temperatures=(0.5, 1.0), search_prompts=3)
    train, search, counts = reject.split_prompts(rows, cfg)
    assert (
        len(train) == 36 and len(search) == 3 == counts["search_prompts"] and counts["repeated_prompts"] == 1
    )
    assert not {r["prompt"] for r in train} & {r["prompt"] for r in search}
    assert reject.split_prompts(rows, dataclasses.replace(cfg, temperatures=(1.0,)))[1] == []


def test_distillation_never_samples_the_student(model_dir, judges, prompts, tmp_path, monkeypatch):
    """RS-6: the large model samples in every iteration, the small one is fine-tuned on its selections."""
    save_model(tiny_model(seed=7, num_layers=1), tmp_path / "student")
    write_tokenizer(tmp_path / "student")
    sampled, real = [], reject.sample_file
    monkeypatch.setattr(
        reject, "sample_file", lambda cfg, world: (sampled.append(cfg.model), real(cfg, world))
    )
    cfg = config(
        model_dir, judges, prompts, tmp_path / "run", student=str(tmp_path / "student"), iterations=2,
        temperatures=(0.5, 1.0),
    )  # fmt: skip
    reject.run(cfg)
    assert len(sampled) == 6 and set(sampled) == {model_dir}
    made, start = load_model(tmp_path / "run" / "model"), load_model(tmp_path / "student")
    assert made.config == start.config and not torch.equal(made.embed, start.embed)


def test_interrupted_run_goes_on_to_the_same_bytes(model_dir, judges, prompts, tmp_path, monkeypatch):
    cfg = config(model_dir, judges, prompts, tmp_path / "whole", iterations=2, temperatures=(0.5, 1.0))
    reject.run(cfg)
    cut, real, calls = dataclasses.replace(cfg, out=str(tmp_path / "cut")), reject.score_file, []

    def score_until(cfg, world):
        calls.append(cfg.out)
        if len(calls) == 4:  # the samples of iteration 2 are there, their scores are not
            raise KeyboardInterrupt
        real(cfg, world)

    with monkeypatch.context() as patch:
        patch.setattr(reject, "score_file", score_until)
        with pytest.raises(KeyboardInterrupt):
            reject.run(cut)
    assert (tmp_path / "cut/iteration-2/samples.jsonl").exists() and not (tmp_path / "cut" / "model").exists()
    reject.run(cut)
    for name in ("iteration-1/selected.jsonl", "iteration-2/scores.jsonl", "iteration-2/selected.jsonl"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert model_bytes(tmp_path / "cut" / "model") == model_bytes(tmp_path / "whole" / "model")


def test_no_resume_inherits_nothing(model_dir, judges, prompts, tmp_path):
    cfg = config(model_dir, judges, prompts, tmp_path / "run", iterations=2)
    reject.run(cfg)
    with pytest.raises(InputError, match="seed was 0, now 1"):
        reject.run(dataclasses.replace(cfg, seed=1, iterations=1))
    reject.run(dataclasses.replace(cfg, seed=1, iterations=1, resume=False))
    assert not (tmp_path / "run" / "iteration-2").exists()


def test_bad_input(model_dir, judges, prompts, tmp_path):
    def run(**changes):
        reject.run(config(model_dir, judges, prompts, tmp_path / "run", **changes))

    for changes, message in (
        ({"k": 0}, "--k must be at least 1"),
        (
            {"temperatures": (1.0, float("nan"))},
            "--temperatures must be one number or more, each 0 or greater",
        ),
        ({"top_p": 0.0}, "--top-p must be"),
        ({"pool_from": ("nowhere",)}, "--pool-from nowhere: no such file or folder"),
        ({"helpful_rm": model_dir}, "no reward head"),
        ({"max_new_tokens": 500}, "exceed the context of 128"),
    ):
        with pytest.raises(InputError, match=message):
            run(**changes)
    path = tmp_path / "test.jsonl"
    write_records(path, [{"prompt": "a test", "split": "test_help"}])
    with pytest.raises(InputError, match="no prompt is left to train on"):
        run(data=(str(path),))
