"""The demo: its pipeline's settings, its budgets, its table; a run of all of it on a tiny model."""

import json

import numpy as np
import pytest

from hpsafety import cli
from hpsafety.config import DemoConfig
from hpsafety.data.chat import encode_prompt
from hpsafety.demo import BUDGETS, DEMO, budgets
from hpsafety.demo_parts import choose_pairs
from hpsafety.model.io import save_model
from hpsafety.pipeline_file import read_pipeline
from hpsafety.report.demo import comparison, show_table
from hpsafety.report.text import printable
from tests.stages.conftest import TEMPLATE, tiny_tokenizer, write_tokenizer
from tests.tiny import tiny_model

EVALS = ("eval-original", "eval-sft", "eval-reject", "eval-ppo", "eval-distill")


class FakeTokenizer:
    chat_template, bos_token, eos_token = TEMPLATE, "", "<|im_end|>"
    eos_id = end_of_turn_id = 1
    stop_ids = (1,)

    def __init__(self):
        self.backend = tiny_tokenizer()

    def encode(self, text):
        return self.backend.encode(text, add_special_tokens=False).ids

    encode_plain = encode

    def decode(self, ids, skip_special=True):
        return self.backend.decode(ids, skip_special_tokens=skip_special)


def pairs(count=80):
    return [
        {"prompt": f"question {i}", "chosen": "yes.", "rejected": "no!", "id": i, "is_safety": i % 2 == 0}
        for i in range(count)
    ]


@pytest.mark.parametrize("kind, share", [("safety", 0.9), ("helpfulness", 0.5)])
def test_pairs_keep_the_mix_within_their_budget(kind, share):
    """RM-6's shares, and a bound on tokens."""
    chosen = choose_pairs(pairs(), FakeTokenizer(), kind, 2000, 0)
    assert np.mean([row["is_safety"] for row in chosen]) == share
    size = sum(len(encode_prompt(FakeTokenizer(), row["prompt"])) + 5 + 4 for row in chosen)
    assert 1000 < size <= 2000
    again, other = (choose_pairs(pairs(), FakeTokenizer(), kind, 2000, seed) for seed in (0, 1))
    assert chosen == again != other


def test_the_pipeline_of_the_demo():
    """DATA-3: what trains never is what is asked; each stage that samples has prompts of its own."""
    stages = {stage.name: stage for stage in read_pipeline(str(DEMO)).stages}
    asked = {path for name in EVALS for path in stages[name].raw.data}
    assert len(asked) == 3 and all("heldout_" in path for path in asked)
    assert not any(
        "heldout_" in path for s in stages.values() if s.run != "eval" for path in getattr(s.raw, "data", ())
    )
    assert [s.name for s in stages.values() if s.run == "eval"] == list(EVALS)
    sampled = [
        name for name in stages if stages[name].run == "select" and stages[name].raw.record == "prompt"
    ]
    for place, name in enumerate(sampled):
        others = {f"{{{other}}}/rows.jsonl" for other in sampled[:place]}
        if name in ("select-distill", "select-redteam"):  # fine-tuning leaves no others for best-of-K and PPO
            others |= {"{select-sft}/rows.jsonl"}
        assert set(stages[name].raw.exclude) == others, name
    answers = {stages[name].raw.max_new_tokens for name in EVALS}
    assert answers == {stages["reject"].raw.max_new_tokens}
    assert (
        stages["select-reject"].raw.extra_tokens
        == stages["reject"].raw.k * stages["reject"].raw.max_new_tokens
    )


def test_budgets_reach_their_stages():
    cfg = DemoConfig(train_tokens=900, reward_tokens=800, eval_prompts=2)
    stages = {s.name: s for s in read_pipeline(str(DEMO), {"out": "o", "seed": 3}, budgets(cfg)).stages}
    assert stages["select-sft"].cfg.tokens == 900 and stages["select-ppo"].cfg.tokens == 8000
    assert stages["select-safety-pairs"].cfg.tokens == stages["select-helpfulness-pairs"].cfg.tokens == 800
    assert all(stages[name].cfg.limit == 2 for name in EVALS) and stages["sft"].cfg.seed == 3
    names = [name for names, _ in BUDGETS.values() for name in names]
    assert set(names) <= stages.keys()


def entry(value, kind="rate"):
    return {"value": value, "low": value - 0.03, "high": value + 0.08, "kind": kind, "n": 60}


def evaluation():
    rates = ("refused/adversarial", "false_refusal/borderline", "false_refusal/helpful", "violation")
    scores = ("safety_score/adversarial", "helpful_score/helpful", "helpful_score/borderline")
    return {k: entry(0.05) for k in rates} | {k: entry(0.5, "mean") for k in scores}


def test_table_on_the_terminal(capsys):
    names = ("original", "sft", "reject", "ppo", "distill\x1b[31m\u202e")
    evals = {name: evaluation() for name in names}
    evals["sft"]["violation"] = {"value": None, "low": None, "high": None, "n": 0}
    del evals["ppo"]["violation"]
    show_table(evals)
    out = capsys.readouterr().out
    assert "\x1b[31m" not in out and "\u202e" not in out
    assert out.count("(2-13)") == 3 * 5 + 3 and out.count("not") == 2 and out.count("0.500") == 15
    assert "refused," in out and all(name in out for name in names[:4])  # 80 columns hold every name
    table = comparison(evals)
    assert table[0] == ("refused, adversarial", "high", *["5 % (2-13)"] * 5)
    assert [row[0] for row in table] == [
        "refused, adversarial", "refused, borderline", "refused, helpful", "violations", "safety score, adversarial",
        "helpful score, helpful", "helpful score, borderline",
    ]  # fmt: skip
    assert table[3][2:] == ("5 % (2-13)", "not measured", "5 % (2-13)", "not measured", "5 % (2-13)")


def test_printable():
    assert printable("a\x1b[2Jb\u202ec\nd") == "a [2Jb c\nd"


@pytest.mark.slow
def test_demo(tmp_path, capsys, monkeypatch):
    """All stages on a tiny model: opens with the plan, ends with the table and the paths; once."""
    from hpsafety import demo

    save_model(tiny_model(seed=2, max_positions=2048), str(tmp_path / "tiny"))
    write_tokenizer(tmp_path / "tiny")
    file = tmp_path / "demo.toml"
    file.write_text(
        DEMO.read_text()
        .replace('"smollm2"', f'"{tmp_path / "tiny"}"')
        .replace("attempts = 63", "attempts = 21")
    )
    monkeypatch.setattr(demo, "DEMO", file)
    words = [
        "demo",
        "--out",
        str(tmp_path / "out"),
        "--device",
        "cpu",
        "--precision",
        "fp32",
        "--eval-prompts",
        "3",
    ]
    assert cli.main(words) == 0
    told = capsys.readouterr()
    assert told.out.startswith("stage\tcommand\tstatus") and "stages to do: about" in told.err
    assert "held-out questions after each stage" in told.out and "last model: " in told.err
    state = json.loads((tmp_path / "out" / "pipeline.json").read_text())
    assert {s["status"] for s in state["stages"]} == {"done"}
    assert all(
        (tmp_path / "out" / name).exists() for name in ("report.html", "card/card.md", "redteam/redteam.json")
    )
    before = (tmp_path / "out" / "sft" / "manifest.json").stat().st_mtime_ns
    assert cli.main(words) == 0 and (tmp_path / "out" / "sft" / "manifest.json").stat().st_mtime_ns == before
