"""attention through flash-attn. The bug this file must catch: backward of a call with its own lse, not the merged one.

The package is a stand-in here (tests/ops/packages.py), so what is proven is our side: how segments become calls, the
merge, the gradients, and the form of each call.
"""

import gc
import itertools

import pytest
import torch

from hpsafety import ops, reference
from hpsafety.ops import backends, flash_attn_backend, signatures
from hpsafety.ops.attention import BACKENDS
from tests.ops import packages
from tests.ops.oracle import check_against_oracle, run_with_grads
from tests.ops.test_attention import NAMES, grouped, make_inputs, plain


@pytest.fixture
def package(monkeypatch):
    """The stand-in, served as if on CUDA; the list of its calls."""
    monkeypatch.setattr(flash_attn_backend, "functions", lambda: packages.FLASH_ATTN)
    monkeypatch.setattr(flash_attn_backend, "unavailable", lambda op, device, dtype: None)
    packages.calls.clear()
    return packages.calls


def check(args):
    """Within twice plain torch's error; in fp32, which the package does not take, lse to base 2 and back costs more."""
    factor = 4.0 if args["q"].dtype == torch.float32 else 2.0
    check_against_oracle("attention", ops.attention, args, factor, impl="flash_attn")


LAYOUTS = [
    plain(1, 2, 1, 37),
    grouped((1, 1)),
    grouped((64, 7, 65, 1), (3, 50)),
    grouped((33, 30, 2, 65), (97,), (20, 1, 1, 1)),
    [(2, 5, 0, 0), (9, 12, 6, 8)],  # rows of no segment, one of them a prefix
    [(0, 9, 0, 0), (9, 12, 0, 9), (12, 20, 0, 4), (20, 23, 0, 9), (23, 30, 3, 11)],  # prefixes that overlap
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("segments", LAYOUTS, ids=range(len(LAYOUTS)))
@pytest.mark.parametrize("heads, kv_heads, dim", [(1, 1, 8), (6, 2, 40)])
def test_matches_oracle(package, dtype, segments, heads, kv_heads, dim):
    """KER-2: forward and backward against fp64, through the whole op."""
    check(make_inputs(segments, heads, kv_heads, dim, dtype, total=segments[-1][1] + len(segments) % 2))


def test_single_keys(package):
    """A row that sees one key: its gradient of q is exactly 0, here the rest of a difference of two equal sums."""
    for segments in (plain(1), plain(1, 1, 1)):
        args = make_inputs(segments, 6, 2, 40)
        ours = run_with_grads(ops.attention, args, impl="flash_attn")
        exact = run_with_grads(reference.attention, args)
        for name, value in ours.items():
            torch.testing.assert_close(value, exact[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [1, 7, 9, 63, 256])
def test_head_dims_are_padded(package, dim, dtype):
    check(make_inputs(grouped((20, 7, 3)), 4, 2, dim, dtype))


@pytest.mark.parametrize("seed", range(20))
def test_random_shapes(package, seed):
    """KER-2 on drawn layouts with gaps, head groups, dims, scales and dtypes."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda low, high: int(torch.randint(low, high + 1, (), generator=g))  # noqa: E731
    groups = [[draw(1, 24) for _ in range(draw(1, 6))] for _ in range(draw(1, 4))]
    gap, shifted = draw(0, 1) * draw(1, 9), []
    for start, end, prefix_start, prefix_end in grouped(*groups):
        moved = gap if prefix_start != prefix_end else 0
        shifted.append((start + gap, end + gap, prefix_start + moved, prefix_end + moved))
    kv_heads, dim = draw(1, 3), draw(1, 48)
    dtype = (torch.float32, torch.bfloat16)[draw(0, 1)]
    args = make_inputs(shifted, kv_heads * draw(1, 3), kv_heads, dim, dtype, seed, scale=draw(1, 8))
    check(args | {"softmax_scale": draw(1, 100) / 200})


def test_calls(package):
    """One call without prefixes; with them two, in which a prompt's responses are one sequence; the flag goes on."""
    args = make_inputs(plain(5, 3), 2, 1, 8)
    run_with_grads(ops.attention, args, impl="flash_attn")
    assert package == [("forward", 2, True), ("backward", 2, True, False)]
    package.clear()
    args = make_inputs(grouped((9, 4, 5, 6), (3, 2), (7,)), 2, 1, 8)
    run_with_grads(ops.attention, args | {"deterministic": True}, impl="flash_attn")
    assert package == [
        ("forward", 7, True), ("forward", 2, False), ("backward", 7, True, True), ("backward", 2, False, True),
    ]  # fmt: skip


def test_plan_copies_nothing_where_rows_lie_end_to_end():
    plan = flash_attn_backend.make_plan(make_inputs(grouped((9, 4, 5)), 1, 1, 8)["segments"], 18)
    assert plan.own.q_rows == slice(0, 18) and plan.prefix.q_rows == slice(9, 18)
    assert plan.prefix.k_rows == slice(0, 9) and not plan.overlap
    assert plan.prefix.cu_q.tolist() == [0, 9] and plan.prefix.cu_k.tolist() == [0, 9]


def test_plan_is_made_once_per_batch(package, monkeypatch):
    """Every layer and every backward of a batch shares it; a change in place or another tensor gets its own."""
    made = []
    make = flash_attn_backend.make_plan
    monkeypatch.setattr(flash_attn_backend, "make_plan", lambda *args: made.append(1) or make(*args))
    args = make_inputs(grouped((9, 4, 5)), 2, 1, 8)
    q, k, v = (args[n].requires_grad_() for n in NAMES)
    for _ in range(3):
        ops.attention(q, k, v, args["segments"], impl="flash_attn").sum().backward()
    assert len(made) == 1
    args["segments"].copy_(torch.tensor(grouped((8, 5, 5))))
    changed = ops.attention(q, k, v, args["segments"], impl="flash_attn")
    torch.testing.assert_close(changed, reference.attention(q, k, v, args["segments"]))
    assert len(made) == 2
    with torch.inference_mode():
        segments = args["segments"].clone()
        ops.attention(q, k, v, segments, impl="flash_attn")
        segments[0, 1] = 7  # no version tells of this
        assert not ops.attention(q, k, v, segments, impl="flash_attn")[7].any()
    before = len(flash_attn_backend._plans)
    del args, changed  # whose graph holds the segments
    gc.collect()
    assert len(flash_attn_backend._plans) < before


def test_each_subset_of_requires_grad(package):
    args = make_inputs(grouped((20, 5, 40)), 4, 2, 24)
    whole = run_with_grads(ops.attention, args, impl="flash_attn", grads=NAMES)
    for size in range(len(NAMES)):
        for subset in itertools.combinations(NAMES, size):
            part = run_with_grads(ops.attention, args, impl="flash_attn", grads=subset)
            assert part.keys() == {"out0", *(f"grad_{n}" for n in subset)}
            assert all(torch.equal(value, whole[key]) for key, value in part.items())


@pytest.mark.parametrize("dim", [32, 20])
def test_views_and_strides(package, dim):
    """Views of one buffer, odd strides, odd addresses and expanded gradients give the bits of dense tensors."""
    args = make_inputs(grouped((40, 30, 3)), 6, 2, dim)
    expected = run_with_grads(ops.attention, args, impl="flash_attn")["out0"]
    for change in (
        lambda x: torch.cat([x, x], -1)[..., :dim],
        lambda x: torch.cat([x, x[..., :1]], -1)[..., :dim],
        lambda x: torch.stack([x, x], -1)[..., 0],
        lambda x: torch.cat([torch.zeros(1), x.flatten()])[1:].view(x.shape),
    ):
        views = [change(args[n]).detach().requires_grad_() for n in NAMES]
        out = ops.attention(*views, args["segments"], impl="flash_attn")
        assert out.is_contiguous() and torch.equal(out, expected)
        grads = torch.autograd.grad(out, views, torch.ones(()).expand(out.shape))
        dense = [args[n].clone().requires_grad_() for n in NAMES]
        again = ops.attention(*dense, args["segments"], impl="flash_attn")
        again = torch.autograd.grad(again, dense, torch.ones_like(again))
        assert all(torch.equal(a, b) for a, b in zip(grads, again, strict=True))


def test_no_rows_and_no_segments(package):
    for total in (0, 3):
        result = run_with_grads(ops.attention, make_inputs([], 4, 2, 8, total=total), impl="flash_attn")
        assert result["out0"].shape == (total, 4, 8) and not any(bool(x.any()) for x in result.values())
    assert package == []


def test_nan_stays_with_the_segments_that_see_it(package):
    args = make_inputs(grouped((10, 4, 5), (6,)), 2, 1, 8)
    args["k"][12] = torch.nan  # a row of the first response
    bad = ops.attention(**args, impl="flash_attn").isnan().flatten(1).any(1).nonzero().flatten().tolist()
    assert bad == [12, 13]
    args["k"][3] = torch.nan  # a row of its prompt
    bad = ops.attention(**args, impl="flash_attn").isnan().flatten(1).any(1).nonzero().flatten().tolist()
    assert bad == list(range(3, 19))


def test_extreme_logits(package):
    for scale in (40.0, 1e-18):
        check(make_inputs(grouped((30, 20, 11)), 4, 2, 32, torch.bfloat16, scale=scale))


def test_lse_keeps_our_layout(package):
    """What the op saves is the same for every backend: (T, H) fp32, base 2, zero in rows of no segment."""
    args = make_inputs([(0, 9, 0, 0), (9, 20, 0, 9), (22, 30, 0, 0)], 4, 2, 16, total=31)
    call = (*(args[n] for n in NAMES), args["segments"], 0.25, False)
    out, lse = torch.ops.hpsafety.attention(*call, "flash_attn")
    expected, expected_lse = torch.ops.hpsafety.attention(*call, "cpu")
    assert lse.is_contiguous() and lse.shape == (31, 4) and lse.dtype == torch.float32
    torch.testing.assert_close(lse, expected_lse)
    torch.testing.assert_close(out, expected)


def test_opcheck(package):
    args = make_inputs(grouped((9, 4, 5)), 4, 2, 12)
    call = (*(args[n].requires_grad_() for n in NAMES), args["segments"], 0.25, False, "flash_attn")
    torch.library.opcheck(torch.ops.hpsafety.attention.default, call)


@pytest.mark.slow
def test_compile(package):
    args = make_inputs(grouped((9, 4, 5)), 4, 2, 16)
    call = lambda q, k, v, segments: ops.attention(2 * q, k, v, segments, impl="flash_attn")  # noqa: E731
    eager = run_with_grads(call, args)
    for key, value in run_with_grads(torch.compile(call, fullgraph=True), args).items():
        torch.testing.assert_close(value, eager[key])


def test_bad_segments(package):
    """They are read on the host anyway, so they are checked on every device."""
    with pytest.raises(ValueError, match=r"segments\[0\] ends at 9, but there are 8 rows"):
        ops.attention(**make_inputs([(0, 9, 0, 0)], 2, 1, 8, total=8), impl="flash_attn")


def test_reasons(monkeypatch):
    """Forced where it cannot serve, it says why and what to do; unasked, it never replaces a backend of our own."""
    args = make_inputs(plain(3), 2, 1, 8)
    with pytest.raises(ops.BackendUnavailable, match="^attention: flash-attn is not for CPUs"):
        ops.attention(**args, impl="flash_attn")
    why = lambda dtype=None: backends.unavailable("attention", "flash_attn", ("flash_attn",), "cuda", dtype)  # noqa: E731
    assert "takes torch.bfloat16 and torch.float16, got torch.float32" in why(torch.float32)
    monkeypatch.setattr(flash_attn_backend.importlib.util, "find_spec", lambda name: None)
    flash_attn_backend.missing.cache_clear()
    assert "is not installed: pip install 'flash-attn" in why(torch.bfloat16)
    monkeypatch.setattr(flash_attn_backend.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(
        flash_attn_backend, "functions", lambda: packages.FLASH_ATTN | {"flash_attn_varlen_func": len}
    )
    flash_attn_backend.missing.cache_clear()
    assert "the calls were written for: parameter 1 of flash_attn_varlen_func" in why()
    monkeypatch.setattr(flash_attn_backend, "functions", lambda: __import__("no_such_package"))
    flash_attn_backend.missing.cache_clear()
    assert "does not load (No module named" in why()
    monkeypatch.setattr(flash_attn_backend, "missing", lambda op: None)
    assert backends.resolve("attention", None, BACKENDS, "cuda", torch.bfloat16) == "triton"
    monkeypatch.setattr(backends, "triton_unavailable", lambda op, device: "no triton")
    monkeypatch.setattr(backends, "cuda_unavailable", lambda *_: "no cuda")
    for dtype, serving in ((torch.bfloat16, "flash_attn"), (torch.float32, "reference")):
        assert backends.resolve("attention", None, BACKENDS, "cuda", dtype) == serving
    assert backends.resolve("attention", None, BACKENDS, "cpu", torch.bfloat16) == "cpu"


def test_signatures():
    """The stand-in has the recorded signatures, exactly; a renamed, lost or new parameter is named."""
    for name, function in packages.FLASH_ATTN.items():
        assert signatures.difference(name, function, exact=True) is None
    find = lambda f: signatures.difference("_flash_attn_varlen_backward", f)  # noqa: E731
    names = signatures.RECORDED["_flash_attn_varlen_backward"]
    make = lambda parameters: eval(f"lambda {parameters}: 0")  # noqa: E731, S307
    assert find(make(names)) is None and find(make(names + ", extra=None")) is None
    assert "parameter 17 of _flash_attn_varlen_backward is now 'window_size', was 'window_size_left'" in find(
        make(names.replace("window_size_left, window_size_right", "window_size"))
    )
    assert "lost parameter 23, 'zero_tensors=False'" in find(make(names.replace(", zero_tensors=False", "")))
    assert "is now 'zero_tensors=True'" in find(
        make(names.replace("zero_tensors=False", "zero_tensors=True"))
    )
    assert "does not tell" in find(3)


def test_installed_package():
    """A new version of the package is noticed here."""
    pytest.importorskip(
        "flash_attn", reason="flash-attn is not installed: nothing to hold the record against"
    )
    for name, function in flash_attn_backend.functions().items():
        assert signatures.difference(name, function, exact=True) is None
