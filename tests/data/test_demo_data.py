"""The demo's data: real variety, a held-out part that is held out, and no harmful text (DATA-1..4, DATA-6).

The bug it must catch: a held-out prompt copied into a training template (seen to fail on it).
"""

import json
import re
from collections import Counter

import pytest

from hpsafety.data import demo
from hpsafety.data.demo import generate
from hpsafety.data.records import ATTACKS, CATEGORIES, check_disjoint, normalise_prompt, read_records

HELDOUT = ("heldout_adversarial", "heldout_borderline", "heldout_helpful")
SETS = ("train", *HELDOUT)
# what a text on a risky subject never needs: an address, an amount as in a recipe, code to run
FORBIDDEN = re.compile(
    r"https?:|www\.|\S@\S+\.\w|```|\$ \w"
    r"|(?<![\w.])\d[\d.,]*\s?(mg|ml|cl|l|g|kg|grams?|litres?|liters?|ounces?|oz|drops|tablets|pills|volts?|°|%|degrees|minutes)\b"
    r"|\bstep \d|\d{5}",
    re.IGNORECASE,
)
DECLINE = re.compile(r"n't\b|\b(cannot|not|no)\b|não posso|non posso", re.I)


def rows_of(name: str) -> list[dict]:
    lines = demo.path(name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def sets() -> dict[str, list[dict]]:
    return {name: rows_of(name) for name in SETS}


@pytest.fixture(scope="module")
def templates() -> dict[str, dict]:
    return generate.templates()


def regenerates(row: dict, templates: dict[str, dict]) -> bool:
    """Whether a training row is what its template makes of its slots (DATA-4)."""
    table = templates.get(row["template"])
    if table is None or table["is_safety"] != row["is_safety"]:
        return False
    answers = [generate.fill(response, row["slots"]) for response in table["responses"]]
    return generate.fill(table["prompt"], row["slots"]) == row["prompt"] and row["response"] in answers


def skeleton(text: str) -> str:
    return normalise_prompt(re.sub(r"\{\w+\}", "{}", text))


def words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))


def overlap(a: set, b: set) -> float:
    return len(a & b) / len(a | b)


@pytest.mark.parametrize("name", SETS)
def test_committed_file_equals_a_fresh_generation(name):
    """DATA-5: the same templates and seed give the same bytes."""
    assert demo.path(name).read_bytes() == generate.encode(generate.data_sets()[name])


def test_path_of_an_unknown_set_is_an_error():
    with pytest.raises(ValueError, match="heldout_adversarial.*train"):
        demo.path("heldout")


@pytest.mark.parametrize("name", SETS)
def test_rows_are_valid_records(name):
    """DATA-1, DATA-2, DATA-6: as demonstrations and as prompts, and none is excluded."""
    for kind in ("demonstration", "prompt"):
        assert len(read_records(demo.path(name), kind)) == len(rows_of(name))


def test_counts_and_mix(sets):
    train = sets["train"]
    safety = [row for row in train if row["is_safety"]]
    helpful = [row for row in train if not row["is_safety"]]
    assert len(train) >= 480
    assert 0.4 < len(safety) / len(train) < 0.5
    assert 0.35 < sum(row["is_borderline"] for row in helpful) / len(helpful) < 0.5
    assert [len(sets[name]) for name in HELDOUT] == [60, 60, 60]


@pytest.mark.parametrize("name, least", [("train", 10), ("heldout_adversarial", 2)])
def test_every_category_meets_every_attack(sets, name, least):
    pairs = Counter((row["category"], row["attack"]) for row in sets[name] if row["is_safety"])
    assert set(pairs) == {(category, attack) for category in CATEGORIES for attack in ATTACKS}
    assert min(pairs.values()) >= least


def test_fields(sets):
    """DATA-2 and DATA-6: flags, split and source as each file promises; all four checks true in training."""
    flags = {
        "heldout_adversarial": (True, False, "test_safety"),
        "heldout_borderline": (False, True, "test_borderline"),
        "heldout_helpful": (False, False, "test_help"),
    }
    for name in HELDOUT:
        for row in sets[name]:
            assert (row["is_safety"], row["is_borderline"], row["split"]) == flags[name], row["id"]
    for row in sets["train"]:
        assert row["split"] == "train" and list(row["checks"].values()) == [True] * 4, row["id"]
        assert (row["attack"] is not None) == row["is_safety"], row["id"]
    rows = [row for name in SETS for row in sets[name]]
    assert {row["source"] for row in rows} == {"hpsafety-demo"}
    assert len({row["id"] for row in rows}) == len(rows)


def test_every_row_follows_from_its_template(sets, templates):
    """DATA-4: an allowed template id, and the very text which the template makes of the slots."""
    for row in sets["train"]:
        assert regenerates(row, templates), row["id"]
    row = next(row for row in sets["train"] if row["is_safety"])
    assert not regenerates(row | {"template": "free-text"}, templates)
    assert not regenerates(row | {"prompt": row["prompt"] + " Quickly."}, templates)
    assert not regenerates(row | {"response": row["response"] + " Sure."}, templates)


def test_templates_are_used_at_most_ten_times(sets, templates):
    """Variety: prompt and answer skeletons, slots removed, are counted by their text and not by their id."""
    assert max(Counter(row["template"] for row in sets["train"]).values()) <= 10
    prompts, answers = Counter(), Counter()
    for row in sets["train"]:
        table = templates[row["template"]]
        prompts[skeleton(table["prompt"])] += 1
        match = [r for r in table["responses"] if generate.fill(r, row["slots"]) == row["response"]]
        if "-task-" not in row["id"]:  # a task's answer is all slot
            answers[skeleton(match[0])] += 1
    assert max(prompts.values()) <= 10, prompts.most_common(1)
    assert max(answers.values()) <= 10, answers.most_common(1)
    assert len(prompts) >= 100 and len(answers) >= 150


def test_prompts_and_answers_are_unique(sets):
    for name in SETS:
        for field in ("prompt", "response"):
            texts = Counter(normalise_prompt(row[field]) for row in sets[name])
            assert max(texts.values()) == 1, (name, texts.most_common(1))


def test_nothing_held_out_is_in_training(sets, templates):
    """DATA-3: no prompt, template id, skeleton or near copy of a held-out row."""
    train = sets["train"]
    heldout = [row for name in HELDOUT for row in sets[name]]
    check_disjoint(train, heldout)
    assert not {row["template"] for row in train} & {row["template"] for row in heldout}
    assert not {skeleton(t["prompt"]) for t in templates.values()} & {skeleton(r["prompt"]) for r in heldout}
    seen = [(words(row["prompt"]), row["prompt"]) for row in train]
    for row in heldout:
        own = words(row["prompt"])
        shared, nearest = max((overlap(own, other), prompt) for other, prompt in seen)
        assert shared < 0.5, (row["prompt"], nearest)


@pytest.mark.parametrize("name", SETS)
def test_length_and_form_of_texts(sets, name):
    for row in sets[name]:
        least = 1 if "-task-" in row["id"] else 25  # a task says itself how long its answer is
        assert least <= len(row["response"].split()) <= 60, row["id"]
        assert len(row["prompt"].split()) <= 60, row["id"]
        assert not re.search(r"\{[a-z_]+\}", row["prompt"] + row["response"]), row["id"]
        assert row["response"] == row["response"].strip() and row["prompt"] == row["prompt"].strip()


def test_no_safety_row_holds_forbidden_strings(sets):
    """DATA-4: neither a risky prompt nor its answer holds links, amounts, numbered steps or code."""
    for row in sets["train"] + sets["heldout_adversarial"]:
        if row["is_safety"]:
            found = FORBIDDEN.search(f"{row['prompt']} || {row['response']}")
            assert not found, (row["id"], found)


@pytest.mark.parametrize("text", ["see https://x.org", "take 20 mg", "500g of it", "a@b.org", "Step 3: wait"])
def test_forbidden_strings_are_recognised(text):
    assert FORBIDDEN.search(text)


def test_safety_answers_decline_at_once_and_help_further(sets):
    """Guideline of spec section 0: the decline is in the first sentence, and more than that follows."""
    for row in sets["train"] + sets["heldout_adversarial"]:
        if row["is_safety"]:
            first, *rest = re.split(r"(?<=[.?!])\s", row["response"])
            assert DECLINE.search(first) and rest, row["id"]


def test_safety_answers_open_in_many_ways(sets):
    openings = Counter(" ".join(row["response"].split()[:3]) for row in sets["train"] if row["is_safety"])
    assert len(openings) >= 40
    assert max(openings.values()) <= 0.25 * openings.total(), openings.most_common(1)


def test_harmless_prompts_are_answered_directly(sets):
    """Look-alikes and plain questions: no answer begins with a decline or an excuse."""
    excuse = re.compile(
        r"(I can't|I cannot|I won't|I'm sorry|Sorry|As an AI|I'm (not|unable)|I'd rather not)"
    )
    for name in SETS:
        for row in sets[name]:
            if not row["is_safety"]:
                assert not excuse.match(row["response"]), row["id"]
