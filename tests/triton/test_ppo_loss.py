"""ppo_loss in Triton. The bug this file must catch: a program's partial sum that is lost in the final one."""

import itertools

import pytest
import torch

from hpsafety import ops
from hpsafety.triton_kernels import ppo_loss as kernels
from tests.ops import ppo_loss_on_gpu
from tests.ops.forms import PAST_INT32, reserved
from tests.ops.ppo_loss_on_gpu import *  # noqa: F403  the tests that both backends have
from tests.ops.test_ppo_loss import GRADS, make_inputs
from tests.triton.audit import audit
from tests.triton.device import DEVICE, check_triton, place
from tests.triton.last_program import last_program, needs_interpreter

DTYPES = [torch.float32, torch.bfloat16]
BLOCK = 64


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(kernels, "BLOCK", BLOCK)
    monkeypatch.setattr(kernels, "PARTIALS", 2)


@pytest.fixture
def impl():
    return "triton"


def run(args, **kwargs):
    return ppo_loss_on_gpu.run(args, "triton", **kwargs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("n", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 5 * BLOCK + 7])
def test_matches_oracle(dtype, entropy, n):
    """KER-2: every field and gradient against fp64 around a block, and with more partials than are summed at a time."""
    args = make_inputs(n, dtype, entropy=entropy)
    out = check_triton("ppo_loss", ops.ppo_loss, args, entropy_coef=0.02 if entropy else 0.0)
    assert all(out[f"out{i}"].dtype == torch.float32 and out[f"out{i}"].dim() == 0 for i in range(6))
    assert {k for k in out if k.startswith("grad")} == {f"grad_{k}" for k in GRADS[: 2 + entropy]}


def check_drawn(seed):
    g = torch.Generator().manual_seed(100 + seed)
    unit = torch.rand(6, generator=g).tolist()
    n = int(torch.randint(0, 300, (), generator=g))
    args = make_inputs(n, DTYPES[seed % 3 == 0], seed, spread=unit[0], masked=unit[1])
    args["values"] = args["values"].float()  # a mix of storage types
    names = ("clip_ratio", "value_clip", "value_coef", "entropy_coef")
    settings = dict(zip(names, (unit[2] / 2, *unit[3:]), strict=True))
    count = (
        None,
        3.0 * n + 1,
        torch.tensor(2 * n + 5),
        torch.tensor(7.0),
        torch.tensor(3, dtype=torch.int8),
    )[seed % 5]
    check_triton("ppo_loss", ops.ppo_loss, args, num_tokens=count, **settings)


@pytest.mark.parametrize("seed", range(5))
def test_settings_and_counts(seed):
    check_drawn(seed)


@pytest.mark.sweep
@pytest.mark.parametrize("seed", range(5, 65))
def test_drawn_settings(seed):
    check_drawn(seed)


@pytest.mark.parametrize("junk", [float("nan"), float("inf")])
def test_masked_tokens_contribute_nothing(junk):
    """PPO-6: whatever masked tokens hold, every field and gradient keeps its bits; their gradients are 0."""
    clean = make_inputs(150)
    dirty = {k: v if k == "mask" else torch.where(clean["mask"], v, junk) for k, v in clean.items()}
    a, b = (run(x, entropy_coef=0.1) for x in (clean, dirty))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert all(not b[f"grad_{k}"].cpu()[~clean["mask"]].any() for k in GRADS)


@pytest.mark.parametrize("kind", ["number", "tensor"])
def test_micro_batches_add_up(kind):
    """Loss, metrics and gradients do not depend on the split when num_tokens is global; ratio_max is maximised."""
    args = make_inputs(200)
    n = int(args["mask"].sum())
    count = n if kind == "number" else torch.tensor(n, device=DEVICE)
    whole = run(args, entropy_coef=0.05)
    parts = [
        run({k: v[a:b] for k, v in args.items()}, entropy_coef=0.05, num_tokens=count)
        for a, b in itertools.pairwise((0, 17, 17, 150, 200))
    ]
    for i in range(5):
        total = sum(p[f"out{i}"].double() for p in parts)
        torch.testing.assert_close(total.float(), whole[f"out{i}"], rtol=2e-6, atol=1e-7)
    assert max(p["out5"] for p in parts) == whole["out5"]
    for name in GRADS:
        joined = torch.cat([p[f"grad_{name}"] for p in parts])
        torch.testing.assert_close(joined, whole[f"grad_{name}"], rtol=2e-6, atol=0)


@pytest.mark.parametrize(
    "name", ["logprobs", "old_logprobs", "advantages", "values", "old_values", "returns"]
)
def test_nan_propagates(name):
    """Also out of a program that is not the last, and into ratio_max only where rho is NaN."""
    args = make_inputs(300, masked=0.0)
    args[name][7] = torch.nan
    out = ops.ppo_loss(**place(args), impl="triton")
    assert out.loss.isnan() and out.ratio_max.isnan() == (name in ("logprobs", "old_logprobs"))


def test_non_contiguous():
    args = make_inputs(70)
    a, b = run(args), run({k: torch.stack((v, v), 1)[:, 0] for k, v in args.items()})
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("dtype", DTYPES)
@needs_interpreter
def test_memory_and_traffic(dtype):
    """Of a token 25 bytes in fp32 (29 with entropy) are read once, and 8 (12) written once, in any order."""
    n, found = 3 * BLOCK + 5, []
    args = make_inputs(n, dtype)
    names = ("logprobs", "old_logprobs", "advantages", "values", "old_values", "returns", "mask", "entropy")
    for seed in (None, 1):
        with audit(seed, **args) as seen:
            found.append(kernels.ppo_loss(*(args[k] for k in names), 0.2, 0.2, 0.5, 0.1, None, None))
        seen.check()
        assert seen.launches == 2
        for name in names:
            assert seen.traffic[name].load_bytes == args[name].nbytes
        grads = found[-1][2]
        assert seen.traffic["new0"].store_bytes == seen.traffic["new0"].store_unique == grads.nbytes
        partial = seen.traffic["new3"]
        assert partial.store_bytes == partial.load_bytes == 7 * 4 * 8
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@needs_interpreter
def test_offsets_past_32_bits():
    """The last program of 2^31 tokens (and gradients beyond twice that), where nothing else is touched."""
    row, mask = reserved(PAST_INT32), reserved(PAST_INT32 // 4).view(torch.bool)
    row[-64:], mask[-50:] = torch.randn(64), True
    near, near_mask = row[-64:].clone(), mask[-64:].clone()
    expected = kernels.ppo_loss(*[near] * 6, near_mask, near, 0.2, 0.2, 0.5, 0.1, 64.0, None)[2]
    grads, programs = reserved(3, PAST_INT32), -(-PAST_INT32 // 128)
    partial = torch.empty(7, programs, dtype=torch.float64)
    last_program(
        kernels.ppo_tokens, programs, *[row] * 6, mask, row, grads, partial, PAST_INT32, 0.2, 0.8, 1.2, 0.2, 0.5, 0.1,
        HAS_ENTROPY=True, BLOCK=128,
    )  # fmt: skip
    assert torch.equal(grads[:, -64:], expected)
