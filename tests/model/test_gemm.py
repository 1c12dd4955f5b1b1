"""linear: the values of torch's, with gradients, and bits that do not depend on the other rows or on threads.

One bug this file must catch: a backward that multiplies with the weight instead of its transpose.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as nnf

from hpsafety.model import gemm
from hpsafety.model.gemm import _onednn, linear, plain_linear, row_difference

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    "rows, inputs, outputs", [(0, 8, 5), (1, 8, 5), (2, 7, 9), (33, 64, 48), (130, 48, 48)]
)
@pytest.mark.parametrize("bias", [False, True])
def test_matches_fp64(dtype, rows, inputs, outputs, bias):
    g = torch.Generator().manual_seed(rows)
    shapes = [(rows, inputs), (outputs, inputs), *([(outputs,)] if bias else [])]
    args = [torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in shapes]
    upstream = torch.randn(rows, outputs, generator=g, dtype=torch.float64).to(dtype)

    def run(function, args, upstream):
        leaves = [a.clone().requires_grad_() for a in args]
        out = function(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]

    exact = run(nnf.linear, [a.double() for a in args], upstream.double())
    plain = run(nnf.linear, args, upstream)
    for e, p, ours in zip(exact, plain, run(linear, args, upstream), strict=True):
        assert ours.shape == e.shape and ours.dtype == dtype
        if e.numel():
            ulp = torch.finfo(dtype).eps * float(e.abs().max())
            assert float((ours - e).abs().max()) <= 2 * float((p - e).abs().max()) + 4 * ulp


@pytest.mark.parametrize("need", [(True, False, False), (False, True, False), (False, False, True)])
def test_each_gradient_alone(need):
    args = [torch.randn(s).requires_grad_(n) for s, n in zip([(3, 4), (5, 4), (5,)], need, strict=True)]
    linear(*args).sum().backward()  # the incoming gradient is expanded, not contiguous
    assert [a.grad is not None for a in args] == list(need)


def test_without_gradients_the_bits_are_the_same():
    x, w = torch.randn(20, 16), torch.randn(12, 16, requires_grad=True)
    with torch.no_grad():
        without = linear(x, w)
    assert torch.equal(without, linear(x, w)) and not without.requires_grad


def test_a_row_does_not_depend_on_the_others_or_on_threads():
    """Design section 7: the same bits for any number of rows from 16 up."""
    x, w = torch.randn(700, 576), torch.randn(960, 576)
    whole, threads = plain_linear(x, w), torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for rows in (16, 17, 31, 64, 100, 255, 699):
                assert torch.equal(plain_linear(x[:rows], w), whole[:rows]), (count, rows)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_fewer_than_16_rows_have_the_bits_of_16(dtype, bias):
    """Design section 7: small inputs are padded with zero rows, which change nothing else and are cut off again."""
    x, w = torch.randn(16, 96).to(dtype), torch.randn(72, 96).to(dtype)
    b = torch.randn(72).to(dtype) if bias else None
    whole = plain_linear(x, w, b)
    assert row_difference(72, 96, dtype) == 0.0 or pytest.skip("rows are not bit-equal on this machine")
    for rows in range(16):
        part = plain_linear(x[:rows], w, b)
        assert part.shape == (rows, 72) and torch.equal(part, whole[:rows]), rows


def test_no_product_is_made_with_fewer_rows(monkeypatch):
    seen, real, onednn = [], gemm.nnf.linear, gemm._onednn()
    monkeypatch.setattr(gemm.nnf, "linear", lambda x, *a: (seen.append(len(x)), real(x, *a))[1])
    if onednn:
        monkeypatch.setattr(gemm, "_onednn", lambda: lambda x, *a: (seen.append(len(x)), onednn(x, *a))[1])
    for rows in (1, 15, 16, 17):
        plain_linear(torch.randn(rows, 8), torch.randn(4, 8))
    assert seen == [16, 16, 16, 17]


def test_row_difference_sees_a_route_that_depends_on_the_rows(monkeypatch):
    """Were a product of under 64 rows to sum in another order, the probe would tell by how much."""
    row_difference.cache_clear()
    real = plain_linear
    monkeypatch.setattr(
        gemm, "plain_linear", lambda x, w, b=None: real(x, w, b) + (1e-3 if len(x) < 64 else 0.0)
    )
    changed = row_difference(48, 32, torch.float32)
    row_difference.cache_clear()
    assert 1e-5 < changed < 1e-3


def test_row_difference_of_this_machine():
    """Rounding at the most: 0.0 on every CPU seen so far, 4e-7 in fp32 for a single row that is not padded."""
    for dtype in (torch.float32, torch.bfloat16):
        found = row_difference(960, 576, dtype)
        assert found <= 8 * torch.finfo(dtype).eps, (
            f"{dtype}: a row changes by {found:.1e} with others beside it"
        )


def test_the_route_is_a_fact_of_the_machine():
    assert _onednn() is _onednn()
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        assert _onednn() is None


SHAPES = """
import resource, torch
from hpsafety.model.gemm import plain_linear
w = torch.randn(1024, 512, dtype=torch.bfloat16)
def run(rows):
    for n in rows: plain_linear(torch.randn(n, 512, dtype=torch.bfloat16), w)
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
run([900, *range(16, 80)])
before = peak()
run(range(80, 880))
print(peak() - before)
"""


def test_products_of_many_shapes_are_forgotten():
    """The bug: one compiled product kept for every number of rows that a ragged run ever had."""
    names, grown = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"), []
    for given in ({}, dict.fromkeys(names, "1024")):
        env = {k: v for k, v in os.environ.items() if k not in names} | {"OMP_NUM_THREADS": "1"} | given
        words = [sys.executable, "-c", SHAPES]
        run = subprocess.run(words, capture_output=True, text=True, env=env, cwd=ROOT, timeout=120)
        assert run.returncode == 0, run.stderr[-2000:]
        grown.append(float(run.stdout))
    ours, kept = grown
    if kept < 20:
        pytest.skip(f"this CPU's products of 800 shapes take {kept:.0f} MB, nothing to forget")
    assert ours < kept / 2
