"""Which backend serves a call: forced, by HPSAFETY_IMPL, and by default; told apart by the oracles' call counter."""

import importlib
import types

import pytest
import torch

from hpsafety import ops, reference
from hpsafety.ops import backends
from hpsafety.ops.table import OPS


def adamw_step(**kwargs):
    lists = [[torch.ones(3)] for _ in range(4)]
    scalars = {"step": torch.tensor(0), "grad_norm": torch.tensor(1.0), "max_norm": 1.0}
    settings = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    return ops.adamw_(*lists, **scalars, **settings, **kwargs)


ROWS, TARGETS = torch.ones(2, 4), torch.tensor([0, 2])
TABLES = (torch.zeros(2, dtype=torch.int32), torch.ones(1, 2), torch.zeros(1, 2))
HEADS = torch.ones(2, 1, 4)
SEGMENTS = torch.tensor([[0, 2, 0, 0]], dtype=torch.int32)
CALLS = {
    "attention": lambda **kw: ops.attention(HEADS, HEADS, HEADS, SEGMENTS, **kw),
    "linear_logprob": lambda **kw: ops.linear_logprob(ROWS, torch.ones(3, 4), TARGETS, **kw),
    "linear_cross_entropy": lambda **kw: ops.linear_cross_entropy(
        ROWS, torch.ones(3, 4), TARGETS, torch.ones(2), **kw
    ),
    "rms_norm": lambda **kw: ops.rms_norm(ROWS, torch.ones(4), 1e-5, **kw),
    "rope": lambda **kw: ops.rope(HEADS, HEADS, *TABLES, **kw),
    "rope_qkv": lambda **kw: ops.rope_qkv(torch.ones(2, 1, 3, 4), *TABLES, **kw),
    "swiglu": lambda **kw: ops.swiglu(ROWS, **kw),
    "adamw": adamw_step,
    "grad_norm_sq": lambda **kw: ops.grad_norm_sq([ROWS], **kw),
}


def oracle_calls(name: str, **kwargs) -> int:
    before = reference.calls[name]
    CALLS[name](**kwargs)
    return reference.calls[name] - before


@pytest.mark.parametrize("name", CALLS)
def test_the_counter_tells_the_backends_apart(name, monkeypatch):
    """KER-1: the default and impl="cpu" leave the oracle alone; "reference", forced either way, calls it."""
    monkeypatch.delenv("HPSAFETY_IMPL", raising=False)
    assert oracle_calls(name) == oracle_calls(name, impl="cpu") == 0
    assert oracle_calls(name, impl="reference") == 1
    monkeypatch.setenv("HPSAFETY_IMPL", "reference")
    assert oracle_calls(name) == 1 and oracle_calls(name, impl="cpu") == 0


@pytest.mark.parametrize("name", CALLS)
def test_a_forced_backend_that_cannot_serve_raises(name):
    with pytest.raises(ops.BackendUnavailable, match="(?i)cuda"):
        CALLS[name](impl="cuda")
    with pytest.raises(ValueError, match="unknown impl 'fast'; choose one of"):
        CALLS[name](impl="fast")


def test_the_cpu_backend_refuses_other_devices():
    with pytest.raises(ops.BackendUnavailable, match="needs CPU tensors, got device meta"):
        ops.swiglu(torch.zeros(2, 4, device="meta"), impl="cpu")


@pytest.fixture
def fresh():
    """What is asked once per process is asked anew, before and after."""
    caches = (backends._triton_missing, backends._gpu_refuses, backends._say_once)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def pretend_gpu(monkeypatch, **properties) -> None:
    values = {
        "name": "Some GPU",
        "major": 8,
        "minor": 0,
        "shared_memory_per_block_optin": 166912,
    } | properties
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: types.SimpleNamespace(**values))


@pytest.mark.parametrize(
    "gpu, reason",
    [
        ({"major": 7, "minor": 5}, "Some GPU has compute capability 7.5; the Triton kernels need 8.0"),
        (
            {"minor": 6, "shared_memory_per_block_optin": 90000},
            "Some GPU has 90000 bytes of shared memory a block",
        ),
    ],
)
def test_a_gpu_that_cannot_is_served_by_the_next_backend(fresh, monkeypatch, caplog, gpu, reason):
    """One line says why, once."""
    monkeypatch.delenv("HPSAFETY_IMPL", raising=False)
    pretend_gpu(monkeypatch, **gpu)
    with caplog.at_level("INFO", logger="hpsafety"):
        for _ in range(2):
            assert backends.resolve("attention", None, ("cpu", "triton"), "cuda") == "reference"
    assert sum(reason in line for line in caplog.messages) == 1
    with pytest.raises(ops.BackendUnavailable, match="attention: Some GPU has"):
        backends.resolve("attention", "triton", ("cpu", "triton"), "cuda")


def test_a_gpu_that_can_is_served_by_triton(fresh, monkeypatch):
    monkeypatch.delenv("HPSAFETY_IMPL", raising=False)
    pretend_gpu(monkeypatch)
    for op, module in OPS.items():
        have = importlib.import_module(f"hpsafety.ops.{module}").BACKENDS
        served = backends.resolve(op, None, have, "cuda")
        assert served == "triton" or (op, 8) in backends.CUDA_FIRST, op


def test_without_triton_or_with_an_untested_one(fresh, monkeypatch):
    monkeypatch.delenv("HPSAFETY_TRITON_UNTESTED", raising=False)
    monkeypatch.setattr(backends.importlib.metadata, "version", lambda name: "4.1.0")
    assert "triton 4.1.0 is not among the tested versions (3.7, 3.9)" in backends.triton_unavailable(
        "gae", "cuda"
    )
    backends._triton_missing.cache_clear()
    monkeypatch.setenv("HPSAFETY_TRITON_UNTESTED", "1")
    assert backends.triton_unavailable("gae", "cuda") is None
    backends._triton_missing.cache_clear()
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None)
    assert "triton is not installed: pip install 'hpsafety[triton]'" in backends.triton_unavailable(
        "gae", "cuda"
    )


def test_triton_on_a_cpu_is_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(
        ops.BackendUnavailable, match="needs CUDA tensors, got device cpu; TRITON_INTERPRET=1"
    ):
        ops.swiglu(torch.zeros(2, 4), impl="triton")


def test_cuda_comes_first_where_the_model_says_so(monkeypatch):
    """By op and chip; elsewhere Triton, and on no GPU anything changes."""
    monkeypatch.setattr(backends, "CUDA_FIRST", frozenset({("gae", 8)}))
    have = ("cpu", "triton", "cuda", "flash_attn")
    assert backends.in_order("gae", have, 8) == ("cpu", "cuda", "triton", "flash_attn")
    assert backends.in_order("gae", have, 9) == backends.in_order("sample", have, 8) == have
    assert backends.in_order("gae", have, None) == have
    monkeypatch.delenv("HPSAFETY_IMPL", raising=False)
    monkeypatch.setattr(backends, "unavailable", lambda *args: None if args[1] != "cpu" else "no")
    for major, served in ((8, "cuda"), (9, "triton")):
        pretend_gpu(monkeypatch, major=major)
        assert backends.resolve("gae", None, have, "cuda") == served
