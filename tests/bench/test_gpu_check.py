"""bench/gpu_check.sh where there is no GPU: its dry mode goes through every part, and what it says without one."""

import json

import pytest
import torch

from bench import gpu_check


def dry(tmp_path, *parts) -> tuple[int, dict]:
    out = tmp_path / "gpu.json"
    code = gpu_check.main(["--dry", "--out", str(out), "--only", *parts])
    return code, json.loads(out.read_text(encoding="utf-8"))


def test_a_part_that_fails_is_a_row_and_an_exit_code(tmp_path, monkeypatch):
    def broken(check):
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(gpu_check.PARTS, "ppo", broken)
    code, result = dry(tmp_path, "ops", "ppo")
    assert code == 1 and result["dry"] and result["machine"]["cpu"]
    assert result["parts"]["ops"]["ok"] and any("rms_norm" in row for row in result["parts"]["ops"]["table"])
    assert not result["parts"]["ppo"]["ok"] and "no such kernel" in result["parts"]["ppo"]["error"]


def test_generation_is_compared(tmp_path):
    code, result = dry(tmp_path, "generation")
    assert code == 0 and result["parts"]["generation"]["equal"] == {
        "temperature 0": 1.0,
        "temperature 1": 1.0,
    }


def test_losses_that_differ_fail(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "largest_difference", lambda *rows: 0.1)
    code, result = dry(tmp_path, "fine-tuning")
    assert code == 1 and "losses differ from the CPU's" in result["parts"]["fine-tuning"]["error"]


@pytest.mark.parametrize(
    "rows, worst", [(([1.0, 2.0], [1.0, 2.2]), 0.2 / 2.2), (([1.0], [1.0, 2.0]), float("inf"))]
)
def test_largest_difference(rows, worst):
    assert gpu_check.largest_difference(*rows) == pytest.approx(worst)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so(capsys):
    assert gpu_check.main([]) == 2
    assert "no CUDA GPU here; --dry" in capsys.readouterr().err


@pytest.mark.slow
def test_every_part_in_dry_mode(tmp_path):
    code, result = dry(tmp_path, *gpu_check.PARTS)
    assert code == 0, result["parts"]
    assert result["parts"].keys() == gpu_check.PARTS.keys()


def test_the_faster_backend_should_be_the_default(capsys):
    row = {"op": "gae", "shape": {"N": 5}, "dtype": "float32", "direction": "forward"}
    rows = [
        row | {"impl": "cuda", "ms_p50": 2.0},
        row | {"impl": "triton", "ms_p50": 3.0},
        row | {"impl": "triton", "ms_p50": 3.0, "dtype": "bfloat16"},
        row | {"impl": "cpu", "ms_p50": 1.0},
    ]
    assert gpu_check.defaults(rows) == [row | {"default": "cuda", "times_faster": 1.5}]
    assert "cuda should be the default, 1.5 times faster" in capsys.readouterr().out
