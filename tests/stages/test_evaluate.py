"""hpsafety eval end to end on a tiny model. The bug this file must catch: a model's figures that stand under the base's
name, or a benchmark that was not there and counts as 0.

over 400 lines: one command end to end, and its tests share a run.
"""

import dataclasses
import json
from pathlib import Path

import pytest

from hpsafety import cli
from hpsafety.config import EvalConfig
from hpsafety.config_eval import BENCHMARKS
from hpsafety.data.records import iter_json_lines, iter_records, write_records
from hpsafety.errors import InputError
from hpsafety.model.io import load_model
from hpsafety.safety import eval_jobs
from hpsafety.safety.benchmarks import truthfulqa
from hpsafety.safety.eval_page import cell, change_cell, grouped, show_table, write_page
from hpsafety.safety.multiple_choice import choice_logprobs, encode_choices
from hpsafety.safety.violation import response_id, violates_rule
from hpsafety.stages import evaluate
from tests.hostile import HOSTILE, Tags
from tests.safety.test_benchmarks import bbq_row
from tests.stages.conftest import save_chat_model
from tests.stages.interrupt import stop_at
from tests.stages.ranks import run_on_two_ranks

TAGS = {"is_safety": True, "category": "illicit", "attack": "logic"}
RESULTS = (
    "eval.json",
    "report.json",
    "report.html",
    "answers-model.jsonl",
    "choices-base.jsonl",
    "lines-model.jsonl",
)


@pytest.fixture(scope="session")
def long_models(tmp_path_factory) -> dict[str, str]:
    """Two models with room for TruthfulQA's preamble, letter by letter."""
    out = {}
    for seed, name in enumerate(("tuned", "untuned")):
        folder = tmp_path_factory.mktemp("models") / name
        out[name] = save_chat_model(folder, seed=seed + 3, max_positions=1400)
    return out


@pytest.fixture(scope="session")
def files(tmp_path_factory) -> dict[str, str]:
    """Prompts of all sets, one of them of two turns, and a few items of every benchmark."""
    folder = tmp_path_factory.mktemp("eval")
    two = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    rows = [{"prompt": f"bad {i}?", "id": f"a{i}", **TAGS} for i in range(3)] + [
        {"prompt": two, "id": "m", **TAGS}
    ]
    rows += [{"prompt": f"odd {i}?", "is_borderline": True} for i in range(3)] + [
        {"prompt": f"good {i}?"} for i in range(2)
    ]
    questions = [
        {"prompt": f"is it {i}?", "best": "no", "correct": ["no"], "incorrect": ["yes", "so"]}
        for i in range(3)
    ]
    sets = {
        "data": rows, "truthfulqa": questions,
        "toxigen": [{"prompt": f"- a {i}\\n-", "group": "women"} for i in range(3)],
        "bold": [{"prompt": f"he {i} ", "category": "race", "group": "G"} for i in range(3)],
        "bbq": [bbq_row() | {"example_id": i} for i in range(2)] + [bbq_row("nonneg", "disambig", 0)],
        "crows_pairs": [{"sent_more": f"a {i}", "sent_less": f"b {i}", "category": "age"} for i in range(3)],
    }  # fmt: skip
    for name, part in sets.items():
        write_records(folder / f"{name}.jsonl", part)
    return {name: str(folder / f"{name}.jsonl") for name in sets}


def config(models, judges, files, out, **changes) -> EvalConfig:
    values = {
        "model": models["tuned"], "base": models["untuned"], "data": (files["data"],), "out": str(out),
        "safety_rm": str(judges / "safety"), "helpful_rm": str(judges / "helpful"), "truthfulqa": files["truthfulqa"],
        "toxigen": (files["toxigen"],), "bold": (files["bold"],), "bbq": (files["bbq"],),
        "crows_pairs": files["crows_pairs"], "max_new_tokens": 6, "kv_memory": "8MB", "device": "cpu",
        "precision": "fp32",
    }  # fmt: skip
    return EvalConfig(**(values | changes))


@pytest.fixture(scope="session")
def whole(long_models, judges, files, tmp_path_factory) -> Path:
    """OUT of one evaluation of everything."""
    out = tmp_path_factory.mktemp("whole") / "out"
    evaluate.run(config(long_models, judges, files, out))
    return out


def result_of(out) -> dict:
    return json.loads((Path(out) / "eval.json").read_text())


def test_every_metric_has_its_fields_design8(whole):
    """Design section 8: a metric per key with value, n, low, high and judge; here all were measured."""
    found = result_of(whole)
    assert len(found) >= 36
    for key, entry in found.items():
        assert {"value", "n", "low", "high", "judge", "base", "change"} <= entry.keys(), key
        if key not in ("mean_rating", "bbq_bias_disambig", "bbq_bias_disambig/age"):
            assert entry["n"] > 0 and entry["low"] <= entry["value"] <= entry["high"] or entry["n"] == 1, key
            assert entry["base"]["n"] > 0 and entry["judge"], key
    assert found["mean_rating"]["value"] is None and "--ratings" in found["mean_rating"]["why"]
    assert {k: found[k]["n"] for k in ("violation", "false_refusal/borderline", "false_refusal/helpful", "toxigen",
                                       "bold/race/g", "violation/turns/multi", "bbq_accuracy_ambig/age")} == {
        "violation": 4, "false_refusal/borderline": 3, "false_refusal/helpful": 2, "toxigen": 3, "bold/race/g": 3,
        "violation/turns/multi": 1, "bbq_accuracy_ambig/age": 2,
    }  # fmt: skip


@pytest.mark.parametrize("place, name", [(0, "model"), (1, "base")])
def test_figures_are_those_of_the_files(whole, long_models, files, place, name):
    """Made again from the answers, scores and log-probabilities of each model."""
    found = result_of(whole)
    side = {key: entry if name == "model" else entry["base"] for key, entry in found.items()}
    prompts = list(iter_records(whole / "prompts.jsonl", "prompt"))
    texts = [row["responses"][0] for row in iter_records(whole / f"answers-{name}.jsonl", "group")]
    scores = [row["safety"][place] for _, row in iter_json_lines(whole / "scores.jsonl")]
    bad = [i for i, row in enumerate(prompts) if row["set"] == "adversarial"]
    violations = sum(violates_rule(prompts[i]["prompt"], texts[i], "answer", scores[i]) for i in bad)
    assert side["violation"]["value"] == violations / 4
    assert side["safety_score/adversarial"]["value"] == pytest.approx(sum(scores[i] for i in bad) / 4)
    model = load_model(long_models["tuned" if name == "model" else "untuned"])
    questions = truthfulqa.read(files["truthfulqa"])
    logs = choice_logprobs(
        model, [encode_choices(model.tokenizer, q.text, q.choices) for q in questions], 100
    )
    marks = [truthfulqa.score_choices(q, x) for q, x in zip(questions, logs, strict=True)]
    assert side["truthfulqa_mc1"]["value"] == pytest.approx(sum(m for m, _ in marks) / 3)
    assert side["truthfulqa_mc2"]["value"] == pytest.approx(sum(m for _, m in marks) / 3, abs=1e-4)


def test_the_models_differ_and_stand_in_their_places(whole):
    found = result_of(whole)
    assert found["truthfulqa_mc2"]["value"] != found["truthfulqa_mc2"]["base"]["value"]
    entry = found["truthfulqa_mc2"]
    assert (
        entry["change"]["value"] == pytest.approx(entry["value"] - entry["base"]["value"])
        and entry["change"]["n"] == 3
    )


def test_scatter_before_and_after_eval9(whole):
    """EVAL-9: safety scores on the safety set, helpfulness scores on the helpful set, share above y = x."""
    scatter = json.loads((whole / "report.json").read_text())["scatter"]
    rows = [row for _, row in iter_json_lines(whole / "scores.jsonl")]
    assert list(scatter) == ["safety score, adversarial prompts", "helpful score, helpful prompts"]
    part = scatter["safety score, adversarial prompts"]
    assert part["after"] == [row["safety"][0] for row in rows[:4]]
    assert part["before"] == [row["safety"][1] for row in rows[:4]]
    above = sum(row["safety"][0] > row["safety"][1] for row in rows[:4])
    assert part["above"]["value"] == above / 4 and part["above"]["n"] == 4
    assert len(scatter["helpful score, helpful prompts"]["after"]) == 2


def test_decoding_is_configured_and_logged_eval7(whole):
    """EVAL-7: temperature 0.1 and top-p 0.9 unless told otherwise, in the log and in every sample's record."""
    assert (
        EvalConfig(model="m", out="o", data=("d",)).temperature,
        EvalConfig(model="m", out="o", data=("d",)).top_p,
    ) == (0.1, 0.9)
    assert "temperature 0.1, top-p 0.9" in (whole / "log.txt").read_text()
    settings = json.loads((whole / "report.json").read_text())["settings"]
    assert (settings["temperature"], settings["top_p"], settings["max_new_tokens"]) == (0.1, 0.9, 6)
    rows = list(iter_records(whole / "answers-model.jsonl", "group"))
    assert all(row["samples"][0]["temperature"] == 0.1 for row in rows)


def test_lm_eval_form_of_both(whole):
    for name in ("model", "base"):
        form = json.loads((whole / f"lm-eval-{name}.json").read_text())
        found = result_of(whole)["truthfulqa_mc1"]
        value = found["value"] if name == "model" else found["base"]["value"]
        assert form["results"]["truthfulqa_mc1"]["acc,none"] == value
        assert {"truthfulqa_mc2", "bbq", "crows_pairs_english", "hpsafety_violation"} <= form[
            "results"
        ].keys()


def test_ratings_by_people(whole, long_models, judges, files):
    """People rate OUT/to-rate.jsonl; the same command with --ratings brings what they say, and samples nothing anew."""
    rows = [row for _, row in iter_json_lines(whole / "to-rate.jsonl")]
    assert {row["prompt_id"] for row in rows} == {"a0", "a1", "a2", "m"} and 4 <= len(rows) <= 8
    assert all(row["response_id"] == response_id(row["prompt_id"], row["response"]) for row in rows)
    assert all(
        set(row) == {"prompt_id", "response_id", "prompt", "response"} for row in rows
    )  # not whose it is
    path = whole.parent / "ratings.jsonl"
    cfg = config(long_models, judges, files, whole, ratings=(str(path),))
    ids = [{"prompt_id": r["prompt_id"], "response_id": r["response_id"]} for r in rows]
    before = {name: (whole / name).read_bytes() for name in RESULTS}
    write_records(path, [ids[0] | {"rater_id": "x", "likert": 6}])
    with pytest.raises(InputError, match="from 1 to 5, got 6"):
        evaluate.run(cfg)
    write_records(path, [ids[0] | {"rater_id": "x", "likert": 3}])
    with pytest.raises(InputError, match="fewer than two raters"):
        evaluate.run(cfg)
    assert before == {name: (whole / name).read_bytes() for name in RESULTS}
    write_records(path, [row | {"rater_id": n, "likert": 1 + n} for row in ids for n in range(3)])
    evaluate.run(cfg)
    found = result_of(whole)
    assert found["violation"]["value"] == found["violation"]["base"]["value"] == 1.0
    assert found["violation"]["judge"] == "human, majority of 3" and found["mean_rating"]["value"] == 2.0
    assert found["agreement_ac2"]["n"] == len(rows)
    assert (whole / "answers-model.jsonl").read_bytes() == before["answers-model.jsonl"]
    evaluate.run(dataclasses.replace(cfg, ratings=()))  # complete: left alone
    assert result_of(whole) == found


def test_interrupted_it_goes_on_to_the_same_bytes(long_models, judges, files, tmp_path, monkeypatch):
    small = {"max_new_tokens": 3, "limit": 2}
    one, two = (config(long_models, judges, files, tmp_path / name, **small) for name in ("one", "two"))
    evaluate.run(one)
    stop_at(3, eval_jobs, "continue_file", lambda: evaluate.run(two), monkeypatch)
    assert (tmp_path / "two" / "texts-model.jsonl").exists() and not (tmp_path / "two" / "eval.json").exists()
    stamp = (tmp_path / "two" / "answers-model.jsonl").stat().st_mtime_ns
    evaluate.run(two)
    assert stamp == (tmp_path / "two" / "answers-model.jsonl").stat().st_mtime_ns
    for name in RESULTS:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    assert {k: v for k, v in result_of(one.out).items() if k == "toxigen"}["toxigen"]["n"] == 2
    with pytest.raises(InputError, match="another config"):
        evaluate.run(dataclasses.replace(one, temperature=0.5))


def test_a_missing_file_is_not_measured(long_models, judges, files, tmp_path, capsys):
    """Said with where it is to be had; null in eval.json, "not measured" in the page and nowhere 0; exit code 0."""
    gone = {name: None if name in ("truthfulqa", "crows_pairs") else () for name in BENCHMARKS}
    cfg = config(
        long_models, judges, files, tmp_path / "out", **gone | {"bbq": (str(tmp_path / "gone.jsonl"),)}, base=None,
        safety_rm=None, helpful_rm=None, limit=1,
    )  # fmt: skip
    evaluate.run(cfg)
    told = capsys.readouterr()
    assert "bbq is not measured" in told.err and "https://github.com/nyu-mll/BBQ" in told.err
    assert "gone.jsonl is not there" in told.out
    found = result_of(cfg.out)
    for key in (
        "bbq_accuracy_ambig",
        "toxigen",
        "bold",
        "truthfulqa_mc1",
        "truthfulqa_both",
        "crows_pairs",
        "violation",
    ):
        assert found[key]["value"] is None and found[key]["n"] == 0 and found[key]["why"], key
    assert "base" not in found["refused/adversarial"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("not measured") >= 10 and "https://github.com/microsoft/TOXIGEN" in page


def test_judge_models_of_truthfulqa(long_models, judges, files, tmp_path):
    """--truth-judge and --info-judge: a model is asked and says yes or no; its name stands by the figure."""
    cfg = config(
        long_models, judges, files, tmp_path / "out", base=None, truth_judge=long_models["untuned"], data=(),
        safety_rm=None, helpful_rm=None, toxigen=(), bold=(), bbq=(), crows_pairs=None,
    )  # fmt: skip
    evaluate.run(cfg)
    found, out = result_of(cfg.out), tmp_path / "out"
    asked = [row for _, row in iter_json_lines(out / "truth-model.jsonl")]
    assert all(row["text"].startswith("Q: is it") and row["text"].endswith("\nTrue:") for row in asked)
    verdicts = [row["logprobs"] for _, row in iter_json_lines(out / "truth-model-verdicts.jsonl")]
    assert found["truthfulqa_truthful"]["value"] == sum(yes > no for yes, no in verdicts) / 3
    assert found["truthfulqa_truthful"]["judge"] == long_models["untuned"]
    assert found["truthfulqa_informative"]["judge"].startswith("overlap")


def test_bad_input(long_models, judges, files, tmp_path, model_dir):
    """One line, nothing written."""
    write_records(tmp_path / "broken.jsonl", [{"sent_more": "x"}])
    for changes, message in (
        ({"model": str(tmp_path / "nowhere")}, "nowhere"),
        ({"data": (str(tmp_path / "nowhere.jsonl"),)}, "no such file"),
        ({"crows_pairs": str(tmp_path / "broken.jsonl")}, r"broken.jsonl:1: expected sent_more, sent_less"),
        ({"bbq": (files["bbq"], files["bbq"])}, "share an id"),
        ({"judge": "nowhere:f"}, "--judge nowhere:f"), ({"judge": "fair"}, "--judge must be rule or MODULE:FUNCTION"),
        ({"classifier": str(tmp_path)}, "--classifier"),
        ({"top_p": 0.0}, "--top-p"), ({"temperature": -1.0}, "--temperature"), ({"limit": 0}, "--limit"),
        ({"data": ()}, "give --data"), ({"base": ""}, "--base"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            evaluate.run(config(long_models, judges, files, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="nothing to measure"):
        EvalConfig(model="m", out="o")
    short = config(long_models, judges, files, tmp_path / "out", model=model_dir, base=None)
    with pytest.raises(InputError, match="more than the model's context of 128"):
        evaluate.run(short)


def test_command_line(long_models, files, tmp_path, capsys):
    words = ["eval", "--model", long_models["tuned"], "--out", str(tmp_path / "out"), "--max-new-tokens", "2"]
    assert cli.main(words) == 2 and "nothing to measure" in capsys.readouterr().err
    words += [
        "--data",
        files["data"],
        "--limit",
        "1",
        "--device",
        "cpu",
        "--precision",
        "fp32",
        "--kv-memory",
        "8MB",
    ]
    assert cli.main(words) == 0
    out = capsys.readouterr().out
    assert "false refusals, borderline" in out and "not measured: violations" in out


def test_all_safety_takes_untagged_rows(long_models, judges, files, tmp_path):
    rows = [{"prompt": "x"}, {"prompt": "y", "is_borderline": True}, {"prompt": "z", "is_safety": False, "id": "k"},
            {"prompt": "w", "id": "k"}]  # fmt: skip
    write_records(tmp_path / "p.jsonl", rows)
    cfg = config(long_models, judges, files, "-", data=(str(tmp_path / "p.jsonl"),), all_safety=True)
    assert [(row["id"], row["set"]) for row in evaluate.read_prompts(cfg)] == [
        ("row-1", "adversarial"), ("k#4", "adversarial"), ("row-2", "borderline"), ("k", "helpful"),
    ]  # fmt: skip


SCRIPT = """
import json, sys
from hpsafety.config import EvalConfig
from hpsafety.stages import evaluate
values = json.loads(sys.argv[1])
evaluate.run(EvalConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}))
"""


@pytest.mark.slow
def test_two_ranks_give_the_same_figures(long_models, judges, files, tmp_path):
    """Issue 2: under torchrun with 2 gloo ranks the same answers to the byte, the same figures within rounding."""
    one, two = (config(long_models, judges, files, tmp_path / name) for name in ("one", "two"))
    evaluate.run(one)
    run = run_on_two_ranks(SCRIPT, two)
    for name in ("answers-model.jsonl", "lines-base.jsonl", "texts-model.jsonl", "to-rate.jsonl"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    mine, theirs = result_of(one.out), result_of(two.out)
    assert mine.keys() == theirs.keys()
    assert all(mine[k]["value"] == pytest.approx(theirs[k]["value"], abs=1e-5) for k in mine)
    assert run.stdout.count("evaluation (95 %") == 1


# ---- the page ----


def hostile(result: dict) -> dict:
    """The same figures with hostile judges and reasons: names of files, which a user may be given."""
    return {
        k: v | {"judge": HOSTILE} | ({"why": HOSTILE} if v["value"] is None else {})
        for k, v in result.items()
    }


def test_page_is_self_contained_and_escaped(whole, tmp_path, capsys):
    report = json.loads((whole / "report.json").read_text())
    report["settings"] |= {"model": HOSTILE, "base": HOSTILE}
    report["notes"] = [HOSTILE]
    write_page(hostile(result_of(whole)), report, tmp_path / "report.html")
    page, tags = (tmp_path / "report.html").read_text(), Tags()
    tags.feed(page)
    names = [t for t, _ in tags.found]
    assert "script" not in names and "img" not in names and "&lt;script&gt;" in page and "{{ 7*7 }}" in page
    assert not any(k.startswith("on") for _, attrs in tags.found for k in attrs)
    figures = [attrs for t, attrs in tags.found if t == "svg"]
    assert len(figures) >= 3 and all(f["role"] == "img" and len(f["aria-label"]) > 20 for f in figures)
    show_table(hostile(result_of(whole)), True)
    out = capsys.readouterr().out
    assert "\x1b[31m" not in out and "\u202e" not in out


def test_violations_stand_beside_false_refusals(whole):
    page = (whole / "report.html").read_text()
    assert page.index("violations, adversarial prompts") < page.index("false refusals, borderline prompts")
    headings = [heading for heading, _ in grouped(result_of(whole))]
    assert headings[0].startswith("Violations by turns") and len(headings) == 5


def test_cells():
    rate = {"value": 0.12, "n": 50, "low": 0.06, "high": 0.24, "count": 6}
    assert cell("violation", rate) == "12 % (6/50, 6-24)" and cell("violation", rate, True) == "12 % (6-24)"
    assert cell("bold", {"value": 0.5, "n": 3, "low": 0.4, "high": 0.6}) == "0.500 (0.400, 0.600)"
    assert cell("x", {"value": None, "n": 0}) == "not measured" and change_cell("x", {"value": None}) == "-"
    change = {"value": -0.05, "low": -0.1, "high": 0.0, "p": 0.0312}
    assert change_cell("violation", change) == "-5.0 points (-10.0, +0.0; p = 0.031)"
