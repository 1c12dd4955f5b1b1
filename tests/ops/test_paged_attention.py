"""paged_attention. The bugs this file must catch: a last page read to its end instead of to the context's length; a
prefix dropped in the merge; values summed in another order where they are packed than where they are read in place."""

import itertools

import pytest
import torch

from hpsafety import ops, reference
from tests.ops.oracle import check_against_oracle, check_error, to_fp64

BLOCK, SPLIT = 96, 288  # keys in a block and in a split of the C++ kernel
NAMES = ("q", "k_pages", "v_pages", "block_table", "context_lens")


def oracle(args, **kwargs):
    return check_against_oracle("paged_attention", ops.paged_attention, args, grads=(), **kwargs)["out0"]


def tables(lengths, page_size, free, spare=0):
    """Takes the pages of each sequence from the list `free`; unused entries are -1."""
    counts = [-(-n // page_size) for n in lengths]
    table = torch.full((len(lengths), max(counts, default=0) + spare), -1, dtype=torch.int32)
    for row, count in zip(table, counts, strict=True):
        row[:count] = torch.tensor([free.pop() for _ in range(count)], dtype=torch.int32)
    return table


def make_inputs(
    lengths, page_size=16, heads=4, kv_heads=2, dim=32, dtype=torch.float32, seed=0, prefix=None, scale=1.0
):
    """Sequences with `lengths` own tokens on shuffled pages; prefix: (lens of the groups, group of each sequence)."""
    g = torch.Generator().manual_seed(seed)
    prefix_lens, group_of = prefix or ((), ())
    total = sum(-(-n // page_size) for n in (*lengths, *prefix_lens)) + 2
    free = torch.randperm(total, generator=g).tolist()
    shape = (total, page_size, kv_heads, dim)
    k, v = (torch.randn(shape, generator=g).to(dtype) for _ in range(2))
    q = torch.randn((len(lengths), heads, dim), generator=g).to(dtype) * scale
    lens = torch.tensor(lengths, dtype=torch.int32)
    args = dict(zip(NAMES, (q, k, v, tables(lengths, page_size, free, 1), lens), strict=True))
    if prefix is not None:
        ints = (torch.tensor(x, dtype=torch.int32) for x in prefix)
        args["prefix"] = (tables(prefix_lens, page_size, free, 2), *ints)
    return args


def dense(pages, table, length):
    return pages[table[: -(-length // pages.shape[1])].long()].flatten(0, 1)[:length]


def on_pages(keys, values, page_size, order):
    """Dense sequences (n, G, K) laid out on pages in the given order; (k_pages, v_pages, table)."""
    free = list(order)
    table = tables([len(k) for k in keys], page_size, free)
    pages = [torch.full((len(order), page_size, *keys[0].shape[1:]), torch.nan) for _ in range(2)]
    for page, parts in zip(pages, (keys, values), strict=True):
        for row, x in zip(table, parts, strict=True):
            for i, piece in enumerate(x.split(page_size)):
                page[row[i], : len(piece)] = piece
    return *pages, table


def rows(args, keep):
    """The sequences `keep` alone."""
    out = dict(args) | {n: args[n][keep] for n in ("q", "block_table", "context_lens")}
    if "prefix" in args:
        out["prefix"] = (*args["prefix"][:2], args["prefix"][2][keep])
    return out


def without_prefix(args):
    """The same work with the prefix pages copied into each sequence's own, page borders aside."""
    table, lens, group_of = args["prefix"]
    parts = []
    for pages in (args["k_pages"], args["v_pages"]):
        parts.append([
            torch.cat([dense(pages, table[g], int(lens[g])), dense(pages, own, int(n))])
            for g, own, n in zip(group_of.tolist(), args["block_table"], args["context_lens"], strict=True)
        ])  # fmt: skip
    size = args["k_pages"].shape[1]
    count = sum(-(-len(x) // size) for x in parts[0])
    k, v, table = on_pages([x.float() for x in parts[0]], [x.float() for x in parts[1]], size, range(count))
    lens = torch.tensor([len(x) for x in parts[0]], dtype=torch.int32)
    return dict(
        zip(NAMES, (args["q"], k.to(args["q"].dtype), v.to(args["q"].dtype), table, lens), strict=True)
    )


@pytest.fixture
def threads():
    """Sets the number of threads; puts the old one back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("page_size", [1, 7, 16, 96, 256])
def test_lengths_around_a_page(dtype, page_size):
    """KER-2: page - 1, page, page + 1, 1 and 0 tokens; blocks and splits and one token to either side."""
    near = [BLOCK - 1, BLOCK, BLOCK + 1, SPLIT - 1, SPLIT, SPLIT + 1]
    out = oracle(make_inputs([1, page_size - 1, page_size, page_size + 1, 0, *near], page_size, dtype=dtype))
    assert not out[4].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "heads, kv_heads, dim",
    [(9, 3, 64), (1, 1, 1), (8, 1, 128), (12, 1, 33), (4, 4, 7), (26, 2, 256), (2, 1, 80)],
)
def test_heads_and_dims(dtype, heads, kv_heads, dim):
    """KER-2 over head groups (1 to 13 query heads a kv head) and head dims, odd ones too; with and without prefix."""
    oracle(make_inputs([5, 130], 16, heads, kv_heads, dim, dtype))
    oracle(make_inputs([5, 0, 40], 8, heads, kv_heads, dim, dtype, prefix=([0, 101], [1, 1, 0])))


@pytest.mark.parametrize("seed", range(24))
def test_random_shapes(seed):
    """KER-2 on drawn lengths, groups, page sizes, heads, dims and scales."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda low, high: int(torch.randint(low, high + 1, (), generator=g))  # noqa: E731
    lengths, kv_heads = [draw(0, 200) for _ in range(draw(1, 7))], draw(1, 3)
    lens = [draw(0, 350) for _ in range(draw(1, 4))]
    prefix = (lens, [draw(0, len(lens) - 1) for _ in lengths]) if draw(0, 2) else None
    dtype = (torch.float32, torch.bfloat16)[draw(0, 1)]
    args = make_inputs(
        lengths, draw(1, 40), kv_heads * draw(1, 8), kv_heads, draw(1, 130), dtype, seed, prefix
    )
    oracle(args | {"softmax_scale": draw(1, 100) / 200})


@pytest.mark.parametrize("members", [1, 2, 4, 5, 13, 64])
@pytest.mark.parametrize("prompt", [1, BLOCK + 1, SPLIT + 1])
def test_prefix_equals_concatenated_contexts(members, prompt):
    """Groups of 1 to 64 members, in any order, beside a group without members and one without tokens: the same as
    with each sequence's whole context on pages of its own."""
    group_of = [0] * members + [3, 3, 1]
    order = torch.randperm(len(group_of), generator=torch.Generator().manual_seed(members)).tolist()
    lengths = [(7 * i) % 60 for i in range(len(group_of))]
    args = make_inputs(lengths, 16, 6, 2, 24, prefix=([prompt, 0, 40, 33], [group_of[i] for i in order]))
    alone = without_prefix(args)
    exact, plain = reference.paged_attention(**to_fp64(alone)), reference.paged_attention(**alone)
    torch.testing.assert_close(
        reference.paged_attention(**to_fp64(args) | {"prefix": args["prefix"]}), exact, rtol=1e-12, atol=1e-12
    )
    for ours in (args, alone):
        check_error("out", ops.paged_attention(**ours, impl="cpu"), exact, plain)


def test_equals_attention():
    """Decoding sees what training sees: the last row of a causal segment, with and without a shared prefix."""
    prompt, lengths, (heads, kv_heads, dim) = 150, [1, 60, 97], (6, 2, 32)
    total = prompt + sum(lengths)
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(total, n, dim, generator=g) for n in (heads, kv_heads, kv_heads))
    ends = [prompt + sum(lengths[: i + 1]) for i in range(len(lengths))]
    starts = [e - n for e, n in zip(ends, lengths, strict=True)]
    segments = [(0, prompt, 0, 0), *((s, e, 0, prompt) for s, e in zip(starts, ends, strict=True))]
    segments = torch.tensor(segments, dtype=torch.int32)
    last = torch.tensor(ends) - 1
    trained = ops.attention(q, k, v, segments, impl="cpu")[last]
    pieces = [[x[s:e] for s, e in zip([0, *starts], [prompt, *ends], strict=True)] for x in (k, v)]
    k_pages, v_pages, table = on_pages(*pieces, 16, torch.randperm(40, generator=g).tolist())
    lens = torch.tensor(lengths, dtype=torch.int32)
    prefix = (table[:1], torch.tensor([prompt], dtype=torch.int32), torch.zeros(3, dtype=torch.int32))
    ours = ops.paged_attention(q[last], k_pages, v_pages, table[1:], lens, prefix, impl="cpu")
    exact = reference.attention(q.double(), k.double(), v.double(), segments)[last]
    plain = reference.attention(q, k, v, segments)[last]
    check_error("attention", trained, exact, plain)
    check_error("paged_attention", ours, exact, plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [30.0, 1e-18])
def test_extreme_logits(dtype, scale):
    oracle(make_inputs([300, 1, 40], dtype=dtype, scale=scale, prefix=([200], [0, 0, 0])))


def test_page_size_and_order_of_pages_change_no_bit():
    """The same tokens on pages of any size and in any order: reversed, shuffled, sorted."""
    g = torch.Generator().manual_seed(0)
    lengths = [1, 95, 290, 33]
    keys, values = ([torch.randn(n, 2, 32, generator=g) for n in lengths] for _ in range(2))
    q, lens = torch.randn(len(lengths), 6, 32, generator=g), torch.tensor(lengths, dtype=torch.int32)
    results = []
    for size in (1, 5, 8, 16, 48, 256, 400):
        count = sum(-(-n // size) for n in lengths)
        for order in (range(count), range(count)[::-1], torch.randperm(count, generator=g).tolist()):
            k, v, table = on_pages(keys, values, size, order)
            results.append(ops.paged_attention(q, k, v, table, lens, impl="cpu"))
    assert all(torch.equal(r, results[0]) for r in results) and results[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [32, 20])
def test_alone_or_in_a_batch(dtype, dim):
    """A sequence's bits do not depend on the other sequences, nor on how many share its prefix or in what order.
    With 1 to 40 members a value is read in place or packed, and tiles are full or not."""
    group_of = [0] * 17 + [1] * 3 + [2] * 20
    args = make_inputs(
        [(13 * i) % 120 for i in range(40)], 16, 6, 2, dim, dtype, prefix=([300, 0, 97], group_of)
    )
    whole = ops.paged_attention(**args, impl="cpu")
    g = torch.Generator().manual_seed(1)
    for keep in (
        [0],
        [16],
        [17],
        [39],
        [3, 1, 2],
        torch.randperm(40, generator=g).tolist(),
        list(range(5, 40, 2)),
    ):
        assert torch.equal(ops.paged_attention(**rows(args, keep), impl="cpu"), whole[keep]), keep


def test_pages_shared_by_own_tables():
    """Sequences whose own tables name the same pages, whole contexts or a part."""
    args = make_inputs([100, 100, 60, 80], 16)
    args["block_table"][1, :7] = args["block_table"][0, :7]
    args["block_table"][2, :3] = args["block_table"][0, :3]
    oracle(args)
    twice = rows(args | {"q": args["q"][[0, 0, 2, 3]]}, [0, 1])
    out = ops.paged_attention(**twice, impl="cpu")
    assert torch.equal(out[0], out[1])


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("dim", [32, 20])
@pytest.mark.parametrize("page_size", [7, 16])
def test_what_is_not_used_is_not_seen(impl, dim, page_size):
    """Unused table entries (-1, huge), pages of nobody and slots past the last token (NaN) change no bit."""
    args = make_inputs([33, 1, 0, 120], page_size, dim=dim, prefix=([20, 9], [1, 0, 1, 0]))
    before = ops.paged_attention(**args, impl=impl)
    used = torch.zeros(args["k_pages"].shape[:2], dtype=torch.bool)
    for table, lens in (args["prefix"][:2], (args["block_table"], args["context_lens"])):
        for row, n in zip(table, lens.tolist(), strict=True):
            for t in range(n):
                used[row[t // page_size], t % page_size] = True
            row[-(-n // page_size) :] = 2**31 - 1
    for pages in (args["k_pages"], args["v_pages"]):
        pages[~used] = torch.nan
    assert torch.equal(ops.paged_attention(**args, impl=impl), before) and before.isfinite().all()


@pytest.mark.parametrize("heads", [2, 8])
def test_nan_reaches_only_the_sequences_that_see_it(heads):
    args = make_inputs([150, 100, 20, 0], 16, heads, 2, 16, prefix=([120, 7], [0, 1, 0, 1]))
    places = [
        (args["block_table"][0, 9], [0]),
        (args["block_table"][2, 0], [2]),
        (args["prefix"][0][0, 6], [0, 2]),
    ]
    places.append((args["prefix"][0][1, 0], [1, 3]))
    for (page, seen), name in itertools.product(places, ("k_pages", "v_pages")):
        bad = args | {name: args[name].clone()}
        bad[name][page, 2] = torch.nan
        nan = ops.paged_attention(**bad, impl="cpu").isnan().flatten(1)
        assert torch.equal(nan.all(1), nan.any(1)) and nan.all(1).nonzero().flatten().tolist() == seen


def test_infinite_scores():
    """All scores -inf, or one +inf: NaN, as softmax is; -inf beside finite ones: weight zero."""
    args = make_inputs([100, 100, 100, 0], 16, 1, 1, 8, prefix=([3, 0], [0, 1, 0, 0]))
    args["q"] = torch.ones_like(args["q"])
    table = args["block_table"]
    args["k_pages"][table[0, :7].long()] = -torch.inf
    args["k_pages"][table[1, :7].long()] = -torch.inf
    args["k_pages"][table[2, 2], 1] = torch.inf
    out = oracle(args)
    assert out.isnan().flatten(1).all(1).tolist() == [False, True, True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_at_every_run_and_for_every_number_of_threads(dtype, threads):
    args = make_inputs([700, 20, 0, 95, 300], 16, 6, 2, 40, dtype, prefix=([600, 5], [1, 0, 0, 1, 0]))
    threads(1)
    first = ops.paged_attention(**args, impl="cpu")
    for i in range(100):
        threads(1 + i % 3)
        assert torch.equal(ops.paged_attention(**args, impl="cpu"), first), i


def test_views_of_one_cache():
    """Pages as views of one (pages, 2, page_size, G, K) cache, tables with strides, a query with a strided last dim."""
    args = make_inputs([40, 3, 90], 16, prefix=([33], [0, 0, 0]))
    expected = ops.paged_attention(**args, impl="cpu")
    cache = torch.stack([args["k_pages"], args["v_pages"]], 1)
    wide = lambda x: torch.stack([x, x], -1)[..., 0]  # noqa: E731
    views = {"q": wide(args["q"]), "k_pages": cache[:, 0], "v_pages": cache[:, 1]}
    views |= {n: wide(args[n]) for n in ("block_table", "context_lens")}
    out = ops.paged_attention(**views, prefix=tuple(wide(x) for x in args["prefix"]), impl="cpu")
    assert not views["k_pages"].is_contiguous() and torch.equal(out, expected) and out.is_contiguous()
    with pytest.raises(ValueError, match="must have last stride 1, got 1 and 2"):
        ops.paged_attention(**args | {"v_pages": wide(args["v_pages"])}, impl="cpu")
    with pytest.raises(ValueError, match="must have last stride 1"):  # a compiled graph comes this way
        call = [wide(args["k_pages"]) if n == "k_pages" else args[n] for n in NAMES]
        torch.ops.hpsafety.paged_attention(*call, *args["prefix"], 0.5, False, "cpu")


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_nothing_to_do(impl):
    """No sequence, no page, no token: empty or zero results."""
    none = make_inputs([], prefix=([5], []))
    assert ops.paged_attention(**none, impl=impl).shape == (0, 4, 32)
    args = make_inputs([0, 0], prefix=([0], [0, 0]))
    args |= {n: args[n][:0] for n in ("k_pages", "v_pages")}
    for prefix in (args["prefix"], None):
        out = ops.paged_attention(**args | {"prefix": prefix}, impl=impl)
        assert out.shape == (2, 4, 32) and not out.any()


def test_offsets_past_2_31():
    """The last page starts past 2^31 elements of a storage of which a few pages are touched."""
    size, kv_heads, dim = 16, 2, 64
    pages = 2**31 // (size * kv_heads * dim) + 2
    try:
        cache = torch.empty((pages, size, kv_heads, dim), dtype=torch.bfloat16)
    except RuntimeError:
        pytest.skip("4 GiB of address space cannot be reserved")
    args = make_inputs([40], size, 4, kv_heads, dim, torch.bfloat16)
    used, moved = args["block_table"][0, :3].long(), torch.tensor([pages - 1, 0, pages - 2])
    cache[moved] = args["k_pages"][used]
    expected = ops.paged_attention(**args | {"v_pages": args["k_pages"]}, impl="cpu")
    far = args | {"k_pages": cache, "v_pages": cache, "block_table": moved[None].to(torch.int32)}
    assert torch.equal(ops.paged_attention(**far, impl="cpu"), expected)


def test_reference_gradcheck():
    """Though the op has no gradient: the oracle is a smooth function of q, keys and values."""
    args = to_fp64(make_inputs([3, 1], 2, 2, 1, 3)) | {
        "prefix": make_inputs([3, 1], 2, prefix=([2], [0, 0]))["prefix"]
    }
    args["prefix"][0][0, 0] = 0
    x = [args[n].requires_grad_() for n in NAMES[:3]]
    rest = [args[n] for n in (*NAMES[3:], "prefix")]
    assert torch.autograd.gradcheck(lambda *x: reference.paged_attention(*x, *rest, 0.7), x)


def test_opcheck():
    args = make_inputs([9, 20], prefix=([17], [0, 0]))
    call = [args[n] for n in NAMES]
    torch.library.opcheck(
        torch.ops.hpsafety.paged_attention.default, (*call, *args["prefix"], 0.25, False, "cpu")
    )
    torch.library.opcheck(
        torch.ops.hpsafety.paged_attention.default, (*call, None, None, None, 0.25, False, "cpu")
    )


@pytest.mark.slow
def test_compile():
    args = make_inputs([9, 20], prefix=([17], [0, 0]))
    whole = torch.compile(lambda q, *rest: ops.paged_attention(2 * q, *rest), fullgraph=True)
    call = [args[n] for n in (*NAMES, "prefix")]
    torch.testing.assert_close(whole(*call), ops.paged_attention(2 * call[0], *call[1:]))
    args["block_table"][1, 1] = 99  # a compiled graph skips the checks of values in Python
    with pytest.raises(ValueError, match=r"block_table\[1\]\[1\] must lie in"):
        whole(*call)
