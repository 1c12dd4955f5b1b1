"""Which cases a command means, who competes in each, and whether each computes the right thing."""

import importlib
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch

from bench.ops.case import Case
from hpsafety.errors import InputError
from hpsafety.ops import backends

OPS_FOLDER = Path(__file__).resolve().parent.parent / "ops"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# A contender's largest error may be so many times that of plain torch in the same dtype, and some ulps more: peers
# round at other places, and a wrong result is off by far more.
ERROR_FACTOR, ERROR_ULPS = 8, 64


def op_names() -> list[str]:
    """The files of bench/ops that define case(); what they share lies beside them."""
    files = OPS_FOLDER.glob("[a-z]*.py")
    return sorted(path.stem for path in files if "\ndef case(" in path.read_text(encoding="utf-8"))


def load(op: str) -> ModuleType:
    """The module bench/ops/<op>.py; a trailing underscore (adamw_) is accepted."""
    name = op.rstrip("_")
    if name not in op_names():
        raise InputError(f"unknown op {op!r}; choose from: all, {', '.join(op_names())}")
    return importlib.import_module(f"bench.ops.{name}")


def read_shape(text: str, op: str, module: ModuleType) -> dict[str, int]:
    """'N=64,D=576' over the op's headline shape. InputError on an unknown name or a value that is no whole number."""
    shape = dict(module.SHAPES[0])
    for piece in text.split(","):
        name, equals, value = piece.partition("=")
        if not equals or not value.strip().isdigit():
            raise InputError(
                f"--shape takes NAME=NUMBER,... with whole numbers, as {show(shape)}; got {piece!r}"
            )
        if name.strip() not in shape:
            raise InputError(f"--shape: {op} has no size {name.strip()!r}; its sizes are {', '.join(shape)}")
        shape[name.strip()] = int(value)
    return shape


def show(shape: dict[str, int]) -> str:
    return ",".join(f"{name}={value}" for name, value in shape.items())


def build(
    module: ModuleType, shape: dict[str, int], dtype: str, device: str, direction: str, seed: int
) -> Case:
    """module.case(...); sizes that do not fit together are the user's mistake and become an InputError."""
    op = module.__name__.rpartition(".")[2]
    try:
        case = module.case(shape, DTYPES[dtype], device, direction, seed)
    except ValueError as error:
        raise InputError(f"--shape {show(shape)}: {op} cannot be made so: {error}") from None
    if case.bytes <= 0:
        raise InputError(f"--shape {show(shape)}: nothing to time, {op} moves no bytes")
    return case


def contenders(
    case: Case, wanted: tuple[str, ...] | None, pass_over: bool = False
) -> tuple[dict[str, Callable], list[str]]:
    """({name: call}, lines about backends that are not here). wanted: names, or None for all that can serve.

    By default: every backend of the op that can serve here, and the peers but for those on request; by name also
    "reference" and the peers on request. A name that the case does not have is an InputError with the remedy, or passed
    over (in a run of all ops, which do not all have the same peers).
    """
    device = case.device.split(":")[0]
    of_case = (case.impls, device, case.dtype, case.shape.get("K"))
    missing = {impl: backends.unavailable(case.op, impl, *of_case) for impl in case.impls}
    if wanted is None:
        ours = [impl for impl in case.impls if missing[impl] is None]
        names = ours + [peer for peer in case.peers if peer not in case.on_request]
        return {name: call_of(case, name) for name in names}, [why for why in missing.values() if why]
    names = []
    for name in wanted:
        if name in case.peers or name == "reference" or (name in case.impls and missing[name] is None):
            names.append(name)
        elif not pass_over:
            raise InputError(_no_such_impl(case, name, device))
    return {name: call_of(case, name) for name in names}, []


def call_of(case: Case, name: str) -> Callable:
    return case.peers[name] if name in case.peers else lambda: case.run(name)


def _no_such_impl(case: Case, name: str, device: str) -> str:
    if name in backends.IMPLS:
        return f"--impl {name}: {backends.unavailable(case.op, name, case.impls, device)}"
    have = ", ".join(("reference", *case.impls))
    peers = ", ".join(case.peers) or "none for this dtype and direction"
    return f"--impl {name}: {case.op} has no such contender; backends: {have}; peers: {peers}"


def faults(case: Case, calls: dict) -> dict[str, str]:
    """Contender -> what is wrong with it, judged at this (small) case against the fp64 oracle; {} when all are right.

    Each contender is called once: one that writes in place has a state of its own, which exact() starts from too.
    """
    exact = case.exact()
    plain = case.run("reference")
    found = {}
    for name, call in calls.items():
        try:
            result = call()
            result = case.unpack[name](result) if name in case.unpack else result
        except (
            Exception
        ) as error:  # a peer may lack a dtype or a kernel here; the row says so instead of a time
            found[name] = (
                f"failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            )
            continue
        line = first_fault(result, exact, plain)
        if line is not None:
            found[name] = line
    return found


def first_fault(result, exact, plain) -> str | None:
    """What is wrong with the first tensor that is wrong; None when every one is within its budget."""
    if len(result) != len(exact):
        return f"wrong: returned {len(result)} tensors, the oracle {len(exact)}"
    for i, (got, want, rough) in enumerate(zip(result, exact, plain, strict=True)):
        if got.shape != want.shape:
            return f"wrong: tensor {i} is {tuple(got.shape)}, the oracle's {tuple(want.shape)}"
        got, want = got.detach().cpu(), want.detach().cpu()
        if not want.is_floating_point():
            places = int((got.to(want.dtype) != want).sum())
            if places:
                return f"wrong: tensor {i} differs from the oracle's at {places} places"
            continue
        error, budget = largest_error(got, want), largest_error(rough.detach().cpu(), want)
        largest = float(want[torch.isfinite(want)].abs().max()) if torch.isfinite(want).any() else 0.0
        allowed = ERROR_FACTOR * budget + ERROR_ULPS * torch.finfo(got.dtype).eps * largest
        if not error <= allowed:
            return f"wrong: tensor {i} is off by {error:.3g} (the oracle's largest value is {largest:.3g})"
    return None


def largest_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """max |got - want|; infinite where one is finite and the other not, or where infinities differ."""
    if not want.numel():
        return 0.0
    got, want = got.double(), want.double()
    off = torch.where(got == want, 0.0, (got - want).abs())
    off = torch.where(got.isnan() & want.isnan(), 0.0, off)
    return float(off.nan_to_num(nan=math.inf, posinf=math.inf).max())
