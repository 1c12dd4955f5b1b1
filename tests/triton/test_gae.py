"""gae in Triton. The bug this file must catch: a block that does not hand on what comes after it."""

import itertools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from hpsafety import ops
from hpsafety.triton_kernels import gae as kernels
from hpsafety.triton_kernels import launch
from tests.ops.forms import PAST_INT32, lazy_zeros
from tests.ops.test_gae import assert_rounded, make_inputs, sequential
from tests.triton.audit import audit
from tests.triton.device import check_triton, place
from tests.triton.last_program import last_program, needs_interpreter

BLOCK = 16


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(kernels, "BLOCK", BLOCK)


def check_sequential(args, gamma, lam):
    advantages, returns = (x.cpu() for x in ops.gae(**place(args), gamma=gamma, lam=lam, impl="triton"))
    exact = sequential(**args, gamma=gamma, lam=lam)
    assert_rounded(advantages, exact)
    assert_rounded(returns, exact + args["values"].double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", [[], [1], [1, 1, 1], [3, 40, 1, 8, 17]])
def test_matches_oracle(dtype, lengths):
    """KER-2: against the fp64 oracle."""
    out = check_triton("gae", ops.gae, make_inputs(lengths, dtype), gamma=0.99, lam=0.9)
    assert out["out0"].dtype == out["out1"].dtype == torch.float32 and len(out) == 2


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (1.0, 1.0), (0.0, 0.5), (0.9, 0.0)])
def test_lengths_around_a_block(gamma, lam):
    """Against the sequential fp64 loop: rounded once, at any distance."""
    check_sequential(make_inputs([1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 5]), gamma, lam)


@pytest.mark.parametrize("length", [513])
def test_length_around_the_real_block(monkeypatch, length):
    monkeypatch.setattr(kernels, "BLOCK", 512)
    check_sequential(make_inputs([length], seed=length), 1.0, 0.95)


@pytest.mark.sweep
@pytest.mark.parametrize("length", [1, 511, 512, 513, 1023, 1024, 1025, 5000])
def test_long_responses(monkeypatch, length):
    monkeypatch.setattr(kernels, "BLOCK", 512)
    check_sequential(make_inputs([length], seed=length), 0.99, 1.0)


@pytest.mark.sweep
@pytest.mark.parametrize("seed", range(40))
def test_drawn_batches(seed):
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, (4, 60)[seed % 2], (int(torch.randint(1, 12, (), generator=g)),), generator=g)
    args = make_inputs(lengths.tolist(), torch.bfloat16 if seed % 4 == 0 else torch.float32, seed)
    check_sequential(args, *torch.rand(2, generator=g).tolist())


def test_a_response_does_not_depend_on_its_batch():
    """Neighbours never mix: bit-equal alone and in any batch."""
    args = place(make_inputs([3, 1, 37, 17]))
    whole = ops.gae(**args, impl="triton")
    for start, end in itertools.pairwise(args["cu_responses"].tolist()):
        alone = {"cu_responses": args["cu_responses"].new_tensor([0, end - start])}
        alone |= {name: args[name][start:end] for name in ("rewards", "values")}
        found = ops.gae(**alone, impl="triton")
        assert all(torch.equal(one, both[start:end]) for one, both in zip(found, whole, strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["rewards", "values"])
def test_bad_values_spread_backwards_only(bad, name):
    """To earlier tokens of their own response (a value also enters the delta before its own)."""
    args = place(make_inputs([4, 40, 5]))
    clean = ops.gae(**args, impl="triton")[0]
    at = 4 + 21
    args[name][at] = bad
    found = ops.gae(**args, impl="triton")[0]
    assert torch.equal(found[:4], clean[:4]) and torch.equal(found[at + 1 :], clean[at + 1 :])
    assert not found[4 : at + 1].isfinite().any()


def test_non_contiguous_and_int64():
    args = place(make_inputs([9, 20]))
    plain = ops.gae(**args, impl="triton")
    apart = {k: torch.stack((v, v), 1)[:, 0] for k, v in args.items()}
    for changed in (apart, args | {"cu_responses": args["cu_responses"].long()}):
        found = ops.gae(**changed, impl="triton")
        assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@needs_interpreter
def test_memory_and_traffic(dtype):
    """Rewards and values are read once, advantages and returns written once, in any order of the programs."""
    args, found = make_inputs([1, 33, 16], dtype), []
    for seed in (None, 1):
        with audit(seed, **args) as seen:
            found.append(kernels.gae(**args, gamma=1.0, lam=0.9))
        seen.check()
        for name in ("rewards", "values"):
            assert seen.traffic[name].load_bytes == args[name].nbytes
        assert seen.traffic["new0"].store_bytes == seen.traffic["new1"].store_bytes == 50 * 4
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_more_responses_than_65535():
    """One dimension of the grid, whose limit is 2^31 - 1."""
    count = 70_000
    with FakeTensorMode(), launch.record() as launches:
        rewards, offsets = torch.empty(3 * count), torch.empty(count + 1, dtype=torch.int32)
        kernels.gae(rewards, rewards, offsets, 1.0, 0.95)
    assert [x.programs for x in launches] == [count]


@needs_interpreter
def test_offsets_past_32_bits(monkeypatch):
    """The last of 65,537 responses, behind 2^31 tokens, in memory of which nothing else is touched."""
    args = make_inputs([40])
    far = {name: lazy_zeros(PAST_INT32) for name in ("rewards", "values")}
    for name, row in far.items():
        row[-40:] = args[name]
    offsets = torch.arange(65_537, dtype=torch.int64).mul(2**15)
    offsets = torch.cat((offsets, torch.tensor([PAST_INT32])))
    offsets[-2] = PAST_INT32 - 40
    monkeypatch.setattr(kernels, "launch", last_program)
    ours = kernels.gae(**far, cu_responses=offsets, gamma=1.0, lam=0.9)
    exact = sequential(**args, gamma=1.0, lam=0.9)
    assert_rounded(ours[0][-40:], exact)
    assert_rounded(ours[1][-40:], exact + args["values"].double())
