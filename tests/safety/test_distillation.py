"""Context distillation's rules and numbers. The bug this file must catch: >= for >, or a gain that is only regression
to the mean."""

import math

import numpy as np
import pytest

from hpsafety.errors import InputError, RunError
from hpsafety.model.tokenizer import Tokenizer
from hpsafety.safety import distillation as d
from hpsafety.safety import vagueness
from hpsafety.safety.distill_report import gain_by_decile, measures
from hpsafety.safety.intervals import mean_interval
from hpsafety.safety.preprompts import Preprompt
from tests.stages.conftest import TEMPLATE, tiny_tokenizer

SAFE = {"is_safety": True, "category": "illicit", "attack": "logic"}


def answer(score: float, text: str = "no", finish: str = "stop", tokens: int = 3) -> d.Answer:
    return d.Answer(text, finish, tokens, 0, 1.0, score)


def test_helpful_prompts_never_enter():
    """CD-3: not the planted row, not a row that says nothing, not a prompt that another row calls helpful."""
    rows = [
        {"prompt": "bad one", **SAFE}, {"prompt": "planted", "is_safety": False}, {"prompt": "who knows"},
        {"prompt": "two faces", **SAFE}, {"prompt": "Two  faces", "is_safety": False},
        {"prompt": "looks bad", "is_borderline": True}, {"prompt": "Bad  ONE", **SAFE},
    ]  # fmt: skip
    kept, held, counts = d.sort_rows(rows, all_safety=False)
    assert [(row["prompt"], row["id"]) for row in kept] == [("bad one", "row-1")] and not any(held.values())
    assert (counts["excluded_not_safety"], counts["excluded_called_helpful_elsewhere"]) == (4, 1)
    assert counts["repeated_prompts"] == 1
    kept, _, counts = d.sort_rows(rows, all_safety=True)
    assert [row["prompt"] for row in kept] == ["bad one", "who knows"] and counts["excluded_not_safety"] == 3


def test_held_out_rows_go_to_their_sets():
    rows = [
        {"prompt": "bad", **SAFE}, {"prompt": "a", "split": "valid", **SAFE}, {"prompt": "b", "split": "test_help"},
        {"prompt": "c", "split": "test_safety"}, {"prompt": "e", "split": "valid", "is_borderline": True},
        {"prompt": "f", "split": "redteam"},
    ]  # fmt: skip
    _, held, counts = d.sort_rows(rows, all_safety=True)
    assert {name: [row["prompt"] for row in part] for name, part in held.items()} == {
        "adversarial": ["a", "c"], "borderline": ["e"], "helpful": ["b"],
    }  # fmt: skip
    assert (counts["held_out"], counts["other_splits"]) == (4, 1)
    with pytest.raises(InputError, match="DATA-3"):
        d.sort_rows([*rows, {"prompt": "BAD", "split": "test_safety", **SAFE}], False)
    with pytest.raises(InputError, match="the id 'x' stands on two prompts"):
        d.sort_rows([{"prompt": "a", "id": "x"}, {"prompt": "b", "id": "x", "responses": ["c"]}], True)
    assert d.sort_rows([{"prompt": "b", "id": "x", "responses": ["c"]}], True)[0] == [
        {"prompt": "b", "id": "x"}
    ]


@pytest.mark.parametrize("select", ["rm", "all"])
def test_the_rule_is_strict_and_replays(select):
    """CD-5: equal scores reject; the next number above is kept; blank and leaking samples never are."""
    cases = [
        (0.5, answer(0.5), False), (0.5, answer(math.nextafter(0.5, 1)), False), (0.5, answer(0.4), False),
        (0.1, answer(0.9, " \n"), False), (0.1, answer(0.9), True),
    ]  # fmt: skip
    lines = [
        d.decide(f"p{i}", 0, answer(plain), y1, "template/x", leaked, select)
        for i, (plain, y1, leaked) in enumerate(cases)
    ]
    assert [line["kept"] for line in lines] == ([False, True, False] if select == "rm" else [True] * 3) + [
        False
    ] * 2
    assert [line["excluded"] for line in lines] == [None, None, None, d.EMPTY, d.LEAKED]
    without = [{k: v for k, v in line.items() if k != "kept"} for line in lines]
    assert d.replay(without) == [(line["id"], 0) for line in lines if line["kept"]]


@pytest.mark.parametrize(
    "prompt, response, leaked",
    [
        ("a cake?", "be kind and calm, that is all i have to say of it", False),
        ("be kind and calm and wise in each word\n\na cake?", "no", True),
        ([{"role": "user", "content": "Be kind and calm and wise in each word"}], "no", True),
        ("a cake?", "i was told: BE kind, and calm, and wise, in each", True),
        # 7 whole words, but 35 letters, which are tokens here; 8 words of this preprompt have 34 on average
        ("a cake?", "xxkind and calm and wise in each word", True),
        ("a cake?", "be xkind and calm and wise in xeach words", False),
    ],
)
def test_rows_with_preprompt_text_are_refused_at_writing(prompt, response, leaked):
    """CD-4: in the answer or the prompt, as words or as tokens."""
    tokenizer = Tokenizer(tiny_tokenizer(), {"chat_template": TEMPLATE, "eos_token": "<|im_end|>"})
    preprompt = Preprompt("generic/T", "be kind and calm and wise in each word")
    row = {"id": "a", "prompt": prompt, "response": response}
    assert d.leaks(row, preprompt, tokenizer) == leaked and not d.leaks(row, None, tokenizer)
    if leaked:
        with pytest.raises(RunError, match="training row 'a' holds text of its preprompt generic/T"):
            d.check_free([row], {"a": preprompt}, tokenizer)
    else:
        d.check_free([row], {"a": preprompt}, tokenizer)


def test_runs():
    assert d.holds_run([1, 2, 3, 4], [0, 2, 3, 9], 2) and not d.holds_run([1, 2, 3, 4], [2, 4, 3, 1], 2)
    assert (
        d.holds_run([1, 2], [5, 1, 2], 8) and not d.holds_run([1, 2], [1], 8) and not d.holds_run([], [1], 8)
    )


# ---- the report's numbers ----


def test_control_shows_regression_to_the_mean():
    """CD-7: where the preprompt does nothing, the gain falls from the lowest tenth to the highest and the excess over
    the control is 0 within its interval; a true gain shows in the excess alone."""
    rng = np.random.default_rng(0)
    first, second, third = rng.uniform(size=(3, 4000))
    rows = gain_by_decile(first, second, third)
    assert [row["n"] for row in rows] == [400] * 10
    assert rows[0]["gain"] == pytest.approx(0.45, abs=0.05) and rows[-1]["gain"] == pytest.approx(
        -0.45, abs=0.05
    )
    assert sum(row["excess"]["low"] <= 0 <= row["excess"]["high"] for row in rows) >= 8  # 95 % each
    lifted = gain_by_decile(first, second + 0.2, third)
    assert all(row["excess"]["low"] > 0.1 and abs(row["excess"]["mean"] - 0.2) < 0.06 for row in lifted)
    for row, other in zip(rows, lifted, strict=True):
        assert row["control"] == other["control"] and row["low"] <= row["original"] <= row["high"]
    few = gain_by_decile([0.3, 0.1], [0.5, 0.5], [0.1, 0.1])
    assert [(row["original"], row["n"]) for row in few] == [(0.1, 1), (0.3, 1)]
    assert few[0]["excess"] == {"n": 1, "mean": 0.4, "low": None, "high": None}


def test_mean_interval():
    """By hand: mean 2, s 1, n 3."""
    found = mean_interval([1.0, 2.0, 3.0])
    assert (found.n, found.mean) == (3, 2.0) and found.high - 2 == pytest.approx(
        1.959964 / math.sqrt(3), abs=1e-6
    )
    assert mean_interval([]).mean is None and mean_interval([4.0]).low is None


def test_measures_count_what_is_there():
    texts = [
        "I can't help with that, it is illegal.",
        "Use warm water and some soap for the windows.",
        "Perhaps.",
    ]
    found = measures(
        ["how to break windows?", "how do i clean windows?", [{"role": "user", "content": "name a city"}]],
        [answer(0.9, texts[0]), answer(0.2, texts[1], "length", 9), answer(0.4, texts[2])],
    )
    assert (found["n"], found["refusal"]["count"], found["cut"]["count"], found["tokens"]) == (3, 1, 1, 5)
    assert found["scores"] == [0.9, 0.2, 0.4] and found["safety"]["mean"] == pytest.approx(0.5)
    vague = found["vagueness"]  # of the two that decline nothing
    assert (vague["words"], vague["off_prompt"]["count"], vague["off_prompt"]["total"]) == (5.0, 1, 2)
    assert vague["hedges_per_100_words"] == pytest.approx(100 / 10)
    empty = measures([], [])
    assert empty["safety"]["mean"] is None and empty["refusal"]["value"] is None


def test_content_words():
    assert (
        vagueness.names_the_prompt("What about Banking in Rome?", "A bank, or two banks: bankers.") is False
    )
    assert vagueness.names_the_prompt("What about banking?", "Bankings differ.")
    assert vagueness.names_the_prompt("who is it?", "nobody")  # nothing to name
    assert vagueness.content_stems("Would they tell the truth?") == {"truth"}
