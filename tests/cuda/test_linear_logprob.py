"""linear_logprob in CUDA. The bugs this file must catch: a part that is merged without its rescaling, a sum that one
part leaves out or takes twice, a row without gradient that is read, and results written over logits not yet read."""

import itertools
import math

import pytest
import torch

from hpsafety import ops, reference
from hpsafety.cuda_kernels import library
from hpsafety.cuda_kernels import linear_logprob as kernels
from tests.cuda import replay
from tests.cuda.conftest import DEVICE, check_cuda, place
from tests.ops.forms import lazy_zeros
from tests.ops.oracle import check_error, run_with_grads
from tests.ops.test_linear_logprob import make_inputs
from tests.triton.linear_forms import Allocated

DTYPES = [torch.float32, torch.bfloat16]
ROWS, WORDS = 32, 64  # of a part, where parts are small


@pytest.fixture(autouse=True)
def small_parts(monkeypatch, request):
    """Small inputs have borders of parts; a test that names `real_parts` gets what a GPU gets."""
    if "real_parts" not in request.fixturenames:
        monkeypatch.setattr(kernels, "part_of", lambda n: (ROWS, WORDS))


@pytest.fixture
def real_parts():
    """The parts that a GPU gets."""


def run(args, grad, grad_entropy=None, temperature=1.0, **needs):
    """Outputs and gradients, (logprobs, norm, entropies, grad_hidden, grad_weight), by the wrapper's functions."""
    outputs = kernels.linear_logprob(*args.values(), temperature, grad_entropy is not None)
    return *outputs, *backward(args, grad, grad_entropy, outputs, temperature, **needs)


def backward(args, grad, grad_entropy, outputs, temperature=1.0, need_hidden=True, need_weight=True):
    _, norm, entropies = outputs
    return kernels.linear_logprob_backward(
        grad, grad_entropy, *args.values(), norm, None if grad_entropy is None else entropies, temperature,
        need_hidden, need_weight,
    )  # fmt: skip


def incoming(n, seed=5, share=1.0):
    """Two rows of gradients, zero in the same rows."""
    g = torch.Generator().manual_seed(seed)
    trained = torch.rand(n, generator=g) < share
    grads = [torch.randn(n, generator=g) * trained for _ in range(2)]
    return trained, *(x.to(DEVICE) for x in grads)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize(
    "n, d, v", [(0, 8, 5), (1, 64, 33), (15, 5, 1), (31, 33, 63), (33, 32, 65), (65, 24, 200), (32, 7, 64)]
)
def test_matches_oracle(dtype, entropy, n, d, v):
    """KER-2: forward and backward around the borders of parts, rows that end within a 16-byte word."""
    out = check_cuda("linear_logprob", ops.linear_logprob, make_inputs(n, d, v, dtype), entropy=entropy)
    assert out["grad_weight"].dtype == dtype and (out["out0"] <= 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("v", [507, kernels.TILE - 1, kernels.TILE + 3, 5 * kernels.TILE + 130])
def test_real_parts(dtype, v, real_parts):
    """Around a tile of the kernels and with several in a part."""
    check_cuda(
        "linear_logprob", ops.linear_logprob, make_inputs(5, 24, v, dtype), entropy=True, temperature=0.5
    )


@pytest.mark.parametrize("temperature, scale", [(0.7, 1.0), (3.0, 100.0)])
def test_temperature_and_large_logits(temperature, scale):
    args = make_inputs(20, 24, 301, scale=scale)
    out = check_cuda("linear_logprob", ops.linear_logprob, args, entropy=True, temperature=temperature)
    assert (out["out0"] <= 0).all() and (out["out1"] >= 0).all()


@pytest.mark.sweep
@pytest.mark.parametrize("seed", range(100))
def test_drawn_shapes(seed):
    g = torch.Generator().manual_seed(seed)
    n, d, v = (int(torch.randint(1, high, (), generator=g)) for high in (150, 100, 700))
    args = make_inputs(n, d, v, DTYPES[seed % 2], seed, scale=10.0 ** (seed % 3 - 1))
    temperature = 0.25 * (1 + seed % 7)
    check_cuda("linear_logprob", ops.linear_logprob, args, temperature=temperature, entropy=seed % 4 < 2)


def test_parts_do_not_change_the_forward(monkeypatch, real_parts):
    """Where a part ends at a tile's border, a row's numbers are to the bit those of one part."""
    args = place(make_inputs(3, 16, 2 * kernels.TILE + 70))
    args["weight"] = args["weight"].sign()  # products without rounding, whatever the GEMM's shape
    args["hidden"] = args["hidden"].mul(8).round()
    whole = kernels.linear_logprob(*args.values(), 1.7, True)
    monkeypatch.setattr(kernels, "part_of", lambda n: (2, kernels.TILE))
    for a, b in zip(kernels.linear_logprob(*args.values(), 1.7, True), whole, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_without_gradient(dtype):
    """They may hold anything and get exact zeros; the rest is as if they had not been there."""
    args = place(make_inputs(70, 24, 130, dtype))
    trained, grad, grad_entropy = incoming(70, share=0.6)
    *outputs, dh, dw = run(args, grad, grad_entropy)
    kept = {k: v if k == "weight" else v[trained] for k, v in args.items()}
    *_, alone_h, alone_w = run(kept, grad[trained], grad_entropy[trained])
    torch.testing.assert_close(dh[trained], alone_h)
    torch.testing.assert_close(dw, alone_w, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)
    assert not dh[~trained].any()
    for x in (args["hidden"], outputs[1].t(), outputs[2]):
        x[~trained] = float("nan")
    dirty_h, dirty_w = backward(args, grad, grad_entropy, outputs)
    assert torch.equal(dirty_h, dh) and torch.equal(dirty_w, dw)
    args["weight"][129] = float("inf")  # 0 * inf is not what such a row gets
    dirty_h, _ = backward(args, grad, grad_entropy, outputs)
    assert not dirty_h[~trained].any() and dirty_h[trained].isnan().all()


def test_either_gradient_keeps_a_row():
    args = place(make_inputs(40, 16, 70))
    zeros, grad = torch.zeros(40, device=DEVICE), torch.ones(40, device=DEVICE)
    for grads in ((zeros, grad), (grad, zeros), (grad, None)):
        *_, dh, dw = run(args, *grads)
        assert (dh != 0).any(1).all() and dw.any()
    *_, dh, dw = run(args, zeros, zeros)
    assert not dh.any() and not dw.any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_bad_rows_stay_alone(bad):
    args = place(make_inputs(35, 16, 200))
    ones, rest = torch.ones(35, device=DEVICE), torch.arange(35) != 3
    clean = run(args, ones, ones)
    args["hidden"][3, 5] = bad
    logprobs, norm, entropies, dh, _ = run(args, ones, ones)
    for found, before in ((logprobs, clean[0]), (entropies, clean[2]), (dh, clean[3])):
        assert found[3].isnan().all() and torch.equal(found[rest], before[rest])


def test_words_of_no_probability():
    """Logits of -inf, a whole part of them, count as probability 0 and take part in nothing."""
    args = place(make_inputs(3, 8, 300))
    args["hidden"].abs_()
    words = torch.cat([torch.arange(WORDS, 200), torch.arange(201, 300)])
    some = args | {"weight": args["weight"][words], "targets": torch.tensor([0, 5, 170], device=DEVICE)}
    args["weight"][:WORDS] = args["weight"][200] = -float("inf")
    args["targets"] = words.to(DEVICE)[some["targets"]]
    found, exact = (kernels.linear_logprob(*x.values(), 1.0, True) for x in (args, some))
    torch.testing.assert_close(found[0], exact[0])
    torch.testing.assert_close(found[2], exact[2])
    ones = torch.ones(3, device=DEVICE)
    _, dw = backward(args, ones, ones, found, need_hidden=False)
    assert not dw[:WORDS].any() and not dw[200].any() and dw.isfinite().all()
    args["targets"][1] = 200
    assert kernels.linear_logprob(*args.values(), 1.0, False)[0][1] == -math.inf
    args["weight"][:] = -float("inf")
    logprobs, _, entropies = kernels.linear_logprob(*args.values(), 1.0, True)
    assert logprobs.isnan().all() and entropies.isnan().all()


def test_ties_and_certainty():
    w = torch.ones(80, 8, device=DEVICE)
    hidden, targets = torch.ones(3, 8, device=DEVICE), torch.tensor([0, 7, 79], device=DEVICE)
    logp, entropy = ops.linear_logprob(hidden, w, targets, entropy=True, impl="cuda")
    torch.testing.assert_close(logp, torch.full_like(logp, -math.log(80)))
    torch.testing.assert_close(entropy, torch.full_like(logp, math.log(80)))
    w[7] = 200.0
    logp, entropy = ops.linear_logprob(hidden, w, targets, entropy=True, impl="cuda")
    assert logp[1] == 0 and not entropy.any()


def test_digits_of_large_norms():
    """log s is not added to a maximum of thousands: its digits would be lost in the gradient."""
    args = place(make_inputs(4, 8, 70))
    args["hidden"][:], args["weight"][:] = 1, 4096.0
    args["weight"][:, 0] += torch.arange(70, device=DEVICE) % 2 / 256
    ones = torch.ones(4, device=DEVICE)
    check_cuda("linear_logprob", ops.linear_logprob, {k: v.cpu() for k, v in args.items()})
    _, norm, _, _, dw = run(args, ones)
    z = (args["hidden"].double() @ args["weight"].double().T).float()
    wanted = -torch.softmax(z.double(), -1).sum(0)
    wanted.scatter_add_(0, args["targets"], torch.ones_like(ones).double())
    torch.testing.assert_close(dw[:, 0].double(), wanted, rtol=2e-6, atol=2e-6)
    assert (norm[1] > 3).all()


def test_a_target_that_is_no_word_gives_nan():
    """Values on a GPU are not checked beforehand; nothing is read or written at such an index."""
    args = place(make_inputs(4, 8, 70))
    args["targets"] = torch.tensor([3, 70, -1, 2**40], device=DEVICE)
    assert kernels.linear_logprob(*args.values(), 1.0, False)[0].isnan().tolist() == [False, True, True, True]


def test_each_subset_of_requires_grad():
    args = place(make_inputs(33, 20, 150))
    whole = run_with_grads(ops.linear_logprob, args, impl="cuda", grads=("hidden", "weight"), entropy=True)
    for subset in itertools.chain([()], [("hidden",), ("weight",)]):
        part = run_with_grads(ops.linear_logprob, args, impl="cuda", grads=subset, entropy=True)
        assert {k for k in part if k.startswith("grad")} == {f"grad_{k}" for k in subset}
        assert all(torch.equal(value, whole[key]) for key, value in part.items())


@pytest.mark.skipif(
    DEVICE == "cuda", reason="cuBLAS promises nothing of the sort; the CPU's BLAS does from 16 rows on"
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_its_batch(dtype):
    args = make_inputs(70, 40, 300, dtype)
    whole = kernels.linear_logprob(*args.values(), 1.0, True)
    for rows in (slice(0, 16), slice(7, 39), slice(30, 67)):
        part = kernels.linear_logprob(args["hidden"][rows], args["weight"], args["targets"][rows], 1.0, True)
        assert all(torch.equal(a, b[..., rows]) for a, b in zip(part, whole, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_at_every_run(dtype):
    args, (_, *grads) = place(make_inputs(70, 24, 130, dtype)), incoming(70, share=0.7)
    first = run(args, *grads)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(run(args, *grads), first, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_far_apart(dtype):
    """Rows of hidden and of the weight up to 2^31 elements and more from the first, in storages hardly touched, at
    16-byte addresses and at others."""
    args = make_inputs(33, 8, 34, dtype)
    for step in (2**26 + 16, 2**26 + 3):
        far = dict(args)
        for name in ("hidden", "weight"):
            rows = args[name].shape[0]
            far[name] = lazy_zeros(rows * step, dtype).to(DEVICE).view(rows, step)[:, :8]
            far[name].copy_(args[name])
        far, grad = place(far), torch.ones(33, device=DEVICE)
        for a, b in zip(run(far, grad), run(place(args), grad), strict=True):
            assert torch.equal(a, b)


def test_views():
    args = make_inputs(40, 66, 90)
    hidden, weight = args["hidden"][:, ::2], args["weight"][::3, 1::2]
    targets = torch.randint(0, 30, (80,), generator=torch.Generator().manual_seed(0))[::2]
    check_cuda(
        "linear_logprob", ops.linear_logprob, {"hidden": hidden, "weight": weight, "targets": targets.int()}
    )
    h = hidden.to(DEVICE).clone().requires_grad_()
    out = ops.linear_logprob(h, weight.to(DEVICE), targets.to(DEVICE), impl="cuda")
    (expanded,) = torch.autograd.grad(out.sum(), h)  # a gradient of stride 0
    (whole,) = torch.autograd.grad(
        ops.linear_logprob(h, weight.to(DEVICE), targets.to(DEVICE), impl="cuda"), h, torch.ones_like(out)
    )
    assert torch.equal(expanded, whole)


def test_opcheck():
    h, w, targets = place(make_inputs(9, 24, 70)).values()
    args = (h.requires_grad_(), w.requires_grad_(), targets, 0.7, True, "cuda")
    torch.library.opcheck(torch.ops.hpsafety.linear_logprob.default, args)


def test_grad_weight_sums_in_fp32_over_parts_of_rows():
    """Many rows whose contributions to a bf16 gradient would each be lost beside the sum before them."""
    n = 40 * ROWS
    hidden, weight = (torch.full((rows, 8), x, dtype=torch.bfloat16) for rows, x in ((n, 1.0), (2, 0.0)))
    args = place({"hidden": hidden, "weight": weight, "targets": torch.zeros(n, dtype=torch.int64)})
    *_, dw = run(args, torch.ones(n, device=DEVICE))
    assert torch.equal(dw.float(), torch.tensor([[0.5], [-0.5]], device=DEVICE).mul(n).expand(2, 8))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n, v", [(16_384, 131_072), (64, 131_072)])
def test_bound_of_memory(dtype, n, v, real_parts):
    """No (N, V) and no read of a value: beside results, rows and fp32 sums there is one buffer, of fixed size."""
    d = 1024
    with Allocated() as seen, library.record() as calls:
        hidden, weight = (torch.empty((rows, d), dtype=dtype, device="meta") for rows in (n, v))
        targets = torch.empty((n,), dtype=torch.int64, device="meta")
        logprobs, norm, _ = kernels.linear_logprob(hidden, weight, targets, 1.0, False)
        forward = seen.bytes
        kernels.linear_logprob_backward(logprobs, None, hidden, weight, targets, norm, None, 1.0, True, True)
    rows, words = kernels.part_of(n)
    assert rows * words * 4 <= kernels.BUFFER_BYTES and words < v
    parts = -(-n // rows) * -(-v // words)
    assert forward <= kernels.BUFFER_BYTES + 40 * n
    sums = (n + words) * d * 4 if dtype == torch.bfloat16 else 0
    gradients = (n + v) * d * dtype.itemsize
    assert seen.bytes - forward <= gradients + kernels.BUFFER_BYTES + n * d * dtype.itemsize + sums
    names = [c.name for c in calls]
    assert names.count("hps_logprob_update") == names.count("hps_logprob_dlogits") == parts


@pytest.mark.skipif(DEVICE == "cuda", reason="counts what the CPU's operators do")
def test_the_main_work_is_the_kernels(monkeypatch):
    """No operator of torch beside the products, allocation, views and conversions; and no oracle."""
    before, names = reference.calls["linear_logprob"], set()

    class Operators(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.add(function.overloadpacket.__name__)
            return function(*args, **(kwargs or {}))

    args, (_, *grads) = make_inputs(70, 24, 130, torch.bfloat16), incoming(70)
    with Operators():
        run(args, *grads)
    products, views = {"mm", "addmm"}, {"detach", "view", "slice", "t", "select", "alias", "narrow"}
    assert names >= products and names <= products | views | {"new_empty", "empty", "_to_copy"}
    assert reference.calls["linear_logprob"] == before


@pytest.mark.parametrize("dtype", DTYPES)
def test_error_over_many_parts(dtype):
    args, (_, *grads) = make_inputs(130, 40, 400, dtype), incoming(130, share=0.9)
    *_, dh, dw = run(place(args), *grads)
    results = []
    for cast in (torch.float64, dtype):
        h, w = (args[k].to(cast).requires_grad_() for k in ("hidden", "weight"))
        outs = reference.linear_logprob(h, w, args["targets"], entropy=True)
        weights = [g.cpu().to(outs[0].dtype) for g in grads]
        results.append(torch.autograd.grad(outs, (h, w), weights))
    for name, ours, exact, plain in zip(("grad_hidden", "grad_weight"), (dh, dw), *results, strict=True):
        check_error(name, ours.cpu(), exact, plain)


KERNELS = ["hps_logprob_update", "hps_logprob_finish", "hps_logprob_keep_rows", "hps_logprob_dlogits"]
READ_BACK = {"hps_logprob_update": (8, 9, 10, 11), "hps_logprob_dlogits": (0,)}  # read and written


@pytest.mark.skipif(DEVICE == "cuda", reason="checks the emulated kernels")
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("mode, seed", [("fibers", 1), ("fibers", 2), ("tsan", None), ("asan", None)])
def test_replay(mode, seed, name, monkeypatch, real_parts):
    """Other orders of threads and blocks, races, bounds, two writers: nothing is found, and the bytes are the same."""
    monkeypatch.setattr(kernels, "part_of", lambda n: (2, 2 * kernels.TILE))
    args = make_inputs(3, 9, 2 * kernels.TILE + 67, torch.bfloat16)
    with replay.recorded() as calls:
        run(args, *(x[:3] for x in incoming(3, share=0.7)[1:]))
    found = [c for c in calls if c.call.name == name]
    for one in (found[0], found[-1]) if mode == "fibers" else found[-2:-1] or found:
        replay.run(one, mode, seed, read_back=READ_BACK.get(name, ()))
