"""bench/static: the reader of machine code, what is compiled, the check, and the file on record.

The bugs this file must catch: a spill in a loop that nobody sees, and figures on record of code that is gone.
"""

import copy
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from bench.static import __main__ as command
from bench.static import check, record, sass, table
from bench.static.baselines import BASELINES
from bench.static.cases import LLAMA

ROOT = Path(__file__).resolve().parents[2]
ROWS = [row for row in record.read() if not row["op"].startswith("cuda ")]
CASES = sorted(path.stem for path in (ROOT / "bench" / "static" / "cases").glob("[a-z]*.py"))

# Lines of cuobjdump's form: an outer loop around a loop of one HMMA and a wait that is written out of line.
SASS = """
	code for sm_80
		Function : planted
	.headerflags	@"EF_CUDA_SM80 EF_CUDA_PTX_SM(EF_CUDA_SM80)"
        /*0000*/                   IMAD.MOV.U32 R1, RZ, RZ, c[0x0][0x28] ;          /* 0x00000a0000017624 */
                                                                                    /* 0x000fe200078e00ff */
        /*0010*/                   LDG.E.128 R4, [R2.64] ;                          /* 0x0000000402047981 */
        /*0020*/                   LDG.E.U16 R8, [R2.64+0x10] ;                     /* 0x0000000402087981 */
        /*0030*/                   LDGSTS.E.BYPASS.128 [R9], [R2.64], P1 ;          /* 0x0000000002097fae */
        /*0040*/                   BSSY B0, 0xa0 ;                                  /* 0x0000000000007945 */
        /*0050*/                   LDSM.16.M88.4 R12, [R9] ;                        /* 0x000000000900783b */
        /*0060*/                   LDL.64 R20, [R1+0x8] ;                           /* 0x0000080001147983 */
        /*0070*/                   HMMA.16816.F32.BF16 R24, R12, R16, R24 ;         /* 0x000000100c18723c */
        /*0080*/              @!P2 BRA 0x120 ;                                      /* 0x0000000000008947 */
        /*0090*/               @P0 BRA 0x50 ;                                       /* 0x0000000000000947 */
        /*00a0*/                   MUFU.EX2 R36, R36 ;                              /* 0x0000002400247308 */
        /*00b0*/                   FFMA.FTZ R37, R36, R5, -R6 ;                     /* 0x0000000524257223 */
        /*00c0*/                   STL [R1+0xc8], R76 ;                             /* 0x0000c84c01007387 */
        /*00d0*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;                    /* 0x0000000000007b1d */
        /*00e0*/              @!P3 BRA 0x10 ;                                       /* 0x0000000000003947 */
        /*00f0*/                   STG.E.64 [R2.64], R24 ;                          /* 0x0000001802007986 */
        /*0100*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24 ;  /* 0x00e00000081879f0 */
        /*0110*/                   EXIT ;                                           /* 0x000000000000794d */
        /*0120*/                   NOP ;                                            /* 0x0000000000007918 */
        /*0130*/                   BRA 0x90 ;                                       /* 0xfffffff000007947 */
        /*0140*/                   BRA 0x140;                                       /* 0xfffffff000007947 */
        /*0150*/                   NOP;                                             /* 0x0000000000007918 */
"""


@pytest.fixture(scope="module")
def code():
    (name, found), *rest = sass.parse(SASS).items()
    assert name == "planted" and not rest
    return found


def test_parser(code):
    """Padding goes, predicates and operands are told apart, widths and tensor-core work are read."""
    assert len(code) == 20 and code[-1].opcode == "BRA"
    by = {one.address: one for one in code}
    assert by[0x80].predicate == "@!P2" and by[0x80].target == 0x120 and by[0x30].operands.endswith("P1")
    assert [by[at].bytes for at in (0x10, 0x20, 0x30, 0x60, 0xC0)] == [16, 2, 16, 8, 4]
    assert (by[0x70].eq, by[0x100].eq, by[0x50].matrices) == (1.0, 16.0, 4)
    assert [one.address for one in code if one.tensor] == [0x70, 0x100]


def test_half_precision_arithmetic_is_no_tensor_work():
    text = "\tFunction : f\n        /*0000*/   HFMA2.MMA R21, -RZ, RZ, 0, 0 ;   /* 0x0 */\n"
    assert not sass.parse(text)["f"][0].tensor


def test_loops(code):
    """The inner loop holds the block out of line; the code behind the loops is in none."""
    graph = sass.Graph(code)
    bodies = sorted(([one.address for one in graph.instructions(body)] for body in graph.loops()), key=len)
    assert bodies[0] == [0x50, 0x60, 0x70, 0x80, 0x90, 0x120, 0x130]
    assert bodies[1] == [*range(0x10, 0xF0, 0x10), 0x120, 0x130] and len(bodies) == 2


def test_hot_loop_and_counts(code):
    loop, spill = sass.hot(sass.Graph(code))
    assert [one.address for one in loop][:3] == [0x50, 0x60, 0x70] and spill == 8 + 4
    inside, whole = sass.count(loop), sass.count(code)
    assert (inside["mma"], inside["eq"], inside["non_mma_per_eq"], inside["spill"], inside["ldsm"]) == (
        1,
        1.0,
        6.0,
        8,
        1,
    )
    assert (whole["mma"], whole["eq"], whole["mufu"], whole["barriers"], whole["spill"]) == (
        2,
        17.0,
        1,
        1,
        12,
    )
    assert whole["widths"] == {"ldg": {"16": 1, "128": 1}, "ldgsts": {"128": 1}, "stg": {"64": 1}}
    model = sass.pipes(loop, 80)
    assert (model["issue"], model["tensor"], model["shared"], model["bound"]) == (7, 8.0, 16, "shared")
    assert model["tensor_use"] == 0.5


def test_code_without_loops_is_hot_as_a_whole(code):
    straight = [one for one in code if one.base != "BRA"]
    assert sass.hot(sass.Graph(straight)) == (straight, 0) and sass.Graph([]).loops() == []


def test_occupancy():
    """NVIDIA's own calculator: 128 registers and 256 threads are 2 blocks; 163 KiB is one block of an A100."""
    assert sass.occupancy(80, 128, 8, 0) == {"blocks": 2, "warps": 16, "limited_by": "registers"}
    assert sass.occupancy(80, 32, 4, 163 * 1024) == {"blocks": 1, "warps": 4, "limited_by": "shared"}
    assert sass.occupancy(90, 32, 4, 0)["warps"] == 64 and sass.occupancy(90, 255, 16, 0)["blocks"] == 0
    assert sass.occupancy(90, 64, 4, 112 * 1024)["blocks"] == 2


# --- the check ---------------------------------------------------------------------------------------------------


def planted(**changes) -> dict:
    """A sound row of an imaginary kernel; changes by "hot.eq" and the like."""
    row = {
        "op": "attention", "kernel": "k", "arch": "sm_80", "config": "BLOCK=64 warps=4 stages=2", "types": "*bf16D i32",
        "hash": "a", "calls": {"7B": [["attention", 0, 432, 10**8, 1]]}, "registers": 128, "stack": 0, "shared": 65536,
        "warps": 4, "loop_spill": 0, "occupancy": [2, 8, "shared"],
        "whole": {"instructions": 900, "mma": 64, "eq": 64, "spill": 0},
        "hot": {"instructions": 256, "mma": 64, "eq": 64, "non_mma_per_eq": 3.0, "mufu_per_eq": 0.3, "spill": 0,
                "widths": {"ldgsts": {"128": 8}}},
        "model": {"issue": 256, "tensor": 512, "bound": "tensor", "tensor_use": 1},
    }  # fmt: skip
    for path, value in changes.items():
        *folders, last = path.split("__")
        inner = row
        for folder in folders:
            inner = inner[folder]
        inner[last] = value
    return copy.deepcopy(row)


FITS = (65536, 65536)


def test_a_sound_row_has_no_fault():
    assert check.faults(planted(), FITS, True) == []
    assert check.compare([planted(hash="b")], [planted()]) == []


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"loop_spill": 8}, "a loop spills 8 bytes"),
        ({"shared": 163 * 1024 + 16}, "a block has 166912 at most"),
        ({"shared": 65552}, "SHARED_BYTES says 65536"),
        ({"whole__mma": 0}, "tl.dot without a tensor-core instruction"),
        ({"error": "ValueError: no"}, "does not compile: ValueError: no"),
    ],
)
def test_faults(changes, expected):
    lines = check.faults(planted(**changes), FITS, True)
    assert any(expected in line and line.startswith("attention: k on sm_80 (") for line in lines), lines


def test_more_faults():
    assert "does not say its SHARED_BYTES" in check.faults(planted(), None, True)[0]
    assert check.faults(planted(arch="sm_90", shared=200_000), (65536, 200_000), True) == []
    rarely = planted(kernel="attention_forward", config="REDO=True warps=8 stages=2", loop_spill=8)
    assert check.faults(rarely, FITS, True) == []
    assert check.faults(rarely | {"kernel": "linear_logprob_forward", "config": "REST=True"}, FITS, True)
    vectors = planted(whole={"instructions": 9, "mma": 0, "spill": 0})
    assert check.faults(vectors, FITS, False) == []
    assert check.missing_tensor_cores([vectors]) == [
        "attention: attention on sm_80 uses no tensor cores",
        "attention: attention_backward on sm_80 uses no tensor cores",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"registers": 168, "occupancy": [1, 4, "registers"]}, "registers 128 -> 168, warps 8 -> 4"),
        ({"hot__non_mma_per_eq": 3.1}, "other instructions per eq 3.0 -> 3.1"),
        ({"whole__spill": 16}, "spill 0 -> 16 bytes"),
        ({"hot__widths": {"ldgsts": {"32": 32}}}, "loads of 128 -> 32 bits"),
    ],
)
def test_regressions(changes, expected):
    """Also where the configuration changed: what the same call launched before is what counts."""
    for more in ({}, {"config": "BLOCK=128 warps=4 stages=2"}):
        lines = check.compare([planted(hash="b", **changes, **more)], [planted()])
        assert len(lines) == 1 and expected in lines[0], lines


@pytest.mark.parametrize(
    "changes",
    [
        {"registers": 168},
        {"hot__non_mma_per_eq": 3.05},
        {"hot__widths": {"ldg": {"128": 2}}},
        {"occupancy": [1, 4, "shared"]},
        {"hash": "a", "whole__spill": 99},
        {"op": "rope", "whole__spill": 99},
    ],
)
def test_no_regressions(changes):
    """Within 3 %; registers that cost no warps; unchanged code is never compared, nor another op's."""
    assert check.compare([planted(**{"hash": "b", **changes})], [planted()]) == []


def test_exit_codes(monkeypatch, capsys, tmp_path):
    """--check: 1 with a line for each fault, 0 and the remedy where figures changed for the better."""
    from bench.static import cuda, launches

    monkeypatch.setattr(cuda, "ops", lambda: [])
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(record, "PATH", tmp_path / "static.json")
    record.write([planted()], "3", record.PATH)
    monkeypatch.setattr(record, "read", lambda path=None: json.loads(record.PATH.read_text())["rows"])
    monkeypatch.setattr(check, "shared_bytes", lambda op: FITS)
    monkeypatch.setattr(check, "TENSOR_CORES", {})
    monkeypatch.setattr(launches, "ops", lambda: ["attention"])

    def result(row, *flags):
        monkeypatch.setattr(command, "gather", lambda names, everything: ([row], {("attention", "k"): True}))
        return command.main([*flags]), capsys.readouterr().out

    assert result(planted(), "--check") == (0, "1 kernels, no fault\n")
    code, text = result(planted(hash="b", registers=96), "--check")
    assert code == 0 and "--write" in text
    code, text = result(planted(hash="b", loop_spill=4), "--check")
    assert code == 1 and text.count("\n") == 2 and "--write" not in text
    assert command.main(["--op", "nothing"]) == 2
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert command.main(["--check"]) == 2


# --- the file on record ------------------------------------------------------------------------------------------


def test_every_case_has_rows():
    assert {row["op"] for row in ROWS} == {*CASES}, command.REMEDY
    for op in CASES:
        arches = {row["arch"] for row in ROWS if row["op"] == op}
        sizes = {size for row in ROWS if row["op"] == op for size in row["calls"]}
        assert arches == {"sm_80", "sm_90"} and sizes == {shapes.name for shapes in LLAMA}, op


@pytest.mark.parametrize("op", CASES)
def test_shared_bytes_cover_what_is_launched(op):
    declared = importlib.import_module(f"hpsafety.triton_kernels.{op}").SHARED_BYTES
    for index, arch in enumerate(("sm_80", "sm_90")):
        used = max(row["shared"] for row in ROWS if row["op"] == op and row["arch"] == arch)
        assert used <= declared[index], f"{op} on {arch}: {used} bytes, SHARED_BYTES says {declared[index]}"


def test_no_row_on_record_has_a_fault():
    lines = [line for row in ROWS for line in check.faults(row, check.shared_bytes(row["op"]), False)]
    recorded = {op for op in check.TENSOR_CORES if op in CASES}
    lines += [line for line in check.missing_tensor_cores(ROWS) if line.split(":")[0] in recorded]
    assert not lines, "\n".join(lines)


def test_the_file_can_be_reviewed():
    text = record.PATH.read_text(encoding="utf-8")
    assert len(text) < 400_000 and max(map(len, text.splitlines())) < 4000
    assert ROWS == sorted(ROWS, key=record.place) and len({record.place(row) for row in ROWS}) == len(ROWS)
    assert json.loads(text)["baselines"] == BASELINES


def test_writing_and_reading(tmp_path):
    path = tmp_path / "static.json"
    record.write([planted(kernel="z"), planted()], "3", path)
    assert record.read(path) == [planted(), planted(kernel="z")] and record.read(tmp_path / "absent") == []


def test_tables():
    text = table.attention([planted(), planted(op="rope")])
    assert len(text.splitlines()) == 3 + len(BASELINES) and "| k | sm_80 |" in text and "FA3 backward" in text
    assert "8x128" in table.kernels([planted()])


# --- with real kernels, in a process that compiles ----------------------------------------------------------------


@pytest.fixture(scope="module")
def probe():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.triton.static_probe"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_specialisation_is_that_of_triton_jit(probe):
    assert probe["specialisations"] == []


def test_the_record_is_of_these_sources(probe):
    code, text = probe["stale"]
    assert code == 0, text


def test_a_kernel_compiled_here(probe):
    """One HMMA for a 16x16x16 product, on the loop that was written."""
    figures = probe["figures"]
    assert figures["hot"]["mma"] == 1 and figures["whole"]["spill"] == 0 and figures["shared"] >= 1024
    assert (
        figures["hot"]["instructions"] < figures["whole"]["instructions"]
        and figures["occupancy"]["warps"] == 64
    )


def test_the_hash_is_of_the_content(probe):
    """Rows are not specialised; another chip and another specialisation are other code; helpers and constants count."""
    first, other_rows, other_chip, other_depth = probe["hashes"]
    assert first == other_rows and len({first, other_chip, other_depth}) == 3
    assert "def scaled(x)" in probe["source"] and "SCALE = 2.0" in probe["source"]
