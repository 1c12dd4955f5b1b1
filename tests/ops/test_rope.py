"""rope. The bug this file must catch: a backward that rotates forward again (+sin instead of -sin)."""

import itertools

import pytest
import torch

from hpsafety import ops, reference
from tests.ops.forms import PAST_INT32, check_same_bits, lazy_zeros
from tests.ops.oracle import check_against_oracle, check_error, run_with_grads

MAX_POS = 40


def make_tables(size, max_pos=MAX_POS):
    angles = torch.outer(torch.arange(max_pos), 1e4 ** (-torch.arange(0, size, 2) / size))
    return {"cos": angles.cos(), "sin": angles.sin()}


def make_inputs(t, h, g, size, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "q": torch.randn(t, h, size, generator=generator).to(dtype),
        "k": torch.randn(t, g, size, generator=generator).to(dtype),
        "positions": torch.randint(0, MAX_POS, (t,), generator=generator, dtype=torch.int32),
    } | make_tables(size)


def make_qkv_inputs(t, g, j, size, dtype=torch.float32, seed=0):
    args = make_inputs(t, g * (j + 2), 1, size, dtype, seed)
    q, _, *tables = args.values()
    return dict(zip(("qkv", "positions", "cos", "sin"), (q.unflatten(1, (g, j + 2)), *tables), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "t, h, g, size",
    [(0, 2, 1, 8), (1, 1, 1, 2), (7, 4, 1, 6), (63, 9, 3, 64), (65, 8, 8, 30), (130, 4, 2, 16)],
)
def test_matches_oracle(dtype, t, h, g, size):
    """KER-2: forward and backward against fp64; half a head of 1, 3 and 15 elements has tails."""
    check_against_oracle("rope", ops.rope, make_inputs(t, h, g, size, dtype), grads=("q", "k"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "t, g, j, size", [(0, 1, 1, 8), (1, 1, 1, 2), (65, 3, 3, 64), (33, 2, 8, 6), (40, 1, 4, 30)]
)
def test_qkv_matches_oracle(dtype, t, g, j, size):
    check_against_oracle("rope_qkv", ops.rope_qkv, make_qkv_inputs(t, g, j, size, dtype), grads=("qkv",))


@pytest.mark.parametrize("seed", range(24))
def test_random_shapes(seed):
    """KER-2 on drawn shapes and dtypes, plain and fused."""
    generator = torch.Generator().manual_seed(seed)
    t, g, j, half = (int(torch.randint(1, high, (), generator=generator)) for high in (70, 5, 9, 65))
    dtype = (torch.float32, torch.bfloat16)[seed % 2]
    args = make_inputs(t, g * j, g, 2 * half, dtype, seed)
    check_against_oracle("rope", ops.rope, args, grads=("q", "k"))
    args = make_qkv_inputs(t, g, j, 2 * half, dtype, seed)
    check_against_oracle("rope_qkv", ops.rope_qkv, args, grads=("qkv",))


def test_qkv_equals_split_and_rope():
    qkv, *tables = make_qkv_inputs(50, 3, 4, 16).values()
    q, k, v = ops.rope_qkv(qkv, *tables, impl="cpu")
    q_split, k_split = ops.rope(qkv[:, :, :4].flatten(1, 2), qkv[:, :, 4], *tables, impl="cpu")
    assert torch.equal(q, q_split) and torch.equal(k, k_split) and torch.equal(v, qkv[:, :, 5])
    assert all(x.is_contiguous() for x in (q, k, v))


def test_equals_transformers():
    """The convention is HF Llama's own."""
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    args = make_inputs(30, 6, 2, 64)
    q, k = ops.rope(**args, impl="cpu")
    cos, sin = (args[name][args["positions"].long()].repeat(1, 2) for name in ("cos", "sin"))
    q_hf, k_hf = llama.apply_rotary_pos_emb(
        args["q"].transpose(0, 1)[None], args["k"].transpose(0, 1)[None], cos[None], sin[None]
    )
    torch.testing.assert_close(q, q_hf[0].transpose(0, 1), rtol=0, atol=1e-6)
    torch.testing.assert_close(k, k_hf[0].transpose(0, 1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-6), (torch.bfloat16, 4e-2)])
def test_inverse_undoes(dtype, bound):
    q, k, *tables = make_inputs(40, 3, 1, 32, dtype).values()
    turned = torch.ops.hpsafety.rope(q, k, *tables, False, "cpu")
    assert not torch.allclose(turned[0], q, atol=0.1)
    back = torch.ops.hpsafety.rope(*turned, *tables, True, "cpu")
    for x, y in zip(back, (q, k), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=bound)


def test_each_subset_of_requires_grad():
    args = make_inputs(6, 4, 2, 8)
    whole = run_with_grads(ops.rope, args, impl="cpu", grads=("q", "k"))
    for subset in itertools.chain([()], [("q",), ("k",)]):
        part = run_with_grads(ops.rope, args, impl="cpu", grads=subset)
        assert {n for n in part if n.startswith("grad")} == {f"grad_{n}" for n in subset}
        for name in subset:  # out0 and out1 both require grad here, so the projection is the same
            assert torch.equal(part[f"grad_{name}"], whole[f"grad_{name}"]), name


@pytest.mark.parametrize("used", [s for n in (1, 2) for s in itertools.combinations(range(3), n)])
def test_qkv_with_unused_outputs(used):
    """A missing gradient counts as zero; an expanded one (stride 0) is read rightly."""
    qkv, *tables = make_qkv_inputs(9, 2, 3, 8).values()
    qkv.requires_grad_()
    found = {}
    for name, function in (("ours", lambda *a: ops.rope_qkv(*a, impl="cpu")), ("oracle", reference.rope_qkv)):
        out = function(qkv, *tables)
        (found[name],) = torch.autograd.grad(sum(out[i].sum() for i in used), qkv)
    torch.testing.assert_close(found["ours"], found["oracle"])


def test_non_contiguous():
    q, k, positions, cos, sin = make_inputs(20, 6, 2, 16).values()
    expected = ops.rope(q, k, positions, cos, sin, impl="cpu")
    wide = torch.zeros(20, 8, 16)
    wide[:, :6], wide[:, 6:] = q, k
    every_second = torch.stack((q, q), -1).flatten(-2)[..., ::2]
    heads_first = q.transpose(0, 1).contiguous().transpose(0, 1)
    strided_tables = (torch.stack((x, x), -1)[..., 0] for x in (cos, sin))
    variants = [(wide[:, :6], wide[:, 6:]), (every_second, k), (heads_first, k)]
    for got in [ops.rope(a, b, positions, cos, sin, impl="cpu") for a, b in variants] + [
        ops.rope(q, k, torch.stack((positions, positions), -1)[:, 0], *strided_tables, impl="cpu")
    ]:
        assert all(torch.equal(x, y) and x.is_contiguous() for x, y in zip(got, expected, strict=True))


def test_same_bits_again_and_for_any_thread_count(threads):
    check_same_bits(ops.rope_qkv, make_qkv_inputs(200, 3, 3, 64), threads, grads=("qkv",))
    check_same_bits(ops.rope, make_inputs(200, 3, 3, 64), threads, repeats=6, grads=("q", "k"))


def test_nan_stays_in_its_pair():
    args = make_inputs(3, 2, 1, 8)
    args["q"][1, 0, 2] = float("nan")
    q, k = ops.rope(**args, impl="cpu")
    assert q.isnan().nonzero().tolist() == [[1, 0, 2], [1, 0, 6]] and not k.isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_offsets_past_32_bits(dtype):
    """Keys in pages that far apart: token offsets pass 2^31 elements, when read and when written."""
    args = make_inputs(3, 2, 1, 16, dtype)
    storage = lazy_zeros(PAST_INT32 + 16, dtype)
    far = storage.as_strided((3, 1, 16), (PAST_INT32 // 2, 16, 1)).copy_(args["k"])
    q, k = ops.rope(**args, impl="cpu")
    assert torch.equal(ops.rope(**args | {"k": far}, impl="cpu")[1], k)
    ops.rope_(**args | {"k": far}, impl="cpu")
    assert torch.equal(far, k)


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_in_place(impl):
    args = make_inputs(12, 4, 2, 16)
    q, k = ops.rope(**args, impl="cpu")
    page = torch.zeros(12, 7, 16)  # keys that stand in a wider page
    page[:, 3:5] = args["k"]
    args["q"], args["k"] = args["q"].clone(), page[:, 3:5]
    ops.rope_(**args, impl=impl)
    check_error("q", args["q"], q.double(), q)
    check_error("k", page[:, 3:5], k.double(), k)
    assert not page[:, :3].any() and not page[:, 5:].any()


def test_in_place_refuses():
    args = make_inputs(3, 2, 1, 8)
    with pytest.raises(ValueError, match="has no gradient"):
        ops.rope_(**args | {"k": args["k"].requires_grad_()})
    with torch.no_grad():
        ops.rope_(**args)
    with pytest.raises(ValueError, match="q must have last stride 1"):
        ops.rope_(**args | {"q": torch.zeros(3, 2, 16)[..., ::2], "k": torch.zeros(3, 1, 8)})
    with pytest.raises(ValueError, match="no two elements in one place"):
        ops.rope_(**args | {"q": torch.zeros(3, 1, 8).expand(3, 2, 8), "k": torch.zeros(3, 1, 8)})


def test_reference_gradcheck():
    q, k, positions, cos, sin = make_inputs(3, 2, 1, 6).values()
    args = [x.double().requires_grad_() for x in (q, k)]
    tables = (positions, cos.double(), sin.double())
    assert torch.autograd.gradcheck(lambda q, k: reference.rope(q, k, *tables), args)


def test_opcheck():
    q, k, *tables = make_inputs(9, 4, 2, 8).values()
    torch.library.opcheck(
        torch.ops.hpsafety.rope.default, (q.requires_grad_(), k.requires_grad_(), *tables, False, "cpu")
    )
    qkv, *tables = make_qkv_inputs(9, 2, 3, 8).values()
    torch.library.opcheck(torch.ops.hpsafety.rope_qkv.default, (qkv.requires_grad_(), *tables, "cpu"))


@pytest.mark.slow
def test_compiles_whole():
    qkv, *tables = make_qkv_inputs(9, 2, 3, 8).values()
    qkv.requires_grad_()
    results = []
    for function in (ops.rope_qkv, torch.compile(ops.rope_qkv, fullgraph=True)):
        out = function(qkv, *tables, impl="cpu")
        grad = torch.autograd.grad(sum((x * x).sum() for x in out[::2]), qkv)
        results.append((*out, *grad))
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize("bad", [-1, MAX_POS, 2**31 - 1, -(2**31)])
def test_positions_out_of_range(bad, impl):
    args = make_inputs(5, 2, 1, 8)
    args["positions"][3] = bad
    with pytest.raises(ValueError, match=r"positions must lie in \[0, 40\)"):
        ops.rope(**args, impl=impl)
    qkv = make_qkv_inputs(5, 2, 1, 8) | {"positions": args["positions"]}
    with pytest.raises(ValueError, match="positions must lie"):
        ops.rope_qkv(**qkv, impl=impl)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"q": torch.zeros(5, 8)}, "q must be"),
        ({"k": torch.zeros(5, 1, 6)}, "q must be"),
        ({"k": torch.zeros(4, 1, 8)}, "q must be"),
        ({"k": torch.zeros(5, 1, 8, dtype=torch.bfloat16)}, "k must be like q"),
        ({"q": torch.zeros(5, 2, 7), "k": torch.zeros(5, 1, 7)}, "K must be even"),
        ({"q": torch.zeros(5, 2, 8).double(), "k": torch.zeros(5, 1, 8).double()}, "float32 or bfloat16"),
        ({"positions": torch.zeros(5, dtype=torch.int64)}, r"positions must be \(5,\) int32"),
        ({"positions": torch.zeros(4, dtype=torch.int32)}, "positions must be"),
        ({"cos": torch.zeros(40, 8)}, r"cos and sin must be \(max_pos, 4\)"),
        ({"sin": torch.zeros(39, 4)}, "cos and sin must be"),
        ({"sin": torch.zeros(40, 4, dtype=torch.bfloat16)}, "must be float32"),
        ({"cos": torch.zeros(40, 4, device="meta")}, "must be on cpu"),
        (
            {"positions": torch.zeros(5, dtype=torch.int32, device="meta")},
            "positions, cos and sin must be on cpu",
        ),
        ({"k": torch.zeros(5, 1, 8, device="meta")}, "k must be like q torch.float32 on cpu"),
    ],
)
def test_bad_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        ops.rope(**make_inputs(5, 2, 1, 8) | change, impl="cpu")


@pytest.mark.parametrize("shape", [(5, 3, 8), (5, 0, 3, 8), (5, 1, 2, 8)])
def test_bad_qkv(shape):
    with pytest.raises(ValueError, match="qkv must be"):
        ops.rope_qkv(**make_qkv_inputs(5, 1, 1, 8) | {"qkv": torch.zeros(shape)}, impl="cpu")
