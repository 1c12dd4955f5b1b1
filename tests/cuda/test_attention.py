"""attention in CUDA, forward. The bugs this file must catch: a row that sees one key too many or too few; a copy that
is used before it is there; a prefix that is read for each response where it should be shared."""

import ctypes
import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from hpsafety import ops, reference
from hpsafety.cuda_kernels import attention as forward
from hpsafety.cuda_kernels import library
from hpsafety.ops import backends
from hpsafety.triton_kernels.attention_tiles import query_tiles
from tests.cuda import replay
from tests.cuda.conftest import DEVICE, check_cuda, place
from tests.ops.forms import PAST_INT32
from tests.ops.oracle import check_error, to_fp64
from tests.ops.test_attention import NAMES, dense_runs, grouped, make_inputs, plain, strided_rows

BF16 = torch.bfloat16
ROWS, KEYS = forward.ROWS, {64: 128, 128: 64}  # of a block of scores, by head dim
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


def call(args, scale=None):
    """(out, lse) of the launching function itself, on the CPU."""
    args = place(args)
    scale = args["q"].shape[-1] ** -0.5 if scale is None else scale
    return tuple(
        x.cpu() for x in forward.attention(*(args[n] for n in NAMES), args["segments"], scale, False)
    )


def exact_lse(args, scale):
    """(T, H) in fp64, base 2, from the definition."""
    q, k = (args[n].double() for n in ("q", "k"))
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    out = q.new_zeros(q.shape[:2])
    for start, end, prefix0, prefix1 in args["segments"].tolist():
        for i in range(start, end):
            keys = torch.cat([k[prefix0:prefix1], k[start : i + 1]])
            out[i] = torch.einsum("hd,thd->th", q[i], keys).mul(scale).logsumexp(0) / math.log(2)
    return out


def check(args, scale=None):
    out, lse = call(args, scale)
    scale = args["q"].shape[-1] ** -0.5 if scale is None else scale
    exact = reference.attention(**to_fp64(args), softmax_scale=scale)
    check_error("out", out, exact, reference.attention(**args, softmax_scale=scale))
    assert lse.dtype == torch.float32
    torch.testing.assert_close(lse.double(), exact_lse(args, scale), rtol=2e-6, atol=2e-5)


@pytest.mark.parametrize(
    "segments, heads, kv_heads, dim",
    [
        (plain(1), 1, 1, 64),
        (plain(1), 2, 1, 128),
        (plain(1, 2, 1, 37), 4, 2, 64),
        (plain(ROWS - 1, ROWS, ROWS + 1), 1, 1, 64),
        (plain(ROWS // 4 - 1, ROWS // 4 + 1, 70), 4, 1, 128),
        (grouped((127, 7, 129, 1), (3, 20)), 3, 1, 64),
        (grouped((128, 9, 40), (256, 1)), 2, 1, 64),
        (grouped((63, 1, 64, 65), (64, 3), (65, 2)), 1, 1, 128),
        (grouped((130, 70, 3)), 7, 1, 128),
        (plain(300), 1, 1, 64),
        (plain(200), 2, 2, 128),
        (GENERAL[0], 3, 1, 64),
        (GENERAL[1], 2, 1, 128),
        (grouped((2, 1, 2)), 130, 1, 64),
        (grouped((5, *[1 + i % 2 for i in range(64)])), 1, 1, 64),
        (grouped((130, 5, 270)), 8, 1, 64),
        (grouped((70, 3, 150)), 8, 1, 128),
    ],
    ids=range(17),
)
def test_matches_oracle(segments, heads, kv_heads, dim):
    """KER-2 over ragged segments, general prefixes, K from 1 to 64, and groups of heads, also of more than a tile's
    rows; whole blocks of keys of the prefix, of the segment, of both, and none."""
    check(make_inputs(segments, heads, kv_heads, dim, BF16, total=segments[-1][1] + 2))


@pytest.mark.sweep
@pytest.mark.parametrize("seed", range(80))
def test_drawn_shapes(seed, monkeypatch):
    g = torch.Generator().manual_seed(seed)
    draw = lambda low, high: int(torch.randint(low, high + 1, (), generator=g))  # noqa: E731
    monkeypatch.setattr(forward, "resident_blocks", lambda _: draw(1, 4))
    groups = [[draw(1, 150) for _ in range(draw(1, 6))] for _ in range(draw(1, 3))]
    kv_heads, group = draw(1, 2), (1, 2, 3, 4, 7)[draw(0, 4)]
    check(
        make_inputs(grouped(*groups), kv_heads * group, kv_heads, 64 << seed % 2, BF16, seed),
        draw(1, 100) / 200,
    )


@pytest.mark.parametrize("scale", [30.0, 1e-18])
def test_extreme_logits(scale):
    check(make_inputs(grouped((150, 7, 30)), 2, 1, 64, BF16, scale=scale))


@pytest.mark.parametrize("dim", [64, 128])
def test_maxima_that_rise_late(dim):
    """Scores grow along the keys, by steps below and above what makes a row's maximum move."""
    args = make_inputs(plain(400), 1, 1, dim, BF16)
    args["q"][:], args["k"][:] = 0, 0
    args["q"][:, 0, 0] = 1
    args["k"][:, 0, 0] = torch.arange(400) / 8 + (torch.arange(400) == 130) * 100
    args["k"][300:, 0, 0] += 200
    check(args, scale=1.0)


@pytest.mark.parametrize("prompt, responses", [(1, 1), (129, 5), (5, 64)])
def test_shared_prefix_equals_independent_sequences(prompt, responses):
    lengths = [1 + i % 2 if responses > 8 else 1 + 5 * i % 11 for i in range(responses)]
    args = make_inputs(grouped((prompt, *lengths)), 1, 1, 64, BF16)
    tensors = {n: args[n] for n in NAMES}
    exact, rounded = (dense_runs(**x, prompt=prompt, lengths=lengths) for x in (to_fp64(tensors), tensors))
    check_error("out", call(args)[0], exact, rounded)


def test_no_rows_and_rows_of_no_segment():
    for total in (0, 3):
        out, lse = call(make_inputs([], 4, 2, 64, BF16, total=total))
        assert out.shape == (total, 4, 64) and lse.shape == (total, 4) and not out.any() and not lse.any()
    args = make_inputs([(2, 5, 0, 0), (9, 12, 6, 8)], 4, 2, 64, BF16, total=14)
    for n in NAMES:
        args[n][[0, 5, 8, 13]] = torch.nan
    out, lse = call(args)
    outside = [0, 1, 5, 6, 7, 8, 12, 13]
    assert not out[outside].any() and not lse[outside].any() and out[[2, 11]].any()


def test_few_blocks_do_the_work_of_many(monkeypatch):
    """Blocks that take many tiles, in turns from the front and the back of the list, leave the same bits."""
    args = make_inputs(grouped((40, 200, 3), (9,), (100, 30)), 4, 2, 64, BF16, total=390)
    expected = call(args)
    for blocks in (1, 2, 3, 7):
        monkeypatch.setattr(forward, "resident_blocks", lambda _, blocks=blocks: blocks)
        assert all(torch.equal(a, b) for a, b in zip(call(args), expected, strict=True)), blocks


GROUPS = [(3,), (140, 9, 40, 1), (17,), (18, 3, 3), (150,)]


@pytest.mark.parametrize("dim, heads", [(64, 2), (128, 1)])
def test_alone_or_packed(dim, heads):
    """A group's bits do not depend on what else is in the batch; a response's not on its siblings. Maxima rise."""
    args = make_inputs(grouped(*GROUPS), heads, 1, dim, BF16, scale=6.0)
    packed = call(args)
    end = 0
    for group in GROUPS:
        start, end = end, end + sum(group)
        alone = {n: args[n][start:end] for n in NAMES}
        found = call(alone | {"segments": torch.tensor(grouped(group), dtype=torch.int32)})
        assert all(torch.equal(a, b[start:end]) for a, b in zip(found, packed, strict=True)), group
    for start, end, *prefix in args["segments"].tolist():
        rows = torch.cat([torch.arange(*prefix), torch.arange(start, end)])
        alone = grouped((prefix[1] - prefix[0], end - start)) if prefix[1] else plain(end - start)
        found = call({n: args[n][rows] for n in NAMES} | {"segments": torch.tensor(alone, dtype=torch.int32)})
        assert all(torch.equal(a, b[rows]) for a, b in zip(found, packed, strict=True)), (start, end)


BAD = [("q", torch.nan), ("k", torch.nan), ("v", torch.nan), ("v", torch.inf)]


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(
    "row, seen, bad", [(7, range(7, 171), BAD), (153, range(153, 162), BAD), (175, [175], BAD[1:])]
)
def test_nan_and_infinity_stay_with_the_rows_that_see_them(dim, row, seen, bad):
    """And change no bit of the others, which may stand in the same tile."""
    args = make_inputs(grouped((150, 12, 9), (5,)), 1, 1, dim, BF16)
    clean = call(args)[0]
    for name, value in bad:
        changed = args | {name: args[name].clone()}
        changed[name][row, :, 3] = value
        out = call(changed)[0]
        sees = [row] if name == "q" else [*seen]
        kept = [i for i in range(len(out)) if i not in sees]
        assert torch.equal(out[kept], clean[kept]), (name, value)
        exact = reference.attention(**to_fp64(changed))[sees]
        assert torch.equal(exact.isnan(), out[sees].isnan()), (name, value)
        assert torch.equal(exact.isinf(), out[sees].isinf()), (name, value)
        finite = exact.isfinite()
        assert torch.equal(out[sees][finite], clean[sees][finite]) or name != "v", (name, value)


def test_infinities_of_both_signs_make_nan():
    args = make_inputs(plain(9), 1, 1, 64, BF16)
    args["v"][3, 0, 1], args["v"][5, 0, 1] = torch.inf, -torch.inf
    column = call(args)[0][:, 0, 1]
    assert column[:3].isfinite().all() and (column[3:5] == torch.inf).all() and column[5:].isnan().all()


def test_scores_of_minus_infinity():
    """Have weight 0; a row of no other score is NaN."""
    args = make_inputs(grouped((20, 30)), 2, 1, 64, BF16)
    args["q"][:, 0, 0], args["q"][:, 1, 0] = 1.0, 0.5
    args["k"][17:20, 0, 0] = args["k"][0, 0, 0] = -torch.inf
    out = call(args)[0]
    exact = reference.attention(**to_fp64(args))
    check_error("out", out, exact, exact.float())
    assert out[0].isnan().all() and out[1:].isfinite().all()


def test_views():
    """q, k and v as views of one buffer; at an address that is not 16-byte aligned, dense or not; with a strided last
    dim."""
    args = make_inputs(grouped((10, 17, 3)), 3, 1, 64, BF16)
    expected = call(args)
    buffer = torch.cat([args["q"], args["k"], args["v"]], dim=1)
    views = {"q": buffer[:, :3], "k": buffer[:, 3:4], "v": buffer[:, 4:]}
    shifted = {n: torch.nn.functional.pad(args[n], (3, 2))[..., 3:67] for n in NAMES}
    apart = {n: torch.stack([args[n], args[n]], -1)[..., 0] for n in NAMES}
    assert forward.in_chunks(views["k"]) is views["k"] and forward.in_chunks(shifted["k"]).is_contiguous()
    dense = {n: torch.cat([args[n].flatten()[:1], args[n].flatten()])[1:].view_as(args[n]) for n in NAMES}
    for other in (views, shifted, dense, apart):
        found = call(other | {"segments": args["segments"]})
        assert found[0].is_contiguous() and all(
            torch.equal(a, b) for a, b in zip(found, expected, strict=True)
        )


@pytest.mark.skipif(DEVICE != "cpu", reason="the storage is reserved, not touched, only on the CPU")
@pytest.mark.parametrize(
    "lengths, heads, dim, names", [((4, 3, 1), 1, 64, NAMES), ((64, 50, 150), 8, 128, ("k", "v"))]
)
def test_offsets_past_32_bits(lengths, heads, dim, names):
    """Rows that far apart: within a block of keys; between blocks only, and from a prefix to a segment's own."""
    args = make_inputs(grouped(lengths), heads, 1, dim, BF16)
    far = {n: strided_rows(args[n], PAST_INT32 // (lengths[0] + lengths[1] // 2) + 8 & ~7) for n in names}
    assert all(torch.equal(a, b) for a, b in zip(call(args | far), call(args), strict=True))


def matrices():
    """(8 x 8 matrices that were read, turns of the banks that they took) so far."""
    opened = ctypes.CDLL(str(library.path()))
    opened.simt_matrices.restype = opened.simt_turns.restype = ctypes.c_uint64
    return opened.simt_matrices(), opened.simt_turns()


@pytest.mark.skipif(DEVICE == "cuda", reason="counts what the emulated kernels do")
@pytest.mark.parametrize("dim", [64, 128])
def test_a_prefix_is_read_once_for_all_responses_and_without_bank_conflicts(dim):
    """Once for each tile: the five short responses of the first prompt are one."""
    segments, heads = grouped((300, 3, 4, 5, 2, 6), (20, 50)), 2
    args = make_inputs(segments, heads, 1, dim, BF16)
    before = matrices()
    call(args)
    read, turns = (after - start for after, start in zip(matrices(), before, strict=True))
    assert turns == read
    keys, blocks = KEYS[dim], 0
    tiles = query_tiles(args["segments"], len(args["q"]), ROWS // heads).tolist()
    for _, last, segment0, segment1 in (t for t in tiles if t[0] < t[1]):
        blocks += -(-(segments[segment0][3] - segments[segment0][2]) // keys)
        blocks += sum(
            -(-(min(end, last) - start) // keys) for start, end, _, _ in segments[segment0:segment1]
        )
    squares = forward.WARPS * (
        2 * dim // 16 + 2 * (keys // 16) * (dim // 16)
    )  # of Q, K and V, for a block of keys
    assert read == blocks * squares * 4
    assert sum(300 <= first < 320 for first, *_ in tiles) == 1


def test_what_the_kernels_do_not_serve():
    """The next backend does, unless the CUDA kernels were asked for."""
    args = place(make_inputs(plain(5), 1, 1, 64))
    for change in ({n: args[n].to(BF16)[..., :40] for n in NAMES}, {}):
        with pytest.raises(ops.BackendUnavailable, match="the CUDA attention kernels are for"):
            ops.attention(**args | change, impl="cuda")
    resolve = lambda *x: backends.resolve("attention", None, ("cuda", "cpu"), DEVICE, *x)  # noqa: E731
    assert resolve(BF16, 64) == "cuda" and resolve(BF16, 128) == "cuda"
    assert resolve(torch.float32, 64) != "cuda" and resolve(BF16, 80) != "cuda"


def test_through_the_op():
    """The kernels serve it, and segments are checked where they may be read."""
    args = make_inputs(grouped((20, 3)), 2, 1, 64, BF16)
    check_cuda("attention", ops.attention, args, grads=())
    if DEVICE == "cpu":
        with pytest.raises(ValueError, match="must be sorted"):
            ops.attention(**args | {"segments": args["segments"].flip(0)}, impl="cuda")


def test_one_call_and_none_for_fake_tensors():
    args = place(make_inputs(grouped((20, 3)), 2, 1, 64, BF16))
    with library.record() as calls:
        call(args)
    assert [c.name for c in calls] == ["hps_attention_forward_d64"]
    with FakeTensorMode() as mode, library.record() as calls:
        fake = {n: mode.from_tensor(args[n]) for n in (*NAMES, "segments")}
        out, lse = forward.attention(*(fake[n] for n in NAMES), fake["segments"], 0.1, False)
    assert out.shape == (23, 2, 64) and lse.shape == (23, 2) and len(calls) == 1


def test_launcher_refuses_what_it_has_no_kernel_for(monkeypatch):
    monkeypatch.setattr(forward, "resident_blocks", lambda _: 0)
    with pytest.raises(library.LaunchError, match="hps_attention_forward_d64"):
        call(make_inputs(plain(3), 1, 1, 64, BF16))


OUT, FLAGS = (
    3,
    7,
)  # of the launcher's arguments: the first launch writes both, the second reads flags and writes out


@pytest.mark.skipif(DEVICE == "cuda", reason="checks the emulated kernels")
@pytest.mark.parametrize("mode, seed", [("fibers", 1), ("fibers", 2), ("tsan", None), ("asan", None)])
@pytest.mark.parametrize("dim", [pytest.param(64, marks=pytest.mark.sweep), 128])
def test_replay(mode, seed, dim, monkeypatch):
    """Other orders of threads and blocks, races, bounds, two writers: nothing is found, and the bytes are the same.

    Two blocks, whole and masked blocks of keys of a prefix and of segments; then a tile that is done again.
    """
    monkeypatch.setattr(forward, "resident_blocks", lambda _: 2)
    args = make_inputs(grouped((2 * KEYS[dim] + 3, 6, 5)), 1, 1, dim, BF16)
    again = seed != 1
    if again:
        args["v"][-3] = torch.nan
    with replay.recorded() as calls:
        call(args)
    replay.run(calls[0], mode, seed, read_back=(OUT, FLAGS) if again else (FLAGS,))
