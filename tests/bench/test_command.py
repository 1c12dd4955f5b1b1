"""`hpsafety bench`: the command line of design section 8, its one-line errors, and the door to the checkout."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hpsafety import bench_command, cli, flags
from hpsafety.config import BenchCompareConfig, BenchConfig

ROOT = Path(__file__).resolve().parents[2]


def parse(*args):
    return flags.parse(BenchConfig, "hpsafety bench", "summary", list(args))


def test_ops_are_words_among_the_flags():
    cfg = parse(
        "rms_norm",
        "--dtype",
        "float32,bfloat16",
        "--shape",
        "T=8",
        "T=9,D=4",
        "--impl=cpu, torch",
        "--threads",
        "1",
    )
    assert (cfg.ops, cfg.dtypes, cfg.shape) == (("rms_norm",), ("float32", "bfloat16"), ("T=8", "T=9,D=4"))
    assert (cfg.impls, cfg.threads, cfg.seconds, cfg.cache) == (("cpu", "torch"), 1, None, "auto")
    assert parse("--seed", "3", "rope", "swiglu").ops == ("rope", "swiglu")
    both = flags.parse(BenchCompareConfig, "hpsafety bench compare", "", ["a", "b"])
    assert (both.old, both.new) == ("a", "b")


def test_words_may_stand_in_the_config_file(tmp_path):
    file = tmp_path / "bench.toml"
    file.write_text('ops = ["rope"]\nthreads = 2\n')
    assert parse("--config", str(file)).ops == ("rope",)
    assert parse("swiglu", "--config", str(file)).ops == ("swiglu",)


@pytest.mark.parametrize(
    "args, expected",
    [
        ([], "OP is missing"),
        (["nothing"], "unknown op 'nothing'; choose from: all, adamw, attention"),
        (
            ["rope", "--shape", "T"],
            "--shape takes NAME=NUMBER,... with whole numbers, as T=8192,H=9,G=3,K=64; got 'T'",
        ),
        (["rope", "--shape", "T=-1"], "got 'T=-1'"),
        (["rope", "--shape", "N=4"], "--shape: rope has no size 'N'; its sizes are T, H, G, K"),
        (["rope", "--shape", "T=4,K=3"], "rope cannot be made so: the head dim K must be even, got 3"),
        (["rope", "--shape", "T=0"], "nothing to time"),
        (["rope", "--dtype", "float16"], "--dtype must be float32 or bfloat16, got 'float16'"),
        (["rope", "--direction", "back"], "--direction must be forward, both or forward,both"),
        (["adamw", "--direction", "both"], "--direction both: adamw has forward"),
        (["rope", "--impl", "apex"], "--impl apex: rope has no apex backend; it has: reference, cpu"),
        (
            ["rope", "--impl", "tpu"],
            "--impl tpu: rope has no such contender; backends: reference, cpu, triton; peers: torch",
        ),
        (["rope", "--json", "/nowhere/x.json"], "--json /nowhere/x.json: /nowhere is no directory"),
        (["rope", "--plot", "x.gif"], "--plot must be a file that ends in .png or .svg"),
        (["rope", "--seconds", "0"], "--seconds must be a number greater than 0"),
        (["rope", "--threads", "0"], "--threads must be at least 1"),
        (["compare", "a.json"], "NEW is missing"),
        (["compare", "absent.json", "b.json"], "absent.json: cannot be read"),
        (["compare", "a", "b", "c"], "unexpected argument 'c'"),
        (["rope", "--imp", "cpu"], "unknown flag --imp; did you mean --impl?"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(capsys, args, expected):
    assert cli.main(["bench", *args]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("hpsafety bench") and expected in err, err


def test_a_wrong_contender_makes_exit_code_1(monkeypatch):
    fake = type("Module", (), {"main": staticmethod(lambda cfg: 1)})
    monkeypatch.setattr(bench_command, "load", lambda name: fake)
    assert cli.main(["bench", "rope"]) == 1
    fake.main = staticmethod(lambda cfg: 0)
    assert cli.main(["bench", "rope"]) == 0


def test_without_the_checkout(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(bench_command, "ROOT", tmp_path)
    assert cli.main(["bench", "rope"]) == 2
    assert "benchmarks come with the source checkout" in capsys.readouterr().err


def test_from_another_folder(tmp_path):
    """One small run as a user types it."""
    command = [
        sys.executable,
        "-m",
        "hpsafety",
        "bench",
        "swiglu",
        "--shape",
        "T=64,F=64",
        "--direction",
        "forward",
    ]
    done = subprocess.run(
        [*command, "--seconds", "0.01", "--threads", "1", "--cache", "warm"], cwd=tmp_path, capture_output=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("op\timpl\tshape") and any(
        line.split("\t")[1] == "torch" for line in lines[1:]
    )
