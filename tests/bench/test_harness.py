"""The benchmark harness of design section 8 (bench) and style rule 18, on cases that take no time.

One bug this file must catch: a wrong contender that is timed all the same.
"""

import json
import math
import types

import numpy as np
import pytest
import torch

from bench.harness import compare, contenders, limits, memory, results, roofline, run, table, timing
from bench.ops.case import Case
from hpsafety.config import BenchConfig
from hpsafety.errors import InputError


def fake_case(shape, dtype, device, direction, seed=0):
    x = torch.arange(1.0, shape["N"] + 1).to(dtype)
    return Case(
        op="fake", shape=shape, dtype=dtype, device=device, direction=direction, impls=("cpu",),
        run=lambda impl: (2 * x,), exact=lambda: (2 * x.double(),), flops=shape["N"], bytes=8.0 * shape["N"],
        peers={"right": lambda: (x + x,), "wrong": lambda: (2.1 * x,), "slow": lambda: (2 * x,)},
        on_request=("slow",), note="a note",
    )  # fmt: skip


@pytest.fixture
def fake(monkeypatch):
    module = types.ModuleType("bench.ops.fake")
    module.SHAPES, module.CHECK, module.DIRECTIONS, module.case = (
        [{"N": 1000}],
        {"N": 7},
        ("forward",),
        fake_case,
    )
    monkeypatch.setattr(contenders, "op_names", lambda: ["fake"])
    monkeypatch.setattr(contenders, "load", lambda op: module)
    monkeypatch.setattr(limits, "PEAK_SHAPE", (16, 16, 16))
    monkeypatch.setattr(limits.Limits, "roof_bytes", lambda self: 1 << 16)
    monkeypatch.setattr(timing, "last_level_cache_bytes", lambda: 1 << 16)
    monkeypatch.setattr(
        contenders.backends,
        "unavailable",
        lambda op, impl, have, device, *_: None if impl == "cpu" else "not here",
    )
    return module


def config(**more):
    return BenchConfig(ops=("fake",), device="cpu", seconds=0.002, **more)


def test_rows_have_every_field_and_a_wrong_contender_no_time(fake, tmp_path, capsys):
    """Style rule 18; a wrong contender is named, not timed, and makes the exit code 1."""
    path, picture = tmp_path / "r.json", tmp_path / "r.svg"
    assert run.main(config(json=str(path), plot=str(picture))) == 1
    record = results.read(str(path))
    assert [row["impl"] for row in record["rows"]] == ["cpu", "right"]
    assert [(w["impl"], w["fault"][:15]) for w in record["wrong"]] == [("wrong", "wrong: tensor 0")]
    needed = "op impl shape dtype device ms_p20 ms_p50 ms_p80 bytes flops pct_of_limit peak_mb threads load_average"
    for row in record["rows"]:
        assert {*needed.split(), *results.KEY} <= row.keys() and len(row["samples_ms"]) == row["repeats"] >= 5
        assert row["ms_min"] <= row["ms_p20"] <= row["ms_p50"] <= row["ms_p80"] and row["pct_of_limit"] > 0
    assert {"cpu", "torch_capability", "commit", "versions", "load_average"} <= record["machine"].keys()
    assert record["limits"]["memory_gb_per_s"] > 0 and picture.read_text().count("<svg") == 1
    out, err = capsys.readouterr()
    assert out.count("\n") == 3 and "fake forward float32 wrong: wrong: tensor 0 is off by" in err


def test_contenders_by_name(fake):
    case = fake_case({"N": 7}, torch.float32, "cpu", "forward")
    names = lambda wanted, over=False: list(contenders.contenders(case, wanted, over)[0])  # noqa: E731
    assert names(None) == ["cpu", "right", "wrong"]
    assert names(("slow", "reference")) == ["slow", "reference"]
    assert names(("slow", "torch"), True) == ["slow"]
    with pytest.raises(
        InputError, match="has no such contender; backends: reference, cpu; peers: right, wrong, slow"
    ):
        names(("torch",))
    with pytest.raises(InputError, match="--impl triton: not here"):
        names(("triton",))


@pytest.mark.parametrize(
    "result, fault",
    [
        ([1.0, 2.0], None),
        ([1.0, 2.0 + 1e-6], None),
        ([1.0, 2.01], "off by"),
        ([1.0, math.nan], "off by inf"),
        ([1.0, 2.0, 3.0], "the oracle's"),
    ],
)
def test_faults(result, fault):
    exact = (torch.tensor([1.0, 2.0], dtype=torch.float64),)
    line = contenders.first_fault((torch.tensor(result),), exact, (exact[0].float(),))
    assert line is None if fault is None else fault in line


def test_non_finite_and_whole_number_results():
    inf, nan = math.inf, math.nan
    assert contenders.largest_error(torch.tensor([inf, nan, 1.0]), torch.tensor([inf, nan, 1.0])) == 0
    assert contenders.largest_error(torch.tensor([inf]), torch.tensor([-inf])) == inf
    ints = (torch.tensor([1, 2]),)
    assert contenders.first_fault(ints, ints, ints) is None
    assert "at 1 places" in contenders.first_fault((torch.tensor([1, 3]),), ints, ints)


def test_a_contender_that_raises_is_a_fault(fake):
    case = fake_case({"N": 7}, torch.float32, "cpu", "forward")

    def fail():
        raise NotImplementedError("no bf16 here")

    assert contenders.faults(case, {"x": fail}) == {"x": "failed: NotImplementedError: no bf16 here"}


def test_percentiles_are_numpys():
    samples = list(np.random.default_rng(0).random(37))
    for q in (0, 20, 50, 80, 100):
        assert timing.percentile(samples, q) == pytest.approx(np.percentile(samples, q))
    assert timing.percentile([3.0], 80) == 3.0


def test_order_alternates_and_spreads():
    assert timing.order({"a": 2, "b": 2}) == ["a", "b", "a", "b"]
    mixed = timing.order({"a": 6, "b": 2})
    assert mixed.count("a") == 6 and mixed.count("b") == 2 and mixed.index("b") in (3, 4)
    assert timing.order({}) == []
    assert timing.counts({"fast": 1e-5, "slow": 10.0}, 2.0, 5) == {"fast": timing.MAX_REPEATS, "slow": 5}


def test_a_long_call_is_made_once_where_one_is_enough(monkeypatch):
    timer = types.SimpleNamespace(seconds=lambda call: call())
    monkeypatch.setattr(timing, "LONG_SECONDS", 0.4)
    assert timing.alternate({"slow": lambda: 0.5}, {"slow": timer}, 0.1, at_least=1) == {"slow": [0.5]}
    called = []
    timing.alternate({"slow": lambda: called.append(1) or 0.3}, {"slow": timer}, 1e-12, at_least=3)
    assert len(called) == 4  # and never without a warm-up call else


def test_cold_or_warm():
    assert timing.is_cold("cold", 1) and not timing.is_cold("warm", 1e9)
    assert timing.is_cold("auto", timing.COLD_BYTES) and not timing.is_cold("auto", timing.COLD_BYTES - 1)


def planted_limits() -> limits.Limits:
    found = limits.Limits("cpu")
    found.gemms = {(64, 64, 64, "float32"): {"mm": 50.0, "linear": 100.0}}
    found.probes = {(True, 8000): {"read": 4e-6, "copy": 2e-6}}
    found.call_seconds = {False: 1e-9, True: 1e-7}
    return found


def case_of(flops=0.0, size=8000.0, gemms=()):
    return Case(
        op="x", shape={"N": 1}, dtype=torch.float32, device="cpu", direction="forward", run=None, impls=(),
        exact=None, flops=flops, bytes=size, gemms=gemms,
    )  # fmt: skip


def test_the_limit_is_the_longer_of_gemms_and_bytes(monkeypatch):
    monkeypatch.setattr(timing, "last_level_cache_bytes", lambda: 1 << 16)
    found = planted_limits()
    by_bytes = found.of(case_of(flops=1.0), True)
    assert (by_bytes.by, by_bytes.seconds) == (
        "memory",
        pytest.approx(2e-6),
    ) and "copy 4.0 GB/s" in by_bytes.told
    gemms = ((64, 64, 64, 3),)
    by_gemm = found.of(case_of(gemms=gemms), True)
    assert by_gemm.by == "gemm" and by_gemm.seconds == pytest.approx(3 * 2 * 64**3 / 100e9)
    assert found.of(case_of(flops=1e9), True).seconds == pytest.approx(
        1e-2
    )  # no GEMMs named: at the best GEMM's rate
    found.call_seconds[True] = 1.5e-6
    assert found.of(case_of(), True).by == "call"


def test_a_rival_can_only_raise_the_limit(monkeypatch):
    monkeypatch.setattr(timing, "last_level_cache_bytes", lambda: 1 << 16)
    found = planted_limits()
    found.credit(("bytes", True, 8000, "copy"), [3e-6, 1e-6])
    found.credit(("gemm", (64, 64, 64, "float32"), 64, "linear"), [1.0])
    assert (
        found.probes[(True, 8000)]["copy"] == 1e-6 and found.gemms[(64, 64, 64, "float32")]["linear"] == 100.0
    )
    assert limits.gemm_rows(4096, 576, 49152) == 264 and limits.gemm_rows(10, 64, 64) == 10


def test_terminal_table(capsys):
    case = fake_case({"N": 7}, torch.float32, "cpu", "forward")
    limit = limits.Limit(1e-3, "memory", "copy 4.0 GB/s")
    rows = [run.make_row(case, name, [2e-3, 4e-3], limit, cache="cold") for name in ("cpu", "right")]
    table.Writer(terminal=True).rows(rows)
    out = capsys.readouterr().out
    assert (
        "fake forward, N=7, float32, cold caches" in out and "limit 1 ms: memory" in out and "a note" in out
    )
    assert rows[0]["pct_of_limit"] == pytest.approx(100 / 3) and rows[0][
        "pct_of_limit_best"
    ] == pytest.approx(50)


def test_peak_memory_in_a_child():
    """rms_norm on (4096, 576) without a residual: the output is 9.4 MB, the inputs do not count."""
    job = {"op": "rms_norm", "shape": {"T": 4096, "D": 576, "residual": 0}, "dtype": "float32", "device": "cpu",
           "direction": "forward", "seed": 0, "impl": "reference", "threads": 1}  # fmt: skip
    assert 9 <= memory.in_child(job) < 45


def noisy(rng, scale=1.0, n=60):
    """Times with a slow drift and outliers, as a shared machine gives them."""
    drift = np.cumsum(rng.normal(0, 0.002, n))
    return list(scale * (1 + drift + 0.03 * rng.random(n) + 0.3 * (rng.random(n) < 0.05)))


def test_compare_finds_a_slowdown_and_calls_noise_noise():
    rng = np.random.default_rng(0)
    verdicts = {scale: [] for scale in (1.2, 1.0, 0.8)}
    for _ in range(20):
        for scale, found in verdicts.items():
            found.append(compare.verdict(*compare.ratio(noisy(rng), noisy(rng, scale))))
    assert set(verdicts[1.2]) == {"slower"} and set(verdicts[0.8]) == {"faster"}
    assert verdicts[1.0].count("no difference") >= 19
    middle, low, high = compare.ratio([1.0], [1.5])
    assert (middle, low, high) == (1.5, 1.5, 1.5)


def test_compare_matches_rows_by_key_and_tells_of_the_machine(fake, tmp_path, capsys):
    path, other = tmp_path / "a.json", tmp_path / "b.json"
    run.main(config(json=str(path), impl="cpu,right"))
    record = json.loads(path.read_text())
    for row in record["rows"]:
        row["samples_ms"] = [2 * s for s in row["samples_ms"]]
    record["rows"][1]["samples_ms"] = [9.0]
    record["rows"].append(record["rows"][0] | {"threads": 99})
    record["limits"]["memory_gb_per_s"] *= 2
    other.write_text(json.dumps(record))
    capsys.readouterr()
    assert compare.main(types.SimpleNamespace(old=str(path), new=str(other))) == 0
    out, err = capsys.readouterr()
    line = out.splitlines()[1].split("\t")
    assert len(out.splitlines()) == 3 and line[1] == "cpu" and line[8] == "2" and line[-1] == "slower"
    assert (
        "1 slower" in err
        and "1 too few calls; 1 rows stand in one file only" in err
        and "memory bandwidth changed by +100 %" in err
    )


@pytest.mark.parametrize(
    "text, expected",
    [
        (None, "cannot be read"),
        ("no json", "is not JSON"),
        ("[1]", "is not a file that hpsafety bench --json wrote"),
        (
            '{"form": "hpsafety-bench/1", "machine": {}, "limits": {}, "rows": [{"op": 1}]}',
            "rows[0] lacks a field",
        ),
        ('{"form": "hpsafety-bench/1"}', "lacks machine, limits or rows"),
    ],
)
def test_result_files_of_another_form(tmp_path, text, expected):
    path = tmp_path / "x.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError) as error:
        results.read(str(path))
    assert str(error.value).startswith(f"{path}: ") and expected in str(error.value)


def test_roofline_spreads_labels():
    places = roofline.spread([0.0, 1.0, 1.0, 50.0], 10.0)
    assert places[3] == 50.0 and places[1] - places[0] >= 9.9 and places[2] - places[1] >= 9.9
