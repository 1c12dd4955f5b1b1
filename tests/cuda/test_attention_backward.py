"""attention's backward in CUDA. The bugs this file must catch: a prompt's gradient that misses one of its responses; a
block of rows that is computed before its copy has arrived, or after the next one's."""

import functools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from hpsafety import reference
from hpsafety.cuda_kernels import attention_backward as backward
from hpsafety.cuda_kernels import library
from tests.cuda import replay
from tests.cuda.conftest import DEVICE
from tests.ops.forms import PAST_INT32
from tests.ops.oracle import check_error
from tests.ops.test_attention import NAMES, dense_runs, grouped, make_inputs, plain, strided_rows
from tests.triton.test_attention import GENERAL

GRADS = ("dq", "dk", "dv")


def make(segments, heads, kv_heads, dim, seed=0, scale=1.0, total=None, softmax_scale=None):
    """The arguments of attention_backward, on the CPU, of bf16 inputs and a drawn gradient."""
    args = make_inputs(segments, heads, kv_heads, dim, torch.bfloat16, seed, scale, total)
    return with_forward(args, softmax_scale or dim**-0.5)


def with_forward(args, softmax_scale):
    q, k, v, segments = (args[n] for n in (*NAMES, "segments"))
    out, lse = torch.ops.hpsafety.attention(q, k, v, segments, softmax_scale, False, "cpu")
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    return [grad, q, k, v, out, lse, segments, softmax_scale, False]


def run(arguments):
    there = [x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in arguments]
    return [x.cpu() for x in backward.attention_backward(*there)]


def oracle(arguments, dtype, function=reference.attention):
    grad, *x = [x.detach().to(dtype) for x in arguments[:4]]
    x = [t.requires_grad_() for t in x]
    out = function(*x, *arguments[6:8])
    return (
        torch.autograd.grad(out, x, grad.to(dtype)) if out.requires_grad else [torch.zeros_like(t) for t in x]
    )


def check(arguments):
    before = [x.clone() for x in arguments if isinstance(x, torch.Tensor)]
    ours = run(arguments)
    assert all(
        torch.equal(x, y)
        for x, y in zip(before, [x for x in arguments if isinstance(x, torch.Tensor)], strict=True)
    )
    exact, rounded = oracle(arguments, torch.float64), oracle(arguments, torch.bfloat16)
    for name, x, e, r in zip(GRADS, ours, exact, rounded, strict=True):
        assert x.dtype == torch.bfloat16 and x.is_contiguous()
        check_error(name, x, e, r)
    return ours


KEYS, ROWS = 96, 48  # of a tile of keys; of a block of query rows: of head dim 64. Of 128: 128, 32


@pytest.mark.parametrize(
    "segments, heads, kv_heads, dim",
    [
        (plain(1), 1, 1, 64),
        (plain(1), 2, 1, 128),
        (plain(1, 2, 1, 37), 2, 1, 64),
        (plain(ROWS - 1, ROWS, ROWS + 1), 1, 1, 128),
        (plain(KEYS - 1, KEYS + 1), 1, 1, 64),
        (plain(2 * 128 + 70), 1, 1, 128),
        (plain(127, 129), 1, 1, 128),
        (grouped((KEYS, 7, ROWS + 1, 1), (3, 20)), 3, 1, 64),
        (grouped((ROWS - 1, 20, 2), (ROWS + 1, 1, 1)), 4, 2, 128),
        (grouped((150, 70, 30)), 2, 1, 64),
        (GENERAL[0], 3, 1, 128),
        (GENERAL[1], 2, 1, 64),
        (grouped((2, 1, 2)), 40, 1, 64),
        (grouped((20, 9)), 6, 1, 128),
        (grouped((5, *[1 + i % 2 for i in range(64)])), 1, 1, 64),
    ],
    ids=range(15),
)
def test_matches_oracle(segments, heads, kv_heads, dim):
    """KER-2 over ragged segments, general prefixes and groups of heads, also of more than are rows of one tile."""
    check(make(segments, heads, kv_heads, dim, total=segments[-1][1] + 2))


@pytest.mark.sweep
@pytest.mark.parametrize("seed", range(80))
def test_drawn_shapes(seed):
    g = torch.Generator().manual_seed(seed)
    draw = lambda low, high: int(torch.randint(low, high + 1, (), generator=g))  # noqa: E731
    groups = [[draw(1, 150) for _ in range(draw(1, 5))] for _ in range(draw(1, 3))]
    kv_heads, group = draw(1, 2), (1, 2, 3, 4, 7, 8)[draw(0, 5)]
    check(
        make(
            grouped(*groups),
            kv_heads * group,
            kv_heads,
            (64, 128)[seed % 2],
            seed,
            softmax_scale=draw(1, 100) / 200,
        )
    )


@pytest.mark.parametrize("scale", [30.0, 1e-18])
def test_extreme_logits(scale):
    check(make(grouped((20, 7, 50)), 2, 1, 64, scale=scale))


@pytest.mark.parametrize("prompt, responses", [(1, 1), (65, 5)])
def test_shared_prefix_equals_independent_sequences(prompt, responses):
    lengths = [1 + 5 * i % 11 for i in range(responses)]
    arguments = make(grouped((prompt, *lengths)), 1, 1, 64)
    dense = lambda q, k, v, *_: dense_runs(q, k, v, prompt, lengths)  # noqa: E731
    exact, rounded = (oracle(arguments, dtype, dense) for dtype in (torch.float64, torch.bfloat16))
    for name, x, e, r in zip(GRADS, run(arguments), exact, rounded, strict=True):
        check_error(name, x, e, r)


def test_no_rows_and_rows_of_no_segment():
    for total in (0, 3):
        grads = run(make([], 2, 1, 64, total=total))
        assert [x.shape[0] for x in grads] == [total] * 3 and all(not bool(x.any()) for x in grads)
    arguments = make([(2, 5, 0, 0), (9, 12, 6, 8)], 2, 1, 64, total=14)
    for x in arguments[1:4]:
        x[[0, 5, 8, 13]] = torch.nan
    dq, dk, dv = run(arguments)
    alone = [0, 1, 5, 8, 12, 13]
    assert not dq[[*alone, 6, 7]].any() and not dk[alone].any() and not dv[alone].any()
    assert dv[6:8].abs().min() > 0 and all(x[[2, 3, 4, 9, 10, 11]].isfinite().all() for x in (dq, dk, dv))


def test_a_row_that_sees_one_key_pulls_at_nothing():
    """Its weight is 1 whatever the score: no gradient flows to its query, nor from it to the key."""
    arguments = make(plain(1, 1, 1), 2, 1, 64)
    dq, dk, dv = run(arguments)
    assert not dq.any() and not dk.any() and torch.equal(dv[:, 0], arguments[0].float().sum(1).bfloat16())


GROUPS = [(3,), (20, 9, 40, 1), (130, 17), (18, 3, 3)]


@pytest.mark.parametrize("heads, dim", [(2, 64), (1, 128)])
def test_alone_or_packed(heads, dim):
    """A group's bits do not depend on what else is in the batch."""
    arguments = make(grouped(*GROUPS), heads, 1, dim)
    packed, end = run(arguments), 0
    for group in GROUPS:
        start, end = end, end + sum(group)
        alone = [x[start:end].clone() for x in arguments[:6]]
        alone += [torch.tensor(grouped(group), dtype=torch.int32), *arguments[7:]]
        for name, x, whole in zip(GRADS, run(alone), packed, strict=True):
            assert torch.equal(x, whole[start:end]), (name, group)


@pytest.mark.parametrize("dim", [64, 128])
def test_nan_stays_with_its_group(dim):
    """NaN in a row of one group changes no bit of another group's gradients, unless they share a tile of keys."""
    border = {64: 3 * 96, 128: 2 * 128}[dim]
    arguments = make(grouped((130, border - 130), (60, 9)), 1, 1, dim)
    clean = run(arguments)
    for which, row in ((0, 200), (1, 200), (2, 140), (3, 140)):
        bad = list(arguments)
        bad[which] = bad[which].clone()
        bad[which][row] = torch.nan
        if which:
            bad[4:6] = with_forward(
                dict(zip((*NAMES, "segments"), [*bad[1:4], bad[6]], strict=True)), bad[7]
            )[4:6]
        for name, x, y in zip(GRADS, run(bad), clean, strict=True):
            assert torch.equal(x[border:], y[border:]) and x[:border].isnan().any() == (
                name != "dv" or which != 3
            ), name


def test_nan_of_an_unseen_value_stays_out_of_the_query_gradients():
    """What a masked score was is not asked."""
    arguments = make(plain(20, 20), 1, 1, 64)
    clean = run(arguments)
    arguments[3][12] = torch.nan
    dq, dk, _ = run(arguments)
    seen = torch.arange(40) < 12
    seen[20:] = True
    assert torch.equal(dq[seen], clean[0][seen]) and torch.equal(dk[20:], clean[1][20:])


def test_views_and_strided_gradients():
    """q, k and v as views of one (T, G, H/G + 2, K) buffer; a gradient of stride 0, one with gaps between rows, and one
    whose rows are not at multiples of 16 bytes."""
    arguments = make(grouped((10, 17, 3)), 3, 1, 64)
    arguments[0] = torch.ones_like(arguments[0])
    expected = run(arguments)
    buffer = torch.cat(arguments[1:4], dim=1)
    views = [buffer[:, :3], buffer[:, 3:4], buffer[:, 4:]]
    assert not views[0].is_contiguous()
    shape = arguments[0].shape
    gaps = torch.ones((*shape[:2], 72), dtype=torch.bfloat16)[..., :64]
    odd = torch.ones((*shape[:2], 67), dtype=torch.bfloat16)[..., 3:]
    for grad in (torch.ones((), dtype=torch.bfloat16).expand(shape), gaps, odd):
        for x, want in zip(run([grad, *views, *arguments[4:]]), expected, strict=True):
            assert x.is_contiguous() and torch.equal(x, want)


@pytest.mark.skipif(DEVICE != "cpu", reason="the storage is reserved, not touched, only on the CPU")
@pytest.mark.parametrize("prompt, row_stride", [(20, 2**28 + 8), (70, 2**25 + 8)])
def test_offsets_past_32_bits(prompt, row_stride):
    """Rows that far apart: within a block, and between blocks only."""
    arguments = make(grouped((prompt, 13, 1)), 1, 1, 64)
    assert row_stride * prompt > PAST_INT32
    far = [strided_rows(x, row_stride) for x in arguments[:4]]
    assert all(torch.equal(x, y) for x, y in zip(run([*far, *arguments[4:]]), run(arguments), strict=True))


def test_fake_tensors_launch_what_real_ones_do():
    """Grids and arguments follow from shapes alone: nothing is read on the host."""
    arguments = make(grouped((20, 7, 30)), 4, 2, 64)
    with library.record() as real:
        run(arguments)
    with FakeTensorMode() as mode, library.record() as fake:
        there = [mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in arguments]
        backward.attention_backward(*there)
    numbers = [[(c.name, c.signature, [x for x in c.arguments if not isinstance(x, torch.Tensor)]) for c in calls]
               for calls in (real, fake)]  # fmt: skip
    assert numbers[0] == numbers[1] and len(real) == 3


LOG_PACK = {
    "hps_attention_delta": 8,
    "hps_attention_backward_keys_d64": 21,
    "hps_attention_backward_rows_d64": 20,
}


@pytest.mark.parametrize("name", LOG_PACK)
def test_launchers_refuse_what_their_addresses_do_not_allow(name):
    with library.record() as calls:
        run(make(plain(3), 1, 1, 64))
    call = next(c for c in calls if c.name == name)
    stride = call.signature.replace(" ", "").index("l")
    for place, value in ((stride, 60), (LOG_PACK[name], 5)):
        arguments = list(call.arguments)
        arguments[place] = value
        with pytest.raises(library.LaunchError):
            library.launch(name, call.signature, *arguments)


@pytest.mark.parametrize(
    "ratio, packed", [(1, 0), (2, 1), (3, 0), (4, 2), (6, 1), (8, 3), (16, 4), (32, 4), (40, 3)]
)
def test_heads_of_a_tile(ratio, packed):
    assert backward.log_pack(ratio) == packed and ratio % (1 << packed) == 0


@functools.cache
def recordings(dim):
    """The launches of a prompt with a response, over several blocks of rows and of keys."""
    with replay.recorded() as calls:
        run(make(grouped((100, 40)), 1, 1, dim))
    return calls


def _sweep(*case):
    return pytest.param(*case, marks=pytest.mark.sweep)


@pytest.mark.skipif(DEVICE == "cuda", reason="checks the emulated kernels")
@pytest.mark.parametrize("mode, seed", [("fibers", 1), ("fibers", 2), ("tsan", None), ("asan", None)])
@pytest.mark.parametrize(
    "kernel, dim",
    [
        ("delta", 64),
        ("keys", 128),
        ("rows", 64),
        _sweep("delta", 128),
        _sweep("keys", 64),
        _sweep("rows", 128),
    ],
)
def test_replay(mode, seed, kernel, dim):
    """Other orders of threads and blocks, races, bounds, two writers: nothing is found, and the bytes are the same."""
    replay.run(recordings(dim)[("delta", "keys", "rows").index(kernel)], mode, seed)
