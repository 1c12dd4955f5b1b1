"""Preference pairs: margins, bins, what is held out, mixes, what the loader reports. The bug this file must catch:
held-out rows drawn one by one, so that a prompt with two pairs is both trained on and held out."""

from collections import Counter

import pytest

from hpsafety.data.groups import pack
from hpsafety.data.preferences import (
    MARGINS,
    SAFE_BY_BIN,
    Pair,
    batch_of,
    describe,
    drop_equal,
    encode_pairs,
    hold_out,
    is_safety,
    mix,
)
from hpsafety.data.records import normalise_prompt
from hpsafety.errors import InputError
from hpsafety.model.io import load_model
from tests.stages.conftest import model_dir

__all__ = ["model_dir"]  # fixture


def row(number, **changes) -> dict:
    return {"prompt": f"prompt {number}", "chosen": "yes", "rejected": "no"} | changes


def pair(number: int, safety: bool) -> Pair:
    return Pair(
        [number],
        [[1], [2]],
        margin=0.0,
        safe=(-1, -1),
        rating=None,
        safety_bin=None,
        is_safety=safety,
        name="",
    )


def test_margins_and_bins_of_the_paper():
    """Spec section 3: m(rating) of the three variants; (s_c, s_r) of the three bins."""
    assert list(MARGINS["small"].values()) == [1.0, 2 / 3, 1 / 3, 0.0]
    assert list(MARGINS["large"].items()) == [
        ("significantly", 3.0), ("better", 2.0), ("slightly", 1.0), ("negligibly", 0.0)
    ]  # fmt: skip
    assert set(MARGINS["none"].values()) == {0.0}
    assert SAFE_BY_BIN == {1: (1, 0), 2: (1, 1), 3: (0, 0), None: (-1, -1)}


def test_pairs_are_groups_of_chosen_and_rejected(model_dir):
    tokenizer = load_model(model_dir).tokenizer
    rows = [
        row(1, rating="better", safety_bin=1, id=7),
        row(2, prompt=[{"role": "user", "content": "hi"}], rejected="", is_safety=False),
    ]
    first, second = encode_pairs(tokenizer, rows, "large")
    assert (first.margin, first.safe, first.rating, first.safety_bin) == (2.0, (1, 0), "better", 1)
    assert (first.is_safety, first.name, second.is_safety, second.name) == (True, "7", False, "number 2")
    assert (second.margin, second.safe) == (0.0, (-1, -1)), "without a rating the margin is 0"
    end = tokenizer.end_of_turn_id
    assert [tokenizer.decode(r[:-1]) for r in first.responses] == ["yes", "no"]
    assert all(r[-1] == end for r in first.responses)
    assert second.responses[1] == [end], "an empty answer is its end of turn"
    batch = pack([first, second])
    assert batch.groups == (first, second) and batch.last_rows.numel() == 4
    assert batch.tokens_computed == sum(len(p.prompt) + sum(map(len, p.responses)) for p in (first, second))


def test_equal_responses_are_excluded_and_counted():
    rows = [row(1), row(2, rejected="yes"), row(3, rejected="yes ")]
    kept, counts = drop_equal(rows)
    assert [r["prompt"] for r in kept] == ["prompt 1", "prompt 3"]
    assert counts == {"excluded: equal responses": 1}


@pytest.mark.parametrize("size, expected", [(9, 0), (10, 1), (245, 24), (9_999, 999), (12_000, 1000)])
def test_held_out_share_of_a_batch(size, expected):
    """PREF-2: min(1000, 10 % of the batch)."""
    train, held, counts = hold_out([row(i) for i in range(size)], 0)
    assert len(held) == counts["held_out"] == expected and len(train) == size - expected


def test_held_out_of_each_batch_and_disjoint_by_prompt():
    """PREF-2: of each batch its share, all rows of a prompt together, whatever its case and spaces."""
    rows = [row(i, batch="week 1") for i in range(200)] + [row(i // 2, batch=2) for i in range(600, 1000)]
    rows += [row(i, prompt=f"  PROMPT  {i}", batch=3) for i in range(100, 140)]
    train, held, _ = hold_out(rows, 3)
    sizes = Counter(map(batch_of, held))
    assert sizes["week 1"] == 20 and sizes["2"] == 40 and 0 < sizes["3"] <= 4
    assert not {normalise_prompt(r["prompt"]) for r in train} & {normalise_prompt(r["prompt"]) for r in held}
    assert len(train) + len(held) == len(rows)
    again, other = hold_out(rows, 3)[1], hold_out(rows, 4)[1]
    assert held == again and held != other


def test_rows_with_split_valid_are_the_held_out_ones():
    rows = [row(i) for i in range(100)] + [row(100, split="valid"), row(101, split="test_safety")]
    train, held, counts = hold_out(rows, 0)
    assert held == [rows[100]] and train == rows[:100] and counts["rows_of_test_splits"] == 1
    with pytest.raises(InputError, match="prompt of training row number 2 .*DATA-3"):
        hold_out([*rows, row(1, split="valid")], 0)


@pytest.mark.parametrize("kind, share", [("helpfulness", 0.5), ("safety", 0.1)])
@pytest.mark.parametrize("safety, helpful", [(1000, 1000), (4000, 150), (90, 3000), (333, 334), (2000, 40)])
def test_mixes(kind, share, safety, helpful):
    """RM-6: helpfulness 50/50, safety 90/10, within 1 point, and as many of the model's own pairs as that allows."""
    pairs = [pair(i, i < safety) for i in range(safety + helpful)]
    used, counts = mix(pairs, kind, 0)
    own = [p for p in used if p.is_safety == (kind == "safety")]
    assert abs((len(used) - len(own)) / len(used) - share) <= 0.01
    num_own, num_other = (safety, helpful) if kind == "safety" else (helpful, safety)
    assert len(own) == num_own or len(used) - len(own) == num_other, "one side is used whole"
    assert sum(counts.values()) == safety + helpful and len({p.prompt[0] for p in used}) == len(used)
    assert [p.prompt[0] for p in used] == sorted(p.prompt[0] for p in used), "in the order given"
    assert used == mix(pairs, kind, 0)[0]


def test_the_other_kind_is_drawn_uniformly():
    """Each safety pair is drawn for a helpfulness model about equally often over seeds."""
    pairs = [pair(i, i < 40) for i in range(50)]
    drawn = Counter(
        p.prompt[0] for seed in range(400) for p in mix(pairs, "helpfulness", seed)[0] if p.is_safety
    )
    assert set(drawn) == set(range(40)) and all(60 < n < 145 for n in drawn.values())  # 100 expected, 5 sigma


@pytest.mark.parametrize("kind", ["helpfulness", "safety"])
@pytest.mark.parametrize("safety", [True, False])
def test_one_kind_alone_is_used_whole(kind, safety):
    used, counts = mix([pair(i, safety) for i in range(7)], kind, 0)
    assert len(used) == 7 and not any(n for name, n in counts.items() if "left_out" in name)


def test_what_counts_as_safety_data():
    assert is_safety(row(1, is_safety=True)) and is_safety(row(1, safety_bin=2))
    assert not is_safety(row(1)) and not is_safety(row(1, is_safety=False, safety_bin=2))


def test_what_the_loader_reports():
    """PREF-3: bin shares, rating shares per batch, turns and tokens per example."""
    talk = [
        {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}
    ]  # fmt: skip
    rows = [
        row(1, batch=1, rating="better", safety_bin=1),
        row(2, batch=1, rating="slightly", safety_bin=2, prompt=talk),
        row(3, batch=2, rating="better", safety_bin=2),
        row(4, batch=2),
    ]
    pairs = [
        Pair([0] * (i + 1), [[1] * 4, [2] * (2 * i)], margin=0.0, safe=(-1, -1), rating=r.get("rating"),
             safety_bin=r.get("safety_bin"), is_safety=True, name="")
        for i, r in enumerate(rows)
    ]  # fmt: skip
    found = describe(rows, pairs)
    assert found["bins"] == {"1": 1 / 3, "2": 2 / 3, "3": 0.0, "labelled": 3, "none": 1}
    assert found["ratings"]["1"] == {
        "significantly": 0.0, "better": 0.5, "slightly": 0.5, "negligibly": 0.0, "labelled": 2, "none": 0
    }  # fmt: skip
    assert found["ratings"]["2"]["better"] == 1.0 and found["ratings"]["2"]["none"] == 1
    assert found["turns"] == 1.25 and found["tokens"] == {"prompt": 2.5, "chosen": 4.0, "rejected": 3.0}
