"""reward_score. The bug this file must catch: an untagged response at exactly the threshold routed to safety (<= for
<)."""

import itertools
import math

import pytest
import torch

from hpsafety import ops, reference
from hpsafety.reference.reward_score import RewardScore
from tests.ops.oracle import check_error, to_fp64

FLOATS = RewardScore._fields[:4]


def make_inputs(lengths, d1=33, d2=20, t=50, dtype=torch.float32, seed=0, norms=True):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0, mean=0.0):
        return (torch.randn(*shape, generator=g) * scale + mean).to(dtype)

    r = sum(lengths)
    args = {"hidden_safety": normal(t, d1), "hidden_helpful": normal(t, d2)}
    args["last_rows"] = torch.randint(0, max(t, 1), (r,), generator=g)
    args |= {"head_safety": normal(d1, scale=d1**-0.5), "head_helpful": normal(d2, scale=d2**-0.5)}
    args["is_safety"] = torch.rand(r, generator=g) < 0.3
    args["cu_groups"] = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    if norms:
        args |= {
            "norm_safety": normal(d1, scale=0.1, mean=1.0),
            "norm_helpful": normal(d2, scale=0.1, mean=1.0),
        }
    return args


def from_logits(safety, helpful=None, tagged=None, lengths=None):
    """Arguments whose logits are exactly those given: width 1, head 1."""
    safety = torch.as_tensor(safety, dtype=torch.float32)
    r = safety.numel()
    helpful = torch.full((r,), 5.0) if helpful is None else torch.as_tensor(helpful, dtype=torch.float32)
    return {
        "hidden_safety": safety[:, None], "hidden_helpful": helpful[:, None], "last_rows": torch.arange(r),
        "head_safety": torch.ones(1), "head_helpful": torch.ones(1),
        "is_safety": torch.zeros(r, dtype=torch.bool) if tagged is None else torch.tensor(tagged),
        "cu_groups": torch.tensor([0, *itertools.accumulate(lengths or [1] * r)], dtype=torch.int32),
    }  # fmt: skip


def check_against_reference(args, **kwargs):
    exact = reference.reward_score(**to_fp64(args), **kwargs)
    plain = reference.reward_score(**args, **kwargs)
    before = reference.calls["reward_score"]
    ours = ops.reward_score(**args, **kwargs, impl="cpu")
    assert reference.calls["reward_score"] == before, "the cpu backend called the reference"
    for name in FLOATS:
        assert getattr(ours, name).dtype == torch.float32
        check_error(name, getattr(ours, name), getattr(exact, name), getattr(plain, name))
    assert ours.best_of_group.dtype == torch.int64 and torch.equal(ours.best_of_group, exact.best_of_group)
    return ours


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize(
    "lengths, d1, d2",
    [
        ([], 8, 8),
        ([1], 1, 2),
        ([2, 3], 15, 16),
        ([64, 1, 8], 17, 63),
        ([8] * 20, 64, 65),
        ([4] * 9, 576, 4097),
    ],
)
def test_matches_oracle(dtype, norms, lengths, d1, d2):
    """KER-2: logits, route, whitening and best of each group against fp64; K from 1 to 64."""
    ours = check_against_reference(make_inputs(lengths, d1, d2, dtype=dtype, norms=norms))
    assert isinstance(ours, RewardScore)


@pytest.mark.parametrize("seed", range(25))
def test_random_sweep(seed):
    g = torch.Generator().manual_seed(500 + seed)
    lengths = torch.randint(1, 65, (int(torch.randint(1, 6, (), generator=g)),), generator=g).tolist()
    d1, d2 = torch.randint(1, 300, (2,), generator=g).tolist()
    dtype = torch.bfloat16 if seed % 3 == 0 else torch.float32
    args = make_inputs(lengths, d1, d2, t=3 * sum(lengths), dtype=dtype, seed=seed, norms=seed % 2 == 0)
    if seed % 4 == 0:
        del args["is_safety"]
        args["is_safety"] = torch.full((sum(lengths),), seed % 8 == 0)
    check_against_reference(args, eps=1e-3, threshold=float(torch.rand((), generator=g)))


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_route(impl):
    """PPO-1: tagged -> safety; untagged at 0.1499 -> safety; untagged at exactly 0.15 -> helpful."""
    scores = [0.1499, 0.15, 0.1501, 0.15, 0.9, 0.05, 0.05, 0.9]
    tagged = [False, False, False, True, True, True, False, False]
    logits = torch.tensor([math.log(p / (1 - p)) for p in scores], dtype=torch.float64).float()
    out = ops.reward_score(**from_logits(logits, tagged=tagged), impl=impl)
    to_helpful = torch.tensor([False, True, True, False, False, False, False, True])
    assert torch.equal(out.combined, torch.where(to_helpful, 5.0, logits))
    assert torch.equal(out.r_safety, logits) and bool((out.r_helpful == 5).all())


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_threshold_to_the_last_bit(impl):
    """PPO-1: whichever way the logit of 0.15 is made in fp32 it passes; the next smaller fp32 number does not."""
    exact = torch.tensor(math.log(0.15 / 0.85), dtype=torch.float64).float()
    made = [
        exact,
        torch.logit(torch.tensor(0.15)),
        torch.logit(torch.tensor(0.15, dtype=torch.float64)).float(),
    ]
    below = torch.nextafter(exact, torch.tensor(-9.0))
    out = ops.reward_score(**from_logits(torch.stack((*made, below))), impl=impl)
    assert out.combined.tolist() == [5.0, 5.0, 5.0, float(below)]
    border = [
        ops.reward_score(**from_logits([x]), threshold=0.5, impl=impl).combined.item() for x in (0.0, -1e-6)
    ]
    assert border == [5.0, pytest.approx(-1e-6)]


@pytest.mark.parametrize("threshold, helpful", [(0.0, True), (1.0, False)])
def test_borders_of_the_threshold(threshold, helpful):
    out = ops.reward_score(**from_logits([-10.0, 0.0, 10.0]), threshold=threshold, impl="cpu")
    assert bool((out.combined == 5).all()) == helpful


@pytest.mark.parametrize("lengths", [[2], [512], [100] * 3])
def test_whitened(lengths):
    """PPO-3: |mean| < 1e-5 and |std - 1| < 1e-4; whitening follows the route."""
    out = ops.reward_score(**make_inputs(lengths), impl="cpu")
    z = out.whitened.double()
    assert abs(float(z.mean())) < 1e-5 and abs(float(z.std(correction=0)) - 1) < 1e-4
    c = out.combined.double()
    torch.testing.assert_close(z, (c - c.mean()) / (c.std(correction=0) + 1e-8), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("value", [0.1, -7.3, 1e30, float("inf")])
@pytest.mark.parametrize("r", [1, 3, 600])
def test_equal_scores_whiten_to_exact_zeros(value, r):
    """PPO-3: a constant batch, whose mean in floating point need not be the value itself."""
    out = ops.reward_score(**from_logits([value] * r, [value] * r), impl="cpu")
    assert torch.equal(out.whitened, torch.zeros(r))


def test_far_offset_keeps_the_digits_of_whitening():
    """Mean and std in float64: scores of 10,000 + {0, 1, 2, 3} whiten as {0, 1, 2, 3}."""
    logits = torch.arange(4.0)
    near, far = (ops.reward_score(**from_logits(x, x), impl="cpu") for x in (logits, logits + 1e4))
    assert torch.equal(near.whitened, far.whitened)


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_best_of_group(impl):
    """The index is absolute in R, and the lowest of equals."""
    logits = [3.0, 3.0, 1.0, 7.0, 2.0, 2.0, 9.0, -1.0, -1.0]
    args = from_logits(logits, logits, lengths=[3, 1, 2, 1, 2])
    assert ops.reward_score(**args, impl=impl).best_of_group.tolist() == [0, 3, 4, 6, 7]


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_nan_scores(impl):
    """NaN stays with its response, spoils all of whitened, and wins only where there is nothing else."""
    nan, inf = float("nan"), float("inf")
    helpful = [5.0, 5.0, nan, nan, nan, -inf, 5.0]
    args = from_logits([nan, 1.0, 1.0, 1.0, 1.0, 1.0, -9.0], helpful, lengths=[2, 2, 2, 1])
    out = ops.reward_score(**args, impl=impl)
    expected = torch.tensor([nan, 5.0, nan, nan, nan, -inf, -9.0])
    torch.testing.assert_close(out.combined, expected, equal_nan=True)
    assert out.whitened.isnan().all() and out.best_of_group.tolist() == [1, 2, 5, 6]
    tagged = from_logits([1.0, 2.0], [nan, nan], tagged=[True, True])
    assert ops.reward_score(**tagged, impl=impl).combined.tolist() == [1.0, 2.0], (
        "the other score is not read"
    )


def test_rows_that_nobody_reads_may_hold_anything():
    args = make_inputs([4, 4])
    clean = ops.reward_score(**args, impl="cpu")
    read = torch.zeros(50, dtype=torch.bool).index_fill_(0, args["last_rows"], True)
    for name in ("hidden_safety", "hidden_helpful"):
        args[name][~read] = float("nan")
    assert all(torch.equal(a, b) for a, b in zip(clean, ops.reward_score(**args, impl="cpu"), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_score_does_not_depend_on_its_batch(dtype):
    """RM-5: alone, in any batch and in any order: the same bits (also in bf16)."""
    args = make_inputs([64] * 4, 577, 96, t=300, dtype=dtype)
    whole = ops.reward_score(**args, impl="cpu")
    for rows in [torch.tensor([17]), torch.arange(256).flip(0), torch.arange(3, 40)]:
        part = {"last_rows": args["last_rows"][rows], "is_safety": args["is_safety"][rows]}
        part["cu_groups"] = torch.tensor([0, len(rows)], dtype=torch.int32)
        out = ops.reward_score(**(args | part), impl="cpu")
        for name in ("r_safety", "r_helpful", "combined"):
            assert torch.equal(getattr(out, name), getattr(whole, name)[rows])
    alone = {k: args[k][args["last_rows"][17]][None].clone() for k in ("hidden_safety", "hidden_helpful")}
    alone |= {"last_rows": torch.zeros(1, dtype=torch.int64), "is_safety": args["is_safety"][17:18]}
    out = ops.reward_score(**(args | alone | {"cu_groups": torch.tensor([0, 1])}), impl="cpu")
    assert out.combined.item() == whole.combined[17].item()


def test_two_heads_on_one_trunk():
    args = make_inputs([5, 5], 24, 24)
    shared = args | {"hidden_helpful": args["hidden_safety"]}
    copied = args | {"hidden_helpful": args["hidden_safety"].clone()}
    a, b = (ops.reward_score(**x, impl="cpu") for x in (shared, copied))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    check_against_reference(shared)


def test_models_of_two_dtypes():
    args = make_inputs([5, 5])
    for name in ("hidden_helpful", "head_helpful", "norm_helpful"):
        args[name] = args[name].bfloat16()
    check_against_reference(args)


def test_no_gradient():
    args = make_inputs([5, 3])
    for name in ("hidden_safety", "head_safety", "norm_helpful"):
        args[name].requires_grad_()
    for impl in ("cpu", "reference"):
        assert not any(out.requires_grad for out in ops.reward_score(**args, impl=impl))


def test_non_contiguous_and_int32_rows():
    args = make_inputs([6, 7], 40, 40)
    plain = ops.reward_score(**args, impl="cpu")
    apart = {k: torch.stack((v, v), -1)[..., 0] for k, v in args.items()}
    padded = args | {"hidden_safety": torch.cat((args["hidden_safety"], torch.ones(50, 9)), 1)[:, :40]}
    turned = args | {"hidden_helpful": args["hidden_helpful"].t().contiguous().t()}
    narrow = args | {"last_rows": args["last_rows"].int(), "cu_groups": args["cu_groups"].long()}
    for changed in (apart, padded, turned, narrow):
        assert all(
            torch.equal(a, b) for a, b in zip(ops.reward_score(**changed, impl="cpu"), plain, strict=True)
        )


def test_more_responses_than_65535():
    """70,000 responses in 35,000 groups."""
    logits = torch.randn(70_000, generator=torch.Generator().manual_seed(0))
    out = ops.reward_score(**from_logits(logits, logits, lengths=[2] * 35_000), impl="cpu")
    assert torch.equal(out.best_of_group, logits.view(-1, 2).argmax(1) + 2 * torch.arange(35_000))
    assert abs(float(out.whitened.double().mean())) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_and_repeats_change_no_bit(dtype):
    args = make_inputs([64] * 8, 2000, 576, t=600, dtype=dtype)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        first = ops.reward_score(**args, impl="cpu")
        for threads in (1, 2, 3) * 33 + (1,):
            torch.set_num_threads(threads)
            again = ops.reward_score(**args, impl="cpu")
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)), threads
    finally:
        torch.set_num_threads(before)


def op_arguments(args):
    norms = (args.get("norm_safety"), args.get("norm_helpful"))
    return *(v for k, v in args.items() if not k.startswith("norm")), *norms, 1e-5, 0.15, "cpu"


@pytest.mark.parametrize("norms", [False, True])
def test_opcheck(norms):
    args = make_inputs([4, 1, 30], norms=norms)
    eager = ops.reward_score(**args, impl="cpu")  # loads the kernels
    torch.library.opcheck(torch.ops.hpsafety.reward_score.default, op_arguments(args))
    through_dispatcher = torch.ops.hpsafety.reward_score(*op_arguments(args))
    assert all(torch.equal(a, b) for a, b in zip(through_dispatcher, eager, strict=True))


@pytest.mark.slow
def test_compile():
    args = make_inputs([4, 1, 30])
    compiled = torch.compile(lambda **kw: ops.reward_score(**kw, impl="cpu"), fullgraph=True)
    found = zip(compiled(**args), ops.reward_score(**args, impl="cpu"), strict=True)
    assert all(torch.equal(a, b) for a, b in found)


def test_backends_are_told_apart():
    args = make_inputs([4, 3])
    before = reference.calls["reward_score"]
    assert torch.equal(ops.reward_score(**args).combined, ops.reward_score(**args, impl="cpu").combined)
    assert reference.calls["reward_score"] == before
    ops.reward_score(**args, impl="reference")
    assert reference.calls["reward_score"] == before + 1


@pytest.mark.parametrize(
    "change, message",
    [
        ({"hidden_safety": torch.zeros(5)}, "hidden_safety must be"),
        (
            {"hidden_safety": torch.zeros(5, 3, dtype=torch.float64)},
            "hidden_safety must be float32 or bfloat16",
        ),
        ({"hidden_helpful": torch.zeros(4, 2)}, "hidden_helpful must have hidden_safety's 5 rows"),
        ({"head_safety": torch.zeros(2)}, r"head_safety must be \(3,\)"),
        ({"head_helpful": torch.zeros(2, dtype=torch.bfloat16)}, "head_helpful must be"),
        ({"norm_safety": torch.zeros(4)}, "norm_safety must be"),
        ({"norm_helpful": torch.zeros(2, device="meta")}, "norm_helpful must be .* on cpu"),
        ({"last_rows": torch.zeros(3)}, "last_rows must be"),
        ({"last_rows": torch.tensor([0, 1, 5])}, r"last_rows must lie in \[0, 5\), got values from 0 to 5"),
        ({"last_rows": torch.tensor([0, -1, 4])}, "last_rows must lie in"),
        ({"is_safety": torch.zeros(3)}, "is_safety must be"),
        ({"is_safety": torch.zeros(2, dtype=torch.bool)}, "is_safety must be"),
        ({"cu_groups": torch.tensor([0.0, 3.0])}, "cu_groups must be"),
        ({"cu_groups": torch.tensor([0, 2])}, "cu_groups must run from 0 to 3, got 0 to 2"),
        ({"cu_groups": torch.tensor([1, 3])}, "cu_groups must run from 0 to 3"),
        ({"cu_groups": torch.tensor([0, 2, 2, 3])}, "cu_groups must rise strictly: entry 2"),
        ({"cu_groups": torch.tensor([0, 2, 1, 3])}, "cu_groups must rise strictly: entry 2"),
        ({"threshold": 1.5}, "threshold must lie in"),
        ({"eps": -1.0}, "eps must be"),
    ],
)
def test_bad_arguments(change, message):
    args = make_inputs([2, 1], 3, 2, t=5, norms=False)
    with pytest.raises(ValueError, match=message):
        ops.reward_score(**(args | change), impl="cpu")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"last_rows": torch.tensor([0, 1, 5])}, "last_rows must lie in"),
        ({"cu_groups": torch.tensor([0, 4, 3])}, "cu_groups must rise from 0 to 3"),
        ({"cu_groups": torch.tensor([0, 3, 3])}, "cu_groups must rise from 0 to 3"),
        ({"cu_groups": torch.tensor([0, 4])}, "cu_groups must rise"),
        ({"is_safety": torch.zeros(2, dtype=torch.bool)}, "is_safety must be"),
        ({"head_safety": torch.zeros(4)}, "must agree in width"),
    ],
)
def test_kernel_refuses_what_it_could_not_index(change, message):
    args = make_inputs([2, 1], 3, 2, t=5, norms=False)
    with pytest.raises(ValueError, match=message):
        torch.ops.hpsafety.reward_score(*op_arguments(args | change))


@pytest.mark.parametrize("stride", [16, 4096])
def test_rows_past_two_to_the_31(stride, far_hidden):
    """row x stride above 2^31: a view of a hidden state of which only the rows that are read were ever touched."""
    hidden = far_hidden[: 2**31 // stride * stride + 8 * stride].view(-1, stride)
    rows = torch.tensor([0, 2, hidden.shape[0] - 3, hidden.shape[0] - 1])
    near = torch.randn(4, stride, generator=torch.Generator().manual_seed(1))
    hidden[rows] = near
    head, tags = (
        torch.randn(stride, generator=torch.Generator().manual_seed(2)),
        torch.ones(4, dtype=torch.bool),
    )
    cu = torch.tensor([0, 4], dtype=torch.int32)
    far = ops.reward_score(hidden, hidden, rows, head, head, tags, cu, impl="cpu")
    here = ops.reward_score(near, near, torch.arange(4), head, head, tags, cu, impl="cpu")
    assert all(torch.equal(a, b) for a, b in zip(far, here, strict=True))
