"""The demo's choices and its report."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest

from hpsafety.config import DemoConfig
from hpsafety.data.batches import group_tokens
from hpsafety.data.chat import encode_prompt
from hpsafety.data.groups import PromptGroup
from hpsafety.demo import RUNS, choose_prompts, pick_samples
from hpsafety.demo_parts import choose_pairs, choose_rows
from hpsafety.report.demo import PPO_ROWS, comparison, printable, terminal_tables, write_report
from hpsafety.safety.distill_report import measures
from hpsafety.safety.distillation import Answer
from hpsafety.safety.measure import Measured
from tests.stages.conftest import TEMPLATE, tiny_tokenizer

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\x1b[31mred\u202etxt {{ 7*7 }}"


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


def rows(count=60):
    kinds = ({"is_safety": True}, {"is_borderline": True}, {})
    return [{"prompt": f"question {i}", "response": "answer.", **kinds[i % 3]} for i in range(count)]


def test_rows_are_balanced_and_bounded():
    chosen = choose_rows(rows(), FakeTokenizer(), 1500, 0)
    kinds = [(r.get("is_safety", False), r.get("is_borderline", False)) for r in chosen]
    counts = [kinds.count(k) for k in set(kinds)]
    assert len(counts) == 3 and max(counts) - min(counts) <= 1
    assert len(chosen) < 60 and len(choose_rows(rows(), FakeTokenizer(), 3000, 0)) > len(chosen)
    assert (
        chosen
        == choose_rows(rows(), FakeTokenizer(), 1500, 0)
        != choose_rows(rows(), FakeTokenizer(), 1500, 1)
    )


NAMES = ("original", "fine-tuned", "best of K", "PPO", "distilled")
SETS = ("adversarial", "borderline", "helpful")


def evaluation(judge: str) -> dict:
    """eval.json of two measures, of which one was not taken."""
    taken = {"value": 0.2, "n": 5, "low": 0.0, "high": 0.6, "count": 1}
    change = {"value": 0.2, "n": 5, "low": 0.0, "high": 0.6, "p": 1.0}
    none = {"value": None, "n": 0, "low": None, "high": None}
    return {
        "violation": taken | {"judge": judge, "base": taken, "change": change},
        "toxic_answers/helpful": none | {"judge": judge, "why": "w", "base": none, "change": none},
    }


def result(text=HOSTILE):
    rate = {"count": 3, "total": 60, "value": 0.05, "low": 0.017, "high": 0.137}
    scores = {n: {"safety": [0.1, 0.9, 0.5], "helpful": [0.2, 0.4, 0.3]} for n in SETS}
    models = [{"name": n, "loss": 2.5, "refused": dict.fromkeys(SETS, rate), "scores": scores} for n in NAMES]
    metrics = [
        {"step": s, "loss": 3.0 / s, "tokens_equiv": 9 * s, "tokens_per_s": 99.0, "peak_rss_mb": 3000.0}
        for s in (1, 2, 3)
    ]
    ppo = [m | dict.fromkeys(PPO_ROWS, 0.25 * m["step"]) | {"iteration": m["step"]} for m in metrics]
    answers = [{"model": n, "verdict": "answer", "text": text} for n in NAMES]
    samples = [
        {"set": n, "prompt": text, "answers": answers} for n in (SETS[0], SETS[0], SETS[1], SETS[1], SETS[2])
    ]
    judge = {"data": {"examples": 130}, "held_out": {"pairs": 48, "accuracy": {"all": rate}}}
    iteration = {"iteration": 1, "max": [0.4, 0.6], "median": [0.4, 0.4]}
    arm = measures(["a question"] * 2, [Answer("An answer.", "stop", 3, 0, 1.0, r) for r in (0.2, 0.6)])
    distilled = {"arms": {"none": arm, "template": arm}}
    distilled["decisions"] = {"samples": 2, "kept": 1, "not_better": 1, "excluded": {}}
    return {
        "distill": distilled, "eval": evaluation(text),
        "model": "smollm2", "train_rows": 120, "prompts": 30, "ppo_prompts": 40, "models": models, "samples": samples,
        "judges": {"safety": judge, "helpfulness": judge}, "best_of_k": {"iterations": [iteration]},
        "metrics": dict.fromkeys([n for n in RUNS if n != "ppo"], metrics) | {"ppo": ppo},
        "config": {"answer_tokens": 40, "eval_prompts": 60, "batch": 8, "lr": 2e-5, "k": 4}, "precision": "fp32",
    }  # fmt: skip


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def test_report_is_self_contained_and_escaped(tmp_path):
    """Hostile prompts and answers stay text; nothing is loaded from anywhere; figures carry alt text."""
    write_report(result(), tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    tags = Tags()
    tags.feed(page)
    names = [t for t, _ in tags.found]
    assert "script" not in names and "img" not in names and "&lt;script&gt;" in page and "{{ 7*7 }}" in page
    assert not any(k.startswith("on") for _, attrs in tags.found for k in attrs)
    links = [
        v
        for _, attrs in tags.found
        for k, v in attrs.items()
        if k in ("src", "href") and not v.startswith("#")
    ]
    assert links == []
    assert not re.search(r"url\((?!#)", page)
    figures = [attrs for t, attrs in tags.found if t == "svg"]
    assert len(figures) == 5 and all(f["role"] == "img" and len(f["aria-label"]) > 20 for f in figures)
    assert "+20.0 points (+0.0, +60.0; p = 1)" in page and "toxic answers" not in page
    assert "prefers-color-scheme: dark" in page and "already instruction-tuned" in page
    assert names.count("h1") == 1


def test_report_is_deterministic(tmp_path):
    for name in "ab":
        write_report(result("plain"), tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_table_on_the_terminal(capsys):
    terminal_tables(result())
    out = capsys.readouterr().out
    assert "\x1b[31m" not in out and "\u202e" not in out
    assert out.count("(2-14)") == 15 and "2.500" in out
    assert "refused," in out and all(name in out for name in NAMES)  # 80 columns hold every name
    assert comparison(result())[1][2] == "5 % (3/60, 2-14)"
    table = comparison(result())
    assert all(len(row) == 2 + len(NAMES) for row in table)
    assert [row[0] for row in table][1:] == [
        "refused, adversarial prompts", "refused, borderline prompts", "refused, helpful prompts",
        "safety score, adversarial prompts", "helpful score, helpful prompts", "helpful score, borderline prompts",
    ]  # fmt: skip
    assert table[4][2] == "0.500" and table[5][2] == "0.300"


def test_printable():
    assert printable("a\x1b[2Jb\u202ec\nd") == "a [2Jb c\nd"


def test_samples_show_changes_first():
    def side(name, verdicts):
        texts = {n: [f"{name}, {n} {i}" for i in range(4)] for n in SETS}
        return Measured(name, 1.0, {}, texts, dict.fromkeys(SETS, verdicts))

    prompts = {n: [{"prompt": f"p{i}"} for i in range(4)] for n in SETS}
    models = [side("a", ["answer"] * 4), side("b", ["answer", "answer", "refusal", "answer"])]
    samples = pick_samples(prompts, models)
    assert [s["set"] for s in samples] == ["adversarial"] * 2 + ["borderline"] * 2 + ["helpful"]
    assert samples[0]["prompt"] == "p2" and samples[1]["prompt"] == "p0"
    assert samples[0]["answers"][1] == {"model": "b", "verdict": "refusal", "text": "b, adversarial 2"}


def pairs(count=80):
    return [
        {"prompt": f"question {i}", "chosen": "yes.", "rejected": "no!", "id": i, "is_safety": i % 2 == 0}
        for i in range(count)
    ]


@pytest.mark.parametrize("kind, share", [("safety", 0.9), ("helpfulness", 0.5)])
def test_pairs_keep_the_mix_within_their_budget(kind, share):
    """RM-6's shares, and the demo's own bound on tokens."""
    chosen = choose_pairs(pairs(), FakeTokenizer(), kind, 2000, 0)
    assert np.mean([row["is_safety"] for row in chosen]) == share
    size = sum(
        group_tokens(PromptGroup(encode_prompt(FakeTokenizer(), r["prompt"]), [[0] * 5, [0] * 4]))
        for r in chosen
    )
    assert 1000 < size <= 2000
    assert (
        chosen
        == choose_pairs(pairs(), FakeTokenizer(), kind, 2000, 0)
        != choose_pairs(pairs(), FakeTokenizer(), kind, 2000, 1)
    )


def test_prompts_of_rejection_sampling_are_new_and_bounded():
    demonstrations = [row | {"id": i} for i, row in enumerate(rows())]
    used = choose_rows(demonstrations, FakeTokenizer(), 1500, 0)
    cfg = DemoConfig(k=4, answer_tokens=10)
    asked = choose_prompts(demonstrations, used, FakeTokenizer(), 900, cfg)
    assert len(asked) >= 6 and not {r["id"] for r in asked} & {r["id"] for r in used}
    assert all("response" not in row for row in asked)
    assert sum(len(encode_prompt(FakeTokenizer(), r["prompt"])) + 40 for r in asked) <= 900


@pytest.mark.parametrize("count", [0, 1])
def test_few_rows(count):
    assert len(choose_rows(rows(count), FakeTokenizer(), 1000, 0)) == count
    assert np.isfinite(count)
