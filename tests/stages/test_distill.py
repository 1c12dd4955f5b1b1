"""Safety context distillation end to end on a tiny model. The bug this file must catch: a sample that is kept on equal
scores, a helpful prompt that slips in, or a preprompt that stays in what is learnt."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from hpsafety import cli
from hpsafety.config import DistillConfig, SFTConfig
from hpsafety.data.chat import encode_prompt
from hpsafety.data.records import iter_records, write_records
from hpsafety.errors import InputError, RunError
from hpsafety.model.heads import reward_model_from
from hpsafety.model.io import load_model
from hpsafety.model.reward_io import load_reward_model, save_reward_model
from hpsafety.rollout.scoring import Scorer
from hpsafety.safety import distill_arms
from hpsafety.safety.distillation import replay
from hpsafety.stages import distill, sft
from tests.stages.conftest import save_chat_model

RISKS = (
    {"category": "illicit"},
    {"category": "advice"},
    {"category": "hateful", "risk_label": "a new label"},
)
# Short enough for the tiny models' context of 512 characters.
TOML = """
adjectives = ["wise", "safe", "kind"]
[generic]
T1 = "be {adj1} and {adj2}"
T2 = "be {adj1}, then {adj2}"
T3 = ["be {adj1} please", "be good please"]
T4 = "a {adj1} and {adj2} talk"
[answer]
notice = "mind this: {label}"
"""


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny"
    return save_chat_model(folder, seed=2, max_positions=512)


@pytest.fixture(scope="session")
def judges(model_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("judges")
    save_reward_model(reward_model_from(load_model(model_dir), seed=5), folder / "safety")
    return folder


@pytest.fixture
def data(tmp_path):
    """8 adversarial prompts, a helpful one planted among them, and held-out rows of all three kinds."""
    rows = [
        {"prompt": f"bad thing {i}?", "id": f"p{i}", "is_safety": True, "attack": "logic", **RISKS[i % 3]}
        for i in range(8)
    ]
    rows.insert(3, {"prompt": "a cake?", "id": "planted", "is_safety": False})
    rows += [{"prompt": f"bad held {i}?", "id": f"v{i}", "split": "test_safety", "is_safety": True,
              "category": "illicit", "attack": "other"} for i in range(3)]  # fmt: skip
    rows.append({"prompt": "kill a lamp?", "id": "b0", "split": "test_borderline", "is_borderline": True})
    rows.append({"prompt": "a tea?", "id": "h0", "split": "valid", "is_safety": False})
    rows.append({"prompt": "later", "id": "r0", "split": "redteam"})
    path = tmp_path / "prompts.jsonl"
    write_records(path, rows)
    (tmp_path / "own.toml").write_text(TOML)
    return str(path)


def config(model_dir, judges, data, out, **changes) -> DistillConfig:
    values = {
        "model": model_dir, "data": (data,), "out": str(out), "safety_rm": str(judges / "safety"),
        "templates": str(Path(data).with_name("own.toml")), "max_new_tokens": 8, "k": 2, "batch": 4, "epochs": 1,
        "lr": 5e-3, "device": "cpu", "precision": "fp32", "checkpoint_every": 1, "kv_memory": "1MB",
    }  # fmt: skip
    return DistillConfig(**(values | changes))


def lines(path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def keyed(row: dict) -> tuple:
    return row["id"], row["sample_index"]


def model_bytes(folder) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(Path(folder).iterdir())}


@pytest.fixture(scope="session")
def finished(model_dir, judges, tmp_path_factory):
    """One run of the target text that several tests read: (config, its folder)."""
    folder = tmp_path_factory.mktemp("finished")
    cfg = config(model_dir, judges, data.__wrapped__(folder), folder / "run")
    distill.run(cfg)
    return cfg, folder / "run"


def test_arms_are_sampled_and_scored_behind_the_bare_prompt(finished, model_dir, judges):
    """CD-6: the three arms share prompts and seed and differ in the prompt alone; every answer is scored as one to the
    bare prompt; the plain answer has a seed of its own."""
    cfg, out = finished
    arms = {
        name: lines(out / "samples" / f"{name}.jsonl") for name in ("plain", "none", "generic", "template")
    }
    assert all([row["id"] for row in rows] == [f"p{i}" for i in range(8)] for rows in arms.values())
    seeds = {name: {s["seed"] for row in rows for s in row["samples"]} for name, rows in arms.items()}
    assert seeds["none"] == seeds["generic"] == seeds["template"] != seeds["plain"] == {0}
    assert [r["prompt"] for r in arms["none"]] == [r["prompt"] for r in arms["plain"]]
    for name in ("generic", "template"):
        for bare, asked in zip(arms["none"], arms[name], strict=True):
            assert asked["prompt"].endswith("\n\n" + bare["prompt"]) and asked["prompt"] != bare["prompt"]
    scorer = Scorer(*(load_reward_model(judges / "safety") for _ in range(2)))
    scores = lines(out / "samples" / "scores.jsonl")
    report = json.loads((out / "report.json").read_text())
    for index, score in enumerate(scores):
        texts = [text for rows in arms.values() for text in rows[index]["responses"]]
        group = scorer.encode(arms["plain"][index]["prompt"], texts)
        assert scorer.score([group], [True], 4096)[0].safety == score["safety_logit"] and len(texts) == 8
    for place, name in enumerate(arms):
        expected = [x for score in scores for x in score["safety"][2 * place : 2 * place + 2]]
        assert name == "plain" or report["arms"][name]["scores"] == expected


def test_decisions_replay_to_what_is_trained(finished):
    """CD-5: both scores, preprompt and decision of every sample; the strict rule again gives the rows of train.jsonl;
    CD-3: the planted helpful prompt is in none of the files; CD-2: labels without template fall back, counted."""
    cfg, out = finished
    decisions, rows = lines(out / "decisions.jsonl"), lines(out / "train.jsonl")
    assert [(d["id"], d["sample_index"]) for d in decisions] == [
        (f"p{i}", j) for i in range(8) for j in range(2)
    ]
    scores = lines(out / "samples" / "scores.jsonl")
    for number, line in enumerate(decisions):
        of = scores[number // 2]["safety"]
        assert (line["score_plain"], line["score_preprompt"]) == (of[number % 2], of[6 + number % 2])
    kept = [d for d in decisions if d["kept"]]
    assert 0 < len(kept) < len(decisions)
    assert (
        replay(decisions)
        == [(r["id"], r["sample_index"]) for r in rows]
        == [(d["id"], d["sample_index"]) for d in kept]
    )
    assert {d["preprompt_id"].split("/")[0] for d in decisions if d["id"] in ("p2", "p5")} == {"generic"}
    assert {d["preprompt_id"] for d in decisions if d["id"] == "p0"} == {"template/criminal"}
    counts = json.loads((out / "manifest.json").read_text())["counts"]
    assert (counts["excluded_not_safety"], counts["without_answer_template"], counts["kept"]) == (
        1,
        2,
        len(kept),
    )
    assert counts["other_splits"] == 1 and counts["train_prompts"] == 8
    for path in out.rglob("*.jsonl"):
        assert "a cake" not in path.read_text(), path
    report = json.loads((out / "report.json").read_text())
    assert report["fallbacks"] == {"a_new_label": 2} and report["decisions"]["kept"] == len(kept)


def test_rows_know_nothing_of_the_preprompt(finished, model_dir):
    """CD-4: the bare prompt, and no stretch of any preprompt as text or tokens in train.jsonl."""
    cfg, out = finished
    asked = {row["id"]: row["prompt"] for row in lines(out / "samples" / "template-prompts.jsonl")}
    bare = {row["id"]: row["prompt"] for row in lines(cfg.data[0])}
    tokenizer = load_model(model_dir).tokenizer
    for row in lines(out / "train.jsonl"):
        preprompt = asked[row["id"]].removesuffix("\n\n" + bare[row["id"]])
        assert row["prompt"] == bare[row["id"]] and preprompt != asked[row["id"]]
        whole = json.dumps(row)
        assert all(part not in whole for part in preprompt.split("\n"))
        text = "".join(
            map(str, [encode_prompt(tokenizer, row["prompt"]), tokenizer.encode_plain(row["response"])])
        )
        assert str(tokenizer.encode_plain(preprompt))[1:-1] not in text


def test_text_target_is_sft_on_the_kept_rows(finished, model_dir, tmp_path):
    """The target text shares SFT's code: sft on train.jsonl gives the same bytes (CD-4: SFT-1's mask)."""
    cfg, out = finished
    sft.run(SFTConfig(model=model_dir, data=(str(out / "train.jsonl"),), out=str(tmp_path / "sft"), batch=4, epochs=1,
                      lr=5e-3, device="cpu", precision="fp32"))  # fmt: skip
    assert model_bytes(out / "model") == model_bytes(tmp_path / "sft" / "model")


def test_report(finished, model_dir):
    """CD-6..8: distributions, gain beside its control, ablation; held-out answers before and after; both exact prompts,
    of one chat template, escaped."""
    cfg, out = finished
    report, page = json.loads((out / "report.json").read_text()), (out / "report.html").read_text()
    assert page.count("<svg") == 2 + 3 and "<script" not in page
    assert {name: m["n"] for name, m in report["arms"].items()} == dict.fromkeys(
        ("none", "generic", "template"), 16
    )
    assert sum(row["n"] for row in report["gain"]["template"]) == 16 and len(report["gain"]["generic"]) == 10
    assert report["ablation"]["rm"]["n"] == report["decisions"]["kept"] <= report["ablation"]["all"]["n"]
    held = report["heldout"]
    assert {part: m["distilled"]["n"] for part, m in held.items()} == {
        "adversarial": 3,
        "borderline": 1,
        "helpful": 1,
    }
    assert all(list(m) == ["none", "generic", "template", "distilled"] for m in held.values())
    manifests = [
        json.loads((out / "heldout" / f"{n}.jsonl.manifest.json").read_text()) for n in ("none", "distilled")
    ]
    assert [m["config"]["model"] for m in manifests] == [model_dir, str(out / "model")]
    assert manifests[0]["config"]["temperature"] == 0.0
    example = report["example"]
    assert example["plain"] == "<|im_start|>user\nbad thing 0?<|im_end|>\n<|im_start|>assistant\n"
    assert (
        example["preprompted"].startswith("<|im_start|>user\nmind this")
        and "\n\nbad thing 0?<|" in example["preprompted"]
    )
    assert "&lt;|im_start|&gt;user\nmind this" in page


def test_select_all_keeps_every_usable_sample(model_dir, judges, data, tmp_path):
    """CD-8: --select all differs from --select rm in the decision alone."""
    distill.run(config(model_dir, judges, data, tmp_path / "run", select="all"))
    decisions = lines(tmp_path / "run" / "decisions.jsonl")
    assert any(d["score_preprompt"] <= d["score_plain"] and d["kept"] for d in decisions)
    assert all(d["kept"] == (d["excluded"] is None) for d in decisions)
    assert replay(decisions) == [
        (r["id"], r["sample_index"]) for r in lines(tmp_path / "run" / "train.jsonl")
    ]


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_kl_target_moves_the_model_towards_its_preprompted_self(model_dir, judges, data, tmp_path, kind):
    """The divergence to the frozen teacher falls over the steps; a group's samples share one prompt."""
    cfg = config(model_dir, judges, data, tmp_path / "run", target="kl", divergence=kind, steps=6, batch=8)
    distill.run(cfg)
    losses = [row["loss"] for row in lines(tmp_path / "run" / "metrics.jsonl")]
    assert losses[0] > 1e-3 and losses[-1] < 0.8 * losses[0]
    start, made = load_model(model_dir), load_model(tmp_path / "run" / "model")
    assert not torch.equal(start.embed, made.embed)
    rows = lines(tmp_path / "run" / "train.jsonl")
    done = json.loads((tmp_path / "run" / "manifest.json").read_text())["counts"]
    assert done["groups"] == len({row["id"] for row in rows}) < len(rows)


def test_larger_teacher(model_dir, judges, data, tmp_path):
    """A teacher of another size and the same tokenizer; one of another tokenizer or vocabulary is refused."""
    save_chat_model(tmp_path / "large", seed=9, width=48, num_layers=3, max_positions=512)
    changes = {"target": "kl", "teacher": str(tmp_path / "large"), "preprompt": "none", "steps": 2}
    distill.run(config(model_dir, judges, data, tmp_path / "run", **changes))
    losses = [row["loss"] for row in lines(tmp_path / "run" / "metrics.jsonl")]
    assert losses[0] > 0.1
    file = tmp_path / "large" / "tokenizer.json"
    file.write_text(file.read_text().replace('"a"', '"@"'))
    with pytest.raises(InputError, match="differ in their vocabulary"):
        distill.run(config(model_dir, judges, data, tmp_path / "other", **changes))
    save_chat_model(tmp_path / "wide", seed=9, vocab_size=80, max_positions=512)
    with pytest.raises(InputError, match="head of 80 words"):
        distill.run(
            config(
                model_dir, judges, data, tmp_path / "other", **changes | {"teacher": str(tmp_path / "wide")}
            )
        )
    assert not (tmp_path / "other").exists()


def test_system_place(model_dir, judges, data, tmp_path):
    """--system: the preprompt stands in the system message, the user's text is untouched."""
    distill.run(config(model_dir, judges, data, tmp_path / "run", system=True, k=1, select="all"))
    for row in lines(tmp_path / "run" / "samples" / "template-prompts.jsonl"):
        assert [m["role"] for m in row["prompt"]] == ["system", "user"]
        assert row["prompt"][1]["content"].startswith("bad thing")
    assert all(isinstance(row["prompt"], str) for row in lines(tmp_path / "run" / "train.jsonl"))


@pytest.mark.parametrize("target", ["text", "kl"])
def test_interrupted_run_goes_on_to_the_same_bytes(model_dir, judges, data, tmp_path, monkeypatch, target):
    """Killed in sampling, in scoring, in training and before the held-out answers, the same command ends with the same
    files as a run that was let be."""
    cfg = config(model_dir, judges, data, tmp_path / "whole", target=target)
    distill.run(cfg)
    cut = dataclasses.replace(cfg, out=str(tmp_path / "cut"))

    def dies(module, name, call):
        """One run in which the call-th call of module.name dies before it does anything."""
        real, calls = getattr(module, name), []

        def until(*args, **kwargs):
            calls.append(name)
            if len(calls) == call:
                raise KeyboardInterrupt
            return real(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(module, name, until)
            with pytest.raises(KeyboardInterrupt):
                distill.run(cut)

    from hpsafety.safety import sampling_job, scoring_job
    from hpsafety.train import loop

    dies(sampling_job, "group_row", 11)  # the second arm has begun
    dies(scoring_job.Scorer, "score_part", 1)
    dies(loop, "train_step", 2)
    assert (tmp_path / "cut" / "checkpoints" / "step-1").is_dir() and not (
        tmp_path / "cut" / "model"
    ).exists()
    dies(distill, "ask_held_out", 1)
    assert (tmp_path / "cut" / "model").is_dir() and not (tmp_path / "cut" / "report.json").exists()
    distill.run(cut)
    assert "resumed from step 1" in (tmp_path / "cut" / "log.txt").read_text()
    names = (
        "decisions.jsonl",
        "train.jsonl",
        "samples/template.jsonl",
        "samples/scores.jsonl",
        "report.json",
    )
    for name in (*names, "heldout/distilled.jsonl"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert model_bytes(tmp_path / "cut" / "model") == model_bytes(tmp_path / "whole" / "model")


def test_no_resume_inherits_nothing(model_dir, judges, data, tmp_path):
    cfg = config(model_dir, judges, data, tmp_path / "run")
    distill.run(cfg)
    with pytest.raises(InputError, match="seed was 0, now 1"):
        distill.run(dataclasses.replace(cfg, seed=1))
    distill.run(dataclasses.replace(cfg, seed=1, resume=False))
    assert {s["seed"] for s in lines(tmp_path / "run/samples/plain.jsonl")[0]["samples"]} == {1}


def test_nothing_kept_stops_with_the_scores(model_dir, judges, data, tmp_path, monkeypatch, capsys):
    """CD-5's strict rule on equal scores keeps nothing: exit 1, with the table, the log, and no model."""
    real = distill_arms.ask

    def level(*args, **kwargs):
        found = real(*args, **kwargs)
        same = lambda answers: [dataclasses.replace(a, score=0.25) for a in answers]  # noqa: E731
        return [{name: same(answers) for name, answers in one.items()} for one in found]

    monkeypatch.setattr(distill_arms, "ask", level)
    with pytest.raises(RunError, match="nothing to learn: 0 of 16 samples kept, 16 not above"):
        distill.run(config(model_dir, judges, data, tmp_path / "run"))
    table = capsys.readouterr().out
    assert "0.250 (0.250, 0.250)" in table and "0 of 16 samples kept" in table
    assert (
        len(lines(tmp_path / "run" / "decisions.jsonl")) == 16 and not (tmp_path / "run" / "model").exists()
    )


def test_bad_input(model_dir, judges, data, tmp_path):
    """Every fault of the input is one line, before anything is written."""
    out = tmp_path / "run"

    def run(**changes):
        distill.run(dataclasses.replace(config(model_dir, judges, data, out), **changes))

    helpful = tmp_path / "helpful.jsonl"
    write_records(helpful, [{"prompt": "a cake?", "is_safety": False}, {"prompt": "a tea?"}])
    bad = tmp_path / "bad.toml"
    bad.write_text('[labels.new]\nname = "new"\nsteps = []\n')
    for changes, message in (
        ({"data": (str(helpful),)}, "no adversarial prompt is left: of 2 rows to train on 2 are not marked"),
        ({"max_new_tokens": 500}, "no prompt is left: all 8 are too long"),
        ({"templates": str(bad)}, r"bad.toml: key labels.new.steps: there are no steps"),
        ({"safety_rm": model_dir}, "no reward head"),
        ({"teacher": model_dir}, "--teacher needs --target kl"),
        ({"target": "kl", "preprompt": "none"}, "needs --teacher"),
        ({"k": 0}, "--k must be at least 1"),
        ({"divergence": "l2"}, "--divergence must be one of forward_kl"),
    ):
        with pytest.raises(InputError, match=message):
            run(**changes)
    words = ["--model", model_dir, "--safety-rm", str(judges / "safety"), "--data", data, "--out", str(out)]
    assert cli.main(["distill", *words, "--templates", str(bad)]) == 2
    assert cli.main(["distill", *words, "--select", "best"]) == 2
    assert not out.exists()


def test_too_long_prompts_are_dropped_and_counted(model_dir, judges, data, tmp_path):
    rows = lines(data)
    rows[0]["prompt"] = "long " * 100
    write_records(data, rows)
    distill.run(config(model_dir, judges, data, tmp_path / "run", select="all"))
    counts = json.loads((tmp_path / "run" / "manifest.json").read_text())["counts"]
    assert counts["prompts_dropped_too_long"] == 1
    assert {row["id"] for row in iter_records(tmp_path / "run" / "train.jsonl", "demonstration")} <= {
        f"p{i}" for i in range(1, 8)
    }
