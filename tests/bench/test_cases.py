"""Every bench/ops/<op>.py has the form of bench/ops/case.py, and all its contenders are right at its CHECK shape."""

import pytest
import torch

from bench.harness import contenders

OPS = contenders.op_names()


@pytest.mark.parametrize("op", OPS)
def test_form(op):
    module = contenders.load(op)
    assert module.SHAPES and all(shape.keys() == module.CHECK.keys() for shape in module.SHAPES)
    assert all(type(size) is int for shape in (*module.SHAPES, module.CHECK) for size in shape.values())
    assert module.DIRECTIONS in (("forward",), ("forward", "both")) and module.__doc__


@pytest.mark.parametrize("dtype", contenders.DTYPES)
@pytest.mark.parametrize("op", OPS)
def test_contenders_are_right(op, dtype):
    module = contenders.load(op)
    for direction in module.DIRECTIONS:
        case = contenders.build(module, dict(module.CHECK), dtype, "cpu", direction, 1)
        assert case.direction == direction and case.dtype == contenders.DTYPES[dtype] and case.bytes > 0
        calls, _ = contenders.contenders(case, None)
        assert contenders.faults(case, calls) == {}
        assert set(case.on_request) <= set(case.peers) | {"flex"} and set(case.unpack) <= set(case.peers)


def test_a_seed_is_a_case():
    module = contenders.load("swiglu")
    first, again, other = (
        contenders.build(module, dict(module.CHECK), "float32", "cpu", "forward", seed).exact()[0]
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.slow
def test_flex_attention_is_right():
    module = contenders.load("attention")
    case = contenders.build(module, dict(module.CHECK), "float32", "cpu", "forward", 0)
    assert contenders.faults(case, contenders.contenders(case, ("flex",))[0]) == {}
