"""attention in Triton. The bugs this file must catch: a row that sees one key too many or too few; a prompt's gradient
that misses one of its responses; a block that is read twice where it should be shared."""

import itertools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from hpsafety import ops, reference
from hpsafety.triton_kernels import attention as forward
from hpsafety.triton_kernels import attention_backward as backward
from hpsafety.triton_kernels.attention_tiles import key_tiles, query_tiles
from hpsafety.triton_kernels.launch import record
from tests.ops.forms import PAST_INT32
from tests.ops.oracle import check_error, run_with_grads, to_fp64
from tests.ops.test_attention import NAMES, dense_runs, grouped, make_inputs, plain, strided_rows
from tests.triton.audit import audit
from tests.triton.device import DEVICE, check_triton, place
from tests.triton.last_program import needs_interpreter

DTYPES = [torch.float32, torch.bfloat16]
ROWS, KEYS = 32, 16  # the tests' tiles: small, so that few rows cross many borders
GENERAL = [  # prefixes that are a part of a segment, of no segment, of several, of one another; rows of no segment
    [
        (2, 40, 0, 0),
        (45, 63, 40, 44),
        (63, 70, 40, 44),
        (70, 75, 10, 35),
        (75, 99, 30, 72),
        (99, 101, 75, 99),
    ],
    [(0, 20, 0, 0), (20, 50, 0, 0), (50, 60, 0, 50), (60, 61, 0, 50), (61, 90, 5, 5), (90, 120, 20, 50)],
]


@pytest.fixture
def small(monkeypatch):
    tiles = {"num_warps": 4, "num_stages": 1}
    monkeypatch.setattr(forward, "forward_config", lambda *_: {"ROWS": ROWS, "KEYS": KEYS} | tiles)
    monkeypatch.setattr(backward, "keys_config", lambda *_: {"ROWS": KEYS, "KEYS": ROWS} | tiles)
    monkeypatch.setattr(backward, "rows_config", lambda *_: {"ROWS": ROWS, "KEYS": KEYS} | tiles)


def call(args):
    """(out, lse, the arguments of backward) of the launching functions themselves."""
    q, k, v, segments = (args[n] for n in (*NAMES, "segments"))
    out, lse = forward.attention(q, k, v, segments, 0.3, False)
    return out, lse, (torch.ones_like(out), q, k, v, out, lse, segments, 0.3, False)


@pytest.mark.parametrize(
    "segments, heads, kv_heads, dim, dtype",
    [
        (plain(1), 1, 1, 16, torch.float32),
        (plain(1), 2, 1, 16, torch.bfloat16),
        (plain(1, 2, 1, 37), 2, 1, 7, torch.float32),
        (plain(ROWS - 1, ROWS, ROWS + 1), 1, 1, 16, torch.float32),
        (grouped((KEYS, 7, KEYS + 1, 1), (3, 20)), 3, 1, 40, torch.bfloat16),
        (grouped((KEYS - 1, 20, 2), (ROWS + 1, 1, 1)), 2, 1, 1, torch.float32),
        (GENERAL[0], 3, 1, 9, torch.bfloat16),
        (GENERAL[1], 2, 1, 16, torch.float32),
        (grouped((2, 1, 2)), 40, 1, 16, torch.float32),
    ],
    ids=range(9),
)
def test_matches_oracle(small, segments, heads, kv_heads, dim, dtype):
    """KER-2 over ragged segments, general prefixes, head dims and groups of heads, also of more than a tile's rows."""
    args = make_inputs(segments, heads, kv_heads, dim, dtype, total=segments[-1][1] + 2)
    check_triton("attention", ops.attention, args)


@pytest.mark.parametrize(
    "dtype, heads, dim", [(torch.bfloat16, 4, 64), (torch.bfloat16, 1, 130), (torch.float32, 2, 70)]
)
def test_matches_oracle_with_its_own_tiles(dtype, heads, dim):
    check_triton("attention", ops.attention, make_inputs(grouped((70, 13, 20)), heads, 1, dim, dtype))


@pytest.mark.sweep
@pytest.mark.parametrize("seed", range(80))
def test_drawn_shapes(seed, request):
    g = torch.Generator().manual_seed(seed)
    draw = lambda low, high: int(torch.randint(low, high + 1, (), generator=g))  # noqa: E731
    if seed % 4:
        request.getfixturevalue("small")
    groups = [[draw(1, 60) for _ in range(draw(1, 6))] for _ in range(draw(1, 3))]
    kv_heads, group = draw(1, 2), (1, 2, 3, 4, 7)[draw(0, 4)]
    args = make_inputs(grouped(*groups), kv_heads * group, kv_heads, draw(1, 130), DTYPES[seed % 2], seed)
    check_triton("attention", ops.attention, args | {"softmax_scale": draw(1, 100) / 200})


@pytest.mark.parametrize(
    "dtype, scale", [(torch.float32, 30.0), (torch.bfloat16, 30.0), (torch.float32, 1e-18)]
)
def test_extreme_logits(small, dtype, scale):
    check_triton("attention", ops.attention, make_inputs(grouped((20, 7, 30)), 2, 1, 32, dtype, scale=scale))


@pytest.mark.parametrize("prompt, responses", [(1, 1), (KEYS + 1, 5), (5, 64)])
def test_shared_prefix_equals_independent_sequences(small, prompt, responses):
    lengths = [1 + i % 2 if responses > 8 else 1 + 5 * i % 11 for i in range(responses)]
    args = make_inputs(grouped((prompt, *lengths)), 1, 1, 16)
    segments = args.pop("segments")
    dense = lambda q, k, v: dense_runs(q, k, v, prompt, lengths)  # noqa: E731
    exact, rounded = run_with_grads(dense, to_fp64(args)), run_with_grads(dense, args)
    ours = run_with_grads(ops.attention, place(args | {"segments": segments}), impl="triton")
    for name in exact:
        check_error(name, ours[name].cpu(), exact[name], rounded[name])


def test_no_rows_and_rows_of_no_segment(small):
    for total in (0, 3):
        result = run_with_grads(ops.attention, place(make_inputs([], 4, 2, 8, total=total)), impl="triton")
        assert result["out0"].shape == (total, 4, 8) and all(not bool(x.any()) for x in result.values())
    args = place(make_inputs([(2, 5, 0, 0), (9, 12, 6, 8)], 4, 2, 8, total=14))
    for n in NAMES:
        args[n][[0, 5, 8, 13]] = torch.nan
    out, lse, arguments = call(args)
    dq, dk, dv = backward.attention_backward(*arguments)
    outside = [0, 1, 5, 6, 7, 8, 12, 13]
    alone = [0, 1, 5, 8, 12, 13]
    assert not out[outside].any() and not lse[outside].any() and not dq[outside].any()
    assert not dk[alone].any() and not dv[alone].any() and dv[6:8].abs().min() > 0


GROUPS = [(3,), (20, 9, 40, 1), (17,), (18, 3, 3)]


@pytest.mark.parametrize("dtype, heads", [(torch.float32, 2), (torch.bfloat16, 1)])
def test_alone_or_packed(small, dtype, heads):
    """A group's bits, gradients too, do not depend on what else is in the batch; a response's not on its siblings."""
    args = place(make_inputs(grouped(*GROUPS), heads, 1, 16, dtype))
    packed = run_with_grads(ops.attention, args, impl="triton")
    weights = torch.randn(
        packed["out0"].shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    end = 0
    for group in GROUPS:
        start, end = end, end + sum(group)
        x = [args[n][start:end].clone().requires_grad_() for n in NAMES]
        out = ops.attention(*x, torch.tensor(grouped(group), dtype=torch.int32, device=DEVICE), impl="triton")
        grads = torch.autograd.grad((out.double() * weights[start:end].to(DEVICE)).sum(), x)
        for name, value in zip(("out0", "grad_q", "grad_k", "grad_v"), (out, *grads), strict=True):
            assert torch.equal(value, packed[name][start:end]), (name, group)
    for start, end, *prefix in args["segments"].tolist():
        rows = torch.cat([torch.arange(*prefix), torch.arange(start, end)])
        alone = grouped((prefix[1] - prefix[0], end - start)) if prefix[1] else plain(end - start)
        alone = torch.tensor(alone, dtype=torch.int32, device=DEVICE)
        out = ops.attention(*[args[n][rows] for n in NAMES], alone, impl="triton")
        assert torch.equal(out, packed["out0"][rows]), (start, end)


def test_alone_or_packed_with_its_own_tiles():
    args = place(make_inputs(grouped((9,), (150, 20, 40)), 1, 1, 16, torch.bfloat16))
    packed = ops.attention(**args, impl="triton")
    segments = torch.tensor(grouped((150, 40)), dtype=torch.int32, device=DEVICE)
    rows = torch.cat([torch.arange(9, 159), torch.arange(179, 219)])
    assert torch.equal(ops.attention(*[args[n][rows] for n in NAMES], segments, impl="triton"), packed[rows])


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_stay_with_the_rows_that_see_them(small, dtype):
    """And change no bit of the others, which may stand in the same tile."""
    segments = grouped((20, 12, 9), (5,))
    clean = ops.attention(**place(make_inputs(segments, 1, 1, 16, dtype)), impl="triton")
    rows = [(7, range(7, 41)), (23, range(23, 32)), (45, [45])]
    for row, seen in rows[:2] if dtype == torch.float32 else rows[1:]:
        for name, bad in [("q", torch.nan), ("k", torch.nan), ("v", torch.nan), ("v", torch.inf)][
            row == 45 :
        ]:
            args = place(make_inputs(segments, 1, 1, 16, dtype))
            args[name][row, :, 3] = bad
            out = ops.attention(**args, impl="triton")
            sees = [row] if name == "q" else [*seen]
            kept = [i for i in range(len(out)) if i not in sees]
            assert torch.equal(out[kept], clean[kept]), (row, name, bad)
            exact = reference.attention(**to_fp64({n: x.cpu() for n, x in args.items()}))[sees]
            assert torch.equal(exact.isnan(), out[sees].cpu().isnan()), (row, name, bad)
            assert torch.equal(exact.isinf(), out[sees].cpu().isinf()), (row, name, bad)


def test_infinities_of_both_signs_make_nan(small):
    args = place(make_inputs(plain(9), 1, 1, 16))
    args["v"][3, 0, 1], args["v"][5, 0, 1] = torch.inf, -torch.inf
    column = ops.attention(**args, impl="triton")[:, 0, 1]
    assert column[:3].isfinite().all() and (column[3:5] == torch.inf).all() and column[5:].isnan().all()


def test_scores_of_minus_infinity(small):
    """Have weight 0; a row of no other score is NaN."""
    args = place(make_inputs(grouped((20, 30)), 2, 1, 16))
    args["q"][:, 0, 0], args["q"][:, 1, 0] = 1.0, 0.5
    args["k"][17:20, 0, 0] = args["k"][0, 0, 0] = -torch.inf
    out = ops.attention(**args, impl="triton").cpu()
    exact = reference.attention(**to_fp64({n: x.cpu() for n, x in args.items()}))
    check_error("out", out, exact, exact.float())
    assert out[0].isnan().all() and out[1:].isfinite().all()


def test_views_and_strided_gradients(small):
    """q, k and v as views of one (T, G, H/G + 2, K) buffer; a gradient of stride 0 and one with gaps between rows."""
    dtype = torch.bfloat16
    args = place(make_inputs(grouped((10, 17, 3)), 3, 1, 16, dtype))
    out, lse, arguments = call(args)
    buffer = torch.cat([args["q"], args["k"], args["v"]], dim=1)
    views = {"q": buffer[:, :3], "k": buffer[:, 3:4], "v": buffer[:, 4:]}
    assert not views["q"].is_contiguous()
    again = call(views | {"segments": args["segments"]})
    assert torch.equal(again[0], out) and torch.equal(again[1], lse) and again[0].is_contiguous()
    expected = backward.attention_backward(*arguments)
    gaps = torch.ones((*out.shape[:2], 24), dtype=dtype, device=DEVICE)[..., :16]
    for grad in (torch.ones((), dtype=dtype, device=DEVICE).expand(out.shape), gaps):
        for ours, want in zip(backward.attention_backward(grad, *again[2][1:]), expected, strict=True):
            assert ours.is_contiguous() and torch.equal(ours, want)


@pytest.mark.skipif(DEVICE != "cpu", reason="the storage is reserved, not touched, only on the CPU")
@pytest.mark.parametrize("row_stride", [PAST_INT32 // 8 + 1, PAST_INT32 // 30])
def test_offsets_past_32_bits(small, row_stride):
    """Rows that far apart: within a block, and between blocks only."""
    args = make_inputs(grouped((20, 13, 1)), 1, 1, 8, torch.bfloat16)
    far = {n: strided_rows(args[n], row_stride) for n in NAMES}
    (out, _, near), (wide, _, apart) = call(args), call(args | far)
    assert torch.equal(wide, out)
    grad = strided_rows(near[0], row_stride)
    expected = backward.attention_backward(*near)
    for ours, want in zip(backward.attention_backward(grad, *apart[1:]), expected, strict=True):
        assert torch.equal(ours, want)


def watched(args, seed=None, **more):
    segments, total = args["segments"], len(args["q"])
    group = args["q"].shape[1] // args["k"].shape[1]
    tiles = query_tiles(segments, total, ROWS // min(ROWS, group))
    keys = key_tiles(segments, total, ROWS)
    return audit(seed, **args, tiles=tiles, key_tiles=keys.tiles, parts=keys.parts, **more)


SHARED = [grouped((40, 3, 4, 5, 2, 6), (20, 5)), GENERAL[0]]


@needs_interpreter
@pytest.mark.parametrize("segments", SHARED, ids=range(2))
def test_memory_and_traffic_of_forward(small, segments):
    """Every row is read and written once; a prefix once per tile and kv head, however many responses are in it."""
    heads, dim = 2, 16
    args = make_inputs(segments, heads, 1, dim, torch.bfloat16)
    outs = []
    for seed in (None, 1):
        with watched(args, seed) as seen:
            outs.append(call(args)[0])
        seen.check()
    assert torch.equal(*outs)
    tokens, row = len(args["q"]), dim * 2  # bytes of a token's keys
    inside = sum(end - start for start, end, _, _ in segments)
    tiles = [t for t in query_tiles(args["segments"], tokens, ROWS // 2).tolist() if t[0] < t[1]]
    assert seen.traffic["q"].load_bytes == tokens * heads * dim * 2
    keys = 0
    for _, last, segment0, segment1 in tiles:
        if segment0 < segment1:
            keys += segments[segment0][3] - segments[segment0][2]  # once, not once for each segment
            keys += sum(min(end, last) - start for start, end, _, _ in segments[segment0:segment1])
    for name in ("k", "v"):
        assert seen.traffic[name].load_bytes == keys * row
    written = [
        t
        for n, t in seen.traffic.items()
        if n.startswith("new") and t.store_bytes == tokens * heads * dim * 2
    ]
    assert len(written) == 1 and written[0].store_unique == written[0].store_bytes
    if segments is SHARED[0]:  # the five short responses are 20 tokens: two tiles
        assert sum(40 <= first < 60 for first, *_ in tiles) == 2 and inside == tokens


@needs_interpreter
@pytest.mark.parametrize("segments", SHARED, ids=range(2))
def test_memory_and_traffic_of_backward(small, segments):
    """dQ, dK and dV are written once, in any order of the programs with the same bits; a key tile reads each block of
    rows that sees it once, for all keys."""
    args = make_inputs(segments, 2, 1, 16, torch.bfloat16)
    out, lse, arguments = call(args)
    results = []
    for seed in (None, 1):
        with watched(args, seed, out=out, lse=lse, grad=arguments[0]) as seen:
            results.append(backward.attention_backward(*arguments))
        seen.check()
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    for x in results[0]:
        sizes = [t for t in seen.traffic.values() if t.store_bytes == t.store_unique == x.numel() * 2]
        assert sizes
    tokens, a_token = len(out), 2 * 16 * 2
    block = KEYS // 2  # tokens of a block of rows
    from_rows = tokens
    for key0 in range(0, tokens, ROWS):
        key1 = min(key0 + ROWS, tokens)
        for start, end, _, _ in segments:
            if start < key1 and end > key0:
                from_rows += end - start - (max(key0, start) - start) // block * block
        for (p0, p1), run in itertools.groupby(segments, key=lambda s: s[2:]):
            rows = list(run)
            if p0 < min(p1, key1) and p1 > key0:
                from_rows += rows[-1][1] - rows[0][0]
    assert seen.traffic["q"].load_bytes == from_rows * a_token
    assert seen.traffic["grad"].load_bytes == (from_rows + tokens) * a_token  # and once for delta


def brute_force(segments, total):
    """Of each row: its run (an index) or None."""
    of_row, run, before = [None] * total, -1, None
    for start, end, p0, p1 in segments:
        joined = before and before[1] == start and before[2:] == (p0, p1) and p0 < p1
        run += not joined
        before = (start, end, p0, p1)
        of_row[start:end] = [run] * (end - start)
    return of_row


@pytest.mark.parametrize("seed", range(20))
def test_tables(seed):
    """Tiles cover every row once, stay inside one run, name their segments, and come longest first."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda low, high: int(torch.randint(low, high + 1, (), generator=g))  # noqa: E731
    segments = grouped(*[[draw(1, 30) for _ in range(draw(1, 6))] for _ in range(draw(1, 5))])
    segments = [s for s in segments if draw(0, 4)] or plain(1)
    total, tokens = segments[-1][1] + draw(0, 9), draw(1, 20)
    table = torch.tensor(segments, dtype=torch.int32)
    of_row, covered, work = brute_force(segments, total), [0] * total, []
    for first, last, segment0, segment1 in query_tiles(table, total, tokens).tolist():
        assert last - first <= tokens
        for row in range(first, last):
            covered[row] += 1
        if first == last:
            work.append(-1)
            continue
        assert len(set(of_row[first:last])) == 1
        inside = [i for i, s in enumerate(segments) if s[0] < last and s[1] > first]
        assert inside == list(range(segment0, segment1))
        s = segments[segment0]
        work.append(s[3] - s[2] + last - s[0] if inside else 0)
    assert covered == [1] * total and work == sorted(work, reverse=True)
    tiles, parts = key_tiles(table, total, tokens)
    parts = parts.tolist()
    assert parts[: len(segments)] == [[a, b, a, b, -1 if p0 < p1 else a] for a, b, p0, p1 in segments]
    assert sorted(t[0] for t in tiles.tolist()) == list(range(-(-total // tokens)))
    for tile, segment0, segment1, run0, run1 in tiles.tolist():
        key0, key1 = tile * tokens, min(total, (tile + 1) * tokens)
        inside = [i for i, s in enumerate(segments) if s[0] < key1 and s[1] > key0]
        assert inside == list(range(segment0, segment1))
        seen_by = sorted(
            i for p0, p1, a, b, _ in parts[run0:run1] if p0 < key1 and p1 > key0 for i in range(a, b)
        )
        assert seen_by == [
            i for s in segments if s[2] < min(s[3], key1) and s[3] > key0 for i in range(s[0], s[1])
        ]


def test_tables_are_made_once_for_a_batch():
    segments = torch.tensor(grouped((9, 4, 5)), dtype=torch.int32, device=DEVICE)
    first = query_tiles(segments, 18, 8)
    assert query_tiles(segments, 18, 8) is first and query_tiles(segments, 18, 4) is not first
    segments[0, 1] = 8  # changed in place: the tables are stale
    assert query_tiles(segments, 18, 8) is not first
    assert query_tiles(segments.clone(), 18, 8) is not first


def test_fake_tensors_launch_what_real_ones_do(small):
    """Grids and arguments follow from shapes alone: nothing is read on the host."""
    args = place(make_inputs(grouped((20, 7, 30)), 4, 2, 16))
    with record() as real:
        backward.attention_backward(*call(args)[2])
    with FakeTensorMode() as mode, record() as fake:
        backward.attention_backward(*call({n: mode.from_tensor(x) for n, x in args.items()})[2])
    assert [(x.kernel, x.programs, x.constants) for x in fake] == [
        (x.kernel, x.programs, x.constants) for x in real
    ]
    assert len(real) == 5


def test_bad_segments():
    with pytest.raises(ValueError, match="must not overlap"):
        ops.attention(**make_inputs([(0, 4, 0, 0), (3, 6, 0, 0)], 2, 1, 4, total=8), impl="triton")
