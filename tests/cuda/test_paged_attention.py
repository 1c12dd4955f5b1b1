"""paged_attention in CUDA. The bugs this file must catch: a split, a page or a tile of members read past the live
length; a stage of keys overwritten while a warp reads it; a partial result lost in the merge."""

import pytest
import torch

from hpsafety import ops, reference
from hpsafety.cuda_kernels import library
from hpsafety.cuda_kernels import paged_attention as kernels
from hpsafety.ops import backends
from tests.cuda import replay
from tests.cuda.conftest import DEVICE, place
from tests.ops.forms import lazy_zeros
from tests.ops.oracle import check_against_oracle, check_error, to_fp64
from tests.ops.test_paged_attention import NAMES, make_inputs, on_pages, rows, without_prefix
from tests.ops.test_paged_attention_errors import bad
from tests.triton.test_traced import empty, ints

BF16, SPLIT, TILE = torch.bfloat16, kernels.SPLIT, kernels.TILE_ROWS
KEYS, WARP_KEYS = 64, 16  # of a turn: of the block, and of one of its warps


def attend(impl="cuda", **args):
    return ops.paged_attention(**place(args), impl=impl).cpu()


def inputs(lengths, page_size=16, heads=4, kv_heads=2, dim=64, **more):
    return make_inputs(lengths, page_size, heads, kv_heads, dim, BF16, **more)


def oracle(args, **kwargs):
    return check_against_oracle("paged_attention", attend, args, impl="cuda", grads=(), **kwargs)["out0"]


def group_of_many():
    """(lens, group_of): 6, 25 and 1 of 32 sequences in groups, in mixed order, the last without tokens, beside groups
    without members. With 3 heads they make 18 rows, and 75, of two tiles."""
    group_of = [0] * 6 + [3] * 25 + [4]
    order = torch.randperm(32, generator=torch.Generator().manual_seed(0)).tolist()
    return [SPLIT + 9, 40, 7, 70, 0], [group_of[i] for i in order]


@pytest.mark.parametrize("dim", kernels.HEAD_DIMS)
@pytest.mark.parametrize("page_size", [1, 7, 16, 64, 256])
def test_lengths_around_pages_turns_and_splits(dim, page_size):
    """KER-2: 0, 1, and one token to either side of a page, of a warp's and a block's keys and of a split."""
    near = [x + i for x in (page_size, WARP_KEYS, KEYS, SPLIT) for i in (-1, 0, 1)]
    args = inputs([1, *near, 2 * SPLIT + 1], page_size, 3, 1, dim)
    oracle(args)
    for prompt in (KEYS - 1, SPLIT + KEYS + 1):
        out = oracle(inputs([0, 1, KEYS + 1], page_size, 3, 1, dim, prefix=([prompt], [0] * 3)))
        assert out.any(2).all()
    assert not oracle(inputs([0, 3], page_size, dim=dim))[0].any()


@pytest.mark.parametrize("dim", kernels.HEAD_DIMS)
@pytest.mark.parametrize("heads, kv_heads", [(1, 1), (9, 3), (8, 1), (15, 1), (16, 1), (34, 2), (65, 1)])
def test_groups_of_heads(dim, heads, kv_heads):
    """KER-2: 1 to 65 query heads a kv head: an MMA's 16 rows in part, in full, and several of them."""
    oracle(inputs([5, 0, 130], 8, heads, kv_heads, dim, prefix=([0, 81], [1, 1, 0])))


@pytest.mark.parametrize("members", [1, 2, 21, 22, 64])
@pytest.mark.parametrize("prompt", [1, KEYS + 1, SPLIT + 1])
def test_prefix_equals_concatenated_contexts(members, prompt):
    """Groups of 1 to 64 members, in any order, beside a group without members and one without tokens."""
    group_of = [0] * members + [3, 3, 1]
    order = torch.randperm(len(group_of), generator=torch.Generator().manual_seed(members)).tolist()
    lengths = [(7 * i) % 60 for i in range(len(group_of))]
    args = inputs(lengths, 16, 3, 1, prefix=([prompt, 0, 40, 33], [group_of[i] for i in order]))
    alone = without_prefix(args)
    exact, plain = reference.paged_attention(**to_fp64(alone)), reference.paged_attention(**alone)
    for ours in (args, alone):
        check_error("out", attend(**ours), exact, plain)


def test_many_groups():
    """More sequences than the plan takes at a time, in groups that are empty, full and cut by a tile's border."""
    g = torch.Generator().manual_seed(0)
    group_of = torch.randint(0, 9, (300,), generator=g).mul(3).tolist()
    args = inputs([1 + i % 3 for i in range(300)], 16, 2, 1, prefix=([i % 5 for i in range(27)], group_of))
    oracle(args)


@pytest.mark.parametrize("scale", [30.0, 1e-18])
def test_extreme_logits(scale):
    oracle(inputs([150, 1, 40], scale=scale, prefix=([70], [0, 0, 0])))
    oracle(inputs([700, 20], scale=scale) | {"softmax_scale": 3.0})


def test_page_size_and_order_of_pages_change_no_bit():
    g = torch.Generator().manual_seed(0)
    lengths = [1, 95, 600, 33]
    keys, values = ([torch.randn(n, 1, 64, generator=g) for n in lengths] for _ in range(2))
    q, lens = torch.randn(len(lengths), 3, 64, generator=g).to(BF16), torch.tensor(lengths, dtype=torch.int32)
    results = []
    for size in (1, 5, 16, 256, 1000):
        count = sum(-(-n // size) for n in lengths)
        order = torch.randperm(count, generator=g).tolist()
        k, v, table = on_pages(keys, values, size, order)
        results.append(
            attend(q=q, k_pages=k.to(BF16), v_pages=v.to(BF16), block_table=table, context_lens=lens)
        )
    assert all(torch.equal(r, results[0]) for r in results) and results[0].isfinite().all()


def test_alone_or_in_a_batch():
    """A sequence's bits do not depend on the other sequences, nor on how many share its prefix or in what order, nor
    on the widths of the tables."""
    args = inputs([(13 * i) % 80 for i in range(32)], 16, 3, 1, prefix=group_of_many())
    whole = attend(**args)
    for keep in ([0], [3, 1, 2], list(range(31, 0, -3))):
        some = rows(args, keep)
        assert torch.equal(attend(**some), whole[keep]), keep
        some["block_table"] = torch.nn.functional.pad(some["block_table"], (0, 90), value=-1)
        assert torch.equal(attend(**some), whole[keep])


def test_pages_shared_by_own_tables():
    args = inputs([100, 100, 60, 80])
    args["block_table"][1, :7] = args["block_table"][0, :7]
    args["block_table"][2, :3] = args["block_table"][0, :3]
    oracle(args)
    out = attend(**rows(args | {"q": args["q"][[0, 0, 2, 3]]}, [0, 1]))
    assert torch.equal(out[0], out[1])


@pytest.mark.parametrize("apart", [False, True])
def test_what_is_not_used_is_not_seen(apart):
    """Unused table entries (huge), pages of nobody, the first among them, and slots past the last token (NaN) change no
    bit, in words and element by element."""
    args = inputs([33, 1, 0, 70], 7, 3, 1, prefix=([20, 9, 5], [1, 0, 1, 0]))
    args |= {n: torch.cat([args[n][:1], args[n]]) for n in ("k_pages", "v_pages")}
    args["block_table"] += 1
    args["prefix"][0].add_(1)
    if apart:
        args |= {n: torch.nn.functional.pad(args[n], (0, 3))[..., :64] for n in ("k_pages", "v_pages")}
    before = attend(**args)
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
    assert torch.equal(attend(**args), before) and before.isfinite().all()


def test_nan_reaches_only_the_sequences_that_see_it():
    args = inputs([80, 70, 20, 0], 16, 2, 1, prefix=([70, 7], [0, 1, 0, 1]))
    places = [
        ("k_pages", args["block_table"][0, 4], [0]),
        ("v_pages", args["block_table"][2, 0], [2]),
        ("v_pages", args["prefix"][0][0, 4], [0, 2]),
        ("k_pages", args["prefix"][0][1, 0], [1, 3]),
    ]
    for name, page, seen in places:
        wrong = args | {name: args[name].clone()}
        wrong[name][page, 2] = torch.nan
        nan = attend(**wrong).isnan().flatten(1)
        assert torch.equal(nan.all(1), nan.any(1)) and nan.all(1).nonzero().flatten().tolist() == seen


def test_infinite_scores():
    """All scores -inf, or one +inf: NaN, as softmax is; -inf beside finite ones, a whole split of them: weight zero."""
    args = inputs([100, 100, 100, 0, SPLIT + 30], 16, 1, 1, prefix=([3, 0], [0, 1, 0, 0, 1]))
    args["q"] = torch.ones_like(args["q"])
    table = args["block_table"]
    args["k_pages"][table[0, :7].long()] = -torch.inf
    args["k_pages"][table[1, :7].long()] = -torch.inf
    args["k_pages"][table[2, 2], 1] = torch.inf
    args["k_pages"][table[4, : SPLIT // 16].long()] = -torch.inf
    assert oracle(args).isnan().flatten(1).all(1).tolist() == [False, True, True, False, False]


def test_views_of_one_cache():
    """Pages as views of one (pages, 2, page_size, G, K) cache, tables with strides, a query with a strided last dim;
    rows of pages at addresses that are not 16-byte aligned, and a query at one that is not 4-byte aligned."""
    args = inputs([40, 3, 90], 16, prefix=([33], [0, 0, 0]))
    expected = attend(**args)
    cache = torch.stack([args["k_pages"], args["v_pages"]], 1).to(DEVICE)
    wide = lambda x: torch.stack([x, x], -1)[..., 0]  # noqa: E731
    views = {"q": wide(args["q"]), "k_pages": cache[:, 0], "v_pages": cache[:, 1]}
    views |= {n: wide(args[n]) for n in ("block_table", "context_lens")}
    out = attend(**views, prefix=tuple(wide(x) for x in args["prefix"]))
    assert torch.equal(out, expected) and out.is_contiguous()
    odd = torch.zeros(args["q"].numel() + 1, dtype=BF16, device=DEVICE)[1:].view(args["q"].shape)
    unaligned = args | {
        n: torch.nn.functional.pad(args[n], (1, 0)).to(DEVICE)[..., 1:] for n in ("k_pages", "v_pages")
    }
    assert torch.equal(attend(**unaligned | {"q": odd.copy_(args["q"])}), expected)
    with pytest.raises(ValueError, match="must have last stride 1, got 1 and 2"):
        attend(**args | {"v_pages": wide(args["v_pages"])})
    with pytest.raises(ValueError, match="must have last stride 1"):  # a compiled graph comes this way
        call = [wide(args["k_pages"]) if n == "k_pages" else args[n] for n in NAMES]
        torch.ops.hpsafety.paged_attention(*place({"x": (*call, *args["prefix"])})["x"], 0.5, False, "cuda")


def test_nothing_to_do():
    """No sequence, no page, no token, no table: empty or zero results."""
    none = inputs([], prefix=([5], []))
    assert attend(**none).shape == (0, 4, 64)
    args = inputs([0, 0], prefix=([0], [0, 0]))
    args |= {n: args[n][:0] for n in ("k_pages", "v_pages")}
    for prefix in (args["prefix"], None):
        out = attend(**args | {"prefix": prefix})
        assert out.shape == (2, 4, 64) and not out.any()
    nothing = [torch.zeros(2, 0, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)]
    args |= {"block_table": nothing[0], "prefix": (*nothing, torch.ones(2, dtype=torch.int32))}
    assert not attend(**args).any()


@pytest.mark.parametrize("stride", ["page", "slot", "head"])
def test_offsets_past_2_31(stride):
    """Half of the pages, the last slot of a page, or the last kv head is past 2^31 elements of a storage that is hardly
    touched; also by the way of single elements."""
    args = inputs([40, 5], 8, 2, 2, prefix=([20], [0, 0]))
    pages, size, kv_heads, dim = args["k_pages"].shape
    step = {"page": 2**31 // (pages // 2), "slot": 2**31 // (size - 1), "head": 2**31}[stride] // 16 * 16 + 16
    strides = {"page": (step, 128, 64, 1), "slot": (64, step, 4096, 1), "head": (512, 64, step, 1)}[stride]
    elements = sum((n - 1) * s for n, s in zip((pages, size, kv_heads), strides, strict=False)) + dim
    far = lazy_zeros(elements + 1, BF16).to(DEVICE)
    for first in (0, 1):
        cache = far[first : first + elements].as_strided((pages, size, kv_heads, dim), strides, first)
        cache.copy_(args["k_pages"])
        wanted = attend(**args | {"v_pages": args["k_pages"]})
        assert torch.equal(attend(**args | {"k_pages": cache, "v_pages": cache}), wanted)


def test_launches_do_not_depend_on_values():
    """A CUDA graph replays them: other lengths, groups and tables, the same grids and arguments."""
    calls = []
    for lengths, prefix in (([5, 70, 0], ([70, 3], [0, 1, 0])), ([70, 0, 9], ([0, 70], [1, 1, 1]))):
        args = inputs(lengths, 16, prefix=prefix)
        args |= {n: torch.zeros(40, 16, 2, 64, dtype=BF16) for n in ("k_pages", "v_pages")}
        with library.record() as recorded:
            attend(**args)
        calls.append([(c.name, *(_value(x) for x in c.arguments)) for c in recorded])
    assert [c[0][10:] for c in calls[0]] == ["plan", "prefixes_64", "own_64", "merge"]
    assert calls[0] == calls[1]


def _value(x):
    return (x.dtype, x.shape, x.stride()) if isinstance(x, torch.Tensor) else x


def test_reads_no_value_on_the_host():
    """Fake CUDA tensors have none; a long context's arguments."""
    with torch._subclasses.fake_tensor.FakeTensorMode(), library.record() as calls:
        q = empty(512, 32, 128)
        strides = (2 * 16 * 8 * 128, 8 * 128, 128, 1)  # of one cache of keys and values
        pages = torch.empty_strided((200_000, 16, 8, 128), strides, dtype=BF16, device="cuda")
        call = (q, pages, pages, ints(512, 600), ints(512), ints(64, 64), ints(64), ints(512))
        assert kernels.paged_attention(*call, 0.1, False).shape == q.shape
    own, prefix = -(-600 * 16 // SPLIT), 2
    assert [c.name[10:] for c in calls] == ["plan", "prefixes_128", "own_128", "merge"]
    sizes = [c.arguments[8:14] for c in calls[1:3]]
    assert sizes == [(4, 8, 64, 16, own + prefix, prefix), (4, 8, 600, 16, own + prefix, own)]
    assert calls[1].arguments[14] == strides[0] and calls[1].arguments[-1] == 512 * 4 // TILE + 64


def test_what_it_refuses(monkeypatch):
    """fp32, other head dims and the sequential form: forced it says so, unasked another backend serves."""
    args = inputs([9, 20])
    fp32 = {n: args[n].float() for n in NAMES[:3]}
    for change, message in (
        (fp32, "take bfloat16, got float32"),
        ({n: args[n][..., :32].contiguous() for n in NAMES[:3]}, "head dim 64 and 128, got 32"),
        ({"sequential": True}, "no sequential form; the triton backend has one"),
    ):
        with pytest.raises(backends.BackendUnavailable, match=message):
            attend(**args | change)
        monkeypatch.setenv("HPSAFETY_IMPL", "cuda")
        with pytest.raises(backends.BackendUnavailable, match=message):
            attend(impl=None, **args | change)
        monkeypatch.delenv("HPSAFETY_IMPL")
        monkeypatch.setattr(backends, "triton_unavailable", lambda *_: "no")
        monkeypatch.setattr(backends, "cpu_status", lambda: (False, "no"))
        before = reference.calls["paged_attention"]
        attend(impl=None, **args | change)
        assert reference.calls["paged_attention"] == before + 1
        attend(impl=None, **args)
        assert reference.calls["paged_attention"] == before + 1, "the CUDA kernels serve what they can"
    with pytest.raises(ValueError, match="no sequential form"):
        torch.ops.hpsafety.paged_attention(*place(args).values(), None, None, None, 0.5, True, "cuda")


@pytest.mark.skipif(DEVICE == "cuda", reason="values on a GPU are not read beforehand")
def test_bad_tables():
    for change, message in (
        ({"block_table": ((1, 2), -1)}, r"block_table\[1\]\[2\] must lie in \[0, 9\), got -1"),
        ({"lens": (0, 65)}, r"prefix lens\[0\] must lie in \[0, 64\], .* got 65"),
    ):
        wrong = {k: v.to(BF16) if k in NAMES[:3] else v for k, v in bad(**change).items()}
        wrong |= {n: wrong[n].repeat(1, *[1] * (wrong[n].dim() - 2), 8)[..., :64] for n in NAMES[:3]}
        with pytest.raises(ValueError, match=message):
            attend(**wrong)


def test_opcheck():
    args = place(inputs([9, 20], prefix=([17], [0, 0])))
    call = (*(args[n] for n in NAMES), *args["prefix"])
    torch.library.opcheck(torch.ops.hpsafety.paged_attention.default, (*call, 0.25, False, "cuda"))


@pytest.mark.sweep
@pytest.mark.parametrize("seed", range(100))
def test_drawn_shapes(seed):
    g = torch.Generator().manual_seed(seed)
    draw = lambda low, high: int(torch.randint(low, high + 1, (), generator=g))  # noqa: E731
    lengths, kv_heads = [draw(0, 700) for _ in range(draw(1, 6))], draw(1, 3)
    lens = [draw(0, 1200) for _ in range(draw(1, 4))]
    prefix = (lens, [draw(0, len(lens) - 1) for _ in lengths]) if draw(0, 2) else None
    args = inputs(
        lengths, draw(1, 60), kv_heads * draw(1, 20), kv_heads, (64, 128)[seed % 2], seed=seed, prefix=prefix
    )
    oracle(args | {"softmax_scale": draw(1, 100) / 200})


@pytest.mark.skipif(DEVICE == "cuda", reason="checks the emulated kernels")
@pytest.mark.parametrize("launch", range(4), ids=["plan", "prefixes", "own", "merge"])
@pytest.mark.parametrize("mode, seed", [("fibers", 1), ("fibers", 2), ("tsan", None), ("asan", None)])
def test_replay(mode, seed, launch):
    """Other orders of threads and blocks, races, bounds, two writers: nothing is found, and the bytes are the same."""
    args = inputs([200, 3], 16, 17, 1, prefix=([5, 4 * KEYS - 9], [1, 1]))  # stages are used again
    if launch == 0:  # as are the counts of warps
        args = inputs([1] * 300, 16, 1, 1, prefix=([1, 2], [i % 3 // 2 for i in range(300)]))
    with replay.recorded() as calls:
        attend(**args)
    replay.run(calls[launch], mode, seed)
