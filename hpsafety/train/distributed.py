"""The only file that knows about ranks. One process is the same code with nothing wrapped.

Launch: torchrun --nproc-per-node N -m hpsafety <stage> ... (NCCL on GPUs, gloo on CPUs). Parameters and optimiser
state are sharded with FSDP2 (fully_shard); loss denominators, gradient norm and metrics stay global.
"""

import contextlib
import datetime
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from hpsafety.train import phases

# Methods beside forward that use parameters. They must not call each other: the inner one would end the outer's gather.
ENTRY_POINTS = ("logprobs", "nll", "rewards", "values", "divergence")


@dataclass(frozen=True)
class World:
    """This process among its peers."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def init(device: str = "auto") -> World:
    """Joins the process group that torchrun describes in the environment; alone, nothing is set up.

    device  "auto" (a GPU if there is one), "cpu", "cuda", "cuda:N"
    """
    size, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    where = torch.device(device)
    if where.type == "cuda":
        torch.cuda.set_device(where)
    if size > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if where.type == "cuda" else "gloo")
    return World(rank, size, where)


def close() -> None:
    """Leaves the process group, if there is one and it is not held."""
    if dist.is_initialized() and not _HELD:
        dist.destroy_process_group()


_HELD: list[World] = []


@contextlib.contextmanager
def held(device: str) -> Iterator[World]:
    """Keeps the process group from one stage to the next: processes can meet under one launch only once."""
    world = init(device)
    _HELD.append(world)
    try:
        yield world
    finally:
        _HELD.pop()
        close()


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Inside, init gives a world of this process alone, whatever launched it."""
    saved = {name: os.environ.get(name) for name in ("WORLD_SIZE", "RANK")}
    os.environ |= {"WORLD_SIZE": "1", "RANK": "0"}
    try:
        yield
    finally:
        for name, value in saved.items():
            os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)


def _shard_dim(param: nn.Parameter, size: int):
    """The longest dimension that divides evenly: qkv (G, J+2, K, D) and gate_up (2, F, D) are short in dim 0."""
    from torch.distributed.tensor import Shard

    even = [dim for dim, length in enumerate(param.shape) if length % size == 0]
    return Shard(max(even, key=lambda dim: param.shape[dim])) if even else None  # None: dim 0, padded


def shard(model: nn.Module, world: World, dtype: torch.dtype) -> nn.Module:
    """Wraps each block and the root with FSDP2, so that gradients are plain sums over ranks; alone, returns model.

    dtype  of the computation; parameters stay fp32 and gradients are reduced in fp32
    """
    if world.size == 1:
        return model
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(world.device.type, (world.size,))
    # Inputs are left alone: hidden rows have the dtype already, and the rotary tables must stay fp32.
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    options = {"mesh": mesh, "mp_policy": policy, "shard_placement_fn": lambda p: _shard_dim(p, world.size)}
    modules = [*model.blocks, model]
    for module in modules:
        fully_shard(module, **options)
        module.set_force_sum_reduction_for_comms(True)  # gloo has no pre-multiplied sum
        module.set_gradient_divide_factor(1.0)  # the loss denominator is global already
    for name in ENTRY_POINTS:
        if hasattr(model, name):
            register_fsdp_forward_method(model, name)
    return model


def local(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """This rank's part of a sharded tensor; a plain tensor as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def full(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a sharded tensor (a collective: all ranks call it); a plain tensor as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def all_sum(tensor: torch.Tensor, world: World) -> torch.Tensor:
    """The sum over ranks, on every rank."""
    if world.size > 1:
        with phases.phase("communication"):
            dist.all_reduce(tensor)
    return tensor


def all_sum_together(tensors: list[torch.Tensor], world: World) -> None:
    """Adds up each tensor over the ranks, in place, in one message."""
    if world.size > 1:
        flat = all_sum(torch.cat([tensor.flatten() for tensor in tensors]), world)
        for tensor, total in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(total.view(tensor.shape))


def all_max(tensor: torch.Tensor, world: World) -> torch.Tensor:
    """The largest over ranks, element by element, on every rank."""
    if world.size > 1:
        with phases.phase("communication"):
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor


def all_objects(value, world: World) -> list:
    """Every rank's value, in the order of ranks, on every rank: plain data of ours only."""
    if world.size == 1:
        return [value]
    values = [None] * world.size
    dist.all_gather_object(values, value)
    return values


def copy_whole(source: nn.Module, target: nn.Module) -> None:
    """Fills target, a whole model, with source's parameters, gathered from the ranks (a collective call)."""
    with torch.no_grad():
        for p, q in zip(source.parameters(), target.parameters(), strict=True):
            q.copy_(full(p.detach()))


def barrier(world: World) -> None:
    if world.size > 1:
        dist.barrier()


def long_barrier(world: World) -> Callable[[], None]:
    """A barrier for ranks whose work differs by hours, which the usual one's time limit would not stand; it is made
    while they are together (a collective call)."""
    if world.size == 1:
        return lambda: None
    group = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=30))
    return lambda: dist.barrier(group=group)


def broadcast_object(value, world: World):
    """Rank 0's value on every rank: small plain data only (numbers, strings, None)."""
    if world.size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]
