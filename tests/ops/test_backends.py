"""Which backend serves a call: forced, by HPSAFETY_IMPL, and by default; told apart by the oracles' call counter."""

import pytest
import torch

from hpsafety import ops, reference


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
    with pytest.raises(ops.BackendUnavailable, match="cuda"):
        CALLS[name](impl="cuda")
    with pytest.raises(ValueError, match="unknown impl 'fast'; choose one of"):
        CALLS[name](impl="fast")


def test_the_cpu_backend_refuses_other_devices():
    with pytest.raises(ops.BackendUnavailable, match="needs CPU tensors, got device meta"):
        ops.swiglu(torch.zeros(2, 4, device="meta"), impl="cpu")
