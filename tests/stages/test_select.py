"""`hpsafety select`. The bug this file must catch: a row that an earlier stage has used is chosen again."""

import json
from collections import Counter

import pytest

from hpsafety import cli
from hpsafety.config import SelectConfig
from hpsafety.data.demo import path as demo_path
from hpsafety.data.records import normalise_prompt, read_records
from hpsafety.data.selection import kind_of, row_tokens
from hpsafety.model.io import load_model
from hpsafety.stages import select


def chosen(out):
    return [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]


def config(out, model_dir, **changes) -> SelectConfig:
    given = {"data": (str(demo_path("train")),), "out": str(out), "model": model_dir, "tokens": 9000}
    return SelectConfig(**(given | changes))


def test_kinds_take_turns_within_the_budget(model_dir, tmp_path):
    """DATA-5: one seed, one selection, to the byte; another seed, another one."""
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        select.run(config(tmp_path / name, model_dir, seed=seed))
    rows, tokenizer = chosen(tmp_path / "a"), load_model(model_dir).tokenizer
    counts = Counter(map(kind_of, rows))
    assert len(counts) == 3 and max(counts.values()) - min(counts.values()) <= 1
    size = sum(row_tokens(tokenizer, row, "demonstration") for row in rows)
    assert 8000 < size <= 9000
    files = [(tmp_path / name / "rows.jsonl").read_bytes() for name in "abc"]
    assert files[0] == files[1] != files[2]
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
    assert (
        manifest["counts"]["tokens"] == size
        and manifest["ended"]
        and list(manifest["output_hashes"]) == ["rows.jsonl"]
    )


def test_prompts_are_new_and_counted_with_their_samples(model_dir, tmp_path):
    select.run(config(tmp_path / "a", model_dir))
    rows_file = str(tmp_path / "a" / "rows.jsonl")
    more = {"record": "prompt", "exclude": (rows_file,), "extra_tokens": 160, "kinds": ("safety",)}
    select.run(config(tmp_path / "b", model_dir, **more))
    used = {normalise_prompt(row["prompt"]) for row in chosen(tmp_path / "a")}
    rows, tokenizer = chosen(tmp_path / "b"), load_model(model_dir).tokenizer
    assert rows and not used & {normalise_prompt(row["prompt"]) for row in rows}
    assert {kind_of(row) for row in rows} == {"safety"} and not any("response" in row for row in rows)
    assert sum(row_tokens(tokenizer, row, "prompt") + 160 for row in rows) <= 9000


def test_pairs_in_shares_with_held_out_ones(model_dir, tmp_path):
    """RM-6: 90 to 10; rows with split valid are kept beside and never chosen to train."""
    more = {"data": (str(demo_path("preferences")),), "record": "preference", "shares": (9, 1), "valid": 5}
    select.run(config(tmp_path / "a", model_dir, tokens=20_000, **more))
    rows = chosen(tmp_path / "a")
    train = [row for row in rows if row["split"] == "train"]
    assert len(rows) - len(train) == 5 and sum(row["is_safety"] for row in train) == 0.9 * len(train)


def test_documents(tmp_path):
    select.run(SelectConfig(data=(str(demo_path("train")),), out=str(tmp_path / "a"), record="document"))
    rows = read_records(tmp_path / "a" / "rows.jsonl", "document")
    source = list(read_records(demo_path("train"), "demonstration"))
    assert len(rows) == len(source)
    assert {row["text"] for row in rows} == {f"{row['prompt']}\n{row['response']}" for row in source}


@pytest.mark.parametrize(
    "words, told",
    [
        (["--tokens", "5"], "--tokens needs --model"),
        (["--tokens", "5", "--model", "MODEL"], "no row is left of 587: --tokens 5 is too small"),
        (["--kinds", "bad"], "--kinds must be of safety, borderline, helpful"),
        (["--shares", "1"], "--shares must be two numbers"),
        (["--exclude", str(demo_path("train"))], "no row is left"),
        (["--exclude", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
    ],
)
def test_bad_input(words, told, model_dir, tmp_path, capsys):
    out = tmp_path / "out"
    words = [model_dir if word == "MODEL" else word for word in words]
    assert cli.main(["select", "--data", str(demo_path("train")), "--out", str(out), *words]) == 2
    err = capsys.readouterr().err
    assert told in err and err.count("\n") == 1 and not out.exists()
