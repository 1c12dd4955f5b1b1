"""`hpsafety scaling --demo` on a tiny model. The bug this file must catch: small shares that are the same rows."""

import json

import pytest

from hpsafety import cli
from hpsafety.config_scaling import ScalingConfig
from hpsafety.data.batches import nested_subset
from hpsafety.data.demo import path as demo_path
from hpsafety.data.records import iter_records, read_records
from hpsafety.errors import InputError
from hpsafety.model.io import save_model
from hpsafety.scaling import HELPFUL_ROWS, SAFETY_ROWS, choose_rows
from tests.stages.conftest import write_tokenizer
from tests.tiny import tiny_model


def test_rows():
    """SFT-7: six shares of the demo safety rows are six sets; helpful rows are half look-alikes, half plain help."""
    rows = list(read_records(demo_path("train"), "demonstration"))
    chosen = choose_rows(rows, 0)
    safety = [row for row in chosen if row["is_safety"]]
    assert (len(safety), len(chosen)) == (SAFETY_ROWS, SAFETY_ROWS + HELPFUL_ROWS)
    assert sum(row["is_borderline"] for row in chosen) == HELPFUL_ROWS / 2
    sizes = [len(nested_subset(SAFETY_ROWS, f, 0)) for f in ScalingConfig(demo=True).fractions]
    assert sizes == [0, 1, 5, 13, 25, 50]
    assert chosen == choose_rows(rows, 0) != choose_rows(rows, 1)


def test_settings_of_the_demo():
    """Settings that are given win; the demo brings its own data and judges, a study must be given them."""
    cfg = ScalingConfig(demo=True, lr=3e-4)
    assert (cfg.model, cfg.out, cfg.lr, cfg.batch, cfg.epochs) == ("smollm2", "scaling-demo", 3e-4, 4, 1)
    needed = {"model": "m", "data": ("d",), "out": "o", "safety_rm": "s", "helpful_rm": "h"}
    cfg = ScalingConfig(**needed)
    assert (cfg.lr, cfg.batch, cfg.epochs, cfg.warmup, cfg.max_new_tokens) == (
        2e-5,
        64,
        2,
        0,
        256,
    )  # sft's, and sample's
    for field in needed:
        with pytest.raises(InputError, match=f"--{field.replace('_', '-')} is missing"):
            ScalingConfig(**{k: v for k, v in needed.items() if k != field})
    for given in ({"data": ("d",)}, {"safety_rm": "s"}, {"eval": ("e",)}):
        with pytest.raises(InputError, match="left out with --demo"):
            ScalingConfig(demo=True, **given)
    with pytest.raises(InputError, match="--lr must be"):
        ScalingConfig(demo=True, lr=0.0)


def test_demo_is_one_process(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(["scaling", "--demo", "--out", str(tmp_path / "out")]) == 2
    assert "--demo runs in one process" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_demo(tmp_path, capsys):
    """Two judges, the variants, tables and report; the same command again makes nothing anew."""
    save_model(tiny_model(seed=2, max_positions=2048), str(tmp_path / "tiny"))
    write_tokenizer(tmp_path / "tiny")
    words = [
        "scaling",
        "--demo",
        "--model",
        str(tmp_path / "tiny"),
        "--out",
        str(tmp_path / "out"),
        "--device",
        "cpu",
    ]
    words += ["--precision", "fp32", "--fractions", "0", "1", "--eval-prompts", "3", "--max-new-tokens", "4"]
    assert cli.main(words) == 0
    told = capsys.readouterr()
    assert told.err.startswith("hpsafety scaling --demo: ") and "9 held-out questions" in told.err
    assert "refused prompts" in told.out and "report: " in told.err
    out = tmp_path / "out"
    assert (out / "reward-safety" / "model").is_dir() and (out / "reward-helpfulness" / "model").is_dir()
    result = json.loads((out / "study" / "scaling.json").read_text())
    assert result["sets"] == {"adversarial": 3, "borderline": 3, "helpful": 3}
    assert [v["safety_rows_used"] for v in result["variants"]] == [0, SAFETY_ROWS]
    trained = {row["prompt"] for row in iter_records(out / "data" / "train.jsonl", "demonstration")}
    assert not trained & {row["prompt"] for row in iter_records(out / "study" / "prompts.jsonl", "prompt")}
    before = (out / "study" / "scaling.json").stat().st_mtime_ns
    assert cli.main(words) == 0 and (out / "study" / "scaling.json").stat().st_mtime_ns == before
