"""`hpsafety pipeline --plan`: what it counts, and the paper's settings in configs/."""

import json

import pytest
import torch

from hpsafety import cli, pipeline_sizes
from hpsafety.data.chat import encode_dialogue
from hpsafety.model.io import load_model
from hpsafety.pipeline_file import read_pipeline
from hpsafety.pipeline_sizes import Sizes
from hpsafety.pipeline_work import Place, work_of
from hpsafety.train.work import forward_flops
from tests.pipeline.conftest import ROOT


def test_a_plan_writes_nothing(file, capsys):
    """--plan: a line per stage with status, needs, tokens, time and memory; totals; no file."""
    assert cli.main(["pipeline", str(file), "--plan"]) == 0
    told = capsys.readouterr()
    rows = [line.split("\t") for line in told.out.splitlines()]
    assert rows[0] == ["stage", "command", "status", "needs", "tokens", "time", "memory"]
    assert [row[:4] for row in rows[1:]] == [
        ["rows", "select", "to do", ""], ["pairs", "select", "to do", ""], ["sft", "sft", "to do", "rows"],
        ["rm", "reward", "to do", "pairs sft"],
    ]  # fmt: skip
    assert "4 of 4 stages to do: about" in told.err and "measured" in told.err
    assert not (file.parent / "out").exists()


def test_a_plan_without_a_model(tmp_path):
    """Stages that compute nothing can be planned, and run, too."""
    path = tmp_path / "a.toml"
    path.write_text('[[stage]]\nname = "a"\nrun = "select"\ndata = ["{demo}/train.jsonl"]\n')
    assert cli.main(["pipeline", str(path), "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "a" / "rows.jsonl").exists()


def test_rows_beyond_those_that_are_read(tmp_path, monkeypatch):
    """A large file is reckoned from its size."""
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": "abcd" * 10, "response": "abcd"}) + "\n" for _ in range(500))
    )
    exact = pipeline_sizes.count_rows(str(path), None)
    assert (exact.count, exact.prompt, exact.answer) == (500, 11, 2)
    monkeypatch.setattr(pipeline_sizes, "READ", 50)
    assert pipeline_sizes.count_rows(str(path), None).count == pytest.approx(500, rel=0.02)


@pytest.mark.parametrize("size", ["7b", "70b"])
def test_the_papers_settings(size, capsys, tmp_path):
    """configs/llama2-*.toml hold the paper's settings (spec sections 2, 3 and 5) and can be planned without a model."""
    path = ROOT / "configs" / f"llama2-{size}.toml"
    assert cli.main(["pipeline", str(path), "--plan", "--out", str(tmp_path / "out")]) == 0
    told = capsys.readouterr()
    assert "A100-80GB" in told.err and "GPU hours" in told.err and not (tmp_path / "out").exists()
    stages = {s.name: s for s in read_pipeline(str(path)).stages}
    sft, ppo = stages["sft"].cfg, stages["ppo"].cfg
    assert (sft.lr, sft.epochs, sft.batch, sft.max_length, sft.weight_decay) == (2e-5, 2, 64, 4096, 0.1)
    assert (ppo.lr, ppo.batch, ppo.minibatch, ppo.clip_ratio, ppo.k) == (1e-6, 512, 64, 0.2, 1)
    assert ppo.kl_coef == {"7b": 0.01, "70b": 0.005}[size] and 200 <= ppo.iterations <= 400
    judges = [s.cfg for s in stages.values() if s.run == "reward"]
    assert {(c.lr, c.epochs, c.batch) for c in judges} == {({"7b": 1e-5, "70b": 5e-6}[size], 1, 512)}
    for cfg in (sft, ppo, *judges):
        assert (cfg.beta1, cfg.beta2, cfg.eps, cfg.weight_decay, cfg.clip) == (0.9, 0.95, 1e-5, 0.1, 1.0)
    order = [s.name for s in stages.values() if s.run in ("sft", "reject", "gatt", "ppo", "distill")]
    assert order == ["sft", "reject-v1", "reject-v2", "reject-v3", "gatt", "reject-v4", "ppo", "distill"]
    assert stages["reject-v4"].raw.pool_from == ("{reject-v1}", "{reject-v2}", "{reject-v3}")  # RS-3
    assert stages["ppo"].raw.model == "{reject-v4}/model"
    base = "student" if size == "7b" else "base"  # RS-6; RS-7: every version from the pretrained weights
    assert {getattr(stages[f"reject-v{v}"].raw, base) for v in (1, 2, 3, 4)} == {f"models/llama2-{size}"}


def test_counted_flops_are_the_trainers(done):
    """The plan of a stage whose data are there counts within a tenth what the stage's own account does."""
    pipeline = read_pipeline(str(done))
    stage = pipeline.stages[2]
    model = load_model(stage.cfg.model)
    rows = [json.loads(line) for line in (stage.out.parent / "rows" / "rows.jsonl").read_text().splitlines()]
    groups = [encode_dialogue(model.tokenizer, row["prompt"], row["response"]) for row in rows]
    exact = 3 * sum(forward_flops(model.config, group) for group in groups)
    work = work_of(stage, Sizes(pipeline), Place(torch.float32, 1, host=True))
    assert work.train == pytest.approx(exact, rel=0.1) and not work.assumed
    tokens = sum(len(g.prompt) + len(g.responses[0]) for g in groups)
    assert work.tokens == pytest.approx(tokens, rel=0.02)
