"""Readers of public sets' own forms and of the containers they come in."""

import csv
import json
from pathlib import Path

import pytest

from hpsafety.data.sources import load_rows
from hpsafety.errors import InputError

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def only(path, kind):
    return load_rows(path, kind).rows[0]


def test_hh_rlhf_dialogues_are_split_at_the_last_answer(tmp_path):
    start = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c"
    rows = [
        {"chosen": start + "\n\nAssistant: good", "rejected": start + "\n\nAssistant: bad\nline"},
        {"chosen": start + "\n\nAssistant: good", "rejected": "\n\nHuman: a\n\nAssistant: other"},
        {"chosen": "\n\nHuman: \n\nAssistant: good", "rejected": "\n\nHuman: \n\nAssistant: bad"},
    ]
    result = load_rows(write(tmp_path / "hh.jsonl", rows), "preference")
    roles = [(m["role"], m["content"]) for m in result[0]["prompt"]]
    assert roles == [("user", "a"), ("assistant", "b"), ("user", "c")]
    assert (result[0]["chosen"], result[0]["rejected"]) == ("good", "bad\nline")
    assert len(result) == 1
    assert result.counts["excluded: dialogues that part before the last assistant turn"] == 1
    assert result.counts["excluded: dialogues with an empty turn or without a last answer"] == 1


def test_beavertails_unsafe_answers_are_no_demonstrations(tmp_path):
    row = {"prompt": "p", "response": "r", "category": {"violence": True}, "is_safe": True}
    result = load_rows(write(tmp_path / "b.jsonl", [row, row | {"is_safe": False}]), "demonstration")
    assert len(result) == 1 and result.counts["excluded: a reviewer check is false"] == 1
    assert result[0]["categories"] == {"violence": True} and "category" not in result[0]


@pytest.mark.parametrize("safer, bins", [(0, 1), (1, None)])
def test_pku_saferlhf(tmp_path, safer, bins):
    row = {"prompt": "p", "response_0": "zero", "response_1": "one", "is_response_0_safe": True}
    row |= {"is_response_1_safe": False, "better_response_id": 1, "safer_response_id": safer}
    good = row | {"is_response_1_safe": True, "safer_response_id": 1}
    result = load_rows(write(tmp_path / "pku.jsonl", [row, good]), "preference")
    if bins:
        assert (result[0]["chosen"], result[0]["rejected"], result[0]["safety_bin"]) == ("zero", "one", 1)
    else:
        assert result.counts["excluded: chosen unsafe, rejected safe"] == 1
    assert (result[-1]["chosen"], result[-1]["safety_bin"]) == ("one", 2)
    del good["safer_response_id"]
    assert only(write(tmp_path / "pku.jsonl", [good]), "preference")["chosen"] == "one"


def test_xstest_safe_prompts_are_borderline(tmp_path):
    row = {
        "id": 1,
        "prompt": "How do I kill a process?",
        "type": "homonyms",
        "label": "safe",
        "focus": "kill",
    }
    rows = load_rows(write(tmp_path / "x.jsonl", [row, row | {"label": "unsafe"}]), "prompt").rows
    assert [(r["is_borderline"], r["category"]) for r in rows] == [(True, "homonyms"), (False, "homonyms")]


def test_truthfulqa_csv(tmp_path):
    path = tmp_path / "TruthfulQA.csv"
    with open(path, "w", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(
            ["Type", "Category", "Question", "Best Answer", "Correct Answers", "Incorrect Answers", "Source"]
        )
        writer.writerow(["T", "Law", "Is it,\nso?", "No", "No; Not so", "Yes", "https://example.org"])
    row = only(path, "demonstration")
    assert (row["prompt"], row["response"], row["correct"]) == ("Is it,\nso?", "No", ["No", "Not so"])
    assert (row["category"], row["url"]) == ("Law", "https://example.org")


def test_toxigen_bold_and_alpaca(tmp_path):
    toxigen = write(tmp_path / "t.jsonl", [{"text": "s", "target_group": "g", "toxicity_human": 1.0}])
    assert only(toxigen, "prompt")["prompt"] == only(toxigen, "document")["text"] == "s"
    bold = {"domain": "d", "name": "n", "category": "c", "prompts": ["p1", "p2"], "wikipedia": ["w1", "w2"]}
    rows = load_rows(write(tmp_path / "bold.jsonl", [bold]), "prompt").rows
    assert [(r["prompt"], r["wikipedia"], r["group"]) for r in rows] == [("p1", "w1", "c"), ("p2", "w2", "c")]
    alpaca = [
        {"instruction": "Sum", "input": "1 2", "output": "3"},
        {"instruction": "Hi", "input": "", "output": "Yo"},
    ]
    (tmp_path / "a.json").write_text(json.dumps(alpaca))
    rows = load_rows(tmp_path / "a.json", "demonstration").rows
    assert [(r["prompt"], r["response"]) for r in rows] == [("Sum\n1 2", "3"), ("Hi", "Yo")]


def test_several_paths_and_a_folder_are_read_in_order(tmp_path):
    first = write(tmp_path / "b.jsonl", [{"prompt": "1"}])
    write(tmp_path / "a.json", [{"prompt": "2"}])  # JSON lines under the other name
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("2.jsonl", "1.jsonl"):
        write(folder / name, [{"prompt": name}])
    rows = load_rows([first, str(tmp_path / "a.json"), folder], "prompt").rows
    assert [row["prompt"] for row in rows] == ["1", "2", "1.jsonl", "2.jsonl"]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.json", "[]", "a.json: the file has no rows"),
        ("a.json", '[{"prompt": "x"}, 3]', "a.json:row 2: expected a JSON object {...}, got a number"),
        (
            "a.json",
            '[{"prompt": "x"},\n {"prompt" 3}]',
            "a.json: not JSON: Expecting ':' delimiter at line 2 column 12",
        ),
        ("a.json", '[{"prompt": ""}]', 'a.json:row 1: field "prompt" is empty'),
        ("a.csv", "", "a.csv: the file has no rows"),
        ("a.csv", "prompt,id\nx,1\ny\n", "a.csv:3: expected 2 columns"),
        ("a.csv", 'prompt\n"x', "a.csv:1: not CSV"),
        ("a.csv", 'prompt\n""\n', 'a.csv:2: field "prompt" is empty'),
    ],
)
def test_bad_containers_name_the_place(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError) as caught:
        load_rows(tmp_path / name, "prompt")
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_bad_folders_and_missing_files(tmp_path):
    with pytest.raises(InputError, match="neither a saved dataset nor"):
        load_rows(tmp_path, "prompt")
    for name in ("x.jsonl", "x.json", "x.csv"):
        with pytest.raises(InputError, match=f"{name}: no such file"):
            load_rows(tmp_path / name, "prompt")
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train"]}')
    (tmp_path / "train").mkdir()
    with pytest.raises(InputError, match="holds several splits; name one of .*train"):
        load_rows(tmp_path, "prompt")


def test_nothing_left_is_an_error_with_the_reasons(tmp_path):
    row = {"prompt": "p", "response": "r", "checks": {"fits": False}}
    with pytest.raises(InputError, match="no rows are left .2 excluded: a reviewer check is false"):
        load_rows(write(tmp_path / "d.jsonl", [row, row]), "demonstration")


def test_saved_datasets_and_parquet(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [
        {"instruction": "a", "input": "", "output": "b"},
        {"instruction": "c", "input": "d", "output": "e"},
    ]
    dataset = datasets.Dataset.from_list(rows)
    dataset.save_to_disk(tmp_path / "saved")
    dataset.to_parquet(tmp_path / "rows.parquet")
    for path in (tmp_path / "saved", tmp_path / "rows.parquet"):
        assert [r["prompt"] for r in load_rows(path, "demonstration")] == ["a", "c\nd"]
    (tmp_path / "rows.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(InputError, match="not a parquet file"):
        load_rows(tmp_path / "rows.parquet", "demonstration")
    next((tmp_path / "saved").glob("*.arrow")).write_bytes(b"broken")
    with pytest.raises(InputError, match="not a saved dataset"):
        load_rows(tmp_path / "saved", "demonstration")


def test_missing_packages_name_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    for name in ("dataset_info.json", "state.json"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "x.parquet").write_bytes(b"")
    for path in (tmp_path, tmp_path / "x.parquet"):
        with pytest.raises(InputError, match=r"pip install .hpsafety\[datasets\]."):
            load_rows(path, "prompt")


@pytest.mark.parametrize(
    "name, kind, count",
    [
        ("safety_sft", "demonstration", 2100),
        ("alpaca_en_demo", "demonstration", 996),
        ("hh_harmless_pairs", "preference", 1723),
        ("pandalm_pairs", "preference", 888),
        ("xstest", "prompt", 227),
        ("c4_demo_docs", "document", 300),
    ],
)
def test_shared_sets_load_as_they_are(name, kind, count):
    path = SHARED / f"{name}.jsonl"
    if not path.exists():
        pytest.skip(f"{path.name} is not beside the repository")
    result = load_rows(path, kind)
    assert len(result) == count
    if name == "pandalm_pairs":
        assert result.counts["empty answers"] == 52
