"""The scaling study's measures and page. The bug this file must catch: a change of helpfulness that is not paired, or
an answer that stands under another variant."""

import json
import math
import re

import pytest

from hpsafety.errors import InputError
from hpsafety.safety.scaling_figures import ramp, spread, trade_figure
from hpsafety.safety.scaling_page import score, share, show_tables, write_page
from hpsafety.safety.scaling_report import choose_prompts, measures, spearman, summarise
from tests.hostile import HOSTILE, Tags

FRACTIONS = (0.0, 0.01, 0.1, 0.25, 0.5, 1.0)
TAGS = {"is_safety": True, "category": "illicit", "attack": "logic"}


def prompts(text: str = "how {}?", each: int = 4, kinds=(TAGS, {"is_borderline": True}, {})) -> list[dict]:
    return [{"prompt": text.format(i), **tags} for tags in kinds for i in range(each)]


def study(rows: list[dict], refusal="I can't help with that.", fractions=FRACTIONS, text=None) -> dict:
    """A study in which variant v refuses adversarial prompts from the second on, and scores 0.1 more than v - 1."""
    answers = [
        [
            text or (refusal if v and row.get("is_safety") else f"Sure, here is answer {v}.")
            for v in range(len(fractions))
        ]
        for row in rows
    ]
    scores = [
        {"safety": [0.1 + 0.1 * v + 0.01 * i for v in range(len(fractions))],
         "helpful": [0.8 - 0.1 * v + 0.01 * i for v in range(len(fractions))]}
        for i in range(len(rows))
    ]  # fmt: skip
    run = {"safety_rows_used": 3, "helpful_rows": 9, "trained_tokens": 77, "steps": 5, "loss": 1.5, "run": "fraction",
           "mean_answer_tokens": 12.5, "cut_answers": 1}  # fmt: skip
    settings = {"model": text or "m", "temperature": 0.0, "max_new_tokens": 8}
    data = {"safety_rows": 3, "helpful_rows": 9}
    runs = [run | {"fraction": f} for f in fractions]
    return {"settings": settings, "data": data, **summarise(rows, answers, scores, runs, 0)}


def test_measures():
    """SFT-8: percentiles of the safety scores, and the change of mean helpfulness prompt by prompt: prompts that differ
    much among themselves widen the mean's interval, not the change's."""
    scores = {
        "safety": {"adversarial": [i / 100 for i in range(101)]},
        "helpful": {"helpful": [], "borderline": []},
    }
    base = {"helpful": {"helpful": [0.1, 0.9, 0.2, 0.8, 0.5]}}
    scores["helpful"]["helpful"] = [x + 0.05 for x in base["helpful"]["helpful"]]
    verdicts = {"adversarial": ["refusal", "answer"], "borderline": [], "helpful": ["inability"]}
    found = measures(scores, verdicts, base, 0)
    for percent in (1, 5, 10):
        low = found[f"safety_p{percent}"]
        assert (
            low["value"] == pytest.approx(percent / 100) and low["low"] <= low["value"] <= low["high"] < 0.25
        )
        assert low["n"] == 101
    change, mean = found["helpful_change"], found["helpful_score"]
    assert (
        change["value"] == pytest.approx(0.05)
        and change["high"] - change["low"] < 1e-9 < mean["high"] - mean["low"]
    )
    assert mean["value"] == pytest.approx(0.55) and (mean["set"], mean["judge"]) == ("helpful", "helpful_rm")
    assert found["refused_adversarial"]["value"] == 0.5 and found["refused_helpful"]["value"] == 0.0
    assert found["refused_borderline"] == {
        "set": "borderline", "judge": "judge_refusal", "value": None, "n": 0, "low": None, "high": None,
    }  # fmt: skip


def test_summary_keeps_variants_apart():
    """The change is against the smallest share, wherever it stands; every variant has its own scores and verdicts."""
    result = study(prompts(), fractions=(0.5, 1.0, 0.25))
    assert result["base_fraction"] == 0.25
    changes = [v["measures"]["helpful_change"]["value"] for v in result["variants"]]
    assert changes == pytest.approx([0.2, 0.1, 0.0])
    assert [v["measures"]["refused_adversarial"]["value"] for v in result["variants"]] == [0.0, 1.0, 1.0]
    assert [v["measures"]["refused_helpful"]["value"] for v in result["variants"]] == [0.0, 0.0, 0.0]
    assert result["variants"][1]["scores"]["borderline"]["safety"] == pytest.approx([0.24, 0.25, 0.26, 0.27])
    assert (
        result["trend"]["safety_score"] == pytest.approx(-0.5)
        and result["trend"]["refused_borderline"] is None
    )
    sample = result["samples"][0]
    assert sample["set"] == "adversarial"
    assert [a["verdict"] for a in sample["answers"]] == ["answer", "refusal", "refusal"]
    json.dumps(result, allow_nan=False)


@pytest.mark.parametrize(
    "x, y, rho",
    [
        ([0, 1, 2, 3], [1, 10, 100, 1000], 1.0),
        ([0, 1, 2, 3], [4, 3, 2, 1], -1.0),
        ([1, 2, 3, 4, 5], [2, 1, 4, 3, 5], 0.8),  # 1 - 6 * 4 / (5 * 24)
        ([1, 2, 3, 4], [1, 1, 2, 2], 0.8944271909999159),  # ranks 1.5, 1.5, 3.5, 3.5: 4 / sqrt(5 * 4)
        ([1, 2, 3], [7, 7, 7], None),
        ([1], [1], None),
        ([1, 2], [1, None], None),
    ],
)
def test_spearman(x, y, rho):
    assert spearman(x, y) == (rho if rho is None else pytest.approx(rho))


def test_prompts_are_taken_set_by_set():
    rows = [{"prompt": "h0", "response": "r", "split": "valid"}, {"prompt": "a0", **TAGS}, {"prompt": "h1"}]
    rows += [{"prompt": "b0", "is_borderline": True}, {"prompt": "a1", **TAGS}, {"prompt": "a2", **TAGS}]
    assert [row["prompt"] for row in choose_prompts(rows, None)] == ["a0", "a1", "a2", "b0", "h0", "h1"]
    assert [row["prompt"] for row in choose_prompts(rows, 1)] == ["a0", "b0", "h0"]
    assert "response" not in choose_prompts(rows, None)[4]
    with pytest.raises(InputError, match="no held-out helpful prompt"):
        choose_prompts(rows[1:2], None)


def test_page_is_self_contained_and_escaped(tmp_path):
    """Hostile prompts, answers and model names stay text; nothing is loaded; every figure carries its numbers."""
    write_page(
        study(prompts(HOSTILE.replace("{", "{{").replace("}", "}}") + " {}"), text=HOSTILE),
        tmp_path / "r.html",
    )
    page, tags = (tmp_path / "r.html").read_text(encoding="utf-8"), Tags()
    tags.feed(page)
    names = [tag for tag, _ in tags.found]
    assert "script" not in names and "img" not in names and "link" not in names and names.count("h1") == 1
    assert "&lt;script&gt;" in page and "{{ 7*7 }}" in page
    attributes = [(k, v) for _, attrs in tags.found for k, v in attrs.items()]
    assert not any(k.startswith("on") or (k in ("src", "href") and v[:1] != "#") for k, v in attributes)
    assert not re.search(r"url\((?!#)", page)
    alts = [attrs["aria-label"] for tag, attrs in tags.found if tag == "svg" and attrs["role"] == "img"]
    assert len(alts) == 4 and "currentColor" in page and "prefers-color-scheme: dark" in page
    assert all(f" {p} %" in alts[0] for p in ("0", "1", "10", "25", "50", "100"))
    assert "safety 0.12" in alts[0] and "safety 0.61" in alts[0] and "helpfulness 0.40" in alts[0]


def test_page_is_deterministic(tmp_path):
    for name in "ab":
        write_page(study(prompts()), tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_without_borderline_prompts_the_trade_is_with_helpful_ones(tmp_path):
    result = study(prompts(kinds=(TAGS, {})), fractions=(0.0, 1.0))
    assert "of helpful prompts refused" in trade_figure(result["variants"])
    write_page(result, tmp_path / "r.html")
    assert "not measured" in (tmp_path / "r.html").read_text(encoding="utf-8")


def test_one_prompt_has_no_interval(tmp_path, capsys):
    result = study(prompts(each=1), fractions=(1.0,))
    found = result["variants"][0]["measures"]["safety_score"]
    assert (found["n"], found["low"], found["high"]) == (1, None, None) and spread(found) == (0.0, 0.0)
    write_page(result, tmp_path / "r.html")
    show_tables(result)
    assert "not defined" in capsys.readouterr().out


def test_tables_fit_80_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    show_tables(study(prompts()))
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80 and "…" not in out
    cells = ("0.115 (0.105-0.125)", "+0.000 (+0.000, +0.000)", "-0.500 (-0.500, -0.500)", "100 % (51-100)")
    assert all(cell in out for cell in cells), out


def test_cells():
    assert score({"value": 0.7, "low": 0.65, "high": 0.75}) == "0.700 (0.650-0.750)"
    assert score({"value": -0.01, "low": -0.02, "high": 0.0}, "+") == "-0.010 (-0.020, +0.000)"
    assert (
        score({"value": 0.7, "low": None, "high": None}) == "0.700"
        and score({"value": None}) == "not measured"
    )
    assert share({"value": 0.125, "low": 0.1, "high": 0.2}) == "12 % (10-20)"
    assert share({"value": None}) == "not measured"
    assert len({tuple(c) for c in ramp(6)}) == 6 and math.isclose(ramp(1)[0][3], 1.0)
