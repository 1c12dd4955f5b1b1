"""gae in CUDA. The bug this file must catch: a warp or a tile that does not hand on what comes after it."""

import itertools

import pytest
import torch

from hpsafety import ops
from hpsafety.cuda_kernels import gae as kernels
from tests.cuda import replay
from tests.cuda.conftest import DEVICE, check_cuda, place
from tests.ops.forms import PAST_INT32, reserved
from tests.ops.test_gae import assert_rounded, make_inputs, sequential

TILE, WARP, THREAD = 512, 128, 4  # tokens


def check_sequential(args, gamma, lam):
    advantages, returns = (x.cpu() for x in ops.gae(**place(args), gamma=gamma, lam=lam, impl="cuda"))
    exact = sequential(**args, gamma=gamma, lam=lam)
    assert_rounded(advantages, exact)
    assert_rounded(returns, exact + args["values"].double())


@pytest.mark.parametrize("rewards", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("values", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", [[], [1], [1, 1, 1], [3, 600, 1, 8, 17]])
def test_matches_oracle(rewards, values, lengths):
    """KER-2: against the fp64 oracle, in any mix of types."""
    args = make_inputs(lengths)
    args |= {"rewards": args["rewards"].to(rewards), "values": args["values"].to(values)}
    out = check_cuda("gae", ops.gae, args, gamma=0.99, lam=0.9)
    assert out["out0"].dtype == out["out1"].dtype == torch.float32 and len(out) == 2


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (1.0, 1.0), (0.0, 0.5), (0.9, 0.0)])
def test_lengths_around_threads_warps_and_tiles(gamma, lam):
    """Against the sequential fp64 loop: rounded once, at any distance."""
    borders = [size + d for size in (THREAD, WARP, TILE, 2 * TILE) for d in (-1, 0, 1)]
    check_sequential(make_inputs([2, *borders, 3 * TILE + 5]), gamma, lam)


def test_lone_reward():
    """What one reward at the end is worth at every earlier token: powers of gamma lam, over three tiles."""
    args = make_inputs([3 * TILE - 7])
    args["rewards"][:-1], args["values"][:] = 0.0, 0.0
    advantages = ops.gae(**place(args), gamma=1.0, lam=0.999, impl="cuda")[0].cpu().double()
    powers = 0.999 ** torch.arange(3 * TILE - 8, -1, -1, dtype=torch.float64)
    torch.testing.assert_close(advantages, args["rewards"][-1].double() * powers, rtol=2**-23, atol=0)


@pytest.mark.sweep
@pytest.mark.parametrize("seed", range(60))
def test_drawn_batches(seed):
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(
        1, (4, 60, 1500)[seed % 3], (int(torch.randint(1, 9, (), generator=g)),), generator=g
    )
    args = make_inputs(lengths.tolist(), torch.bfloat16 if seed % 4 == 0 else torch.float32, seed)
    check_sequential(args, *torch.rand(2, generator=g).tolist())


@pytest.mark.sweep
def test_more_responses_than_65535():
    check_sequential(make_inputs([1 + i % 3 for i in range(70_000)]), 1.0, 0.95)


def test_a_response_does_not_depend_on_its_batch():
    """Neighbours never mix: bit-equal alone, in any batch and in any place."""
    args = place(make_inputs([3, 1, 700, 130]))
    whole = ops.gae(**args, impl="cuda")
    for start, end in itertools.pairwise(args["cu_responses"].tolist()):
        alone = {"cu_responses": args["cu_responses"].new_tensor([0, end - start])}
        alone |= {name: args[name][start:end] for name in ("rewards", "values")}
        found = ops.gae(**alone, impl="cuda")
        assert all(torch.equal(one, both[start:end]) for one, both in zip(found, whole, strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["rewards", "values"])
@pytest.mark.parametrize("place_of", [21, 4 + 600 - 1])
def test_bad_values_spread_backwards_only(bad, name, place_of):
    """To earlier tokens of their own response (a value also enters the delta before its own)."""
    args = place(make_inputs([4, 600, 5]))
    clean = ops.gae(**args, impl="cuda")[0]
    args[name][place_of] = bad
    found = ops.gae(**args, impl="cuda")[0]
    assert torch.equal(found[:4], clean[:4]) and torch.equal(found[place_of + 1 :], clean[place_of + 1 :])
    assert not found[4 : place_of + 1].isfinite().any()


def test_non_contiguous_and_int64():
    args = place(make_inputs([9, 20]))
    plain = ops.gae(**args, impl="cuda")
    apart = {k: torch.stack((v, v), 1)[:, 0] for k, v in args.items()}
    for changed in (apart, args | {"cu_responses": args["cu_responses"].long()}):
        found = ops.gae(**changed, impl="cuda")
        assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))


@pytest.mark.skipif(DEVICE == "cuda", reason="reserves address space that a GPU has not")
def test_offsets_past_32_bits():
    """A response behind 2^31 tokens, in memory of which nothing else is touched."""
    args = make_inputs([40])
    far = {name: reserved(PAST_INT32) for name in ("rewards", "values")}
    for name, row in far.items():
        row[-40:] = args[name]
    offsets = torch.tensor([PAST_INT32 - 40, PAST_INT32])
    ours = kernels.gae(**far, cu_responses=offsets, gamma=1.0, lam=0.9)
    exact = sequential(**args, gamma=1.0, lam=0.9)
    assert_rounded(ours[0][-40:], exact)
    assert_rounded(ours[1][-40:], exact + args["values"].double())


def test_opcheck():
    args = place(make_inputs([4, 1, 30]))
    torch.library.opcheck(torch.ops.hpsafety.gae.default, (*args.values(), 1.0, 0.95, "cuda"))


@pytest.mark.skipif(DEVICE == "cuda", reason="checks the emulated kernels")
@pytest.mark.parametrize("mode, seed", [("fibers", 1), ("fibers", 2), ("tsan", None), ("asan", None)])
def test_replay(mode, seed):
    """Other orders of threads and blocks, races, bounds, two writers: nothing is found, and the bytes are the same."""
    args = make_inputs([2, 2 * TILE + 130])
    args["values"] = args["values"].bfloat16()
    with replay.recorded() as calls:
        ops.gae(**args, impl="cuda")
    replay.run(calls[0], mode, seed)
