"""The demo's choices and its report."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest

from hpsafety.demo import choose_rows, pick_samples
from hpsafety.report.demo import comparison, printable, terminal_tables, write_report
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


def result(text=HOSTILE):
    rate = {"count": 3, "total": 60, "value": 0.05, "low": 0.017, "high": 0.137}
    side = {"loss": 2.5, "refused": {n: rate for n in ("adversarial", "borderline", "helpful")}}
    metrics = [
        {"step": s, "loss": 3.0 / s, "tokens_equiv": 9 * s, "tokens_per_s": 99.0, "peak_rss_mb": 3000.0}
        for s in (1, 2, 3)
    ]
    samples = [
        {
            "set": n,
            "prompt": text,
            "before": text,
            "before_verdict": "answer",
            "after": text,
            "after_verdict": "refusal",
        }
        for n in ("adversarial", "adversarial", "borderline", "borderline", "helpful")
    ]
    config = {"answer_tokens": 40, "eval_prompts": 60, "batch": 8, "lr": 2e-5}
    return {
        "model": "smollm2", "train_rows": 120, "before": side, "after": side, "metrics": metrics, "samples": samples,
        "config": config, "precision": "fp32",
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
    assert len(figures) == 2 and all(f["role"] == "img" and len(f["aria-label"]) > 20 for f in figures)
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
    assert "5 % (3/60, 2-14)" in out and "loss per response token" in out
    assert [row[0] for row in comparison(result())][1:] == [
        "refused, adversarial prompts", "refused, borderline prompts", "refused, helpful prompts",
    ]  # fmt: skip


def test_printable():
    assert printable("a\x1b[2Jb\u202ec\nd") == "a [2Jb c\nd"


def test_samples_show_changes_first():
    from hpsafety.demo import Measured

    def side(verdicts):
        names = ("adversarial", "borderline", "helpful")
        return Measured(
            1.0, {}, {n: [f"{n} {i}" for i in range(4)] for n in names}, dict.fromkeys(names, verdicts)
        )

    prompts = {n: [{"prompt": f"p{i}"} for i in range(4)] for n in ("adversarial", "borderline", "helpful")}
    samples = pick_samples(prompts, side(["answer"] * 4), side(["answer", "answer", "refusal", "answer"]))
    assert len(samples) == 5 and samples[0]["prompt"] == "p2" and samples[0]["after_verdict"] == "refusal"
    assert [s["set"] for s in samples] == ["adversarial"] * 2 + ["borderline"] * 2 + ["helpful"]


@pytest.mark.parametrize("count", [0, 1])
def test_few_rows(count):
    assert len(choose_rows(rows(count), FakeTokenizer(), 1000, 0)) == count
    assert np.isfinite(count)
