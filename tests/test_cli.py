"""The command line of design section 8: help, config file under flags, one-line errors, exit codes."""

import dataclasses
import errno
import os
import resource
import subprocess
import sys
import types
from pathlib import Path

import pytest

from hpsafety import cli, doctor, flags
from hpsafety.config import DemoConfig, RewardConfig, SFTConfig, TrainConfig
from hpsafety.errors import InputError

ROOT = Path(__file__).resolve().parent.parent
JUDGES = ["--safety-rm", "s", "--helpful-rm", "h"]
NEEDED = ["--model", "m", "--data", "a.jsonl", "--out", "o"]


def parse(*args: str) -> SFTConfig:
    return flags.parse(SFTConfig, "hpsafety sft", "summary", [*NEEDED, *args])


@pytest.fixture
def planted(monkeypatch):
    """Puts a function in place of the SFT stage, so that the tests of main() need no model."""

    def plant(function):
        stage = types.ModuleType("hpsafety.planted")
        stage.run = function
        monkeypatch.setitem(sys.modules, "hpsafety.planted", stage)
        monkeypatch.setitem(cli.COMMANDS, "sft", ("summary", "SFTConfig", "hpsafety.planted:run"))

    return plant


def one_line(capsys) -> str:
    err = capsys.readouterr().err
    assert err.endswith("\n") and err.count("\n") == 1, err
    return err.strip()


def test_help_is_light():
    """Design section 2: hpsafety --help under 0.3 s, which no import of torch allows."""
    code = "import sys, hpsafety.cli as c; c.main(['--help']); c.main(['sft', '--help']); print('torch' in sys.modules)"
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert done.stdout.splitlines()[-1] == "False"
    assert min(seconds) < 0.3, seconds


def test_help_lists_the_commands_that_exist(capsys):
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"\n  {name}" in text for name in cli.COMMANDS)
    assert cli.main([]) == 2  # no command is a usage error


def test_command_help_shows_defaults_and_units(capsys):
    assert cli.main(["sft", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(SFTConfig):
        assert flags.flag(field.name) in text and field.metadata["help"].split(";")[0] in text
    assert "(default 2e-05)" in text and "tokens per micro-batch" in text


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("hpsafety 0.")


def test_defaults_are_the_contract():
    """Design section 8 and SFT-5: sft --batch 64 --epochs 2 --lr 2e-5, AdamW .9/.95/1e-5, decay 0.1, clip 1.0."""
    cfg = parse()
    assert (cfg.batch, cfg.epochs, cfg.lr, cfg.seed, cfg.resume) == (64, 2, 2e-5, 0, True)
    assert (cfg.beta1, cfg.beta2, cfg.eps, cfg.weight_decay, cfg.clip) == (0.9, 0.95, 1e-5, 0.1, 1.0)
    assert (cfg.warmup, cfg.steps, cfg.max_length, cfg.safety_fraction) == (0, None, None, 1.0)


def test_flags_are_typed():
    cfg = parse(
        "--lr", "1e-4", "--steps=7", "--no-resume", "--recompute", "--data", "b", "c", "--max-length", "128"
    )
    assert (cfg.lr, cfg.steps, cfg.resume, cfg.recompute, cfg.max_length) == (1e-4, 7, False, True, 128)
    assert cfg.data == ("a.jsonl", "b", "c")


def test_flags_override_the_file_and_the_file_the_defaults(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text(
        'model = "m"\ndata = ["x", "y"]\nout = "o"\nlr = 1\ntokens-per-batch = 512\nall_safety = true\n'
    )
    cfg = flags.parse(SFTConfig, "hpsafety sft", "", ["--lr", "3e-5", "--config", str(file)])
    assert (cfg.lr, cfg.tokens_per_batch, cfg.data, cfg.all_safety) == (3e-5, 512, ("x", "y"), True)
    assert (cfg.batch, cfg.epochs) == (64, 2)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("lrr = 1", "unknown key 'lrr'; did you mean 'lr'?"),
        ("[sft]\nlr = 1", "unknown key 'sft'"),
        ('lr = "fast"', "key 'lr' must be a number, got 'fast'"),
        ("batch = 2.5", "key 'batch' must be a whole number, got 2.5"),
        ("batch = true", "key 'batch' must be a whole number, got True"),
        ("resume = 1", "key 'resume' must be true or false, got 1"),
        ("data = [1]", "key 'data' must be a string or a list of strings, got [1]"),
        ('precision = "fp8"', "key 'precision' must be one of auto, fp32, bf16, got 'fp8'"),
        ("lr = ", "is not valid TOML"),
    ],
)
def test_bad_config_file(tmp_path, capsys, text, expected):
    file = tmp_path / "run.toml"
    file.write_text(text + "\n")
    assert cli.main(["sft", *NEEDED, "--config", str(file)]) == 2
    line = one_line(capsys)
    assert line.startswith(f"hpsafety sft: {file}: ") and expected in line


@pytest.mark.parametrize(
    "args, expected",
    [
        (["sft"], "--model is missing"),
        (["sft", *NEEDED, "--foo", "1"], "unknown flag --foo. See hpsafety sft --help"),
        (
            ["sft", *NEEDED, "--safety-fractoin=1"],
            "unknown flag --safety-fractoin; did you mean --safety-fraction?",
        ),
        (["sft", *NEEDED, "--lr", "-2e-5"], "--lr must be a number greater than 0, got -2e-05"),
        (["sft", *NEEDED, "--lr", "-1"], "--lr must be a number greater than 0, got -1.0"),
        (["sft", *NEEDED, "--lr", "nan"], "--lr must be a number greater than 0, got nan"),
        (["sft", *NEEDED, "--lr", "fast"], "--lr: invalid float value: 'fast'"),
        (["sft", *NEEDED, "--batch", "0"], "--batch must be at least 1, got 0"),
        (["sft", *NEEDED, "--epochs", "1.5"], "--epochs: invalid int value: '1.5'"),
        (["sft", *NEEDED, "--safety-fraction", "1.01"], "--safety-fraction must be from 0 to 1, got 1.01"),
        (["sft", *NEEDED, "--device", "tpu"], "--device must be auto, cpu, cuda or cuda:N, got 'tpu'"),
        (["sft", *NEEDED, "--precision", "fp8"], "--precision: invalid choice: 'fp8'"),
        (["sft", *NEEDED, "--seed", "-1"], "--seed must be from 0"),
        (["sft", *NEEDED, "--seed"], "--seed: expected one argument"),
        (["sft", *NEEDED, "--config", "absent.toml"], "absent.toml: cannot be read: No such file"),
        (["sft", "stray", *NEEDED], "unexpected argument 'stray'"),
        (["demo", "--eval-prompts", "0"], "--eval-prompts must be at least 1"),
        (["ops", "--all"], "unexpected argument '--all'"),
        (
            ["reject", *NEEDED, *JUDGES, "--kv-memory", "lots"],
            "--kv-memory must be a size such as 512MB or 2GB",
        ),
        (["stf"], "unknown command 'stf'; did you mean sft?"),
    ],
)
def test_usage_errors_are_one_line_and_exit_2(capsys, args, expected):
    assert cli.main(args) == 2
    line = one_line(capsys)
    assert line.startswith("hpsafety") and expected in line


@pytest.mark.parametrize(
    "error, code, expected",
    [
        (InputError('a.jsonl:3: field "response" is missing'), 2, 'a.jsonl:3: field "response" is missing'),
        (
            OSError(errno.ENOSPC, "No space left on device", "o/model"),
            1,
            "disk full while writing o/model: free",
        ),
        (
            RuntimeError("write failed: No space left on device (os error 28)"),
            1,
            "disk full while writing o: free",
        ),
        (
            PermissionError(errno.EACCES, "Permission denied", "/o"),
            2,
            "/o: Permission denied; choose another path",
        ),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "o/x"), 2, "o/x: Not a directory"),
        (KeyboardInterrupt("stopped at step 3"), 130, "stopped at step 3"),
        (FloatingPointError("three steps in a row were not finite"), 1, "three steps in a row"),
        (
            ModuleNotFoundError("No module named 'gguf'", name="gguf"),
            1,
            "the package gguf is not installed: run make",
        ),
    ],
)
def test_failures_are_one_line(planted, capsys, error, code, expected):
    """Exit codes of design section 8: 1 failed in running, 2 bad input, 130 interrupted."""

    def fail(cfg):
        raise error

    planted(fail)
    assert cli.main(["sft", *NEEDED]) == code
    assert one_line(capsys).startswith(f"hpsafety sft: {expected}")


def test_disk_full_is_seen_behind_another_error(planted, capsys):
    def fail(cfg):
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as error:
            raise RuntimeError("could not save") from error

    planted(fail)
    assert cli.main(["sft", *NEEDED]) == 1
    assert "disk full while writing o:" in one_line(capsys)


def test_a_bug_shows_its_traceback_and_exits_1(planted, capsys):
    planted(lambda cfg: {}["absent"])
    assert cli.main(["sft", *NEEDED]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_debug_shows_every_traceback(planted, capsys, monkeypatch):
    def fail(cfg):
        raise InputError("bad")

    planted(fail)
    monkeypatch.setenv("HPSAFETY_DEBUG", "1")
    assert cli.main(["sft", *NEEDED]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_other_ranks_are_silent(planted, capsys, monkeypatch):
    def fail(cfg):
        raise InputError("bad")

    planted(fail)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert cli.main(["sft", *NEEDED]) == 2
    assert capsys.readouterr().err == ""


def test_the_stage_gets_the_config(planted):
    seen = []
    planted(seen.append)
    assert cli.main(["sft", *NEEDED, "--lr", "1e-4"]) == 0
    assert seen == [SFTConfig(model="m", data=("a.jsonl",), out="o", lr=1e-4)]


def test_configs_are_flat_and_frozen():
    """A stage's config adds to what all stages share (TrainConfig), and no config goes deeper."""
    for config in (SFTConfig, RewardConfig, DemoConfig):
        assert config.__mro__ in ((config, object), (config, TrainConfig, object))
        assert all(field.metadata["help"] and field.kw_only for field in dataclasses.fields(config))
    with pytest.raises(dataclasses.FrozenInstanceError):
        DemoConfig().seed = 1


def test_ops_prints_one_row_per_op_and_backend(capsys):
    assert cli.main(["ops"]) == 0
    header, *rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert header == ["op", "backend", "available", "why"]
    assert ["rms_norm", "reference", "yes"] in [row[:3] for row in rows]
    assert all(len(row) == 4 for row in rows)


def test_doctor_reports_and_exits_0(capsys):
    assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    for word in (
        "python",
        "torch",
        "cpu capability",
        "memory",
        "compiler",
        "C++ kernels",
        "rms_norm",
        "advice",
    ):
        assert word in text, text
    assert "failed" not in text, text


def test_doctor_on_optional_packages(monkeypatch):
    """On CPUs one short line; on CUDA what each package would bring and the command, once per reason."""
    from hpsafety.ops import apex_backend, flash_attn_backend

    advice = []
    assert doctor.optional_packages(advice) == "flash-attn, apex: not for CPUs" and not advice
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(flash_attn_backend, "missing", lambda op: None)
    monkeypatch.setattr(apex_backend, "missing", lambda op: f"not installed: {apex_backend.INSTALL}")
    assert doctor.optional_packages(advice) == "attention: flash-attn"
    (line,) = advice
    assert (
        line.startswith("optional, fused AdamW and RMSNorm")
        and "pip install -v --no-build-isolation ." in line
    )


def test_doctor_without_torch(tmp_path):
    """A planted torch that does not import: advice instead of a traceback."""
    (tmp_path / "torch.py").write_text("raise ImportError('libtorch.so: cannot open shared object file')\n")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-m", "hpsafety", "doctor"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert "torch does not import (libtorch.so" in done.stdout and "section" not in done.stdout


def test_doctor_survives_a_failing_section(capsys, monkeypatch):
    def fail(advice):
        raise RuntimeError("no driver")

    monkeypatch.setattr(doctor, "torch_facts", fail)
    doctor.run()
    assert "the section torch failed: RuntimeError: no driver" in capsys.readouterr().out


def test_exit_code_reaches_the_shell():
    command = [sys.executable, "-m", "hpsafety", "sft", "--lr", "-1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
