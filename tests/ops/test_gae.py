"""gae. The bug this file must catch: bootstrapping past a response's end with the next one's value."""

import itertools

import pytest
import torch

from hpsafety import ops, reference
from tests.ops.oracle import check_against_oracle

LENGTHS = [1, 2, 3, 7, 8, 9, 15, 16, 17, 255, 511, 512, 513, 1023, 1025, 5000]


def make_inputs(lengths, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    n = sum(lengths)
    return {
        "rewards": torch.randn(n, generator=g).to(dtype),
        "values": torch.randn(n, generator=g).to(dtype),
        "cu_responses": torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32),
    }


def sequential(rewards, values, cu_responses, gamma, lam):
    """The formula in Python floats (fp64), written a second time."""
    r, v, cu = rewards.tolist(), values.tolist(), cu_responses.tolist()
    out = [0.0] * len(r)
    for start, end in itertools.pairwise(cu):
        for t in range(end - 1, start - 1, -1):
            later, after = (out[t + 1], v[t + 1]) if t + 1 < end else (0.0, 0.0)
            out[t] = r[t] + gamma * after - v[t] + gamma * lam * later
    return torch.tensor(out, dtype=torch.float64)


def assert_rounded(ours, exact):
    """fp64 rounded once: within one ulp of the exact value, or of fp64's own noise."""
    assert bool(((ours.double() - exact).abs() <= exact.abs() * 2**-23 + 1e-9).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", [[], [1], [17], [1, 1, 1], [3, 600, 1, 8, 9], [2000]])
def test_matches_oracle(dtype, lengths):
    """KER-2: against the fp64 oracle."""
    out = check_against_oracle("gae", ops.gae, make_inputs(lengths, dtype), gamma=0.99, lam=0.9)
    assert out["out0"].dtype == out["out1"].dtype == torch.float32 and len(out) == 2


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.99, 1.0), (1.0, 1.0)])
def test_lengths(length, gamma, lam):
    """One response of 1 to 5,000 tokens against the sequential fp64 loop: rounded once, at any distance."""
    args = make_inputs([length], seed=length)
    advantages, returns = ops.gae(**args, gamma=gamma, lam=lam, impl="cpu")
    exact = sequential(**args, gamma=gamma, lam=lam)
    assert_rounded(advantages, exact)
    assert_rounded(returns, exact + args["values"].double())


@pytest.mark.parametrize("seed", range(25))
def test_random_sweep(seed):
    g = torch.Generator().manual_seed(seed)
    top = (4, 40, 700)[seed % 3]
    lengths = torch.randint(1, top, (int(torch.randint(1, 30, (), generator=g)),), generator=g).tolist()
    gamma, lam = torch.rand(2, generator=g).tolist()
    args = make_inputs(lengths, torch.bfloat16 if seed % 4 == 0 else torch.float32, seed)
    assert_rounded(
        ops.gae(**args, gamma=gamma, lam=lam, impl="cpu")[0], sequential(**args, gamma=gamma, lam=lam)
    )


@pytest.mark.parametrize("gamma, lam", [(0.0, 0.5), (1.0, 0.0), (0.0, 0.0)])
def test_borders_of_the_discounts(gamma, lam):
    args = make_inputs([5, 40])
    assert_rounded(
        ops.gae(**args, gamma=gamma, lam=lam, impl="cpu")[0], sequential(**args, gamma=gamma, lam=lam)
    )
    if gamma == 0:
        assert torch.equal(ops.gae(**args, gamma=gamma, lam=lam)[0], args["rewards"] - args["values"])


def test_undiscounted_returns_are_sums():
    """gamma = lam = 1: the return of a token is the sum of the rewards from it on."""
    args = make_inputs([700])
    _, returns = ops.gae(**args, gamma=1.0, lam=1.0, impl="cpu")
    sums = args["rewards"].double().flip(0).cumsum(0).flip(0)
    torch.testing.assert_close(returns, sums.float(), rtol=1e-6, atol=2e-6)


def test_more_responses_than_65535():
    """70,000 responses of one token, and as many of mixed lengths."""
    args = make_inputs([1] * 70_000)
    advantages, returns = ops.gae(**args, impl="cpu")
    assert torch.equal(advantages, args["rewards"] - args["values"])
    torch.testing.assert_close(returns, args["rewards"], rtol=0, atol=1e-6)
    args = make_inputs([1 + i % 3 for i in range(70_000)])
    assert_rounded(ops.gae(**args, impl="cpu")[0], sequential(**args, gamma=1.0, lam=0.95))


def test_a_response_does_not_depend_on_its_batch():
    """Neighbours never mix: bit-equal alone, in any batch and in any order."""
    lengths = [3, 1, 600, 17, 8, 2000, 9]
    args = make_inputs(lengths)
    whole = ops.gae(**args, impl="cpu")
    cu = args["cu_responses"].tolist()
    for start, end in itertools.pairwise(cu):
        alone = ops.gae(
            args["rewards"][start:end],
            args["values"][start:end],
            torch.tensor([0, end - start]).int(),
            impl="cpu",
        )
        assert all(torch.equal(one, both[start:end]) for one, both in zip(alone, whole, strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["rewards", "values"])
@pytest.mark.parametrize("at", [10, 10 + 597, 10 + 600])
def test_bad_values_spread_backwards_only(bad, name, at):
    """To earlier tokens of their own response (a value also enters the delta before its own)."""
    args = make_inputs([10, 1200, 20])
    clean = ops.gae(**args, impl="cpu")[0]
    args[name][at] = bad
    found = ops.gae(**args, impl="cpu")[0]
    assert torch.equal(found[:10], clean[:10]) and torch.equal(found[at + 1 :], clean[at + 1 :])
    assert not found[10 : at + 1].isfinite().any()


def test_no_gradient():
    args = make_inputs([5, 3])
    args["values"].requires_grad_(), args["rewards"].requires_grad_()
    for impl in ("cpu", "reference"):
        assert not any(out.requires_grad for out in ops.gae(**args, impl=impl))


def test_non_contiguous_and_int64():
    args = make_inputs([30, 70])
    plain = ops.gae(**args, impl="cpu")
    apart = {k: torch.stack((v, v), 1)[:, 0] for k, v in args.items()}
    wide = args | {"cu_responses": args["cu_responses"].long()}
    for changed in (apart, wide):
        assert all(torch.equal(a, b) for a, b in zip(ops.gae(**changed, impl="cpu"), plain, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_and_repeats_change_no_bit(dtype):
    args = make_inputs([40_000, 1, 3000, 70, 9000, 20_000], dtype)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        first = ops.gae(**args, impl="cpu")
        for threads in (1, 2, 3) * 33 + (1,):
            torch.set_num_threads(threads)
            again = ops.gae(**args, impl="cpu")
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)), threads
    finally:
        torch.set_num_threads(before)


def test_reference_is_the_formula():
    args = make_inputs([4, 1, 30])
    doubles = {k: v.double() if v.is_floating_point() else v for k, v in args.items()}
    advantages, returns = reference.gae(**doubles, gamma=0.9, lam=0.8)
    torch.testing.assert_close(advantages, sequential(**doubles, gamma=0.9, lam=0.8))
    torch.testing.assert_close(returns, advantages + doubles["values"])


def test_opcheck():
    args = make_inputs([4, 1, 30])
    eager = ops.gae(**args, impl="cpu")  # loads the kernels
    arguments = (*args.values(), 1.0, 0.95, "cpu")
    torch.library.opcheck(torch.ops.hpsafety.gae.default, arguments)
    assert torch.equal(torch.ops.hpsafety.gae(*arguments)[0], eager[0])


@pytest.mark.slow
def test_compile():
    args = make_inputs([4, 1, 30])
    compiled = torch.compile(lambda **kw: ops.gae(**kw, impl="cpu"), fullgraph=True)
    assert all(torch.equal(a, b) for a, b in zip(compiled(**args), ops.gae(**args, impl="cpu"), strict=True))


def test_backends_are_told_apart():
    args = make_inputs([4, 3])
    before = reference.calls["gae"]
    assert torch.equal(ops.gae(**args)[0], ops.gae(**args, impl="cpu")[0])
    assert reference.calls["gae"] == before
    ops.gae(**args, impl="reference")
    assert reference.calls["gae"] == before + 1


@pytest.mark.parametrize(
    "change, message",
    [
        ({"rewards": torch.zeros(6, 1)}, "rewards must be"),
        ({"rewards": torch.zeros(6, dtype=torch.float64)}, "rewards must be"),
        ({"values": torch.zeros(5)}, "values must be"),
        ({"values": torch.zeros(6, device="meta")}, "values must be .* on cpu"),
        ({"gamma": 1.5}, "gamma must lie in"),
        ({"lam": float("nan")}, "lam must lie in"),
        ({"cu_responses": torch.tensor([0.0, 6.0])}, "cu_responses must be"),
        ({"cu_responses": torch.tensor([[0, 6]])}, "cu_responses must be"),
        ({"cu_responses": torch.tensor([], dtype=torch.int32)}, "cu_responses must be"),
        ({"cu_responses": torch.tensor([1, 6])}, "cu_responses must run from 0 to 6, got 1 to 6"),
        ({"cu_responses": torch.tensor([0, 5])}, "cu_responses must run from 0 to 6, got 0 to 5"),
        ({"cu_responses": torch.tensor([0])}, "cu_responses must run from 0 to 6"),
        ({"cu_responses": torch.tensor([0, 4, 2, 6])}, "cu_responses must rise strictly: entry 2"),
        ({"cu_responses": torch.tensor([0, 4, 4, 6])}, "cu_responses must rise strictly: entry 2"),
    ],
)
def test_bad_arguments(change, message):
    args = {"rewards": torch.zeros(6), "values": torch.zeros(6), "cu_responses": torch.tensor([0, 2, 6])}
    with pytest.raises(ValueError, match=message):
        ops.gae(**(args | change), impl="cpu")


@pytest.mark.parametrize("offsets", [[0, 7], [-1, 6], [0, 9, 6], [6], []])
def test_kernel_refuses_offsets_out_of_range(offsets):
    cu = torch.tensor(offsets, dtype=torch.int32)
    with pytest.raises(ValueError, match="cu_responses must rise from 0 to 6"):
        torch.ops.hpsafety.gae(torch.zeros(6), torch.zeros(6), cu, 1.0, 0.95, "cpu")


def test_rows_past_two_to_the_31(far_rows):
    args = make_inputs([30, 700])
    far = {k: far_rows(v) if v.is_floating_point() else v for k, v in args.items()}
    assert all(torch.equal(a, b) for a, b in zip(ops.gae(**args), ops.gae(**far), strict=True))
