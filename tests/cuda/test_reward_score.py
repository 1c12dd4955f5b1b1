"""reward_score in CUDA. The bug this file must catch: a response at exactly the threshold routed to safety."""

import math

import pytest
import torch

from hpsafety import ops, reference
from tests.cuda import replay
from tests.cuda.conftest import DEVICE, place
from tests.ops.oracle import check_error, to_fp64
from tests.ops.test_reward_score import FLOATS, from_logits, make_inputs

DTYPES = [torch.float32, torch.bfloat16]
COMBINED = 22  # of the launcher's arguments: written by its first launch, read by its second


def score(args, **kwargs):
    out = ops.reward_score(**place(args), **kwargs, impl="cuda")
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
    "lengths, d1, d2",
    [([], 8, 8), ([1], 1, 2), ([2, 3], 63, 64), ([17, 1, 8], 65, 2000), ([64], 520, 7), ([600, 5], 8, 16)],
)
def test_matches_oracle(dtype, norms, lengths, d1, d2):
    """KER-2: K from 1 to over a block, widths that are whole 16-byte words and others."""
    check(make_inputs(lengths, d1, d2, dtype=dtype, norms=norms))


@pytest.mark.sweep
@pytest.mark.parametrize("seed", range(100))
def test_drawn_batches(seed):
    g = torch.Generator().manual_seed(500 + seed)
    lengths = torch.randint(1, 40, (int(torch.randint(1, 4, (), generator=g)),), generator=g).tolist()
    d1, d2 = torch.randint(1, 1200, (2,), generator=g).tolist()
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


def test_views_and_indices():
    """Rows apart at an address that is not 16-byte aligned, and int32 indices."""
    args = make_inputs([2, 3], 64, 64, dtype=torch.bfloat16)
    expected = score(args)
    apart = dict(args)
    wide = torch.zeros(50, 101, dtype=torch.bfloat16)
    wide[:, 3:67] = args["hidden_safety"]
    apart |= {"hidden_safety": wide[:, 3:67], "last_rows": args["last_rows"].int()}
    check(apart)
    assert torch.equal(score(apart).r_helpful, expected.r_helpful)


def test_alone_and_together():
    """A response has the same bits alone and in a batch."""
    args = make_inputs([4, 3], 300, 64)
    together = score(args)
    alone = args | {"last_rows": args["last_rows"][5:6], "is_safety": args["is_safety"][5:6]}
    alone["cu_groups"] = torch.tensor([0, 1], dtype=torch.int32)
    assert torch.equal(score(alone).combined, together.combined[5:6])


def test_not_numbers():
    """A NaN among the scores: whitening is NaN, the best passes over it; a group of NaN gives its first."""
    nan = float("nan")
    out = score(from_logits([1.0, nan, 2.0, nan, nan], [nan] * 5, [True] * 5, [3, 2]))
    assert out.best_of_group.tolist() == [2, 3] and out.whitened.isnan().all()
    assert score(from_logits([3.0, 3.0])).whitened.tolist() == [0.0, 0.0]
    assert score(from_logits([3.0, nan, 3.0], [nan] * 3, [True] * 3)).whitened.isnan().all()


@pytest.mark.parametrize("width", [64, 63])
def test_offsets_past_two_to_the_31(width):
    """A row past 2^31 elements, read in place, in 16-byte words and not."""
    try:
        huge = torch.empty(2**31 + 8 + width, dtype=torch.bfloat16, device=DEVICE)
    except RuntimeError:
        pytest.skip("4.3 GB of address space cannot be reserved")
    args = make_inputs([1], width, 7, 2, torch.bfloat16)
    args |= {"last_rows": torch.tensor([1])}
    far = huge.as_strided((2, width), (2**31 + 8, 1))
    far[1] = args["hidden_safety"][1]
    out, wanted = score(args | {"hidden_safety": far}), score(args)
    assert torch.equal(out.r_safety, wanted.r_safety)


@pytest.mark.skipif(DEVICE == "cuda", reason="checks the emulated kernels")
@pytest.mark.parametrize("mode, seed", [("fibers", 1), ("fibers", 2), ("tsan", None), ("asan", None)])
def test_replay(mode, seed):
    """Other orders of threads and blocks, races, bounds, two writers: nothing is found, and the bytes are the same."""
    with replay.recorded() as calls:
        score(make_inputs([2, 3, 8], 64, 37, dtype=torch.bfloat16))
    replay.run(calls[0], mode, seed, read_back=(COMBINED,))
