"""paged_attention in Triton. The bugs this file must catch: a split, a page or a tile of members read past the live
length; prefix pages read once a member instead of once a group; a partial result lost in the merge."""

import math

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from hpsafety import ops, reference
from hpsafety.triton_kernels import launch
from hpsafety.triton_kernels import paged_attention as kernels
from tests.ops.oracle import check_against_oracle, check_error, to_fp64
from tests.ops.test_paged_attention import NAMES, make_inputs, on_pages, rows, without_prefix
from tests.ops.test_paged_attention_errors import bad
from tests.triton.audit import audit
from tests.triton.device import DEVICE, place

DTYPES = [torch.float32, torch.bfloat16]
ROWS, KEYS, SPLIT = 16, 16, 64  # of the small configuration


def attend(impl="triton", **args):
    return ops.paged_attention(**place(args), impl=impl).cpu()


def sequential(**args):
    return attend(sequential=True, **args)


def oracle(args, op=attend):
    return check_against_oracle("paged_attention", op, args, impl="triton", grads=())["out0"]


@pytest.fixture
def small(monkeypatch):
    """Tiles and splits that a few tokens cross."""
    config = {"prefix_rows": ROWS, "own_rows": ROWS, "split": SPLIT, "keys": KEYS}
    config |= {"num_warps": 4, "num_stages": 1}
    monkeypatch.setattr(kernels, "_config", lambda *_: config)


def group_of_many():
    """(lens, group_of): 6, 5 and 1 of 12 sequences in groups, in mixed order, the last without tokens, beside groups
    without members. With 3 heads they make 18 rows, of two tiles of 16, and 15, of one of the two that they get."""
    group_of = [0] * 6 + [3] * 5 + [4]
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0)).tolist()
    return [SPLIT + 9, 40, 7, 40, 0], [group_of[i] for i in order]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("page_size", [7, 16])
def test_lengths_around_pages_blocks_and_splits(dtype, page_size):
    """KER-2 in the shipped configuration."""
    keys = kernels.keys_per_block(32, dtype)
    lengths = [1, page_size, page_size + 1, 0, keys - 1, keys + 1, kernels.SPLIT, kernels.SPLIT + 1]
    out = oracle(make_inputs(lengths, page_size, 2, 1, dtype=dtype, prefix=([kernels.SPLIT + 3], [0] * 8)))
    assert out[3].any()
    assert not oracle(make_inputs([0, 3], page_size, dtype=dtype))[0].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "heads, kv_heads, dim",
    [(9, 3, 64), (1, 1, 1), (12, 1, 33), (34, 2, 24), (2, 1, 256)],
)
def test_heads_and_dims(small, dtype, heads, kv_heads, dim):
    """KER-2 over head groups (1 to 17 query heads a kv head, tiles of 16) and head dims, odd ones too."""
    args = make_inputs([5, 0, 70], 8, heads, kv_heads, dim, dtype, prefix=([0, 81], [1, 1, 0]))
    oracle(args)
    oracle(args, sequential)


@pytest.mark.parametrize("page_size", [1, 256])
def test_small_and_large_pages(small, page_size):
    oracle(make_inputs([1, SPLIT - 1, SPLIT, SPLIT + 1, 0], page_size, 2, 1, prefix=([33], [0] * 5)))


@pytest.mark.parametrize("op", [attend, sequential])
def test_prefix_equals_concatenated_contexts(small, op):
    lengths = [(7 * i) % 60 for i in range(12)]
    args = make_inputs(lengths, 16, 3, 1, 24, prefix=group_of_many())
    alone = without_prefix(args)
    exact, plain = reference.paged_attention(**to_fp64(alone)), reference.paged_attention(**alone)
    for ours in (args, alone):
        check_error("out", op(**ours), exact, plain)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [30.0, 1e-18])
def test_extreme_logits(small, dtype, scale):
    oracle(make_inputs([150, 1, 40], dtype=dtype, scale=scale, prefix=([70], [0, 0, 0])))


@pytest.mark.parametrize("op", [attend, sequential])
def test_page_size_and_order_of_pages_change_no_bit(small, op):
    g = torch.Generator().manual_seed(0)
    lengths = [1, 95, 33]
    keys, values = ([torch.randn(n, 1, 32, generator=g) for n in lengths] for _ in range(2))
    q, lens = torch.randn(len(lengths), 3, 32, generator=g), torch.tensor(lengths, dtype=torch.int32)
    results = []
    for size in (1, 5, 16, 256):
        count = sum(-(-n // size) for n in lengths)
        order = torch.randperm(count, generator=g).tolist()
        k, v, table = on_pages(keys, values, size, order)
        results.append(op(q=q, k_pages=k, v_pages=v, block_table=table, context_lens=lens))
    assert all(torch.equal(r, results[0]) for r in results) and results[0].isfinite().all()


@pytest.mark.parametrize("op", [attend, sequential])
def test_alone_or_in_a_batch(small, op):
    """A sequence's bits do not depend on the other sequences, nor on how many share its prefix or in what order."""
    args = make_inputs([(13 * i) % 80 for i in range(12)], 16, 3, 1, 20, prefix=group_of_many())
    whole = op(**args)
    for keep in ([0], [3, 1, 2], list(range(11, 0, -3))):
        assert torch.equal(op(**rows(args, keep)), whole[keep]), keep


def sequential_row(q, parts, scale):
    """Definition of a sequential row in fp32: blocks of KEYS keys, counted from the start of each part."""
    top = np.full(ROWS, -np.inf, np.float32)
    total, out = np.zeros(ROWS, np.float32), np.zeros((ROWS, q.shape[1]), np.float32)
    for keys, values in parts:
        for first in range(0, len(keys), KEYS):
            k, v = (np.zeros((KEYS, q.shape[1]), np.float32) for _ in range(2))
            n = min(KEYS, len(keys) - first)
            k[:n], v[:n] = keys[first : first + n], values[first : first + n]
            s = np.matmul(q, k.T)
            s[:, n:] = -np.inf
            new = np.maximum(top, s.max(1) * scale)
            fused = s.astype(np.float64) * scale - new[:, None]  # one rounding
            weights, rescale = np.exp2(fused.astype(np.float32)), np.exp2(top - new)
            total, top = total * rescale + weights.sum(1), new
            out = np.matmul(weights, v) + out * rescale[:, None]
    return out * (np.float32(1) / total)[:, None]


@pytest.mark.skipif(DEVICE == "cuda", reason="the definition is in the interpreter's arithmetic")
@pytest.mark.parametrize("prompt, own", [(0, 33), (KEYS, 2), (2 * KEYS + 1, KEYS - 1), (5, 3 * KEYS)])
def test_sequential_is_one_running_softmax(small, prompt, own):
    """To the bit: prefix, then own keys, block after block; the prefix by a program of its own."""
    args = make_inputs([own], 16, 4, 1, 16, prefix=([prompt], [0]))
    q = np.zeros((ROWS, 16), np.float32)
    q[:4] = args["q"][0].numpy()
    parts = []
    for table, n in ((args["prefix"][0][0], prompt), (args["block_table"][0], own)):
        pages = table[: -(-n // 16)].long()
        parts.append([args[x][pages].flatten(0, 1)[:n, 0].numpy() for x in ("k_pages", "v_pages")])
    wanted = sequential_row(q, parts, np.float32(0.25 * math.log2(math.e)))[:4]
    assert torch.equal(sequential(**args)[0], torch.from_numpy(wanted))


@pytest.mark.parametrize("op", [attend, sequential])
def test_what_is_not_used_is_not_seen(small, op):
    """Unused table entries (huge), pages of nobody and slots past the last token (NaN) change no bit, whatever the
    reads of the group without members would meet."""
    args = make_inputs([33, 1, 0, 70], 7, 3, 1, 20, prefix=([20, 9, 5], [1, 0, 1, 0]))
    before = op(**args)
    used = torch.zeros(args["k_pages"].shape[:2], dtype=torch.bool)
    args["prefix"][0][2], members = 2**31 - 1, args["prefix"][1].clone()
    members[2] = 0
    for table, lens in ((args["prefix"][0], members), (args["block_table"], args["context_lens"])):
        for row, n in zip(table, lens.tolist(), strict=True):
            for t in range(n):
                used[row[t // 7], t % 7] = True
            row[-(-n // 7) :] = 2**31 - 1
    for pages in (args["k_pages"], args["v_pages"]):
        pages[~used] = torch.nan
    assert torch.equal(op(**args), before) and before.isfinite().all()


@pytest.mark.parametrize("op", [attend, sequential])
def test_nan_reaches_only_the_sequences_that_see_it(small, op):
    args = make_inputs([80, 70, 20, 0], 16, 2, 1, 16, prefix=([70, 7], [0, 1, 0, 1]))
    places = [
        ("k_pages", args["block_table"][0, 4], [0]),
        ("v_pages", args["block_table"][2, 0], [2]),
        ("v_pages", args["prefix"][0][0, 4], [0, 2]),
        ("k_pages", args["prefix"][0][1, 0], [1, 3]),
    ]
    for name, page, seen in places:
        wrong = args | {name: args[name].clone()}
        wrong[name][page, 2] = torch.nan
        nan = op(**wrong).isnan().flatten(1)
        assert torch.equal(nan.all(1), nan.any(1)) and nan.all(1).nonzero().flatten().tolist() == seen


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of inf - inf
@pytest.mark.parametrize("op", [attend, sequential])
def test_infinite_scores(small, op):
    """All scores -inf, or one +inf: NaN, as softmax is; -inf beside finite ones: weight zero."""
    args = make_inputs([100, 100, 100, 0], 16, 1, 1, 8, prefix=([3, 0], [0, 1, 0, 0]))
    args["q"] = torch.ones_like(args["q"])
    table = args["block_table"]
    args["k_pages"][table[0, :7].long()] = -torch.inf
    args["k_pages"][table[1, :7].long()] = -torch.inf
    args["k_pages"][table[2, 2], 1] = torch.inf
    assert oracle(args, op).isnan().flatten(1).all(1).tolist() == [False, True, True, False]


def test_views_of_one_cache(small):
    """Pages as views of one (pages, 2, page_size, G, K) cache, tables with strides, a query with a strided last dim."""
    args = make_inputs([40, 3, 90], 16, prefix=([33], [0, 0, 0]))
    expected = attend(**args)
    cache = torch.stack([args["k_pages"], args["v_pages"]], 1)
    wide = lambda x: torch.stack([x, x], -1)[..., 0]  # noqa: E731
    views = {"q": wide(args["q"]), "k_pages": cache[:, 0], "v_pages": cache[:, 1]}
    views |= {n: wide(args[n]) for n in ("block_table", "context_lens")}
    out = attend(**views, prefix=tuple(wide(x) for x in args["prefix"]))
    assert torch.equal(out, expected) and out.is_contiguous()
    with pytest.raises(ValueError, match="must have last stride 1, got 1 and 2"):
        attend(**args | {"v_pages": wide(args["v_pages"])})
    with pytest.raises(ValueError, match="must have last stride 1"):  # a compiled graph comes this way
        call = [wide(args["k_pages"]) if n == "k_pages" else args[n] for n in NAMES]
        torch.ops.hpsafety.paged_attention(*call, *args["prefix"], 0.5, False, "triton")


@pytest.mark.parametrize("op", [attend, sequential])
def test_nothing_to_do(op):
    """No sequence, no page, no token, no table: empty or zero results."""
    none = make_inputs([], prefix=([5], []))
    assert op(**none).shape == (0, 4, 32)
    args = make_inputs([0, 0], prefix=([0], [0, 0]))
    args |= {n: args[n][:0] for n in ("k_pages", "v_pages")}
    for prefix in (args["prefix"], None):
        out = op(**args | {"prefix": prefix})
        assert out.shape == (2, 4, 32) and not out.any()
    empty = [torch.zeros(2, 0, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)]
    args |= {"block_table": empty[0], "prefix": (*empty, torch.ones(2, dtype=torch.int32))}
    assert not op(**args).any()


def test_offsets_past_2_31():
    """The last page starts past 2^31 elements of a storage of which a few pages are touched."""
    size, kv_heads, dim = 16, 2, 64
    pages = 2**31 // (size * kv_heads * dim) + 2
    try:
        cache = torch.empty((pages, size, kv_heads, dim), dtype=torch.bfloat16, device=DEVICE)
    except RuntimeError:
        pytest.skip("4 GiB of address space cannot be reserved")
    args = make_inputs([40, 5], size, 4, kv_heads, dim, torch.bfloat16, prefix=([20], [0, 0]))
    expected = attend(**args | {"v_pages": args["k_pages"]})
    old = torch.cat([args["block_table"].flatten(), args["prefix"][0].flatten()])
    moved = {int(page): pages - 1 - i for i, page in enumerate(old[old >= 0])}
    for page, there in moved.items():
        cache[there] = args["k_pages"][page]
    far = args | {"k_pages": cache, "v_pages": cache}
    far["block_table"] = args["block_table"].clone().apply_(lambda x: moved.get(x, -1))
    table = args["prefix"][0].clone().apply_(lambda x: moved.get(x, -1))
    assert torch.equal(attend(**far | {"prefix": (table, *args["prefix"][1:])}), expected)


def watched(args):
    table, lens, group_of = args["prefix"]
    return {n: args[n] for n in NAMES} | {"table": table, "lens": lens, "group_of": group_of}


@pytest.mark.parametrize("op, dtype", [(attend, torch.bfloat16), (sequential, torch.float32)])
def test_memory_and_traffic(small, op, dtype):
    """A group's pages are read once for each tile of its (member, head) rows, own pages once; nothing else of them,
    nor of the tables; the results do not depend on the order of programs."""
    kv_heads, dim, group = 1, 24, 3
    lens, group_of = group_of_many()
    lengths = [(33 * i) % 72 for i in range(12)]
    args = make_inputs(lengths, 7, kv_heads * group, kv_heads, dim, dtype, prefix=(lens, group_of))
    tiles = [-(-group_of.count(g) * group // ROWS) for g in range(len(lens))]
    assert tiles == [2, 0, 0, 1, 1]
    own, once = sum(lengths), sum(n for n, t in zip(lens, tiles, strict=True) if t)
    token = kv_heads * dim * args["q"].element_size()
    outs = [op(**args)]
    with audit(1, **watched(args)) as seen:
        outs.append(op(**args))
    seen.check()
    for name in ("k_pages", "v_pages"):
        assert seen.traffic[name].load_unique == (own + once) * token
        wanted = own + sum(n * t for n, t in zip(lens, tiles, strict=True))
        assert seen.traffic[name].load_bytes == wanted * token
        assert seen.traffic[name].most_loads == 2
    used = sum(-(-n // 7) for n in lengths)
    assert seen.traffic["block_table"].load_unique == used * 4
    used = sum(-(-n // 7) for n, t in zip(lens, tiles, strict=True) if t)
    assert seen.traffic["table"].load_unique == used * 4
    written = [seen.traffic[n].store_bytes for n in watched(args)]
    assert not any(written)
    splits = [-(-n // SPLIT) + -(-lens[g] // SPLIT) for n, g in zip(lengths, group_of, strict=True)]
    parts = [(n > 0) + (lens[g] > 0) for n, g in zip(lengths, group_of, strict=True)]
    states = sum(parts if op is sequential else splits) * kv_heads * group
    plan = 4 * (12 + 2 * len(lens) + 12 * group // ROWS + len(lens))  # order, bounds, tiles
    stored = sum(t.store_bytes for t in seen.traffic.values())
    assert stored == states * (dim + 2) * 4 + plan + args["q"].numel() * args["q"].element_size()
    assert torch.equal(*outs)


def test_launches_do_not_depend_on_values(small):
    """A CUDA graph replays them: other lengths, groups and tables, the same grids and arguments."""
    launches = []
    for lengths, prefix in (([5, 70, 0], ([70, 3], [0, 1, 0])), ([70, 0, 9], ([0, 70], [1, 1, 1]))):
        args = make_inputs(lengths, 16, prefix=prefix)
        args |= {n: torch.zeros(40, 16, 2, 32) for n in ("k_pages", "v_pages")}
        for flag in (False, True):
            with launch.record() as recorded:
                attend(**args, sequential=flag)
            launches.append(recorded)
    names = [one.kernel.__name__ for one in launches[0]]
    assert names == ["plan_prefixes", "attend_prefixes", "attend_own", "combine"]
    for one, other in zip(launches[0] + launches[1], launches[2] + launches[3], strict=True):
        assert (one.programs, one.constants) == (other.programs, other.constants)
        assert [_value(x) for x in one.arguments.values()] == [_value(x) for x in other.arguments.values()]


def _value(x):
    return (x.dtype, x.shape, x.stride) if isinstance(x, launch.Tensor) else x


def test_reads_no_value_on_the_host():
    """Fake CUDA tensors have none; a long context's grid and offsets."""
    with FakeTensorMode(), launch.record((9, 0)) as launches:
        ints = lambda *shape: torch.empty(shape, dtype=torch.int32, device="cuda")  # noqa: E731
        q = torch.empty((512, 32, 128), dtype=torch.bfloat16, device="cuda")
        strides = (2 * 16 * 8 * 128, 8 * 128, 128, 1)  # of one cache of keys and values
        pages = torch.empty_strided((200_000, 16, 8, 128), strides, dtype=torch.bfloat16, device="cuda")
        call = (q, pages, pages, ints(512, 600), ints(512), ints(64, 64), ints(64), ints(512))
        assert kernels.paged_attention(*call, 0.1, False).shape == q.shape
    own_splits, prefix_splits = -(-600 * 16 // kernels.SPLIT), 2
    assert [one.programs for one in launches] == [
        64,
        (512 * 4 // 64 + 64) * 8 * prefix_splits,
        512 * 8 * own_splits,
        512 * 2,
    ]
    assert launches[1].arguments["k_page"] == 2 * 16 * 8 * 128


@pytest.mark.parametrize(
    "change, message",
    [
        ({"block_table": ((1, 2), -1)}, r"block_table\[1\]\[2\] must lie in \[0, 9\), got -1"),
        ({"block_table": ((0, 0), 9)}, r"block_table\[0\]\[0\] must lie in \[0, 9\), got 9"),
        ({"table": ((0, 1), -1)}, r"prefix table\[0\]\[1\] must lie in \[0, 9\), got -1"),
        ({"context_lens": (0, -1)}, r"context_lens\[0\] must lie in \[0, 64\], .* got -1"),
        ({"context_lens": (1, 65)}, r"context_lens\[1\] must .*, which 4 pages of 16 .* got 65"),
        ({"lens": (0, 65)}, r"prefix lens\[0\] must lie in \[0, 64\], .* got 65"),
        ({"group_of": (1, 2)}, r"group_of\[1\] must lie in \[0, 2\), got 2"),
    ],
)
def test_bad_tables(change, message):
    with pytest.raises(ValueError, match=message):
        ops.paged_attention(**bad(**change), impl="triton")


def test_a_group_without_members_may_have_a_stale_table():
    assert attend(**bad(group_of=(0, 0), table=(1, -7))).isfinite().all()


def test_opcheck():
    args = place(make_inputs([9, 20], prefix=([17], [0, 0])))
    call = [args[n] for n in NAMES]
    op = torch.ops.hpsafety.paged_attention.default
    torch.library.opcheck(op, (*call, *args["prefix"], 0.25, False, "triton"))
    torch.library.opcheck(op, (*call, None, None, None, 0.25, True, "triton"))


@pytest.mark.sweep
@pytest.mark.parametrize("seed", range(60))
def test_drawn_shapes(seed):
    g = torch.Generator().manual_seed(seed)
    draw = lambda low, high: int(torch.randint(low, high + 1, (), generator=g))  # noqa: E731
    lengths, kv_heads = [draw(0, 200) for _ in range(draw(1, 6))], draw(1, 2)
    lens = [draw(0, 600) for _ in range(draw(1, 4))]
    prefix = (lens, [draw(0, len(lens) - 1) for _ in lengths]) if draw(0, 2) else None
    shape = (draw(1, 40), kv_heads * draw(1, 8), kv_heads, draw(1, 130), DTYPES[seed % 2], seed, prefix)
    args = make_inputs(lengths, *shape) | {"softmax_scale": draw(1, 100) / 200}
    oracle(args, (attend, sequential)[draw(0, 1)])
