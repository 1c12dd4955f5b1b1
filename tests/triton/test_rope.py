"""rope in Triton. The bug this file must catch: a backward that turns forward again (+sin instead of -sin)."""

import itertools

import pytest
import torch

from hpsafety import ops, reference
from hpsafety.triton_kernels import rope as kernels
from hpsafety.triton_kernels.rope_qkv import rope_qkv, rope_qkv_backward
from tests.ops.forms import PAST_INT32, lazy_zeros
from tests.ops.test_rope import make_inputs, make_qkv_inputs
from tests.triton.audit import audit
from tests.triton.device import DEVICE, check_triton, place
from tests.triton.last_program import needs_interpreter

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(kernels, "TILE", 16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "t, h, g, size", [(0, 2, 1, 8), (1, 1, 1, 2), (7, 4, 1, 6), (3, 9, 3, 64), (4, 8, 8, 30)]
)
def test_matches_oracle(dtype, t, h, g, size):
    """KER-2: forward and backward against fp64; half a head of 3 and 15 elements is no power of two."""
    check_triton("rope", ops.rope, make_inputs(t, h, g, size, dtype), grads=("q", "k"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "t, g, j, size", [(0, 1, 1, 8), (1, 1, 1, 2), (5, 3, 3, 16), (3, 2, 8, 6), (4, 1, 4, 30)]
)
def test_qkv_matches_oracle(small_tiles, dtype, t, g, j, size):
    """GQA ratios of 1 to 8, heads that take several tiles."""
    check_triton("rope_qkv", ops.rope_qkv, make_qkv_inputs(t, g, j, size, dtype), grads=("qkv",))


@pytest.mark.sweep
@pytest.mark.parametrize("seed", range(60))
def test_drawn_shapes(seed):
    generator = torch.Generator().manual_seed(seed)
    t, g, j, half = (int(torch.randint(1, high, (), generator=generator)) for high in (20, 5, 9, 65))
    dtype = DTYPES[seed % 2]
    args = make_inputs(t, g * j, g, 2 * half, dtype, seed)
    check_triton("rope", ops.rope, args, grads=("q", "k"))
    args = make_qkv_inputs(t, g, j, 2 * half, dtype, seed)
    check_triton("rope_qkv", ops.rope_qkv, args, grads=("qkv",))


@pytest.mark.parametrize("used", [s for n in (1, 2) for s in itertools.combinations(range(3), n)])
def test_qkv_with_unused_outputs(used):
    """A missing gradient counts as zero; an expanded one (stride 0) is read rightly."""
    qkv, *tables = place(make_qkv_inputs(3, 2, 3, 8)).values()
    qkv.requires_grad_()
    found = []
    for function in (lambda *a: ops.rope_qkv(*a, impl="triton"), reference.rope_qkv):
        out = function(qkv, *tables)
        found += torch.autograd.grad(sum(out[i].sum() for i in used), qkv)
    torch.testing.assert_close(*found)


def test_non_contiguous():
    q, k, positions, cos, sin = place(make_inputs(5, 6, 2, 16)).values()
    expected = ops.rope(q, k, positions, cos, sin, impl="triton")
    wide = torch.zeros(5, 8, 16, device=DEVICE)
    wide[:, :6], wide[:, 6:] = q, k
    every_second = torch.stack((q, q), -1).flatten(-2)[..., ::2]
    heads_first = q.transpose(0, 1).contiguous().transpose(0, 1)
    tables = [torch.stack((x, x), -1)[..., 0] for x in (positions, cos, sin)]
    variants = [(wide[:, :6], wide[:, 6:]), (every_second, k), (heads_first, k)]
    calls = [(a, b, positions, cos, sin) for a, b in variants] + [(q, k, *tables)]
    for arguments in calls:
        got = ops.rope(*arguments, impl="triton")
        assert all(torch.equal(x, y) and x.is_contiguous() for x, y in zip(got, expected, strict=True))


def test_nan_stays_in_its_pair():
    args = make_inputs(3, 2, 1, 8)
    args["q"][1, 0, 2] = float("nan")
    q, k = ops.rope(**place(args), impl="triton")
    assert q.isnan().nonzero().tolist() == [[1, 0, 2], [1, 0, 6]] and not k.isnan().any()


def test_positions_out_of_range():
    """Read on the CPU; on a GPU with HPSAFETY_CHECK=1 alone."""
    args = make_inputs(3, 2, 1, 8)
    args["positions"][1] = 40
    if DEVICE == "cpu":
        with pytest.raises(ValueError, match=r"positions must lie in \[0, 40\), got"):
            ops.rope(**args, impl="triton")


@needs_interpreter
def test_in_place():
    args = place(make_inputs(6, 4, 2, 16))
    q, k = ops.rope(**args, impl="triton")
    page = torch.zeros(6, 7, 16, device=DEVICE)  # keys that stand in a wider page
    page[:, 3:5] = args["k"]
    args["k"] = page[:, 3:5]
    with audit(3, page=page, **{n: x for n, x in args.items() if n != "k"}) as seen:
        out = ops.rope_(**args, impl="triton")
    seen.check()
    assert out[0] is args["q"] and out[1] is args["k"]
    assert torch.equal(args["q"], q) and torch.equal(page[:, 3:5], k)
    assert not page[:, :3].any() and not page[:, 5:].any()


@pytest.mark.parametrize("dtype", DTYPES)
@needs_interpreter
def test_memory_and_traffic(small_tiles, dtype):
    """q, k and v are read once and written once, and each token's row of the tables once, in one launch."""
    t, g, j, size = 5, 2, 3, 20
    args = make_qkv_inputs(t, g, j, size, dtype)
    found = []
    for seed in (None, 2):
        with audit(seed, **args) as seen:
            q, k, v = rope_qkv(**args)
        seen.check()
        assert seen.launches == 1
        traffic = seen.traffic
        assert traffic["qkv"].load_bytes == traffic["qkv"].load_unique == args["qkv"].nbytes
        assert traffic["cos"].load_bytes == traffic["sin"].load_bytes == t * size // 2 * 4
        assert sum(x.store_bytes for x in traffic.values()) == q.nbytes + k.nbytes + v.nbytes
        tables = {name: args[name] for name in ("positions", "cos", "sin")}
        with audit(seed, q=q, k=k, v=v, **tables) as seen:
            grad = rope_qkv_backward(q, k, v, **tables)
        seen.check()
        assert seen.traffic["new0"].store_bytes == seen.traffic["new0"].store_unique == grad.nbytes
        found.append((q, k, v, grad))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@needs_interpreter
def test_offsets_past_32_bits(dtype):
    """Keys in pages that far apart: offsets of tokens, and of heads, pass 2^31 elements, read and written."""
    storage = lazy_zeros(PAST_INT32 + 16, dtype)
    for shape, strides in (((3, 1, 16), (PAST_INT32 // 2, 16, 1)), ((1, 3, 16), (16, PAST_INT32 // 2, 1))):
        args = make_inputs(shape[0], 2, shape[1], 16, dtype)
        far = storage.as_strided(shape, strides).copy_(args["k"])
        q, k = ops.rope(**args, impl="triton")
        assert torch.equal(ops.rope(**args | {"k": far}, impl="triton")[1], k)
        ops.rope_(**args | {"k": far}, impl="triton")
        assert torch.equal(far, k)
