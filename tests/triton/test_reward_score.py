"""reward_score in Triton. The bug this file must catch: a response at exactly the threshold routed to safety."""

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from hpsafety import ops, reference
from hpsafety.triton_kernels import launch
from hpsafety.triton_kernels import reward_score as kernels
from tests.ops.forms import PAST_INT32, lazy_zeros
from tests.ops.oracle import check_error, to_fp64
from tests.ops.test_reward_score import FLOATS, from_logits, make_inputs, op_arguments
from tests.triton.audit import audit
from tests.triton.device import place
from tests.triton.last_program import needs_interpreter

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(kernels, "COLUMNS", 64)
    monkeypatch.setattr(kernels, "RESPONSES", 32)
    monkeypatch.setattr(kernels, "MEMBERS", 8)


def score(args, **kwargs):
    out = ops.reward_score(**place(args), **kwargs, impl="triton")
    return type(out)(*(x.cpu() for x in out))


def check(args, **kwargs):
    exact = reference.reward_score(**to_fp64(args), **kwargs)
    plain = reference.reward_score(**args, **kwargs)
    before = reference.calls["reward_score"]
    ours = score(args, **kwargs)
    assert reference.calls["reward_score"] == before
    for name in FLOATS:
        assert getattr(ours, name).dtype == torch.float32
        check_error(name, getattr(ours, name), getattr(exact, name), getattr(plain, name))
    assert ours.best_of_group.dtype == torch.int64 and torch.equal(ours.best_of_group, exact.best_of_group)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize(
    "lengths, d1, d2", [([], 8, 8), ([1], 1, 2), ([2, 3], 63, 64), ([17, 1, 8], 65, 20), ([64], 200, 7)]
)
def test_matches_oracle(dtype, norms, lengths, d1, d2):
    """KER-2: logits, route, whitening and best of each group against fp64; K from 1 to 64, rows around a block."""
    check(make_inputs(lengths, d1, d2, dtype=dtype, norms=norms))


@pytest.mark.sweep
@pytest.mark.parametrize("seed", range(40))
def test_drawn_batches(seed):
    g = torch.Generator().manual_seed(500 + seed)
    lengths = torch.randint(1, 40, (int(torch.randint(1, 4, (), generator=g)),), generator=g).tolist()
    d1, d2 = torch.randint(1, 300, (2,), generator=g).tolist()
    args = make_inputs(lengths, d1, d2, 3 * sum(lengths), DTYPES[seed % 3 == 0], seed, norms=seed % 2 == 0)
    check(args, eps=1e-3, threshold=float(torch.rand((), generator=g)))


def test_route():
    """PPO-1: tagged -> safety; untagged at 0.1499 -> safety; untagged at exactly 0.15 -> helpful."""
    scores = [0.1499, 0.15, 0.1501, 0.15, 0.9, 0.05, 0.05, 0.9]
    tagged = [False, False, False, True, True, True, False, False]
    logits = torch.tensor([math.log(p / (1 - p)) for p in scores], dtype=torch.float64).float()
    out = score(from_logits(logits, tagged=tagged))
    to_helpful = torch.tensor([False, True, True, False, False, False, False, True])
    assert torch.equal(out.combined, torch.where(to_helpful, 5.0, logits))
    below = torch.nextafter(logits[1], torch.tensor(-9.0))
    assert score(from_logits([logits[1], below])).combined.tolist() == [5.0, float(below)]
    for threshold, helpful in ((0.0, True), (1.0, False)):
        ends = score(from_logits([-10.0, 0.0, 10.0]), threshold=threshold)
        assert bool((ends.combined == 5).all()) == helpful


@pytest.mark.parametrize("value", [0.1, -7.3, 1e30, float("inf")])
@pytest.mark.parametrize("r", [1, 40])
def test_equal_scores_whiten_to_exact_zeros(value, r):
    """PPO-3: a constant batch, whose mean in floating point need not be the value itself."""
    assert torch.equal(score(from_logits([value] * r, [value] * r)).whitened, torch.zeros(r))


def test_far_offsets_and_outliers_keep_the_digits_of_whitening():
    """fp64: scores of 10,000 + {0, 1, 2, 3} whiten as {0, 1, 2, 3}; also when the first score is far from the rest."""
    logits = torch.arange(4.0)
    near, far = (score(from_logits(x, x)) for x in (logits, logits + 1e4))
    assert torch.equal(near.whitened, far.whitened)
    check(from_logits([1e6, *torch.randn(40).tolist()], [1e6] * 41, tagged=[True] * 41))
    spread = score(make_inputs([50, 20])).whitened.double()
    assert abs(float(spread.mean())) < 1e-5 and abs(float(spread.std(correction=0)) - 1) < 1e-4


def test_best_of_group():
    """The index is absolute in R, and the lowest of equals; also where a group takes several blocks."""
    logits = [3.0, 3.0, 1.0, 7.0, 2.0, 2.0, 9.0, -1.0, -1.0]
    assert score(from_logits(logits, logits, lengths=[3, 1, 2, 1, 2])).best_of_group.tolist() == [
        0,
        3,
        4,
        6,
        7,
    ]
    logits = [0.0] * 9 + [1.0] * 9 + [2.0] + [0.0] * 20 + [2.0]
    assert score(from_logits(logits, logits, lengths=[9, 31])).best_of_group.tolist() == [0, 18]


def test_not_finite_scores():
    """NaN stays with its response, spoils all of whitened, and wins only where there is nothing else."""
    nan, inf = float("nan"), float("inf")
    helpful = [5.0, 5.0, nan, nan, nan, -inf, 5.0]
    out = score(from_logits([nan, 1.0, 1.0, 1.0, 1.0, 1.0, -9.0], helpful, lengths=[2, 2, 2, 1]))
    torch.testing.assert_close(
        out.combined, torch.tensor([nan, 5.0, nan, nan, nan, -inf, -9.0]), equal_nan=True
    )
    assert out.whitened.isnan().all() and out.best_of_group.tolist() == [1, 2, 5, 6]
    assert score(from_logits([nan, 2.0, 2.0], tagged=[True] * 3)).whitened.isnan().all(), (
        "all others are equal"
    )
    assert score(from_logits([1.0, inf], tagged=[True] * 2)).whitened.isnan().all()
    members = [nan] * 20 + [-inf] + [nan] * 5
    assert score(from_logits(members, members, lengths=[26])).best_of_group.tolist() == [20]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_score_does_not_depend_on_its_batch(dtype):
    """RM-5: alone, in any batch and in any order: the same bits (also in bf16)."""
    args = make_inputs([20], 97, 36, dtype=dtype)
    whole = score(args)
    for rows in (torch.tensor([17]), torch.arange(20).flip(0)):
        part = {"last_rows": args["last_rows"][rows], "is_safety": args["is_safety"][rows]}
        out = score(args | part | {"cu_groups": torch.tensor([0, len(rows)], dtype=torch.int32)})
        for name in ("r_safety", "r_helpful", "combined"):
            assert torch.equal(getattr(out, name), getattr(whole, name)[rows])


def test_forms_of_arguments():
    args = make_inputs([3, 4], 40, 40)
    plain = score(args)
    apart = {k: torch.stack((v, v), -1)[..., 0] for k, v in args.items()}
    padded = args | {"hidden_safety": torch.cat((args["hidden_safety"], torch.ones(50, 9)), 1)[:, :40]}
    turned = args | {"hidden_helpful": args["hidden_helpful"].t().contiguous().t()}
    narrow = args | {"last_rows": args["last_rows"].int(), "cu_groups": args["cu_groups"].long()}
    for changed in (apart, padded, turned, narrow):
        assert all(torch.equal(a, b) for a, b in zip(score(changed), plain, strict=True))
    mixed = {k: v.bfloat16() for k, v in args.items() if k.endswith("helpful")}
    check(args | mixed)
    check(args | {"hidden_helpful": args["hidden_safety"]})  # two heads on one trunk


@needs_interpreter
def test_memory_and_traffic():
    """The last rows are read once and no other; heads and norms once a response, from the cache; two launches."""
    args, found = make_inputs([7, 1, 30], 100, 41), []
    args["last_rows"] = torch.randperm(50)[:38]
    for seed in (None, 1):
        with audit(seed, **args) as seen:
            found.append(kernels.reward_score(*op_arguments(args)[:-1]))
        seen.check()
        assert seen.launches == 2
        for name, d in (("safety", 100), ("helpful", 41)):
            hidden, head = seen.traffic[f"hidden_{name}"], seen.traffic[f"head_{name}"]
            assert hidden.load_bytes == hidden.load_unique == 38 * d * 4
            assert head.load_bytes == 38 * d * 4 and head.load_unique == d * 4
        combined = seen.traffic["new2"]
        assert combined.store_bytes == 38 * 4 and combined.load_bytes == (3 * 38 + 1) * 4
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_more_responses_than_65535():
    """One dimension of the grid, whose limit is 2^31 - 1."""
    with FakeTensorMode(), launch.record() as launches:
        hidden, weight = torch.empty(9, 4), torch.empty(4)
        rows, tags = torch.empty(70_000, dtype=torch.int64), torch.empty(70_000, dtype=torch.bool)
        groups = torch.empty(66_001, dtype=torch.int32)
        kernels.reward_score(hidden, hidden, rows, weight, weight, tags, groups, None, None, 1e-5, 0.15)
    assert [x.programs for x in launches] == [70_000, 66_001]


@needs_interpreter
def test_offsets_past_32_bits():
    """Rows that stand that far apart in one storage."""
    args = make_inputs([3], 33, 33, t=3, norms=False) | {"last_rows": torch.tensor([2, 0, 1])}
    far = lazy_zeros(PAST_INT32 + 33).as_strided((3, 33), (PAST_INT32 // 2, 1))
    far.copy_(args["hidden_safety"])
    ours = ops.reward_score(**place(args | {"hidden_safety": far}), impl="triton")
    assert all(torch.equal(a.cpu(), b) for a, b in zip(ours, score(args), strict=True))
