"""How the library of CUDA kernels is found, refused and called. The bug this file must catch: a launcher whose Python
signature is not the C one, which reads arguments as something else."""

import importlib
import re
import shutil
import subprocess
import types
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from hpsafety import ops
from hpsafety.cuda_kernels import library
from hpsafety.ops import backends
from tests.cuda import emulation
from tests.mutations.build import load_setup
from tests.ops.test_reward_score import make_inputs

ROOT = Path(__file__).resolve().parents[2]
WRAPPERS = sorted(p.stem for p in (ROOT / "hpsafety" / "cuda_kernels").glob("*.py"))
setup = load_setup()


@pytest.fixture
def fresh():
    """What is asked once per process is asked anew, before and after."""
    caches = (library._missing, library._open, library._device_refuses, library.launcher)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def declared() -> dict[str, str]:
    """launcher -> a letter per argument without the stream, from the text of csrc/cuda."""
    out = {}
    for text in emulation.texts().values():
        for name, arguments in re.findall(r'extern "C" int (hps_\w+)\(([^)]*)\)\s*\{', text):
            letters = ""
            for one in filter(str.strip, arguments.split(",")):
                kind = one.strip()
                letters += (
                    "p"
                    if "*" in kind
                    else {"int": "i", "int64_t": "l", "float": "f", "double": "d"}[kind.split()[0]]
                )
            out[name] = letters
    return out


def called() -> list[tuple[str, str]]:
    """(launcher, signature) of every launch in hpsafety/cuda_kernels."""
    out = []
    for stem in WRAPPERS:
        text = (ROOT / "hpsafety" / "cuda_kernels" / f"{stem}.py").read_text(encoding="utf-8")
        out += re.findall(r'launch\(\s*f?"(hps_[\w{}]+)",\s*"([a-z ]+)"', text)
    return out


def test_signatures_are_those_of_the_sources():
    """Every launch names a launcher of csrc/cuda with its C types, the stream last; and every launcher is called."""
    launchers = {
        name: letters for name, letters in declared().items() if name not in ("hps_abi", "hps_versions")
    }
    seen = set()
    for name, signature in called():
        pattern = re.compile(re.sub(r"\{[^}]*\}", r"\\w+", name))
        matching = [one for one in launchers if pattern.fullmatch(one)]
        assert matching, f"{name} is called and nowhere defined"
        for one in matching:
            assert launchers[one] == signature.replace(" ", "") + "p", one
        seen |= {*matching}
    assert seen == {*launchers}


def test_ops_and_wrappers_go_together():
    """An op that has a CUDA backend has a wrapper, and no wrapper is without an op."""
    from hpsafety.ops.table import OPS

    have = {
        module
        for module in OPS.values()
        if "cuda" in importlib.import_module(f"hpsafety.ops.{module}").BACKENDS
    }
    tools = {"__init__", "blas", "library"}
    assert {w for w in WRAPPERS if w not in tools and not w.endswith("_backward")} == have


@pytest.mark.parametrize(
    "make, reason",
    [
        (lambda path: None, "are not built here; run make again"),
        (lambda path: path.write_text("no library"), "cannot be opened"),
        (lambda path: shutil.copy(importlib.import_module("_ctypes").__file__, path), "cannot be opened"),
    ],
)
def test_a_library_that_is_none(fresh, monkeypatch, tmp_path, make, reason):
    """One line with the remedy; the next backend serves."""
    path = tmp_path / "lib.so"
    make(path)
    monkeypatch.setenv("HPSAFETY_CUDA_LIBRARY", str(path))
    assert reason in library.unavailable("cuda") and "\n" not in library.unavailable("cuda")
    with pytest.raises(ops.BackendUnavailable, match="reward_score: the CUDA kernels"):
        ops.reward_score(**make_inputs([2]), impl="cuda")


def test_another_abi(fresh, monkeypatch):
    monkeypatch.setattr(library, "ABI", 99)
    assert "were built for ABI 1, not 99" in library.unavailable("cpu")


def pretend_gpu(monkeypatch, major, minor=0):
    gpu = types.SimpleNamespace(name="Some GPU", major=major, minor=minor)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    monkeypatch.setattr(library, "emulated", lambda: False)


@pytest.mark.parametrize("major, minor, text", [(7, 5, "7.5"), (10, 0, "10.0")])
def test_a_gpu_without_code_for_it(fresh, monkeypatch, major, minor, text):
    pretend_gpu(monkeypatch, major, minor)
    said = library.unavailable("cuda")
    assert said == f"Some GPU has compute capability {text}; the CUDA kernels are built for sm_80 and sm_90a"


def test_a_driver_that_is_too_old(fresh, monkeypatch):
    pretend_gpu(monkeypatch, 8)

    def versions(runtime, driver):
        runtime._obj.value, driver._obj.value = 13000, 12040
        return 0

    monkeypatch.setattr(
        library, "_open", lambda file: types.SimpleNamespace(hps_versions=versions, hps_abi=lambda: 1)
    )
    assert "built with CUDA 13.0, this driver serves up to 12.4: update the driver" in library.unavailable(
        "cuda"
    )
    monkeypatch.setattr(backends, "_gpu_refuses", lambda op: None)
    monkeypatch.delenv("HPSAFETY_IMPL", raising=False)
    assert backends.resolve("reward_score", None, ("cpu", "cuda", "triton"), "cuda") == "triton"


def test_a_refused_launch_raises():
    x = torch.zeros(4)
    with pytest.raises(library.LaunchError, match="hps_reward_score: refused by the launcher"):
        library.launch(
            "hps_reward_score", "pppi pppppp llll ii ll df ppppp", x, x, x, 0, x, x, x, x, x, x, 4, 4, 4, 4, 0, 0,
            -1, 1, 1e-5, 0.15, x, x, x, x, x,
        )  # fmt: skip


def test_fake_tensors_are_recorded_and_not_launched():
    """Calls as they will be on a GPU: the same launcher and numbers as the emulation's, no address asked for."""
    args = make_inputs([2, 3], 16, 8, dtype=torch.bfloat16)
    with library.record() as real:
        ops.reward_score(**args, impl="cuda")
    with FakeTensorMode(allow_non_fake_inputs=True), library.record() as fake:
        empty = {k: torch.empty(v.shape, dtype=v.dtype, device="cuda") for k, v in args.items()}
        importlib.import_module("hpsafety.cuda_kernels.reward_score").reward_score(
            *(empty[k] for k in ("hidden_safety", "hidden_helpful", "last_rows", "head_safety", "head_helpful")),
            empty["is_safety"], empty["cu_groups"], empty["norm_safety"], empty["norm_helpful"], 1e-5, 0.15,
        )  # fmt: skip

    def numbers(calls):
        return [(c.name, [x for x in c.arguments if not isinstance(x, torch.Tensor)]) for c in calls]

    assert numbers(fake) == numbers(real) != []


def test_forced_and_default_are_different_backends(monkeypatch):
    """The launcher's call counter: impl="cuda" calls it, the default on the CPU does not."""
    monkeypatch.delenv("HPSAFETY_IMPL", raising=False)
    for impl, times in ((None, 0), ("cuda", 1), ("cpu", 0)):
        with library.record() as calls:
            ops.reward_score(**make_inputs([2, 3]), impl=impl)
        assert len(calls) == times, impl


@pytest.mark.skipif(setup.nvcc() is None, reason="needs nvcc")
def test_nvcc_builds_for_both_chips(fresh, monkeypatch):
    """The very build of setup.py; objects of an earlier one are taken over."""
    out = ROOT / "build" / "cuda" / "test" / "libhpsafety_cuda.so"
    assert setup.build_cuda(out, ROOT / "build" / "cuda", 2)
    monkeypatch.setenv("HPSAFETY_CUDA_LIBRARY", str(out))
    assert library.unavailable("cuda") is None and not library.emulated()
    assert library.unavailable("cpu") == "the cuda backend needs CUDA tensors, got device cpu"
    symbols = subprocess.run(["nm", "-D", "--defined-only", str(out)], capture_output=True, text=True).stdout
    assert {name for name in declared()} <= {line.split()[-1] for line in symbols.splitlines()}


def test_without_nvcc_the_build_goes_on(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(setup, "nvcc", lambda: None)
    assert not setup.build_cuda(tmp_path / "x.so", tmp_path, 1)
    assert "no nvcc found; the CUDA toolkit brings one" in capsys.readouterr().out
    assert not (tmp_path / "x.so").exists()


def test_the_build_can_be_switched_off(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(setup, "nvcc", lambda: "/usr/bin/nvcc")
    monkeypatch.setenv("HPSAFETY_CUDA", "0")
    assert not setup.build_cuda(tmp_path / "x.so", tmp_path, 1)
    assert "HPSAFETY_CUDA=0 is set" in capsys.readouterr().out
