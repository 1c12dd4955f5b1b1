"""Accounting on traces made by hand: every moment has one owner, and the sums are those moments.

One bug this file must catch: the time of a child counted twice, for itself and for its parent.
"""

import pytest

from hpsafety.profile import account as a


def event(name, ts, dur, cat="cpu_op", tid=1, **args):
    return {"ph": "X", "name": name, "cat": cat, "ts": ts, "dur": dur, "tid": tid, "args": args}


def mark(name, ts, dur):
    return event(name, ts, dur, "user_annotation")


def rows(found: dict) -> dict:
    return {(r["kind"], r["name"], r["phase"]): r["us"] for r in found["host"]}


def test_own_time_by_kind_and_phase():
    trace = [
        mark(a.STEP, 100, 100), mark(a.PHASE + "forward", 110, 40), mark(a.PHASE + "backward", 150, 40),
        event("_NormLinear", 112, 30), event("hpsafety_cpu::rms_norm", 114, 8), event("aten::empty", 115, 2),
        event("aten::linear", 124, 16), event("aten::mm", 125, 14, **{"Input Dims": [[4, 5], [5, 6]]}),
        event("autograd::engine::evaluate_function: torch::autograd::AccumulateGrad", 160, 10),
        event("aten::add_", 162, 6), event("aten::mm", 20, 50),
    ]  # fmt: skip
    found = a.account(trace)
    got = rows(found)
    assert found["steps_us"] == 100 and sum(got.values()) == pytest.approx(100)
    assert got[a.OURS, "rms_norm", "forward"] == 8  # with the allocation inside
    assert got[a.AUTOGRAD, "_NormLinear", "forward"] == 30 - 8 - 16
    assert got[a.GEMM, "aten::linear", "forward"] == 2 and got[a.GEMM, "aten::mm", "forward"] == 14
    assert got[a.ACCUMULATE, "torch::autograd::AccumulateGrad", "backward"] == 10
    assert got[a.PYTHON, a.PYTHON, "forward"] == 10 and got[a.PYTHON, a.PYTHON, "backward"] == 30
    assert got[a.PYTHON, a.PYTHON, a.NO_PHASE] == 20
    assert found["gemms"] == [{"m": 4, "k": 5, "n": 6, "phase": "forward", "us": 14, "calls": 1}]
    assert next(r for r in found["host"] if r["name"] == "rms_norm")["calls"] == 1


def test_inner_phases_cut_outer_ones_and_steps_bound_them():
    marks = [
        mark(a.PHASE + "data", 0, 5), mark(a.STEP, 10, 50), mark(a.PHASE + "optimiser", 20, 30),
        mark(a.PHASE + "communication", 30, 5), mark(a.STEP, 60, 10),
    ]  # fmt: skip
    assert a.segments(marks) == [
        (10, 20, a.NO_PHASE), (20, 30, "optimiser"), (30, 35, "communication"), (35, 50, "optimiser"),
        (50, 60, a.NO_PHASE), (60, 70, a.NO_PHASE),
    ]  # fmt: skip


def test_autograds_own_thread_counts_while_the_main_one_waits():
    trace = [
        mark(a.STEP, 0, 100), mark(a.PHASE + "backward", 10, 80),
        event("autograd::engine::evaluate_function: MmBackward0", 20, 60, tid=2), event("aten::mm", 30, 40, tid=2),
    ]  # fmt: skip
    found = a.account(trace)
    got = rows(found)
    assert sum(got.values()) == 100
    assert got[a.GEMM, "aten::mm", "backward"] == 40 and got[a.AUTOGRAD, "MmBackward0", "backward"] == 20


def test_exposed_communication_is_what_no_op_covers():
    trace = [
        mark(a.STEP, 0, 100), mark(a.PHASE + "forward", 0, 100), event("aten::mm", 0, 40),
        event("gloo:all_reduce", 20, 50, tid=7), event("c10d::allreduce_", 40, 5), event("aten::mm", 80, 20),
    ]  # fmt: skip
    found = a.account(trace)
    assert found["communication_us"] == 5 + 25  # the call, and the gap until the collective ended
    assert rows(found)[a.PYTHON, a.PYTHON, "forward"] == 10
    assert sum(rows(found).values()) == 100


def test_kernels_belong_to_the_op_that_launched_them():
    trace = [
        mark(a.STEP, 0, 100), mark(a.PHASE + "forward", 0, 50), event("aten::mm", 5, 10, **{"External id": 3}),
        event("cudaLaunchKernel", 8, 2, "cuda_runtime"), event("nccl:all_gather", 20, 2, **{"External id": 4}),
        event("sm90_gemm", 30, 20, "kernel", tid=70, **{"External id": 3}),
        event("ncclDevKernel_AllGather", 40, 30, "kernel", tid=71, **{"External id": 4}),
        event("before", -50, 10, "kernel", tid=70),
    ]  # fmt: skip
    device = a.account(trace)["device"]
    assert (device["busy_us"], device["exposed_us"], device["idle_us"]) == (40, 20, 60)
    assert {(k["kind"], k["name"], k["phase"]): k["us"] for k in device["kernels"]} == {
        (a.GEMM, "aten::mm", "forward"): 20, (a.COMMUNICATION, "ncclDevKernel_AllGather", "forward"): 30,
    }  # fmt: skip


@pytest.mark.parametrize(
    "name, kind",
    [
        ("hpsafety_cpu::attention_backward", a.OURS), ("hpsafety::rope", a.OURS), ("aten::addmm", a.GEMM),
        ("mkldnn::_linear_pointwise", a.GEMM), ("aten::copy_", a.COPY), ("aten::index_select", a.INDEX),
        ("aten::embedding_dense_backward", a.INDEX), ("aten::empty_strided", a.VIEW), ("aten::mul", a.OTHER),
        ("FSDP::all_gather", a.COMMUNICATION), ("c10d::allreduce_", a.COMMUNICATION), ("attentionBackward", a.AUTOGRAD),
        ("autograd::engine::evaluate_function: TBackward0", a.AUTOGRAD),
    ],
)  # fmt: skip
def test_kinds(name, kind):
    assert a.kind_of(event(name, 0, 1)) == kind


def test_spans():
    assert a.union([(5, 7), (0, 2), (1, 3), (4, 4)]) == [(0, 3), (5, 7)]
    assert a.intersect([(0, 3), (5, 7)], [(2, 6)]) == [(2, 3), (5, 6)]
    assert a.subtract([(0, 10)], [(2, 3), (9, 12)]) == [(0, 2), (3, 9)]
    assert a.subtract([(0, 1)], []) == [(0, 1)]


def test_a_trace_without_steps_is_refused():
    with pytest.raises(ValueError, match="no step"):
        a.account([event("aten::mm", 0, 1)])
