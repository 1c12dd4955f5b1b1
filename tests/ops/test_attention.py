"""attention. The bugs this file must catch: the causal mask of the diagonal block shifted by one; a dropped prefix."""

import itertools

import pytest
import torch

from hpsafety import ops, reference
from tests.ops.forms import PAST_INT32, check_same_bits, lazy_zeros
from tests.ops.oracle import check_against_oracle, check_error, run_with_grads, to_fp64

BLOCK = 96  # keys in a block of the C++ kernel; 384 / (H / G) rows make a task
NAMES = ("q", "k", "v")


def plain(*lengths):
    """Segments without prefixes, one after the other."""
    ends = list(itertools.accumulate(lengths))
    return [(e - n, e, 0, 0) for e, n in zip(ends, lengths, strict=True)]


def grouped(*groups):
    """(prompt, response, ...) lengths -> segments of prompt groups."""
    rows, at = [], 0
    for prompt, *responses in groups:
        first = (at, at + prompt)
        rows.append((*first, 0, 0))
        at += prompt
        for length in responses:
            rows.append((at, at + length, *first))
            at += length
    return rows


def make_inputs(segments, heads, kv_heads, dim, dtype=torch.float32, seed=0, scale=1.0, total=None):
    g = torch.Generator().manual_seed(seed)
    total = segments[-1][1] if total is None else total
    shapes = {"q": (total, heads, dim), "k": (total, kv_heads, dim), "v": (total, kv_heads, dim)}
    args = {name: torch.randn(shape, generator=g).to(dtype) for name, shape in shapes.items()}
    args["q"] = args["q"] * scale
    return args | {"segments": torch.tensor(segments, dtype=torch.int32).reshape(-1, 4)}


RAGGED = [
    plain(1),
    plain(1, 2, 1, 37),
    plain(BLOCK - 1, BLOCK, BLOCK + 1),
    plain(5, 2 * BLOCK + 3, 1),
    grouped((1, 1)),
    grouped((BLOCK, 7, BLOCK + 1, 1), (3, 50)),
    grouped((BLOCK - 1, 30, 2, 65), (BLOCK + 1, 1, 1, 1)),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("segments", RAGGED, ids=range(len(RAGGED)))
@pytest.mark.parametrize("heads, kv_heads, dim", [(1, 1, 40), (3, 1, 64)])
def test_ragged_segments(dtype, segments, heads, kv_heads, dim):
    """KER-2: forward and backward against fp64 over ragged lengths and prefixes."""
    check_against_oracle("attention", ops.attention, make_inputs(segments, heads, kv_heads, dim, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads, kv_heads, dim", [(6, 2, 64), (4, 1, 32), (8, 1, 128), (4, 2, 7), (2, 2, 1)])
def test_heads_and_dims(dtype, heads, kv_heads, dim):
    """KER-2 over head groups and head dims."""
    segments = grouped((BLOCK, 7, 30), (1, BLOCK + 1))
    check_against_oracle("attention", ops.attention, make_inputs(segments, heads, kv_heads, dim, dtype))


@pytest.mark.parametrize("seed", range(24))
def test_random_shapes(seed):
    """KER-2 on drawn layouts, head groups, head dims (32 to 128, every third draw 1 to 256), scales and dtypes."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda low, high: int(torch.randint(low, high + 1, (), generator=g))  # noqa: E731
    groups = [[draw(1, 120) for _ in range(draw(1, 5))] for _ in range(draw(1, 3))]
    kv_heads, group = draw(1, 3), (1, 2, 3, 4, 8)[draw(0, 4)]
    dim = draw(1, 256) if seed % 3 == 0 else 32 * draw(1, 4)
    dtype = torch.bfloat16 if seed % 4 == 3 else torch.float32
    args = make_inputs(grouped(*groups), kv_heads * group, kv_heads, dim, dtype, seed=seed)
    check_against_oracle("attention", ops.attention, args | {"softmax_scale": draw(1, 100) / 200})


@pytest.mark.parametrize(
    "segments", [plain(500, 3), grouped((200, *[130] * 7)), plain(1, *[9] * 30)], ids=range(3)
)
def test_tasks_that_share_keys(segments):
    """A long segment is cut into tasks and short ones are merged: their partial dK and dV add up."""
    check_against_oracle("attention", ops.attention, make_inputs(segments, 2, 1, 24))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [30.0, 1e-18])
def test_extreme_logits(dtype, scale):
    check_against_oracle(
        "attention", ops.attention, make_inputs(grouped((90, 20, 110)), 4, 2, 32, dtype, scale=scale)
    )
    check_against_oracle("attention", ops.attention, make_inputs(plain(1), 4, 2, 32, dtype, scale=scale))


def dense_runs(q, k, v, prompt, lengths):
    """The oracle on independent sequences [prompt, response], one a call; rows in the order of the shared form."""
    starts = itertools.accumulate(lengths, initial=prompt)
    own = [slice(start, start + n) for start, n in zip(starts, lengths, strict=False)]
    runs = []
    for rows in own:
        x = [torch.cat([t[:prompt], t[rows]]) for t in (q, k, v)]
        whole = torch.tensor([(0, len(x[0]), 0, 0)], dtype=torch.int32)
        runs.append(reference.attention(*x, whole))
    return torch.cat([runs[0][:prompt], *[out[prompt:] for out in runs]])


@pytest.mark.parametrize("responses", [1, 2, 8, 64])
@pytest.mark.parametrize("prompt", [1, BLOCK - 1, BLOCK, BLOCK + 1])
def test_shared_prefix_equals_independent_sequences(responses, prompt):
    """One prompt with K responses is K dense sequences [prompt, response], gradients too: the oracle in fp64 to the
    last digits, the kernel within the budget of the dense runs' own error in fp32."""
    lengths = [1 + 5 * i % 23 for i in range(responses)]
    args = make_inputs(grouped((prompt, *lengths)), 4, 2, 32)
    segments = args.pop("segments")
    dense = lambda q, k, v: dense_runs(q, k, v, prompt, lengths)  # noqa: E731
    exact, plain = run_with_grads(dense, to_fp64(args)), run_with_grads(dense, args)
    shared = run_with_grads(reference.attention, to_fp64(args) | {"segments": segments})
    ours = run_with_grads(ops.attention, args | {"segments": segments}, impl="cpu")
    for name in exact:
        torch.testing.assert_close(shared[name], exact[name], rtol=1e-12, atol=1e-12)
        check_error(name, ours[name], exact[name], plain[name])


def test_each_subset_of_requires_grad():
    args = make_inputs(grouped((20, 5, 110)), 4, 2, 24)
    whole = run_with_grads(ops.attention, args, impl="cpu", grads=NAMES)
    for size in range(len(NAMES)):
        for subset in itertools.combinations(NAMES, size):
            part = run_with_grads(ops.attention, args, impl="cpu", grads=subset)
            assert part.keys() == {"out0", *(f"grad_{n}" for n in subset)}
            for key, value in part.items():
                assert torch.equal(value, whole[key]), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_views_of_one_buffer(dtype):
    """q, k and v as the model holds them: views of one (T, G, H/G + 2, K) buffer; then a strided last dim."""
    segments = grouped((40, 100, 3))
    args = make_inputs(segments, 6, 2, 32, dtype)
    segments = args.pop("segments")
    expected = run_with_grads(ops.attention, args | {"segments": segments}, impl="cpu")
    total = segments[-1, 1]
    buffer = torch.cat(
        [args["q"].reshape(total, 2, 3, 32), args["k"][:, :, None], args["v"][:, :, None]], dim=2
    )
    q, k, v = buffer[:, :, :3].flatten(1, 2), buffer[:, :, 3], buffer[:, :, 4]
    assert not k.is_contiguous()
    assert torch.equal(ops.attention(q, k, v, segments, impl="cpu"), expected["out0"])
    wide = [torch.stack([x, x], dim=-1)[..., 0].requires_grad_() for x in (q, k, v)]
    out = ops.attention(*wide, segments, impl="cpu")
    assert out.is_contiguous() and torch.equal(out, expected["out0"])
    grads = torch.autograd.grad(
        out, wide, torch.ones(()).to(dtype).expand(out.shape)
    )  # a gradient of stride 0
    dense = [x.detach().contiguous().requires_grad_() for x in wide]
    again = torch.autograd.grad(ops.attention(*dense, segments, impl="cpu"), dense, torch.ones_like(out))
    assert all(torch.equal(a, b) for a, b in zip(grads, again, strict=True))


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_no_rows_and_rows_of_no_segment(impl):
    """T=0 and S=0 work; rows outside of all segments give zeros and get zero gradients, unless a prefix holds them."""
    empty = run_with_grads(ops.attention, make_inputs([], 4, 2, 8, total=0), impl=impl)
    assert empty["out0"].shape == (0, 4, 8)
    unused = run_with_grads(ops.attention, make_inputs([], 4, 2, 8, total=3), impl=impl)
    assert unused["out0"].shape == (3, 4, 8) and all(not bool(x.any()) for x in unused.values())
    args = make_inputs([(2, 5, 0, 0), (9, 12, 6, 8)], 4, 2, 8, total=14)
    result = run_with_grads(ops.attention, args, impl=impl)
    outside = torch.tensor([0, 1, 5, 6, 7, 8, 12, 13])
    alone = torch.tensor([0, 1, 5, 8, 12, 13])
    assert not result["out0"][outside].any() and not result["grad_q"][outside].any()
    assert not result["grad_k"][alone].any() and not result["grad_v"][alone].any()
    assert result["grad_v"][6:8].abs().min() > 0
    if impl == "cpu":
        check_against_oracle("attention", ops.attention, args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_at_every_run_and_for_every_number_of_threads(dtype, threads):
    segments = grouped((150, 60, 33, 200), (40, 3)) + [
        (s + 489, e + 489, 0, 0) for s, e, _, _ in plain(300, 20)
    ]
    assert segments[6][0] == segments[5][1] + 3  # and three rows of no segment
    args = make_inputs(segments, 6, 2, 40, dtype)
    check_same_bits(ops.attention, args, threads, repeats=20)


def test_a_hundred_runs_give_the_same_bits(threads):
    check_same_bits(ops.attention, make_inputs(grouped((60, 30, 110)), 4, 2, 32), threads)


def strided_rows(like, row_stride):
    """A view of a lazily touched storage that holds `like` (T, heads, K), its rows row_stride elements apart."""
    storage = lazy_zeros((len(like) - 1) * row_stride + like[0].numel(), like.dtype)
    return storage.as_strided(like.shape, (row_stride, like.shape[2], 1)).copy_(like)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_offsets_past_32_bits(dtype):
    """Rows that far apart: row offsets pass 2^31 elements, which 32 bits cannot hold."""
    args = make_inputs(grouped((3, 1, 1)), 2, 1, 16, dtype)
    far = {n: strided_rows(args[n], PAST_INT32 // 4 + 1) for n in NAMES}
    assert torch.equal(ops.attention(**args | far, impl="cpu"), ops.attention(**args, impl="cpu"))
    x = [far[n].detach().requires_grad_() for n in NAMES]  # views stay where they are
    out = ops.attention(*x, args["segments"], impl="cpu")
    near = [args[n].clone().requires_grad_() for n in NAMES]
    expected = torch.autograd.grad(ops.attention(*near, args["segments"], impl="cpu").sum(), near)
    for got, want in zip(torch.autograd.grad(out.sum(), x), expected, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("heads, kv_heads", [(3, 3), (6, 2), (8, 1)])
def test_isolation(heads, kv_heads):
    """Changing one response's tokens changes no bit of another's rows, nor of the prompt's."""
    args = make_inputs(grouped((50, 30, 45, 9), (20, 110)), heads, kv_heads, 32)
    segments = args["segments"].tolist()
    before = ops.attention(**args, impl="cpu")
    for start, end, _, _ in [segments[2], segments[3]]:
        changed = {n: args[n].clone() for n in NAMES}
        for x in changed.values():
            x[start:end] = torch.nan
        after = ops.attention(**changed, segments=args["segments"], impl="cpu")
        assert after[start:end].isnan().all()
        kept = torch.ones(len(before), dtype=torch.bool)
        kept[start:end] = False
        assert torch.equal(after[kept], before[kept])


GROUPS = [(3,), (100,), (1,), (40, 30, 200, 1), (130,), (17, 17), (200,), (500,), (97, 5, 5, 5), (64,)]


@pytest.mark.parametrize("heads, kv_heads", [(6, 2), (8, 1)])
def test_alone_or_packed(heads, kv_heads):
    """A group's bits, gradients too, do not depend on what else is in the batch: not even where the neighbours alone
    would make a long segment fall into other tasks (8 heads a group: a task has 48 rows or an eighth of its run)."""
    args = make_inputs(grouped(*GROUPS), heads, kv_heads, 24)
    packed = run_with_grads(ops.attention, args, impl="cpu")
    weights = torch.randn(
        packed["out0"].shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    end = 0
    for group in GROUPS:
        start, end = end, end + sum(group)
        x = [args[n][start:end].clone().requires_grad_() for n in NAMES]
        out = ops.attention(*x, torch.tensor(grouped(group), dtype=torch.int32), impl="cpu")
        grads = torch.autograd.grad(out, x, weights[start:end].float())
        for name, value in zip(("out0", "grad_q", "grad_k", "grad_v"), (out, *grads), strict=True):
            assert torch.equal(value, packed[name][start:end]), (name, group)


def test_responses_of_one_prompt_do_not_meet():
    """A response's output bits are the same with and without its siblings."""
    args = make_inputs(grouped((150, 60, 33, 200)), 6, 2, 24)
    together = ops.attention(**args, impl="cpu")
    for start, end, *prefix in args["segments"].tolist()[1:]:
        rows = torch.cat([torch.arange(*prefix), torch.arange(start, end)])
        alone = torch.tensor(grouped((150, end - start)), dtype=torch.int32)
        assert torch.equal(ops.attention(*[args[n][rows] for n in NAMES], alone, impl="cpu"), together[rows])


@pytest.mark.parametrize("group", [1, 3])
def test_nan_stays_with_the_rows_that_see_it(group):
    """A NaN key or value reaches its own row, later rows of its segment, and segments whose prefix holds it."""
    segments = grouped((100, 40, 20), (30,))
    for row, seen in [
        (7, [*range(7, 160)]),
        (99, [*range(99, 160)]),
        (105, [*range(105, 140)]),
        (189, [189]),
    ]:
        for name in ("k", "v"):
            args = make_inputs(segments, group, 1, 16)
            args[name][row] = torch.nan
            bad = ops.attention(**args, impl="cpu").isnan().flatten(1)
            assert torch.equal(bad.all(1), bad.any(1)) and bad.all(1).nonzero().flatten().tolist() == seen, (
                row,
                name,
            )


def test_reference_gradcheck():
    args = to_fp64(make_inputs(grouped((2, 1, 1)), 2, 1, 2))
    x = [args[n].requires_grad_() for n in NAMES]
    assert torch.autograd.gradcheck(lambda q, k, v: reference.attention(q, k, v, args["segments"], 0.7), x)


def test_opcheck():
    args = make_inputs(grouped((9, 4, 5)), 4, 2, 16)
    x = [args[n].requires_grad_() for n in NAMES]
    call = (*x, args["segments"], 0.25, False, "cpu")
    torch.library.opcheck(torch.ops.hpsafety.attention.default, call)
    out = ops.attention(*x, args["segments"], 0.25, impl="cpu")
    through_dispatcher = torch.ops.hpsafety.attention(*call)[0]
    assert torch.equal(through_dispatcher, out)
    for a, b in zip(*(torch.autograd.grad(o.sum(), x) for o in (out, through_dispatcher)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.slow
def test_compile():
    args = make_inputs(grouped((9, 4, 5)), 4, 2, 16)
    whole = torch.compile(lambda q, k, v, segments: ops.attention(2 * q, k, v, segments), fullgraph=True)
    eager = run_with_grads(lambda q, k, v, segments: ops.attention(2 * q, k, v, segments), args)
    for key, value in run_with_grads(whole, args).items():
        torch.testing.assert_close(value, eager[key])


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize(
    "segments, message",
    [
        ([(0, 4, 0, 0), (4, 4, 0, 0)], r"segments\[1\] is empty: start 4, end 4"),
        ([(5, 3, 0, 0)], r"segments\[0\] is empty"),
        ([(0, 4, 0, 0), (3, 6, 0, 0)], "must not overlap"),
        ([(4, 6, 0, 0), (0, 4, 0, 0)], "must be sorted"),
        ([(-1, 4, 0, 0)], "must be sorted"),
        ([(0, 9, 0, 0)], r"segments\[0\] ends at 9, but there are 8 rows"),
        ([(2, 6, 0, 3)], r"prefix of segments\[0\] must lie in \[0, 2\)"),
        ([(2, 6, -1, 2)], "prefix of"),
        ([(2, 6, 2, 0)], "prefix of"),
        ([(2, 6, 7, 8)], "prefix of"),
    ],
)
def test_bad_segments(impl, segments, message):
    with pytest.raises(ValueError, match=message):
        ops.attention(**make_inputs(segments, 2, 1, 4, total=8), impl=impl)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"q": torch.zeros(8, 4)}, "q must be"),
        ({"k": torch.zeros(7, 2, 4)}, r"k must be \(8, G, 4\)"),
        ({"k": torch.zeros(8, 2, 5)}, "k must be"),
        ({"v": torch.zeros(8, 1, 4)}, "v must be like k"),
        ({"v": torch.zeros(8, 2, 4, dtype=torch.bfloat16)}, "v must be like k"),
        ({"q": torch.zeros(8, 3, 4)}, "3 query heads must be a multiple of the 2"),
        ({n: torch.zeros(8, 2, 257) for n in NAMES}, "head dim must be 1 to 256"),
        ({n: torch.zeros(8, 2, 4).double() for n in NAMES}, "float32 or bfloat16"),
        ({"segments": torch.zeros(1, 4, dtype=torch.int64)}, "segments must be"),
        ({"segments": torch.zeros(4, dtype=torch.int32)}, "segments must be"),
        ({"softmax_scale": 0.0}, "softmax_scale must be positive"),
        ({"k": torch.zeros(8, 2, 4, device="meta")}, "one device; q is on cpu, k on meta"),
        ({"v": torch.zeros(8, 2, 4, device="meta")}, "v on meta"),
        ({"segments": torch.zeros(1, 4, dtype=torch.int32, device="meta")}, "segments on meta"),
    ],
)
def test_bad_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        ops.attention(**make_inputs(plain(8), 4, 2, 4) | change, impl="cpu")
