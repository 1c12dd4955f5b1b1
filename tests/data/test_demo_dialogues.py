"""The built-in dialogues: questions only, held-out ones apart, nothing risky."""

import re

from hpsafety.data import demo
from hpsafety.data.demo import generate
from hpsafety.data.records import read_records

RISKY = re.compile(r"\b(kill|weapon|bomb|drug|poison|hack|steal|suicide|sex|gun|knife|explosive)\w*\b", re.I)


def rows():
    return read_records(demo.path("dialogues"), "prompt")


def test_committed_file_equals_a_fresh_generation():
    """DATA-5: the same templates give the same bytes."""
    assert demo.path("dialogues").read_bytes() == generate.encode(generate.data_sets()["dialogues"])


def test_dialogues_are_user_turns_of_everyday_life():
    found = list(rows())
    assert len({row["id"] for row in found}) == len(found) == 30
    assert all(len(row["prompt"]) == 4 and {m["role"] for m in row["prompt"]} == {"user"} for row in found)
    assert not any(RISKY.search(m["content"]) for row in found for m in row["prompt"])


def test_no_held_out_question_is_trained_on():
    """DATA-3, and enough questions for the twentieth turn of the evaluation."""
    texts = {split: [m["content"].lower() for row in rows() if row["split"] == split for m in row["prompt"]]
             for split in ("train", "valid")}  # fmt: skip
    assert not set(texts["train"]) & set(texts["valid"])
    assert len(set(texts["valid"])) == len(texts["valid"]) >= 20
