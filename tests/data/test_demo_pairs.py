"""The demo's preference pairs: labels that follow from how they were made, and no cheap way to win (PREF-1..3).

The bug it must catch: a degradation whose chosen and rejected texts are swapped, or a drawing of pairs that leaves one
of the two mostly the longer one, so that a reward model need not read them (both seen to fail).
"""

import json
import re
from collections import Counter, defaultdict

import pytest

from hpsafety.data import demo
from hpsafety.data.demo import generate, pairs, texts
from hpsafety.data.records import (
    ATTACKS,
    CATEGORIES,
    RATINGS,
    check_disjoint,
    normalise_prompt,
    read_records,
)

HELDOUT = tuple(generate.HELDOUT_SPLITS)
# an address, an amount or code to run: what an answer on a risky subject never needs
WORKING = re.compile(r"https?:|www\.|\S@\S+\.\w|```|\d", re.IGNORECASE)
EXCUSE = re.compile(r"\b(sorry|cannot|can't)\b", re.IGNORECASE)


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return [json.loads(line) for line in demo.path("preferences").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def templates() -> dict[str, dict]:
    return generate.templates()


def kind_of(row: dict) -> str:
    if row["is_safety"]:
        return f"bin {row['safety_bin']}"
    return "borderline" if row["is_borderline"] else "helpful"


def by_kind(rows: list[dict]) -> dict[str, list[dict]]:
    groups = defaultdict(list)
    for row in rows:
        groups["all"].append(row)
        groups["safety" if row["is_safety"] else "harmless"].append(row)
        groups[kind_of(row)].append(row)
    return groups


def accuracy(score, rows: list[dict]) -> float:
    """The share of pairs whose chosen text has the higher score; ties count a half."""
    points = [(score(row["chosen"]), score(row["rejected"])) for row in rows]
    return sum((c > r) + 0.5 * (c == r) for c, r in points) / len(points)


def opening(text: str, words: int = 1) -> str:
    return " ".join(re.findall(r"[\w']+", text.lower())[:words])


def test_committed_file_equals_a_fresh_generation():
    """DATA-5: the same templates and seed give the same bytes."""
    assert demo.path("preferences").read_bytes() == generate.encode(generate.data_sets()["preferences"])


def test_every_row_is_valid_and_admitted(rows):
    """DATA-1, DATA-2, DATA-6, PREF-1: nothing is excluded, and nothing is missing that the loader counts."""
    records = read_records(demo.path("preferences"), "preference")
    assert len(records) == len(rows)
    assert {name: count for name, count in records.counts.items() if count} == {
        "rows": len(rows),
        "without safety_bin": sum(not row["is_safety"] for row in rows),
    }


def test_counts_shares_and_ratings(rows):
    """PREF-3: bins near 40/35/25 %, all four ratings on both sides, four batches of one mix."""
    safety = [row for row in rows if row["is_safety"]]
    harmless = [row for row in rows if not row["is_safety"]]
    assert len(rows) >= 420 and len(safety) >= 240 and len(harmless) >= 170
    assert sum(row["is_borderline"] for row in harmless) >= 60
    for number, share in ((1, 0.40), (2, 0.35), (3, 0.25)):
        assert sum(row["safety_bin"] == number for row in safety) / len(safety) == pytest.approx(
            share, abs=0.03
        )
    for group in (safety, harmless):
        ratings = Counter(row["rating"] for row in group)
        assert set(ratings) == set(RATINGS) and min(ratings.values()) >= 0.12 * len(group), ratings
    batches = Counter(row["batch"] for row in rows)
    assert set(batches) == {1, 2, 3, 4} and max(batches.values()) - min(batches.values()) <= 1
    assert {row["category"] for row in safety} == set(CATEGORIES)
    assert {row["attack"] for row in safety} == set(ATTACKS)


def test_labels_follow_from_the_degradation(rows):
    """The rating, the bin and the safety of both texts are those of one declared degradation."""
    declared = {(d.name, d.safety_bin): d.rating for d in (*pairs.SAFETY, *pairs.HELPFUL)}
    safe = {1: (True, False), 2: (True, True), 3: (False, False)}
    for row in rows:
        assert declared[row["degradation"], row.get("safety_bin")] == row["rating"], row["id"]
        assert ("safety_bin" in row) == row["is_safety"], row["id"]
        if row["is_safety"]:
            assert (row["chosen_safe"], row["rejected_safe"]) == safe[row["safety_bin"]], row["id"]
    assert {(row["degradation"], row.get("safety_bin")) for row in rows} == set(declared)


def test_which_text_gives_the_steps(rows, templates):
    """An unsafe text holds the first step of its template, a safe one no step: no pair is the wrong way round."""
    pieces = texts.read_toml("pairs_safety")
    assert set(pieces) == {name for name, table in templates.items() if table["is_safety"]}
    for row in rows:
        if row["is_safety"]:
            slots = {name: pairs.in_answer(text) for name, text in row["slots"].items()}
            steps = [texts.fill(step, slots).lower() for step in pieces[row["template"]].get("steps", [])]
            for name in ("chosen", "rejected"):
                unsafe = bool(steps) and steps[0] in row[name].lower()
                assert unsafe != row[f"{name}_safe"], (row["id"], name)
            if row["degradation"].endswith("instead of in part"):
                assert steps[-1] not in row["chosen"].lower() and steps[-1] in row["rejected"].lower(), row[
                    "id"
                ]
            if row["degradation"] == "complies without a warning":
                warning = texts.fill(pieces[row["template"]]["why"], slots).lower()
                assert warning in row["chosen"].lower() and warning not in row["rejected"].lower(), row["id"]


def test_which_text_gives_the_answer(rows):
    """A harmless prompt's chosen text holds its training answer; the rejected one only where it is a part, or equal."""
    answers = {row["prompt"]: row["response"] for row in generate.train_rows()}
    for row in rows:
        if not row["is_safety"]:
            answer = pairs.but_last(answers[row["prompt"]])
            assert answer in row["chosen"], row["id"]
            kept = row["degradation"] in ("lacks a detail", "needless warning", "only reworded")
            assert (answer in row["rejected"]) == kept, row["id"]
            if row["degradation"] == "lacks a detail":
                assert answers[row["prompt"]] == row["chosen"], row["id"]


def test_distress_is_answered_kindly(rows):
    """Templates on self-harm and eating: both answers are safe, and the chosen one names somebody to turn to."""
    pieces = texts.read_toml("pairs_safety")
    distress = [row for row in rows if row["is_safety"] and "steps" not in pieces[row["template"]]]
    assert len(distress) >= 8
    for row in distress:
        assert row["safety_bin"] == 2 and row["degradation"] != "accuses the user", row["id"]
        assert re.search(r"helpline|crisis line|doctor|emergency|apoio", row["chosen"]), row["id"]


def test_splits(rows):
    """About a fifth of the prompts is for validation, of every kind, and shares no prompt or template (DATA-3)."""
    train = [row for row in rows if row["split"] == "train"]
    valid = [row for row in rows if row["split"] == "valid"]
    assert len(train) + len(valid) == len(rows)
    check_disjoint(train, valid)
    assert not {row["template"] for row in train} & {row["template"] for row in valid}
    sizes = by_kind(rows)
    for name, group in by_kind(valid).items():
        assert 0.12 < len(group) / len(sizes[name]) < 0.28, (name, len(group), len(sizes[name]))
    assert {row["attack"] for row in valid if row["is_safety"]} == set(ATTACKS)
    assert {row["rating"] for row in valid} == set(RATINGS)


def test_prompts_are_those_of_training_and_none_is_held_out(rows, templates):
    """DATA-3 and DATA-4: an allowed template makes each prompt of its slots; held-out prompts never occur."""
    train = {normalise_prompt(row["prompt"]) for row in generate.train_rows()}
    heldout = [row for name in HELDOUT for row in generate.heldout_rows(name)]
    check_disjoint(rows, heldout)
    assert not {row["template"] for row in rows} & {row["template"] for row in heldout}
    for row in rows:
        table = templates[row["template"]]
        assert table["is_safety"] == row["is_safety"], row["id"]
        assert texts.fill(table["prompt"], row["slots"]) == row["prompt"], row["id"]
        assert normalise_prompt(row["prompt"]) in train, row["id"]
    for field in ("id", "prompt"):
        assert max(Counter(normalise_prompt(row[field]) for row in rows).values()) == 1


def test_the_two_answers_of_a_pair_differ(rows):
    """PREF-1: in text, and in model or temperature."""
    for row in rows:
        assert row["chosen"] != row["rejected"], row["id"]
        assert row["gen_a"] != row["gen_b"], row["id"]
        for generator in (row["gen_a"], row["gen_b"]):
            assert generator["model"].startswith("hpsafety-demo-") and generator["temperature"] > 0


def test_texts_are_short_and_whole(rows):
    for row in rows:
        parts = (row["prompt"], row["chosen"], row["rejected"])
        assert sum(len(part.split()) for part in parts) <= pairs.MOST_WORDS, row["id"]
        for part in parts:
            assert part == part.strip() and not re.search(r"\{[A-Za-z_]+\}|  ", part.replace("   ", "")), part
        for name in ("chosen", "rejected"):
            assert row[name][0] == row[name][0].upper(), row["id"]


def test_no_safety_row_holds_anything_that_works(rows):
    """DATA-4: steps are placeholders; no address, no number but those of the prompt, no code."""
    for row in rows:
        if row["is_safety"]:
            for name in ("chosen", "rejected"):
                own = re.sub(r"^.*?: 1\. .*$", "", row[name])  # a safe answer that continues a harmless list
                found = WORKING.search(own)
                assert not found, (row["id"], name, found)
    for template, table in texts.read_toml("pairs_safety").items():
        steps = " ".join(table.get("steps", []))
        if steps and not template.startswith("advice"):
            assert "[" in steps, template


def test_length_does_not_tell_the_better_answer(rows):
    for name, group in by_kind(rows).items():
        shorter = sum(len(row["chosen"]) < len(row["rejected"]) for row in group) / len(group)
        assert 0.4 <= shorter <= 0.6, (name, shorter)


@pytest.mark.parametrize(
    "baseline, bound",
    [
        (lambda text: bool(EXCUSE.search(text)), 0.6),
        (lambda text: bool(re.search(r"n't\b|\b(no|not|cannot)\b", text, re.IGNORECASE)), 0.7),
        (lambda text: "[" in text, 0.75),
        (lambda text: bool(re.search(r"\b(because|since)\b", text)), 0.75),
        (lambda text: "safe" in text.lower(), 0.6),
    ],
    ids=["excuse", "negation", "bracket", "because", "safe"],
)
def test_no_word_tells_the_better_answer(rows, baseline, bound):
    """Whichever way the word points, it is right on far from all pairs, of each kind and of all."""
    for name, group in by_kind(rows).items():
        right = accuracy(baseline, group)
        assert 1 - bound <= right <= bound, (name, right)


def test_the_first_words_do_not_tell_the_better_answer(rows):
    """The first word, counted on the training split and tried on validation; and on all pairs together."""
    train = [row for row in rows if row["split"] == "train"]
    valid = [row for row in rows if row["split"] == "valid"]
    for fitted, tried, bound in ((train, valid, 0.65), (rows, rows, 0.72)):
        counts = Counter(opening(row["chosen"]) for row in fitted)
        counts.subtract(opening(row["rejected"]) for row in fitted)
        assert accuracy(lambda text, counts=counts: counts[opening(text)], tried) <= bound


def test_openings_vary(rows):
    """No way to begin is common: neither among the refusals nor among the unsafe answers."""
    safety = [row for row in rows if row["is_safety"]]
    for safe in (True, False):
        found = [row[n] for row in safety for n in ("chosen", "rejected") if row[f"{n}_safe"] == safe]
        counts = Counter(opening(text, 3) for text in found)
        assert len(counts) >= 40 and max(counts.values()) <= 0.08 * len(found), counts.most_common(3)


def test_texts_are_rarely_used_twice(rows):
    assert max(Counter(row["chosen"] for row in rows).values()) == 1
    assert max(Counter(row["rejected"] for row in rows).values()) <= 5


def test_a_verse_or_a_sentence_loses_its_end():
    assert pairs.but_last("One, / two, / three.") == "One, / two,"
    assert pairs.but_last('Say: "Come. Now." Then wait. Go.') == 'Say: "Come. Now." Then wait.'
    assert pairs.but_last("Only one.") == "Only one."


def test_a_pair_that_cannot_be_short_is_an_error():
    row = generate.train_rows()[0] | {"prompt": "word " * pairs.MOST_WORDS}
    maker = pairs.HelpfulTexts(texts.read_toml("pairs_frames")["helpful"], generate.templates(), [row])
    with pytest.raises(ValueError, match="no pair for"):
        pairs.draw_pair(row, pairs.HELPFUL[1], maker, True, set())
