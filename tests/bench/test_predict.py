"""The model of kernels' time, and hpsafety plan --kernels. The bug it must catch: a worse kernel that looks faster."""

import copy
import json
import math

import pytest

from bench.static import predict, record
from bench.static.cases import LLAMA
from bench.static.work import FORMULAS, SHARES, idle, work
from hpsafety import cli

A100, H100 = predict.CHIPS


def row(arch="sm_80", tensor=True, **changes) -> dict:
    hot = {"instructions": 256, "mma": 64, "eq": 64, "spill": 0, "widths": {"ldgsts": {"128": 8}}}
    model = {"issue": 256, "tensor": 512, "mufu": 64, "bound": "tensor", "tensor_use": 1}
    if not tensor:
        hot = {"instructions": 64, "mma": 0, "spill": 0, "widths": {"ldg": {"128": 4}, "stg": {"128": 2}}}
        model = {"issue": 64, "fp32": 40, "bound": "issue"}
    whole = {"instructions": 900, "mma": 64 * tensor, "spill": 0, "widths": {}}
    return copy.deepcopy({
        "op": "o", "kernel": "k", "arch": arch, "config": "warps=4 stages=3", "warps": 4, "occupancy": [2, 8, "shared"],
        "registers": 128, "shared": 0, "whole": whole, "hot": hot, "model": model,
    } | changes)  # fmt: skip


def seconds(one: dict, chip=A100, programs=21600, moved=1e8, flops=1e12) -> float:
    return predict.launch_time(one, chip, programs, moved, flops)["seconds"]


def test_more_work_takes_longer():
    """A loop twice as long, twice the bytes, twice the programs of the same size."""
    assert seconds(row(), flops=2e12) > 1.9 * seconds(row())
    plain = row(tensor=False)
    assert seconds(plain, moved=2e9, flops=0) > 1.9 * seconds(plain, moved=1e9, flops=0)
    whole = row(tensor=False)
    whole["whole"] = whole.pop("hot")
    assert seconds(whole, programs=2_000_000, flops=0) > 1.9 * seconds(whole, programs=1_000_000, flops=0)


@pytest.mark.parametrize(
    "changes",
    [
        {"model": {"issue": 1024, "tensor": 512, "bound": "issue", "tensor_use": 0.5}},
        {"model": {"issue": 256, "tensor": 512, "mufu": 600, "bound": "mufu", "tensor_use": 0.85}},
    ],
)
def test_worse_instructions_take_longer(changes):
    assert seconds(row(**changes)) > seconds(row())


def test_fewer_warps_and_narrower_loads_keep_memory_waiting():
    wide = row(tensor=False)
    few = row(tensor=False, occupancy=[1, 1, "shared"], warps=1)
    narrow = row(tensor=False, occupancy=[1, 2, "shared"], warps=2, hot={"instructions": 64, "mma": 0, "spill": 0,
                 "widths": {"ldg": {"16": 4}, "stg": {"16": 4}}})  # fmt: skip
    assert seconds(wide, flops=0) < seconds(few, flops=0) < seconds(narrow, flops=0)


def test_a_partly_filled_last_wave_costs():
    full = 2 * A100.processors
    assert seconds(row(), programs=full + 1, flops=1e12 * (full + 1) / full) > 1.8 * seconds(
        row(), programs=full
    )


def test_no_faster_than_the_chip():
    for chip, arch in ((A100, "sm_80"), (H100, "sm_90")):
        for tensor in (True, False):
            for programs in (1, 100, 10**6):
                flops = 1e12 * tensor
                limit = max(flops / chip.flops, 1e9 / chip.bandwidth)
                assert seconds(row(arch, tensor), chip, programs, 1e9, flops) > limit


def test_ends():
    assert seconds(row(), programs=1, moved=0, flops=0) < 10e-6
    assert predict.launch_time(row(tensor=False), A100, 1, 64, 0)["bound"] == "launch"
    assert predict.launch_time(row(occupancy=[0, 0, "shared"]), A100, 1, 1, 1)["seconds"] == math.inf


@pytest.mark.parametrize("shapes", LLAMA, ids=lambda s: s.name)
def test_formulas(shapes):
    """Known ratios, whatever the size; nothing moves fewer bytes than none."""
    assert all(work(name, shapes, call).bytes > 0 for name in FORMULAS for call in (0, 1))
    assert work("nothing", shapes) is None
    for forward, ratio in (("attention", 2.5), ("linear_logprob", 3), ("distill_loss", 5 / 3)):
        assert work(forward + "_backward", shapes).flops == pytest.approx(ratio * work(forward, shapes).flops)
    assert work("linear_logprob", shapes).flops == 2.0 * shapes.trained * shapes.width * shapes.words
    with_copies, without = work("adamw_", shapes, 3).bytes, work("adamw_", shapes, 2).bytes
    assert with_copies == 14 * (with_copies - without), "28 bytes a weight, of which a bf16 copy is 2"


def test_attention_counts_the_prompt_once():
    """8 prompts of 512 with 4 responses of 256: the pairs of the block mask, counted one by one."""
    s = LLAMA[0]
    pairs = sum(range(1, 513)) + 4 * sum(512 + i for i in range(1, 257))
    assert work("attention", s).flops == 4 * s.head_dim * s.heads * s.prompts * pairs


def launched(function: str, kernels: dict[str, tuple], moved: int) -> list[dict]:
    calls = {
        name: {"7B": [[function, 0, programs, moved, times]]} for name, (programs, times) in kernels.items()
    }
    return [row(kernel=name, op=function, calls=one) for name, one in calls.items()]


def test_a_functions_operations_are_shared_among_its_kernels():
    rows = launched("attention_backward", {"a": (432, 1), "b": (432, 3)}, 10**8)
    parts = [one for one in predict.predict(rows, A100) if one["kernel"]]
    (whole,) = [one for one in predict.predict(rows, A100) if one["kernel"] is None]
    total = work("attention_backward", LLAMA[0]).flops
    assert [one["flops"] / total for one in parts] == pytest.approx([0.5, 0.5]) and whole["flops"] == total
    assert whole["seconds"] == pytest.approx(sum(one["seconds"] for one in parts)) and 0 < whole["share"] < 1
    assert all(sum(shares.values()) >= 0.99 for shares in SHARES.values())


def test_operands_behind_addresses_count():
    """AdamW gets a table of addresses: its bytes are those of the formula."""
    rows = launched("adamw_", {"factors": (1, 1), "update": (9999, 1)}, 1000)
    few, most = [
        one["bytes"] / work("adamw_", LLAMA[0]).bytes for one in predict.predict(rows, A100) if one["kernel"]
    ]
    assert few == pytest.approx(0, abs=1e-5) and few + most == pytest.approx(1)


def test_rows_that_are_not_read_do_not_count():
    rows = launched("reward_score", {"heads": (32, 1)}, 10**9)
    assert predict.predict(rows, A100)[0]["bytes"] == pytest.approx(work("reward_score", LLAMA[0]).bytes)


def test_launches_that_find_nothing_to_do():
    rows = launched("attention", {"attention_forward": (432, 1)}, 10**8)
    rows.append(rows[0] | {"config": "REDO=True warps=8 stages=2"})
    first, second, whole = predict.predict(rows, A100)
    assert (
        second["seconds"] == predict.LAUNCH and second["flops"] == 0 and first["flops"] == whole["flops"] > 0
    )


def test_predictions_of_the_record():
    """Every launch on record gets a time below the chip's limits; what the cases launch has a formula."""
    rows = record.read()
    for chip in predict.CHIPS:
        found = predict.predict(rows, chip)
        assert {one["op"] for one in found} == {row["op"] for row in rows}
        seen = [one for one in found if one["op"] not in predict.UNSEEN]
        assert all(0 <= one["share"] <= 1 and math.isfinite(one["seconds"]) for one in seen), chip.name
    functions = {call[0] for row in rows for calls in row["calls"].values() for call in calls}
    assert functions <= {*FORMULAS}, f"bench/static/work.py has no formula for {functions - {*FORMULAS}}"
    for function in functions & {*SHARES}:
        mine = [
            row for row in rows if any(one[0] == function for calls in row["calls"].values() for one in calls)
        ]
        kernels = {row["kernel"] for row in mine if row["whole"]["mma"] and not idle(row)}
        assert kernels == {*SHARES[function]}, (
            f"SHARES of bench/static/work.py: {function} has other kernels by now"
        )


def test_command(capsys, tmp_path):
    file = tmp_path / "plan.json"
    assert (
        cli.main(["plan", "--kernels", "--op", "rms_norm", "--size", "7B", "70B", "--json", str(file)]) == 0
    )
    out, err = capsys.readouterr()
    header, *lines = [line.split("\t") for line in out.splitlines()]
    assert (
        header[0] == "op"
        and {line[0] for line in lines} == {"rms_norm"}
        and {line[6] for line in lines} == {"7B", "70B"}
    )
    assert "not a measurement" in err
    saved = json.loads(file.read_text())
    assert {one["shapes"] for one in saved["predictions"]} == {"7B", "13B", "70B", "1B"} and "model" in saved


@pytest.mark.parametrize(
    "args, expected",
    [
        ([], "only --kernels so far"),
        (["--kernels", "--op", "nothing"], "--op nothing: no compiled kernels of it on record; ops: "),
        (["--kernels", "--size", "8B"], "--size must be of 7B, 13B, 70B, 1B"),
        (["--kernels", "--json", "/nowhere/x.json"], "/nowhere is no directory"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(capsys, args, expected):
    assert cli.main(["plan", *args]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("hpsafety plan: ") and expected in err


def test_terminal(capsys):
    from hpsafety import planner

    found = [
        {"chip": chip.name, **one}
        for chip in predict.CHIPS
        for one in predict.predict(record.read(), chip, ["7B"])
    ]
    planner.show(found, [chip.name for chip in predict.CHIPS], predict.assumptions())
    text = capsys.readouterr().out
    assert "not a measurement" in text and "\n   rms_norm_forward" in text and "A100-80 us" in text
