"""paged_attention: what it refuses, and which backend serves. The bug this file must catch: a page of a table that is
not checked before it is read."""

import pytest
import torch

from hpsafety import ops, reference
from hpsafety.ops import backends
from tests.ops.test_paged_attention import make_inputs


def bad(**values):
    """Two sequences (7 and 40 tokens, tables of 4 pages of 16 tokens) and two groups (20 and 3), with changes."""
    args = make_inputs([7, 40], prefix=([20, 3], [1, 0]))
    args["prefix"] = dict(zip(("table", "lens", "group_of"), args["prefix"], strict=True))
    for name, (index, value) in values.items():
        (args["prefix"] if name in args["prefix"] else args)[name][index] = value
    return args | {"prefix": tuple(args["prefix"].values())}


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize(
    "change, message",
    [
        ({"block_table": ((1, 2), -1)}, r"block_table\[1\]\[2\] must lie in \[0, 9\), got -1"),
        ({"block_table": ((0, 0), 9)}, r"block_table\[0\]\[0\] must lie in \[0, 9\), got 9"),
        ({"block_table": ((1, 1), 2**31 - 1)}, r"block_table\[1\]\[1\] must lie in"),
        ({"table": ((0, 1), -1)}, r"prefix table\[0\]\[1\] must lie in \[0, 9\), got -1"),
        ({"table": ((1, 0), 9)}, r"prefix table\[1\]\[0\] must lie in \[0, 9\), got 9"),
        ({"context_lens": (0, -1)}, r"context_lens\[0\] must lie in \[0, 64\], .* got -1"),
        (
            {"context_lens": (1, 65)},
            r"context_lens\[1\] must lie in \[0, 64\], which 4 pages of 16 .* got 65",
        ),
        ({"lens": (1, -(2**31))}, r"prefix lens\[1\] must lie in \[0, 64\]"),
        ({"lens": (0, 65)}, r"prefix lens\[0\] must lie in \[0, 64\], .* got 65"),
        ({"group_of": (1, 2)}, r"group_of\[1\] must lie in \[0, 2\), got 2"),
        ({"group_of": (0, -1)}, r"group_of\[0\] must lie in \[0, 2\), got -1"),
    ],
)
def test_bad_tables(impl, change, message):
    with pytest.raises(ValueError, match=message):
        ops.paged_attention(**bad(**change), impl=impl)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"q": torch.zeros(2, 4)}, "q must be"),
        ({"q": torch.zeros(2, 3, 32)}, "3 query heads must be a multiple of the 2"),
        ({"q": torch.zeros(2, 4, 32, dtype=torch.bfloat16)}, "k_pages must be .* torch.bfloat16"),
        ({"k_pages": torch.zeros(9, 2, 32)}, "k_pages must be"),
        ({"k_pages": torch.zeros(9, 0, 2, 32)}, "page_size > 0"),
        ({"k_pages": torch.zeros(9, 16, 2, 31)}, r"k_pages must be \(pages, page_size, G, 32\)"),
        ({"k_pages": torch.zeros(9, 16, 2, 32, device="meta")}, "k_pages must be .* on cpu"),
        ({"v_pages": torch.zeros(8, 16, 2, 32)}, "v_pages must be like k_pages"),
        (
            {"block_table": torch.zeros(2, 4, dtype=torch.int64)},
            r"block_table must be \(2, pages\) torch.int32",
        ),
        ({"block_table": torch.zeros(3, 4, dtype=torch.int32)}, "block_table must be"),
        ({"context_lens": torch.zeros(3, dtype=torch.int32)}, r"context_lens must be \(2,\) torch.int32"),
        ({"context_lens": torch.zeros(2)}, "context_lens must be"),
        ({"prefix": (torch.zeros(1, 1, dtype=torch.int32),)}, r"prefix must be \(table, lens, group_of\)"),
        ({"prefix": torch.zeros(3)}, "prefix must be .* got Tensor"),
        ({"softmax_scale": 0.0}, "softmax_scale must be positive"),
        ({"softmax_scale": float("nan")}, "softmax_scale must be positive"),
    ],
)
def test_bad_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        ops.paged_attention(**bad() | change, impl="cpu")


def test_bad_prefix_and_dtypes():
    args = bad()
    table, lens, group_of = args["prefix"]
    for prefix, message in (
        ((table[0], lens, group_of), r"prefix table must be \(groups, pages\)"),
        ((table.long(), lens, group_of), "prefix table must be .* torch.int32"),
        ((table, lens[:1], group_of), r"prefix lens must be \(2,\)"),
        ((table, lens, group_of[:1]), r"group_of must be \(2,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.paged_attention(**args | {"prefix": prefix}, impl="cpu")
    for dtype, dim, message in (
        (torch.float64, 32, "float32 or bfloat16"),
        (torch.float32, 257, "head dim must be 1 to"),
    ):
        wide = {"q": torch.zeros(2, 4, dim, dtype=dtype)}
        wide |= {n: torch.zeros(9, 16, 2, dim, dtype=dtype) for n in ("k_pages", "v_pages")}
        with pytest.raises(ValueError, match=message):
            ops.paged_attention(**args | wide, impl="cpu")


def test_a_group_without_members_may_have_a_stale_table():
    args = bad(group_of=(0, 0), table=(1, -7))
    for impl in ("cpu", "reference"):
        assert ops.paged_attention(**args, impl=impl).isfinite().all()


def test_forced_and_default_backend(monkeypatch):
    args = make_inputs([9])
    monkeypatch.delenv("HPSAFETY_IMPL", raising=False)
    counts = []
    for impl in (None, "cpu", "reference"):
        before = reference.calls["paged_attention"]
        ops.paged_attention(**args, impl=impl)
        counts.append(reference.calls["paged_attention"] - before)
    assert counts == [0, 0, 1]
    with pytest.raises(backends.BackendUnavailable, match="needs CUDA tensors|not built here"):
        ops.paged_attention(**args, impl="cuda")


def test_refuses_where_a_gradient_would_flow():
    args = make_inputs([5])
    for name in ("q", "k_pages", "v_pages"):
        leaf = args | {name: args[name].clone().requires_grad_()}
        for impl in ("cpu", "reference"):
            with pytest.raises(ValueError, match="has no gradient"):
                ops.paged_attention(**leaf, impl=impl)
        with torch.no_grad():
            assert not ops.paged_attention(**leaf).requires_grad
