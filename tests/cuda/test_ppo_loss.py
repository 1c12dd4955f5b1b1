"""ppo_loss in CUDA. The bug this file must catch: a block's or a warp's partial sum that is lost in the final one."""

import itertools

import pytest
import torch

from hpsafety import ops
from hpsafety.cuda_kernels import library
from hpsafety.cuda_kernels import ppo_loss as kernels
from tests.cuda import replay
from tests.cuda.conftest import DEVICE, check_cuda, place
from tests.ops import ppo_loss_on_gpu
from tests.ops.forms import PAST_INT32, reserved
from tests.ops.ppo_loss_on_gpu import *  # noqa: F403  the tests that both backends have
from tests.ops.test_ppo_loss import GRADS, make_inputs

DTYPES = [torch.float32, torch.bfloat16]
BLOCK = kernels.BLOCK
SUM_THREADS = 256  # of the block that adds up the others
NAMES = ("logprobs", "old_logprobs", "advantages", "values", "old_values", "returns", "mask", "entropy")
PARTIALS = 19  # of the launcher's arguments: written by its first launch, read by its second


@pytest.fixture
def impl():
    return "cuda"


def run(args, **kwargs):
    return ppo_loss_on_gpu.run(args, "cuda", **kwargs)


def make_summable(n, dtype=torch.float32, seed=0, **kwargs):
    """make_inputs with advantages around 1: a sum over many tokens is then no difference of large numbers, in which
    every backend's rounding of exp is luck."""
    args = make_inputs(n, dtype, seed, **kwargs)
    return args | {"advantages": (args["advantages"].float() + 1).to(dtype)}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("n", [0, 1, 7, 8, 9, 300, BLOCK - 1, BLOCK, BLOCK + 1, 5 * BLOCK + 12])
def test_matches_oracle(dtype, entropy, n):
    """KER-2: every field and gradient against fp64 around a thread's words, a warp and a block."""
    args = make_summable(n, dtype, entropy=entropy)
    out = check_cuda("ppo_loss", ops.ppo_loss, args, entropy_coef=0.02 if entropy else 0.0)
    assert all(out[f"out{i}"].dtype == torch.float32 and out[f"out{i}"].dim() == 0 for i in range(6))
    assert {k for k in out if k.startswith("grad")} == {f"grad_{k}" for k in GRADS[: 2 + entropy]}


def check_drawn(seed):
    g = torch.Generator().manual_seed(100 + seed)
    unit = torch.rand(6, generator=g).tolist()
    n = int(torch.randint(0, 3 * BLOCK, (), generator=g))
    args = make_summable(n, torch.float32, seed, spread=unit[0], masked=unit[1])
    for i, name in enumerate(k for k in NAMES if k != "mask"):  # a mix of storage types
        args[name] = args[name].bfloat16() if seed >> i & 1 else args[name]
    names = ("clip_ratio", "value_clip", "value_coef", "entropy_coef")
    settings = dict(zip(names, (unit[2] / 2, *unit[3:]), strict=True))
    count = (
        None, 3.0 * n + 1, torch.tensor(2 * n + 5), torch.tensor(7.0), torch.tensor(3, dtype=torch.int8),
        torch.tensor(11.0, dtype=torch.float64),
    )[seed % 6]  # fmt: skip
    count = count.to(DEVICE) if isinstance(count, torch.Tensor) else count
    check_cuda("ppo_loss", ops.ppo_loss, args, num_tokens=count, **settings)


@pytest.mark.parametrize("seed", [6, 13, 44, 63, 70, 107])
def test_settings_and_counts(seed):
    check_drawn(seed)


@pytest.mark.sweep
@pytest.mark.parametrize("seed", range(128))
def test_drawn_settings(seed):
    """Every mix of fp32 and bf16 rows."""
    check_drawn(seed)


def test_more_blocks_than_threads_add_them_up():
    """A block of more than one partial sum for some of the last launch's threads."""
    check_cuda("ppo_loss", ops.ppo_loss, make_summable((SUM_THREADS + 3) * BLOCK + 5, entropy=False))


@pytest.mark.parametrize("junk", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_tokens_contribute_nothing(junk, dtype):
    """PPO-6: whatever masked tokens hold, every field and gradient keeps its bits; their gradients are 0."""
    clean = make_inputs(1200, dtype)
    dirty = {k: v if k == "mask" else torch.where(clean["mask"], v, junk) for k, v in clean.items()}
    a, b = (run(x, entropy_coef=0.1) for x in (clean, dirty))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert all(not b[f"grad_{k}"].cpu()[~clean["mask"]].any() for k in GRADS)


@pytest.mark.parametrize("kind", ["number", "tensor"])
def test_micro_batches_add_up(kind):
    """Loss, metrics and gradients do not depend on the split when num_tokens is global; ratio_max is maximised.
    The parts begin at addresses that are not 16-byte aligned."""
    args = make_inputs(1500)
    n = int(args["mask"].sum())
    count = n if kind == "number" else torch.tensor(n, device=DEVICE)
    whole = run(args, entropy_coef=0.05)
    parts = [
        run({k: v[a:b] for k, v in args.items()}, entropy_coef=0.05, num_tokens=count)
        for a, b in itertools.pairwise((0, 17, 17, 1111, 1500))
    ]
    for i in range(5):
        total = sum(p[f"out{i}"].double() for p in parts)
        torch.testing.assert_close(total.float(), whole[f"out{i}"], rtol=2e-6, atol=1e-7)
    assert max(p["out5"] for p in parts) == whole["out5"]
    for name in GRADS:
        joined = torch.cat([p[f"grad_{name}"] for p in parts])
        torch.testing.assert_close(joined, whole[f"grad_{name}"], rtol=2e-6, atol=0)


@pytest.mark.parametrize("at", [7, BLOCK + 700])
@pytest.mark.parametrize("name", NAMES[:6])
def test_nan_propagates(name, at):
    """Also out of a block or a warp that is not the last, and into ratio_max only where rho is NaN."""
    args = make_inputs(2 * BLOCK + 100, masked=0.0)
    args[name][at] = torch.nan
    out = ops.ppo_loss(**place(args), impl="cuda")
    assert out.loss.isnan() and out.ratio_max.isnan() == (name in ("logprobs", "old_logprobs"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_views(dtype):
    """Elements apart, and rows at addresses that are not 16-byte aligned: the same bits."""
    args = make_inputs(1304, dtype)
    shifted = {k: torch.cat((v[:3], v))[3:] for k, v in args.items()}
    plain = run(args)
    for views in (shifted, {k: torch.stack((v, v), 1)[:, 0] for k, v in args.items()}):
        found = run(views)
        assert all(torch.equal(plain[k], found[k]) for k in plain)


@pytest.mark.skipif(DEVICE == "cuda", reason="runs one block alone")
def test_offsets_past_32_bits(monkeypatch):
    """The last block of 2^31 tokens (and gradients beyond twice that), where nothing else is touched."""
    row, mask = reserved(PAST_INT32), reserved(PAST_INT32 // 4).view(torch.bool)
    row[-64:], mask[-50:] = torch.randn(64), True
    near, near_mask = row[-64:].clone(), mask[-64:].clone()
    with library.record() as calls:
        expected = kernels.ppo_loss(*[near] * 6, near_mask, near, 0.2, 0.2, 0.5, 0.1, 64.0, None)[2]
    grads, blocks = reserved(3, PAST_INT32), -(-PAST_INT32 // BLOCK)
    partials, stats = torch.zeros(kernels.PARTIALS, blocks, dtype=torch.float64), torch.empty(7)
    monkeypatch.setenv("SIMT_LAST", "1")
    library.launch(
        "hps_ppo_loss", calls[0].signature, *[row] * 7, 0, mask, PAST_INT32, 0.2, 0.8, 1.2, 0.2, 0.5, 0.1, 1, None,
        64.0, partials, stats[6:], stats, grads,
    )  # fmt: skip
    assert torch.equal(grads[:, -64:], expected)
    assert partials[:, -1].any() and not partials[:, :-1].any()


def test_opcheck():
    args = place(make_inputs(20))
    arguments = (*(args[k] for k in NAMES), 0.2, 0.2, 0.5, 0.1, None, None, "cuda")
    torch.library.opcheck(torch.ops.hpsafety.ppo_loss.default, arguments)


@pytest.mark.skipif(DEVICE == "cuda", reason="checks the emulated kernels")
@pytest.mark.parametrize(
    "mode, seed, tail", [("fibers", 1, 16), ("fibers", 2, 3), ("tsan", None, 16), ("asan", None, 3)]
)
def test_replay(mode, seed, tail):
    """Other orders of threads and blocks, races, bounds, two writers: nothing is found, and the bytes are the same."""
    args = make_inputs(BLOCK + tail)
    args["values"] = args["values"].bfloat16()
    args["returns"] = torch.cat((args["returns"][:1], args["returns"]))[1:]  # 4 bytes past a 16-byte address
    with replay.recorded() as calls:
        ops.ppo_loss(**args, impl="cuda")
    replay.run(calls[0], mode, seed, read_back=(PARTIALS,))
