"""Records on disk: schemas, messages for bad lines, exclusion and counting (DATA-1..3, DATA-6, PREF-1)."""

import json

import pytest

from hpsafety.data import records
from hpsafety.errors import InputError

PROMPT = {"prompt": "Hi"}
DEMO = {"prompt": "Hi", "response": "Hello"}
PAIR = {"prompt": "Hi", "chosen": "a", "rejected": "b"}
SAMPLE = {"text": "a", "tokens": [1], "logprobs": [-0.5], "finish": "stop", "seed": 0, "temperature": 1.0}
SCORE = {
    "id": "x",
    "safety": [0.5, 0.1],
    "helpful": [0.5, 0.2],
    "safety_logit": [0.0, -2.0],
    "helpful_logit": [0.0, -1.0],
    "combined": [0.5, 0.1],
    "best": 0,
}
JUDGEMENT = {
    "prompt_id": "p",
    "response_id": 1,
    "rater_id": "r",
    "likert": 5,
    "category": None,
    "attack": None,
}
CHAT = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
GOOD = [
    (
        "prompt",
        PROMPT | {"id": 3, "source": None, "split": "valid", "category": "anything", "extra": [1, {"a": 2}]},
    ),
    ("prompt", {"prompt": CHAT, "is_safety": False, "is_borderline": True}),
    ("prompt", PROMPT | {"is_safety": True, "category": "illicit", "attack": "logic"}),
    ("demonstration", DEMO | {"checks": {"fits": True}, "author_id": "a"}),
    ("preference", PAIR | {"rejected": "", "rating": "better", "safety_bin": 2}),
    ("group", PROMPT | {"responses": ["a", ""], "samples": [SAMPLE, SAMPLE | {"finish": "length"}]}),
    ("score", SCORE),
    ("judgement", JUDGEMENT),
    ("document", {"text": "", "id": "d"}),
]
USER = {"role": "user", "content": "x"}
BAD = [
    (
        "preference",
        {"prompt": "a", "rejected": "b"},
        'field "chosen" is missing; a preference needs prompt, chosen, rejected',
    ),
    (
        "judgement",
        {"prompt_id": 1},
        'field "response_id" is missing; a judgement needs prompt_id, response_id',
    ),
    (
        "prompt",
        {"prompt": 5},
        'field "prompt" must be a string or a list of messages [{role, content}], got a number',
    ),
    ("prompt", {"prompt": []}, 'field "prompt" must be a string or a list of messages'),
    ("prompt", {"prompt": " \n"}, 'field "prompt" is empty'),
    (
        "prompt",
        {"prompt": [{"role": "robot", "content": "x"}]},
        'field "prompt[0].role": unknown role "robot"',
    ),
    (
        "prompt",
        {"prompt": [{"role": ["user"], "content": "x"}]},
        'field "prompt[0].role": unknown role ["user"]',
    ),
    ("prompt", {"prompt": [{"role": "user", "content": " "}]}, 'field "prompt[0].content" is empty'),
    (
        "prompt",
        {"prompt": [{"role": "user", "content": None}]},
        'field "prompt[0].content" must be a string, got null',
    ),
    ("prompt", {"prompt": [{"role": "user"}]}, 'field "prompt[0]" must be an object with role and content'),
    (
        "prompt",
        {"prompt": [USER, {"role": "assistant", "content": "x"}]},
        "must end with a user message, not assistant",
    ),
    ("prompt", PROMPT | {"id": True}, 'field "id" must be a string or a whole number, got true'),
    ("prompt", PROMPT | {"split": "test"}, 'field "split" must be one of train, rt_train, valid'),
    ("prompt", PROMPT | {"is_safety": "true"}, 'field "is_safety" must be true or false, got "true"'),
    ("prompt", PROMPT | {"category": 3}, 'field "category" must be a string, got 3'),
    (
        "prompt",
        PROMPT | {"is_safety": True, "attack": "logic"},
        'field "category" is missing; a row with "is_safety"',
    ),
    (
        "prompt",
        PROMPT | {"is_safety": True, "category": "bad", "attack": "logic"},
        "one of illicit, hateful, advice",
    ),
    (
        "prompt",
        PROMPT | {"is_safety": True, "category": "advice", "attack": "x"},
        "one of psychological, logic",
    ),
    ("prompt", PROMPT | {"is_safety": True, "is_borderline": True}, "cannot both be true"),
    ("demonstration", DEMO | {"response": ""}, 'field "response" is empty; a demonstration needs an answer'),
    ("demonstration", DEMO | {"response": None}, 'field "response" must be a string, got null'),
    ("demonstration", DEMO | {"checks": {"fits": "yes"}}, 'field "fits" must be true or false, got "yes"'),
    ("preference", PAIR | {"rating": "much better"}, "one of significantly, better, slightly, negligibly"),
    ("preference", PAIR | {"safety_bin": 4}, 'field "safety_bin" must be 1, 2 or 3, got 4'),
    ("preference", PAIR | {"safety_bin": True}, 'field "safety_bin" must be 1, 2 or 3, got true'),
    ("preference", PAIR | {"chosen_safe": True}, "go together"),
    ("preference", PAIR | {"safety_bin": 2, "chosen_safe": True, "rejected_safe": False}, "make bin 1"),
    ("preference", PAIR | {"safety_bin": 3, "chosen_safe": False, "rejected_safe": True}, "fit no bin"),
    ("preference", PAIR | {"gen_a": "gpt"}, 'field "gen_a" must be an object'),
    ("group", PROMPT | {"responses": []}, 'field "responses" must be a list of at least one string'),
    ("group", PROMPT | {"responses": ["a"], "samples": [SAMPLE, SAMPLE]}, "2 entries for 1 responses"),
    (
        "group",
        PROMPT | {"responses": ["a"], "samples": [SAMPLE | {"logprobs": []}]},
        "0 logprobs for 1 tokens",
    ),
    ("group", PROMPT | {"responses": ["a"], "samples": [SAMPLE | {"finish": "eos"}]}, "one of stop, length"),
    ("score", SCORE | {"safety": [0.5, 1.5]}, 'field "safety" must be a list of numbers in (0, 1)'),
    ("score", SCORE | {"helpful": [0.5]}, 'field "helpful" has 1 numbers, "safety" has 2'),
    ("score", SCORE | {"best": 2}, "a whole number from 0 to 1, got 2"),
    ("judgement", JUDGEMENT | {"likert": 6}, 'field "likert" must be a whole number from 1 to 5, got 6'),
    ("judgement", JUDGEMENT | {"likert": 2.5}, "from 1 to 5, got 2.5"),
    ("document", {"text": None}, 'field "text" must be a string, got null'),
]


@pytest.mark.parametrize("kind, row", GOOD)
def test_data1_good_rows_come_back_with_all_their_fields(tmp_path, kind, row):
    path = tmp_path / "rows.jsonl"
    assert records.write_records(path, [row]) == 1
    assert records.read_records(path, kind).rows == [row]


@pytest.mark.parametrize("kind, row, message", BAD)
def test_data1_bad_rows_name_file_line_and_field(tmp_path, kind, row, message):
    """DATA-1, DATA-2: one line, that names the place."""
    path = tmp_path / "rows.jsonl"
    good = next(r for k, r in GOOD if k == kind)
    path.write_text(json.dumps(good) + "\n\n" + json.dumps(row) + "\n")
    with pytest.raises(InputError) as caught:
        records.read_records(path, kind)
    text = str(caught.value)
    assert text.startswith(f"{path}:3: ") and message in text and "\n" not in text


def test_the_contract_message_word_for_word():
    with pytest.raises(InputError) as caught:
        records.validate({"prompt": "a", "rejected": "b"}, "preference", ("FILE", 7))
    assert (
        str(caught.value) == 'FILE:7: field "chosen" is missing; a preference needs prompt, chosen, rejected'
    )


@pytest.mark.parametrize(
    "raw, message",
    [
        (b'{"text": "a"', "not JSON: Expecting ',' delimiter at column 13"),
        (b"[1]", "expected a JSON object {...}, got a list"),
        (b'"a"', "got a string"),
        (b'{"text": NaN}', "NaN is not a number JSON allows"),
        (b'{"text": "a", "n": -Infinity}', "-Infinity is not a number"),
        (b'{"text": "a", "n": 1e999}', "1e999 is too large"),
        (b'{"text": "\\ud800"}', "without its partner"),
        (b'{"text": "a\xff"}', "not UTF-8: byte 0xff at byte 12"),
        (b'{"text": ' + b"[" * 100_000, "nested too deeply"),
        (b'{"text": ' + b"9" * 5_000 + b"}", "not JSON: Exceeds the limit"),
    ],
)
def test_bad_lines(tmp_path, raw, message):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "fine"}\n' + raw + b"\n")
    with pytest.raises(InputError) as caught:
        records.read_records(path, "document")
    assert str(caught.value).startswith(f"{path}:2: ") and message in str(caught.value)


def test_bad_files(tmp_path):
    for content in (b"", b"\n \n"):
        (tmp_path / "empty.jsonl").write_bytes(content)
        with pytest.raises(InputError, match="has no rows"):
            records.read_records(tmp_path / "empty.jsonl", "document")
    with pytest.raises(InputError, match="missing.jsonl: no such file"):
        records.read_records(tmp_path / "missing.jsonl", "document")
    with pytest.raises(InputError, match="cannot be read"):
        records.read_records(tmp_path, "document")


def test_blank_lines_byte_order_mark_and_other_line_ends(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n{"text": "b\\u2028\xe2\x80\xa8"}')
    assert [row["text"] for row in records.read_records(path, "document")] == ["a", "b\u2028\u2028"]


def test_rows_are_read_one_at_a_time(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\nbroken\n')
    rows = records.iter_records(path, "document")
    assert next(rows) == {"text": "a"}
    with pytest.raises(InputError, match=":2: not JSON"):
        next(rows)


def test_safety_bins_are_derived(tmp_path):
    flags = [(True, False), (True, True), (False, False)]
    path = tmp_path / "rows.jsonl"
    records.write_records(path, [PAIR | {"chosen_safe": c, "rejected_safe": r} for c, r in flags])
    assert [row["safety_bin"] for row in records.read_records(path, "preference")] == [1, 2, 3]


def test_data6_and_pref1_exclusions_are_counted(tmp_path):
    """DATA-6: a false check keeps a row out. PREF-1: so do an unsafe choice and equal generators."""
    generator = {"model": "m", "temperature": 1.0}
    rows = [
        PAIR
        | {
            "rejected": "",
            "checks": {"fits": True},
            "gen_a": generator,
            "gen_b": generator | {"temperature": 0.5},
        },
        PAIR | {"checks": {"fits": True, "safe": False}},
        PAIR | {"chosen_safe": False, "rejected_safe": True},
        PAIR | {"gen_a": generator, "gen_b": dict(generator)},
        PAIR | {"rating": "slightly", "safety_bin": 1},
    ]
    path = tmp_path / "rows.jsonl"
    records.write_records(path, rows)
    result = records.read_records(path, "preference")
    assert result.rows == [rows[0], rows[4]] and len(result) == 2 and result[1] == rows[4]
    assert result.counts == {
        "excluded: a reviewer check is false": 1,
        "excluded: chosen unsafe, rejected safe": 1,
        "excluded: gen_a equals gen_b": 1,
        "without checks": 3,
        "without rating": 1,
        "without safety_bin": 1,
        "without gen_a or gen_b": 1,
        "empty answers": 1,
        "rows": 2,
    }


def test_data3_a_prompt_in_training_and_held_out_is_refused():
    """DATA-3: compared in lower case with white space collapsed, string or messages."""
    train = [{"prompt": "Other"}, {"prompt": "How  do\nI bake?", "id": "t1"}]
    heldout = [{"prompt": [{"role": "user", "content": " how do i BAKE? "}], "id": "h9"}]
    with pytest.raises(InputError, match='training row "t1" .* held-out row "h9"'):
        records.check_disjoint(train, heldout)
    with pytest.raises(InputError, match="training row number 2 .* held-out row number 1"):
        records.check_disjoint([{"prompt": r["prompt"]} for r in train], [{"prompt": heldout[0]["prompt"]}])
    records.check_disjoint(train, [{"prompt": "How do I boil?"}])
    dialogue = [
        {"role": "user", "content": "A"},
        {"role": "assistant", "content": "B"},
        {"role": "user", "content": "C"},
    ]
    assert records.normalise_prompt(dialogue) == "user: a\nassistant: b\nuser: c"


def test_writing_is_atomic_and_refuses_nan(tmp_path):
    path = tmp_path / "rows.jsonl"
    records.write_records(path, [{"text": "é"}])
    assert path.read_bytes() == '{"text":"é"}\n'.encode()
    with pytest.raises(ValueError):
        records.write_records(path, [{"text": "x"}, {"text": float("nan")}])
    assert path.read_bytes() == '{"text":"é"}\n'.encode() and list(tmp_path.iterdir()) == [path]
