"""A pipeline's TOML file: order, references, defaults, and one line for whatever is wrong in it."""

from pathlib import Path

import pytest

from hpsafety import cli
from hpsafety.pipeline_file import read_pipeline

STAGE = '[[stage]]\nname = "{}"\nrun = "sft"\nmodel = "{}"\ndata = ["d.jsonl"]\n'


@pytest.mark.parametrize(
    "text, told",
    [
        ("", "a pipeline needs stages"),
        ("[[stage]\n", "is not valid TOML"),
        ("[pipelines]\n", "unknown table 'pipelines'; did you mean 'pipeline'?"),
        ("[[stage]]\nrun = 'sft'\n", "stage number 1: name is missing"),
        ("[[stage]]\nname = '../x'\nrun = 'sft'\n", "name must be small letters"),
        ("[[stage]]\nname = 'out'\nrun = 'sft'\n", "the name is taken"),
        ("[[stage]]\nname = 'a'\n", "stage 'a': run is missing"),
        ("[[stage]]\nname = 'a'\nrun = 'stf'\n", "names no command of a pipeline: 'stf'; did you mean 'sft'?"),
        ("[[stage]]\nname = 'a'\nrun = 'chat'\n", "names no command of a pipeline: 'chat'"),
        (STAGE.format("a", "m") + "lrr = 1.0\n", "stage 'a': unknown key 'lrr'; did you mean 'lr'?"),
        (STAGE.format("a", "m") + "lr = 'x'\n", "stage 'a': key 'lr' must be a number, got 'x'"),
        (STAGE.format("a", "m") + "lr = -1.0\n", "stage 'a': --lr must be a number greater than 0, got -1.0"),
        (STAGE.format("a", "m") + "out = 'x'\n", "stage 'a': out is given by the pipeline"),
        ("[[stage]]\nname = 'a'\nrun = 'sft'\n", "stage 'a': model is missing"),
        (STAGE.format("a", "{b}/model"), "stage 'a': model = {b}: no such stage"),
        (STAGE.format("a", "m") + STAGE.format("a", "m"), "stage 'a': the name is used twice"),
        (STAGE.format("a", "{b}") + STAGE.format("b", "m"), "model = {b}: 'b' stands after it; move it before"),
        (STAGE.format("a", "{b}") + STAGE.format("b", "{a}"), "model = {b}: a ring: a needs b needs a"),
        (STAGE.format("a", "{a}"), "a ring: a needs a"),
        ("[pipeline]\nsede = 1\n" + STAGE.format("a", "m"), "no stage has a flag 'sede'; did you mean 'seed'?"),
        ("[pipeline]\nseed = 'x'\n" + STAGE.format("a", "m"), "key 'seed' must be a whole number, got 'x'"),
        (STAGE.format("a", "m"), "stage 'a': data: d.jsonl: no such file"),
        ("[plan]\nshapes = 'x'\n" + STAGE.format("a", "m"), "[plan]: unknown key 'shapes'; did you mean 'shape'?"),
        ("[plan]\nshape = 'llama9'\n" + STAGE.format("a", "m"), "[plan]: no shape 'llama9'"),
    ],
)  # fmt: skip
def test_bad_files(text, told, tmp_path, capsys, model):
    """One line with file, stage and field, exit 2, and nothing is written."""
    path = tmp_path / "bad.toml"
    path.write_text(text.replace('"m"', f'"{model}"'))
    plan = ["--plan"] if "[plan]" in text else []
    assert cli.main(["pipeline", str(path), "--out", str(tmp_path / "out"), *plan]) == 2
    line = capsys.readouterr().err
    assert told in line and str(path) in line and line.count("\n") == 1, line
    assert not (tmp_path / "out").exists()


def test_references_and_defaults(tmp_path):
    """{stage}, {out} and {demo} become paths; defaults reach the stages that have such a flag, their own flags win."""
    path = tmp_path / "a.toml"
    head = f'[pipeline]\nout = "{tmp_path}/o"\nseed = 3\nlr = 5e-4\n'
    data = 'data = ["{demo}/heldout_helpful.jsonl", "{out}/x"]\n'
    second = '[[stage]]\nname = "b"\nrun = "eval"\nmodel = "{a}/model"\n' + data
    path.write_text(head + STAGE.format("a", "m") + second + "seed = 7\n")
    a, b = read_pipeline(str(path), {"out": "elsewhere", "seed": 4, "device": None}).stages
    assert (a.cfg.seed, a.cfg.lr, a.cfg.out, b.cfg.seed) == (4, 5e-4, "elsewhere/a", 7)
    assert (
        b.cfg.model == "elsewhere/a/model"
        and b.cfg.data[1] == "elsewhere/x"
        and Path(b.cfg.data[0]).is_file()
    )
    assert b.needs == ("a",) and a.needs == ()


def test_a_directory_of_others(file, capsys):
    (file.parent / "out").mkdir()
    (file.parent / "out" / "thesis.tex").write_text("mine")
    assert (
        cli.main(["pipeline", str(file)]) == 2
        and "holds files but no pipeline.json" in capsys.readouterr().err
    )
    assert [p.name for p in (file.parent / "out").iterdir()] == ["thesis.tex"]
