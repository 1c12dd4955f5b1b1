"""A GPU is never waited for inside a step: whole steps run on tensors without values, where every read of one raises.

Nothing is computed. What is proved: the trainer's own Python, the ops' glue, the Triton kernels' launch functions and
the optimiser ask no tensor for its value; every op takes its Triton branch; and the launches, their grids, shapes,
types and constants are those of the same step in Triton's interpreter, whose results the other tests prove.
"""

import dataclasses

import pytest
import torch

from hpsafety import ops
from hpsafety.data.groups import pack
from hpsafety.model.llama import Llama
from hpsafety.ops import backends
from hpsafety.ops.table import OPS
from hpsafety.rollout import passes
from hpsafety.rollout.kv_cache import PageCache
from hpsafety.train.distributed import World
from hpsafety.train.optim import AdamW
from hpsafety.train.ppo_step import VALUE_COEF
from tests.tiny import random_groups, tiny_config

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run on the GPU here")
SHAPE = {"head_dim": 16, "width": 32, "num_heads": 4, "num_kv_heads": 2}


@pytest.fixture(autouse=True)
def triton_everywhere(monkeypatch):
    """Every op takes its Triton branch, whatever the device."""
    monkeypatch.setattr(backends, "resolve", lambda op, impl, have, device, *_, **__: impl or "triton")


def make_model(device: str) -> Llama:
    with torch.device(device):
        model = Llama(tiny_config(**SHAPE))
    if device == "cpu":
        for p in model.parameters():
            torch.nn.init.normal_(p, 0.0, 0.1)
    return model


def make_batch(device: str):
    return pack(random_groups(3, k=2, longest=9)).to(device)


def fine_tune(device: str, dtype) -> None:
    model = make_model(device)
    optimizer = AdamW(model, dtype)
    optimizer.zero_grad()
    for _ in range(2):  # two micro-batches
        model.nll(make_batch(device), 100).backward()
    optimizer.step(1e-3, World(rank=0, size=1, device=torch.device(device)))


def ppo(device: str, dtype) -> None:
    model, batch = make_model(device).to(dtype), make_batch(device)
    logprobs, entropy = model.logprobs(batch, 0.7, entropy=True)
    rows = torch.zeros_like(logprobs)
    advantages, returns = ops.gae(rows, rows, batch.cu_responses)
    loss = ops.ppo_loss(
        logprobs, rows, advantages, rows, rows, returns, batch.train_mask, entropy=entropy, entropy_coef=0.1,
        value_coef=VALUE_COEF, num_tokens=batch.num_trained,
    )  # fmt: skip
    loss.loss.backward()


def distill(device: str, dtype) -> None:
    student, teacher, batch = make_model(device).to(dtype), make_model(device).to(dtype), make_batch(device)
    with torch.no_grad():
        hidden, weight = teacher.trained_rows(batch)
    for kind in ("forward_kl", "reverse_kl", "jsd"):
        student.divergence(batch, hidden, weight, kind, 100).backward()


def decode(device: str, dtype) -> None:
    """One step of the sampling engine: two sequences of a shared prompt."""
    model = make_model(device).to(dtype)
    cache = PageCache(model.config, 8, 4, dtype, device)
    tables = passes.make_tables([1, 2], [[0], [1]], [0, 0], [[2, 3]], [7], [5, 6], device)
    tokens = torch.ones(2, dtype=torch.int64, device=device)
    hidden = passes.decode(model, tokens, tables, cache)
    logits = hidden @ model.head_weight.t()
    ops.sample(logits, 0.8, 0.9, 5, tables.seeds, tables.made.long())


def launches_of(step, device: str, dtype) -> list:
    launch = backends.triton("launch")
    torch.manual_seed(0)
    with launch.record() as launches:
        step(device, dtype)
    return launches


def described(one) -> tuple:
    """What must agree: everything but the addresses."""
    arguments = {
        name: dataclasses.replace(x, aligned=True) if hasattr(x, "aligned") else x
        for name, x in one.arguments.items()
    }
    options = (one.num_warps, one.num_stages, one.fp_fusion)
    return one.kernel.__name__, one.programs, arguments, one.constants, options


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("step", [fine_tune, ppo, distill, decode])
def test_a_step_without_values_launches_what_the_interpreter_runs(step, dtype):
    blind = launches_of(step, "meta", dtype)
    seen = launches_of(step, "cpu", dtype)
    assert len(blind) == len(seen) > 4
    for a, b in zip(blind, seen, strict=True):
        assert described(a) == described(b)


def test_a_read_value_would_raise():
    """What the other tests stand on."""
    with pytest.raises(RuntimeError, match="item"):
        torch.ones(3, device="meta").sum().item()
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.ones(3, device="meta")[torch.ones(3, dtype=torch.bool, device="meta")]


def test_every_op_is_served_by_triton_on_a_gpu(monkeypatch):
    monkeypatch.undo()
    monkeypatch.delenv("HPSAFETY_IMPL", raising=False)
    for op, module in OPS.items():
        have = __import__(f"hpsafety.ops.{module}", fromlist=["BACKENDS"]).BACKENDS
        assert backends.resolve(op, None, have, "cuda") == "triton", op
        assert backends.resolve(op, None, have, "cpu") == "cpu", op
