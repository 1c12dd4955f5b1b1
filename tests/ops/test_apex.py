"""adamw_ and rms_norm through NVIDIA's apex. The bug this file must catch: gradients overwritten by clipped ones.

The package is a stand-in here (tests/ops/packages.py), so what is proven is our side: the form of each call, and that
the contract holds around kernels that do less than it asks.
"""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hpsafety import ops, reference
from hpsafety.ops import apex_backend, backends, signatures
from hpsafety.ops.adamw import BACKENDS
from tests.ops import packages
from tests.ops.oracle import check_against_oracle, check_error, run_with_grads
from tests.ops.test_adamw import SETTINGS, SHAPES, copy_of, flat, make_grads, make_state, run_torch, same_bits
from tests.ops.test_rms_norm import make_inputs

KERNELS = {"adamw_": packages.ADAM, "rms_norm": packages.RMS_NORM}


@pytest.fixture
def package(monkeypatch):
    """The stand-in, served as if on CUDA; the list of its calls."""
    monkeypatch.setattr(apex_backend, "functions", KERNELS.get)
    monkeypatch.setattr(apex_backend, "unavailable", lambda op, device, dtype: None)
    packages.calls.clear()
    return packages.calls


def run(state, steps, dtype=torch.float32, max_norm=1.0, impl="apex"):
    for i in steps:
        grads = make_grads(i, dtype)
        norm = reference.grad_norm_sq(grads).sqrt()
        ops.adamw_(grads=grads, grad_norm=norm, max_norm=max_norm, impl=impl, **SETTINGS, **state)
    return state


@pytest.mark.parametrize("max_norm", [1.0, 1e6, math.inf, 0.0])
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16])
def test_steps_match_torch(package, max_norm, grad_dtype):
    """KER-2: against torch.optim.AdamW in fp64. apex rounds the betas to fp32 before it takes them from 1: up to
    2^-25 / (1 - beta) of each new moment, where torch has no such error."""
    steps = range(10)
    exact = flat(run_torch(steps, torch.float64, grad_dtype, max_norm))
    plain = flat(run_torch(steps, torch.float32, grad_dtype, max_norm))
    reference.calls.clear()
    state = run(make_state(), steps, grad_dtype, max_norm)
    assert reference.calls["adamw"] == 0
    assert int(state.pop("step")) == len(steps)
    ours = flat(state)
    for kind in ("params", "exp_avg", "exp_avg_sq"):
        sides = [
            torch.cat([x[n].flatten() for n in exact if n.split(".")[0] == kind])
            for x in (ours, exact, plain)
        ]
        sides[2] = sides[2].double() + 2**-25 / (1 - 0.95) * sides[1].abs()
        check_error(kind, *sides)


def test_gradients_are_left_alone(package):
    """The kernel writes the clipped gradient back: into a scratch copy, never into ours."""
    state = make_state()
    state["params"] = [torch.nn.Parameter(p) for p in state["params"]]
    for dtype in (torch.float32, torch.bfloat16):
        grads = make_grads(0, dtype)
        before = [g.clone() for g in grads]
        ops.adamw_(grads=grads, grad_norm=torch.tensor(9.0), max_norm=1.0, impl="apex", **SETTINGS, **state)
        assert all(torch.equal(a, b) for a, b in zip(grads, before, strict=True))
    assert int(state["step"]) == 2


@pytest.mark.parametrize("norm", [math.inf, -math.inf, math.nan])
def test_non_finite_norm_changes_nothing(package, norm):
    state = run(make_state(copies=True), range(2))
    state["copies"][0].zero_()  # a copy that is out of step stays so too
    before, grads = copy_of(state), make_grads(2)
    grads[0][0, 0] = norm
    ops.adamw_(grads=grads, grad_norm=torch.tensor(norm), max_norm=1.0, impl="apex", **SETTINGS, **state)
    assert same_bits(state, before) and int(state["step"]) == 2
    run(state, range(3, 4))
    assert int(state["step"]) == 3 and not same_bits(state, before)


def test_copies_are_the_rounded_parameters(package):
    state = run(make_state(copies=True), range(3))
    assert all(torch.equal(c, p.bfloat16()) for p, c in zip(state["params"], state["copies"], strict=True))


def test_calls_by_dtype_and_size(package, monkeypatch):
    """Gradients of two dtypes are two calls; large tensors are cut, small ones share a call, empty ones are in none."""
    monkeypatch.setattr(apex_backend, "PIECE", 10_000)
    whole = run(make_state(), range(1), impl="cpu")
    state, grads = make_state(), make_grads(0)
    norm = reference.grad_norm_sq(grads).sqrt()
    ops.adamw_(grads=grads, grad_norm=norm, max_norm=1.0, impl="apex", **SETTINGS, **state)
    # (3, 5) and (1,); then 10,000 and 6,385 of the large one, the second with (29, 30) and (7, 1, 3)
    assert package == [("scale", 2), ("adam", 2), ("scale", 1), ("adam", 1), ("scale", 3), ("adam", 3)]
    for name, value in flat(state).items():
        torch.testing.assert_close(value, flat(whole)[name], rtol=1e-5, atol=1e-8)
    package.clear()
    mixed = [g.bfloat16() if i % 2 else g for i, g in enumerate(grads)]
    monkeypatch.setattr(apex_backend, "PIECE", 1 << 26)
    ops.adamw_(grads=mixed, grad_norm=norm, max_norm=1.0, impl="apex", **SETTINGS, **make_state())
    assert package == [("scale", 3), ("adam", 3), ("scale", 2), ("adam", 2)]
    assert sum(math.prod(shape) > 0 for shape in SHAPES) == 5


def test_nothing_to_update_still_counts_the_step(package):
    for state in (make_state([]), make_state([(0, 4)])):
        grads = [torch.zeros(0, 4)] * len(state["params"])
        ops.adamw_(grads=grads, grad_norm=torch.tensor(0.0), max_norm=1.0, impl="apex", **SETTINGS, **state)
        assert int(state["step"]) == 1
    assert packages.calls == []


class NoReads(TorchDispatchMode):
    """Fails on any reading of a tensor's value on the host: on CUDA each would be a synchronisation."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default, "a tensor's value was read"
        return func(*args, **(kwargs or {}))


def test_no_host_synchronisation(package):
    state, grads = make_state(copies=True), make_grads(0)
    with NoReads():
        ops.adamw_(grads=grads, grad_norm=torch.tensor(9.0), max_norm=1.0, impl="apex", **SETTINGS, **state)
    with pytest.raises(AssertionError, match="was read"), NoReads():
        float(grads[0].sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("t, d", [(0, 8), (1, 3), (63, 8), (65, 33), (130, 576)])
@pytest.mark.parametrize("residual", [False, True])
def test_rms_norm_matches_oracle(package, dtype, t, d, residual):
    """KER-2: forward and backward against fp64 through the whole op."""
    args = make_inputs(t, d, dtype, residual)
    ours = check_against_oracle("rms_norm", ops.rms_norm, args, impl="apex")
    assert package == ([("rms_forward",), ("rms_backward",)] if t else [])
    assert all(value.is_contiguous() for value in ours.values())


@pytest.mark.parametrize("seed", range(20))
def test_rms_norm_random_shapes(package, seed):
    g = torch.Generator().manual_seed(seed)
    t, d, residual, low = (int(torch.randint(n, (), generator=g)) for n in (70, 200, 2, 2))
    dtype = (torch.float32, torch.bfloat16)[low]
    check_against_oracle("rms_norm", ops.rms_norm, make_inputs(t, d + 2, dtype, residual, seed), impl="apex")


def test_rms_norm_strides_and_unused_outputs(package):
    x, w, r = torch.randn(40, 66)[:, ::2], torch.randn(66)[::2], torch.randn(40, 66)[:, 1::2]
    y, summed = ops.rms_norm(x, w, 1e-5, r, impl="apex")
    expected = reference.rms_norm(x, w, 1e-5, r)
    torch.testing.assert_close(y, expected[0])
    assert summed.is_contiguous() and torch.equal(summed, expected[1])
    args = make_inputs(6, 20, torch.float32, residual=True)
    whole = run_with_grads(ops.rms_norm, args, impl="apex", grads=("x", "weight", "residual"))
    for name in ("x", "weight", "residual"):
        part = run_with_grads(ops.rms_norm, args, impl="apex", grads=(name,))
        assert torch.equal(part[f"grad_{name}"], whole[f"grad_{name}"])
    x = torch.randn(4, 8, requires_grad=True)
    _, summed = ops.rms_norm(x, torch.randn(8), 1e-5, torch.zeros(4, 8), impl="apex")
    assert torch.equal(torch.autograd.grad(summed.sum(), x)[0], torch.ones(4, 8))


def test_rms_norm_opcheck(package):
    args = make_inputs(9, 24, torch.float32, residual=True)
    x, w, eps, r = (v.requires_grad_() if isinstance(v, torch.Tensor) else v for v in args.values())
    for residual in (r, None):
        torch.library.opcheck(torch.ops.hpsafety.rms_norm.default, (x, w, eps, residual, "apex"))


@pytest.mark.slow
def test_rms_norm_compile(package):
    args = make_inputs(9, 24, torch.float32, residual=True)
    call = lambda x, weight, eps, residual: ops.rms_norm(2 * x, weight, eps, residual, impl="apex")  # noqa: E731
    eager = run_with_grads(call, args)
    for key, value in run_with_grads(torch.compile(call, fullgraph=True), args).items():
        torch.testing.assert_close(value, eager[key])


def planted(folder, monkeypatch, *files):
    """A package called apex with the given files, the only one on the path."""
    for file in files:
        (folder / "apex" / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / "apex" / file).write_text("raise RuntimeError('nobody may import this')\n")
    monkeypatch.syspath_prepend(str(folder))
    apex_backend.missing.cache_clear()


def test_reasons(monkeypatch, tmp_path):
    """Not installed, PyPI's apex, NVIDIA's without kernels, kernels that do not load, changed ones: told apart."""
    with pytest.raises(ops.BackendUnavailable, match="^rms_norm: apex is not for CPUs"):
        ops.rms_norm(torch.zeros(1, 8), torch.zeros(8), 1e-5, impl="apex")
    why = lambda op="adamw_": backends.unavailable(op, "apex", ("apex",), "cuda")  # noqa: E731
    real = apex_backend.importlib.util.find_spec
    monkeypatch.setattr(apex_backend.importlib.util, "find_spec", lambda name: None)
    apex_backend.missing.cache_clear()
    assert "NVIDIA's apex is not installed: git clone https://github.com/NVIDIA/apex" in why()
    monkeypatch.setattr(apex_backend.importlib.util, "find_spec", real)
    planted(tmp_path / "pypi", monkeypatch, "__init__.py", "lib/libapex.py")
    assert "an unrelated package of PyPI, not NVIDIA's: pip uninstall apex, then git clone" in why()
    planted(tmp_path / "bare", monkeypatch, "__init__.py", "multi_tensor_apply/__init__.py")
    assert "built without its CUDA extensions (fused_layer_norm_cuda is missing)" in why("rms_norm")
    monkeypatch.setattr(apex_backend.importlib.util, "find_spec", lambda name: name)
    apex_backend.missing.cache_clear()
    assert "apex's amp_C does not load (No module named 'amp_C')" in why()
    monkeypatch.setattr(apex_backend, "functions", lambda op: KERNELS[op] | {"multi_tensor_scale": old_scale})
    apex_backend.missing.cache_clear()
    assert "parameter 4 of multi_tensor_scale is now 'Tensor', was 'float'" in why()
    monkeypatch.setattr(apex_backend, "functions", KERNELS.get)
    apex_backend.missing.cache_clear()
    assert why() is None and why("rms_norm") is None
    assert backends.resolve("adamw_", None, ("cpu", "apex"), "cuda") == "apex"
    assert backends.resolve("adamw_", None, BACKENDS, "cuda") == "triton", "our own serve before a package's"
    assert backends.resolve("adamw_", None, BACKENDS, "cpu") == "cpu"
    apex_backend.missing.cache_clear()


class OldScale:
    __doc__ = "multi_tensor_scale(arg0: int, arg1: at::Tensor, arg2: List[List[at::Tensor]], arg3: at::Tensor) -> None"


old_scale = OldScale()

# What pybind11 3.0.4 of torch 2.13 writes for the C++ declarations of apex's master.
TEXTS = [
    "multi_tensor_scale(arg0: typing.SupportsInt | typing.SupportsIndex, arg1: torch.Tensor, arg2: "
    "collections.abc.Sequence[collections.abc.Sequence[torch.Tensor]], arg3: typing.SupportsFloat | "
    "typing.SupportsIndex) -> None\n\nFused overflow check + scale\n",
    "rms_backward_affine(arg0: torch.Tensor, arg1: torch.Tensor, arg2: torch.Tensor, arg3: Tuple[int, ...], arg4: "
    "torch.Tensor, arg5: typing.SupportsFloat | typing.SupportsIndex, arg6: bool) -> list[torch.Tensor]\n\nRMSNorm\n",
]


@pytest.mark.parametrize("text", TEXTS)
def test_signatures_of_compiled_functions(text):
    function = type("Function", (), {"__doc__": text})()
    name = text.split("(")[0]
    assert signatures.difference(name, function, exact=True) is None
    function.__doc__ = text.replace(", arg3", ", arg9: bool, arg3")
    assert f"parameter 4 of {name} is now 'bool'" in signatures.difference(name, function)
    function.__doc__ = "no signature"
    assert "does not tell" in signatures.difference(name, function)


@pytest.mark.parametrize("op", KERNELS)
def test_the_stand_in_has_the_recorded_signatures(op):
    for name, function in KERNELS[op].items():
        assert signatures.difference(name, function, exact=True) is None


@pytest.mark.parametrize("op", KERNELS)
def test_installed_package(op):
    """A new version of the package is noticed here."""
    pytest.importorskip(
        apex_backend.MODULES[op][0], reason="NVIDIA's apex is not built: nothing to hold the record to"
    )
    for name, function in apex_backend.functions(op).items():
        assert signatures.difference(name, function, exact=True) is None
