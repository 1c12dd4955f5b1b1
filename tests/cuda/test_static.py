"""The CUDA kernels' rows of static.json. The bug this file must catch: a spill in a loop, and figures of other code."""

import pytest

pytest.importorskip("triton")

from bench.static import check, cuda, predict, record
from bench.static.cases import LLAMA
from hpsafety.ops import backends

ROWS = [row for row in record.read() if row["op"].startswith(cuda.PREFIX)]


def test_the_record_is_of_these_sources():
    assert not cuda.stale(record.read(), cuda.ops()), "run python -m bench.static --write"


def test_a_changed_source_is_stale():
    rows = [row | {"hash": "0"} if row["types"] == "reward_score.cu" else row for row in ROWS]
    assert (
        cuda.stale(rows, ["reward_score"])
        == ["reward_score.cu of reward_score: static.json is not of this text"] * 2
    )


@pytest.mark.parametrize("row", ROWS, ids=check.name)
def test_no_kernel_spills_in_a_loop(row):
    assert not check.cuda_faults(row)


def test_faults_are_found():
    bad = ROWS[0] | {"loop_spill": 8, "shared": 300000}
    said = " ".join(check.cuda_faults(bad))
    assert "a loop spills 8 bytes" in said and "300000 bytes of shared memory" in said


def test_names_of_kernels():
    """g++'s and c++filt's spelling of one kernel are one name."""
    ours = "const char* simt::name_of() [with auto Kernel = {anonymous}::k<64, true, 2>]"
    assert cuda.kernel_name(ours) == "k<64,true,2>"
    theirs = "void (anonymous namespace)::k<64, true, 2>(float const*, long)"
    assert cuda.kernel_name(theirs) == "k<64,true,2>"
    assert (
        cuda.kernel_name("void (anonymous namespace)::k<(int)64, (bool)1, (int)2>(float*)") == "k<64,true,2>"
    )
    assert cuda.kernel_name("(anonymous namespace)::k(float const*, (anonymous namespace)::Model)") == "k"


@pytest.mark.parametrize("op", cuda.ops())
def test_launches_at_the_models_shapes(op):
    """The launchers take the Llama shapes, at most two launches for reward_score, and each kernel has a row."""
    known = {row["config"] for row in ROWS if row["op"] == cuda.PREFIX + op}
    for shapes in (LLAMA[0], LLAMA[-1]):
        found = cuda.launches(op, shapes)
        assert found and {one[2] for one in found} <= known
        assert all(threads % 32 == 0 and 32 <= threads <= 1024 for *_, threads, _, _ in found)
        if op == "reward_score":
            assert max(sum(one[1] == call for one in found) for call in (0, 1)) == 2


def test_cuda_comes_first_where_the_model_of_time_says_so():
    """The list of hpsafety/ops/backends.py is what the figures on record give, no more and no less."""
    assert {*predict.cuda_first(record.read())} == backends.CUDA_FIRST
