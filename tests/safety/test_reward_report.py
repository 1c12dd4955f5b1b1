"""The statistics of a reward model's report, counted by hand (RM-9). The bug this file must catch: recall counted over
the flagged responses and precision over the unsafe ones."""

import json
import math

import pytest

from hpsafety.data.preferences import SAFE_BY_BIN, Pair
from hpsafety.safety.intervals import wilson
from hpsafety.safety.reward_page import measures, show_table, write_page
from hpsafety.safety.reward_report import sigmoid, summarise


def pair(rating=None, safety_bin=None, safety=True) -> Pair:
    safe = SAFE_BY_BIN[safety_bin]
    return Pair(
        [1],
        [[1], [2]],
        margin=0.0,
        safe=safe,
        rating=rating,
        safety_bin=safety_bin,
        is_safety=safety,
        name="n",
    )


def logit(p: float) -> float:
    return math.log(p / (1 - p))


PAIRS = [
    pair("significantly", 1), pair("significantly", 1), pair("better", 2), pair("slightly", 3),
    pair("negligibly", None, False), pair(None, None, False),
]  # fmt: skip
# R of (chosen, rejected)
STATED = [(0.92, 0.12), (0.32, 0.62), (0.82, 0.72), (0.14, 0.05), (0.5, 0.5), (0.96, 0.4)]
SCORES = [(logit(c), logit(r)) for c, r in STATED]


@pytest.fixture
def held() -> dict:
    return summarise(PAIRS, SCORES)


def counts(rate: dict) -> tuple[int, int]:
    return rate["count"], rate["total"]


def test_accuracy_per_rating_and_per_bin(held):
    """RM-9: chosen above rejected; a tie is no success."""
    found = held["accuracy"]
    assert counts(found["all"]) == (4, 6)
    assert {k: counts(v) for k, v in found["rating"].items()} == {
        "significantly": (1, 2), "better": (1, 1), "slightly": (1, 1), "negligibly": (0, 1), "none": (1, 1)
    }  # fmt: skip
    assert {k: counts(v) for k, v in found["bin"].items()} == {
        "1": (1, 2), "2": (1, 1), "3": (1, 1), "none": (1, 2)
    }  # fmt: skip
    assert counts(found["data"]["safety"]) == (3, 4) and counts(found["data"]["helpful"]) == (1, 2)
    exact = wilson(4, 6)
    assert (found["all"]["low"], found["all"]["high"]) == (exact.low, exact.high)


def test_unsafe_is_the_positive_class(held):
    """RM-9: of 4 unsafe responses (.12, .62, .14, .05) 3 lie below 0.5 and 3 below 0.15; a safe one (.32) below 0.5."""
    found = held["unsafe"]
    assert counts(found["recall_below_0.5"]) == (3, 4) and counts(found["precision_below_0.5"]) == (3, 4)
    assert counts(found["recall_below_0.15"]) == (3, 4) and counts(found["precision_below_0.15"]) == (3, 3)


def test_calibration_table(held):
    """RM-9: 10 bins over the labelled responses; mean R against the share that is safe."""
    rows = held["calibration"]
    assert len(rows) == 10 and [row["low"] for row in rows] == [i / 10 for i in range(10)]
    assert [row["share"]["total"] for row in rows] == [1, 2, 0, 1, 0, 0, 1, 1, 1, 1]
    by_low = {round(row["low"], 1): row for row in rows}
    assert by_low[0.0]["mean"] == pytest.approx(0.05) and counts(by_low[0.0]["share"]) == (0, 1)
    assert by_low[0.3]["mean"] == pytest.approx(0.32) and counts(by_low[0.3]["share"]) == (1, 1)
    assert by_low[0.2]["mean"] is None and by_low[0.2]["share"]["value"] is None


def test_pairwise_calibration(held):
    """Confidence in the preferred response against the share of right choices; a tie counts as wrong."""
    rows = held["pairwise_calibration"]
    assert (
        rows[0]["low"] == 0.5 and rows[-1]["high"] == 1.0 and sum(row["share"]["total"] for row in rows) == 6
    )
    assert rows[0]["mean"] == pytest.approx(0.5) and counts(rows[0]["share"]) == (0, 1)
    sure = sigmoid(logit(0.92) - logit(0.12))
    assert rows[-1]["mean"] == pytest.approx((sure + sigmoid(logit(0.96) - logit(0.4))) / 2)
    assert counts(rows[-1]["share"]) == (2, 2)


def test_histograms_hold_every_response(held):
    assert {name: sum(c) for name, c in held["histogram"].items()} == {"chosen": 6, "rejected": 6}
    assert held["histogram"]["chosen"][19] == 1 and held["histogram"]["rejected"][1] == 1
    assert held["mean_score"]["chosen"] == pytest.approx(sum(c for c, _ in SCORES) / 6)


def test_far_scores_stay_finite():
    found = summarise([pair(safety_bin=1)] * 2, [(800.0, -800.0), (-800.0, 800.0)])
    assert counts(found["unsafe"]["recall_below_0.5"]) == (1, 2) and counts(found["accuracy"]["all"]) == (
        1,
        2,
    )
    json.dumps(found, allow_nan=False)


ALL_RIGHT = [pair(safety_bin=1)] * 29, [(3.0, -3.0)] * 29  # Wilson's upper bound falls a rounding short of 1


@pytest.mark.parametrize("pairs, scores", [(PAIRS, SCORES), ([], []), (PAIRS[4:5], SCORES[4:5]), ALL_RIGHT])
def test_table_and_page(pairs, scores, tmp_path, capsys):
    """Strict JSON, a table and a page, also for no held-out pairs at all and for none with a bin or rating."""
    shares = {"1": 0.5, "2": 0.25, "3": 0.25, "labelled": 4, "none": 2}
    data = {
        "examples": 6, "bins": shares, "ratings": {"<week>": {"better": 1.0, "labelled": 1, "none": 0}},
        "turns": 1.0, "tokens": {"prompt": 3.0, "chosen": 1.0, "rejected": 1.0},
    }  # fmt: skip
    loss = 0.5 if pairs else None
    result = {"kind": "safety", "margin": "none", "aux_weight": 1.0, "head_only": True, "data": data}
    result["held_out"] = {"loss": loss} | summarise(pairs, scores)
    json.dumps(result, allow_nan=False)
    show_table(result)
    first, value = measures(result)[0]
    assert first.startswith("accuracy") and value in capsys.readouterr().out
    assert value == (
        "not measured" if not pairs else str(wilson(*counts(result["held_out"]["accuracy"]["all"])))
    )
    write_page(result, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") == 2 and "&lt;week&gt;" in page and "<script" not in page and "nan" not in page
    again = tmp_path / "again.html"
    write_page(result, again)
    assert again.read_bytes() == (tmp_path / "report.html").read_bytes()
    assert ("Safety bins" in page or "safety bins" in page) and f"The {len(pairs)} pairs" in page
