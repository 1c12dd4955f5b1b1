"""What a microbenchmark hands to the harness: one Case per op, shape, dtype, device and direction.

A module bench/ops/<op>.py defines
    SHAPES       the shapes timed by default, as dicts of ints, from real models; the first is the headline
    CHECK        a small, awkward shape at which every contender is first held against the fp64 oracle
    DIRECTIONS   ("forward",), or ("forward", "both") for an op with a backward
    case(shape, dtype, device, direction, seed=0) -> Case
and nothing else public. Peers are imported inside case(), and left out where they are not installed.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True, kw_only=True)
class Case:
    """One piece of work, done by several contenders.

    run      run(impl) does the work once through hpsafety.ops with that backend; returns the tensors to check (outputs,
             and in direction "both" the gradients), always in the same order
    impls    the op's backends, the preferred one first (the op module's BACKENDS)
    peers    name -> call that does the same work by other means and returns the same tensors
    exact    returns the same tensors from the fp64 oracle; called at the CHECK shape only
    flops    strictly needed floating-point operations of one call (a multiply-add is two)
    bytes    strictly needed traffic of one call: every input read once, every output written once
    gemms    (M, K, N, count) of the GEMMs that the work consists of; empty for an op bound by bytes
    note     what a reader of the row must know, or ""
    unpack   peer -> what makes the tensors to check of its result, where a peer works in a layout of its own; not timed
    on_request  peers that are timed only when --impl names them (slow to compile, or far behind)

    Each call is made once at CHECK before anything is timed; one that writes in place has a state of its own, so that
    this first call starts from the very inputs that exact() starts from.
    """

    op: str
    shape: dict[str, int]
    dtype: torch.dtype
    device: str
    direction: str
    run: Callable[[str], tuple[torch.Tensor, ...]]
    impls: tuple[str, ...]
    exact: Callable[[], tuple[torch.Tensor, ...]]
    flops: float
    bytes: float
    peers: dict[str, Callable[[], tuple[torch.Tensor, ...]]] = field(default_factory=dict)
    gemms: tuple[tuple[int, int, int, int], ...] = ()
    note: str = ""
    unpack: dict[str, Callable[[tuple], tuple[torch.Tensor, ...]]] = field(default_factory=dict)
    on_request: tuple[str, ...] = ()
