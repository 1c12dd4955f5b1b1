"""Every op on a GPU that is not there: traced by make_fx and torch.compile(fullgraph=True) over fake CUDA tensors, it
is one node that names the Triton backend, and what it returns lies on the GPU. Backward passes are traced without
values in tests/train/test_no_host_sync.py, since autograd asks a build without CUDA for the device.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from hpsafety import ops

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the real thing runs on the GPU here")


def empty(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="cuda")


def ints(*shape, dtype=torch.int32):
    return empty(*shape, dtype=dtype)


def floats(*shape):
    return empty(*shape, dtype=torch.float32)


def paged():
    prefix = (ints(2, 3), ints(2), ints(5))
    pages = empty(9, 16, 2, 64)
    return (lambda q, k, v, table, lens: ops.paged_attention(q, k, v, table, lens, prefix)), (
        empty(5, 8, 64), pages, pages, ints(5, 4), ints(5),
    )  # fmt: skip


def rows(count: int, n: int = 7):
    return tuple(floats(n) for _ in range(count))


HIDDEN, WEIGHT = (6, 32), (50, 32)
CASES = {
    "attention": lambda: (ops.attention, (empty(20, 8, 64), empty(20, 2, 64), empty(20, 2, 64), ints(3, 4))),
    "linear_logprob": lambda: (
        lambda *args: ops.linear_logprob(*args, 0.7, True),
        (empty(*HIDDEN), empty(*WEIGHT), ints(6, dtype=torch.int64)),
    ),
    "linear_cross_entropy": lambda: (
        ops.linear_cross_entropy,
        (empty(*HIDDEN), empty(*WEIGHT), ints(6, dtype=torch.int64), floats(6)),
    ),
    "distill_loss": lambda: (
        lambda *args: ops.distill_loss(*args, "jsd"),
        (empty(*HIDDEN), empty(*WEIGHT), empty(6, 16), empty(50, 16)),
    ),
    "paged_attention": paged,
    "rms_norm": lambda: (
        lambda *args: ops.rms_norm(*args[:2], 1e-5, args[2]),
        (empty(4, 8), empty(8), empty(4, 8)),
    ),
    "rope": lambda: (ops.rope, (empty(4, 8, 64), empty(4, 2, 64), ints(4), floats(9, 32), floats(9, 32))),
    "rope_qkv": lambda: (ops.rope_qkv, (empty(4, 2, 6, 64), ints(4), floats(9, 32), floats(9, 32))),
    "sample": lambda: (
        lambda *args: ops.sample(args[0], 0.8, 0.9, 5, *args[1:]),
        (floats(3, 50), ints(3, dtype=torch.int64), ints(3, dtype=torch.int64)),
    ),
    "swiglu": lambda: (ops.swiglu, (empty(4, 16),)),
    "ppo_loss": lambda: (lambda *args: tuple(ops.ppo_loss(*args)), (*rows(6), empty(7, dtype=torch.bool))),
    "gae": lambda: (ops.gae, (*rows(2), ints(3))),
    "reward_score": lambda: (
        lambda *args: tuple(ops.reward_score(*args)),
        (
            empty(9, 8),
            empty(9, 16),
            ints(4, dtype=torch.int64),
            empty(8),
            empty(16),
            empty(4, dtype=torch.bool),
            ints(3),
        ),
    ),
    "pair_loss": lambda: (ops.pair_loss, rows(3)),
}


@pytest.fixture(autouse=True)
def default_backend(monkeypatch):
    monkeypatch.delenv("HPSAFETY_IMPL", raising=False)


@pytest.mark.parametrize("name", CASES)
def test_one_node_that_names_triton(name):
    with FakeTensorMode():
        function, args = CASES[name]()
        graph = make_fx(lambda *given: function(*given))(*args).graph  # without the op's optional arguments
    nodes = [node for node in graph.nodes if "hpsafety" in str(node.target)]
    assert [str(node.target) for node in nodes] == [f"hpsafety.{name}.default"] and nodes[0].args[
        -1
    ] == "triton"


@pytest.mark.parametrize("name", CASES)
def test_compiles_as_one_graph(name):
    torch._dynamo.reset()
    with FakeTensorMode():
        function, args = CASES[name]()
        outputs = torch.compile(function, backend="eager", fullgraph=True)(*args)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    assert all(out.device.type == "cuda" for out in outputs)
