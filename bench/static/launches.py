"""What is launched, and so what is compiled: each case's launches with fake CUDA tensors, each distinct code once.

triton.jit compiles a kernel again for other types, for other constants, and for what it sees in the arguments: whether
an address or a number is divisible by 16, whether a number is 1, whether it fits 32 bits. Here that is decided by
triton.jit's own code, so that what is looked at is what a GPU would run. Not to be used under TRITON_INTERPRET=1.
"""

import ast
import contextlib
import dataclasses
import functools
import hashlib
import importlib
import inspect
import math
import pkgutil
import sys
import textwrap
import types
from unittest import mock

import torch
import triton
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from bench.static import cases
from hpsafety.triton_kernels import launch

CAPABILITIES = ((8, 0), (9, 0))
KERNELS = "hpsafety.triton_kernels."
NOT_OPS = (KERNELS + "launch", KERNELS + "interpreter")


@dataclasses.dataclass(frozen=True, slots=True)
class Call:
    """Where a launch comes from. `call`: which call of `function` in the case it is, from 0."""

    op: str
    shapes: str
    function: str
    call: int
    launch: launch.Launch

    @property
    def bytes(self) -> int:
        """All tensors the launch is given, each once; broadcast dimensions count once."""
        tensors = [x for x in self.launch.arguments.values() if isinstance(x, launch.Tensor)]
        return sum(
            math.prod(n for n, step in zip(x.shape, x.stride, strict=True) if step or not n)
            * x.dtype.itemsize
            for x in tensors
        )


@dataclasses.dataclass(slots=True)
class Compilation:
    """One kernel's code for one chip, and the calls that launch it."""

    kernel: object
    arch: int
    signature: dict
    constants: dict
    attributes: dict
    options: dict
    types: str
    hash: str
    calls: list[Call]

    @property
    def config(self) -> str:
        """Constants, warps and stages, for people."""
        names = self.kernel.arg_names
        given = {names[path[0]]: value for path, value in self.constants.items()}
        words = [
            f"{name}={value}"
            for name, value in given.items()
            if self.kernel.params[names.index(name)].is_constexpr
        ]
        words += [f"warps={self.options['num_warps']}", f"stages={self.options['num_stages']}"]
        return " ".join(words + ["no-fusion"] * (not self.options["enable_fp_fusion"]))


def ops() -> list[str]:
    return sorted(found.name for found in pkgutil.iter_modules(cases.__path__))


def _functions(case) -> list[tuple[object, str, types.FunctionType]]:
    """(module, name, function) of the launch functions that a case can reach."""
    modules = [
        case,
        *(m for name, m in list(sys.modules.items()) if name.startswith(KERNELS) and name not in NOT_OPS),
    ]
    return [
        (module, name, value)
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, types.FunctionType) and not name.startswith("_")
        and value.__module__.startswith(KERNELS) and value.__module__ not in NOT_OPS
    ]  # fmt: skip


def record(op: str, shapes: cases.Shapes, capability: tuple[int, int]) -> list[Call]:
    """The launches of an op's case, in order, each with the launch function that the case called for it."""
    case = importlib.import_module(f"bench.static.cases.{op}")
    owners: list[tuple[str, int]] = []  # of each launch
    counts: dict[str, int] = {}
    inside = False

    def watched(function):
        @functools.wraps(function)
        def call(*args, **kwargs):
            nonlocal inside
            if inside:  # a launch function that calls another: the outer one is what the case asked for
                return function(*args, **kwargs)
            inside = True
            try:
                return function(*args, **kwargs)
            finally:
                inside = False
                fresh = len(launches) - len(owners)
                if fresh:
                    name = function.__name__
                    owners.extend([(name, counts.get(name, 0))] * fresh)
                    counts[name] = counts.get(name, 0) + 1

        return call

    def empty(*shape, dtype=torch.bfloat16):
        return torch.empty(shape, dtype=dtype, device="cuda")

    with contextlib.ExitStack() as stack:
        for module, name, function in _functions(case):
            stack.enter_context(mock.patch.object(module, name, watched(function)))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        launches = stack.enter_context(launch.record(capability))
        case.run(shapes, empty)
    if len(owners) != len(launches):
        raise RuntimeError(
            f"{op}: its case launches kernels by other means than the functions of triton_kernels/{op}.py"
        )
    return [Call(op, shapes.name, *owner, one) for owner, one in zip(owners, launches, strict=True)]


@functools.cache
def source(kernel) -> str:
    """A kernel's text and that of all it calls or names, without comments, layout and line numbers."""
    texts, seen = [], set()

    def visit(one):
        if id(one) in seen:
            return
        seen.add(id(one))
        tree = ast.parse(textwrap.dedent(inspect.getsource(one.fn)))
        texts.append(ast.unparse(tree))
        scope = one.fn.__globals__ | inspect.getclosurevars(one.fn).nonlocals
        for node in ast.walk(tree):
            value = None
            if isinstance(node, ast.Name):
                value = scope.get(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                module = scope.get(node.value.id)
                value = getattr(module, node.attr, None) if isinstance(module, types.ModuleType) else None
            if isinstance(value, triton.language.constexpr):
                texts.append(f"{ast.unparse(node)} = {value.value!r}")
            elif isinstance(
                getattr(value, "fn", None), types.FunctionType
            ) and not value.fn.__module__.startswith("triton."):
                visit(value)

    visit(kernel)
    return "\n".join(dict.fromkeys(texts))


class _Argument:
    """What triton.jit looks at in a tensor."""

    def __init__(self, tensor: launch.Tensor):
        self.dtype, self.aligned = tensor.dtype, tensor.aligned

    def data_ptr(self) -> int:
        return 0 if self.aligned else 8


@functools.cache
def _backend(arch: int):
    return make_backend(GPUTarget("cuda", arch, 32))


@functools.cache
def _binder(kernel, arch: int):
    return create_function_from_signature(kernel.signature, kernel.params, _backend(arch))


def specialise(one: launch.Launch, arch: int) -> Compilation:
    """What triton.jit compiles for a launch on a chip of this architecture."""
    kernel, backend = one.kernel, _backend(arch)
    arguments = {
        name: _Argument(x) if isinstance(x, launch.Tensor) else x for name, x in one.arguments.items()
    }
    options = {"num_warps": one.num_warps, "num_stages": one.num_stages, "enable_fp_fusion": one.fp_fusion}
    given = {**arguments, **one.constants, **options}
    bound, seen, extra = _binder(kernel, arch)(**given)
    parsed, signature, constants, attributes = kernel._pack_args(backend, given, bound, seen, extra)
    words = [
        kind + (what if isinstance(what, str) else "") if kind != "constexpr" else repr(bound[name])
        for (kind, what), (name, param) in zip(
            seen, zip(kernel.arg_names, kernel.params, strict=True), strict=True
        )
        if not param.is_constexpr
    ]
    known = [source(value) if hasattr(value, "fn") else repr(value) for value in constants.values()]
    content = (
        source(kernel), sorted(signature.items()), [*constants], known, sorted(attributes.items()),
        sorted(options.items()), arch, triton.__version__,
    )  # fmt: skip
    digest = hashlib.sha256(repr(content).encode()).hexdigest()[:16]
    return Compilation(
        kernel, arch, signature, constants, attributes, vars(parsed) | {}, " ".join(words), digest, []
    )


def compilations(names: list[str] | None = None) -> dict[tuple[str, str], Compilation]:
    """All distinct compilations of the ops' cases, by (op, content hash)."""
    found: dict[tuple[str, str], Compilation] = {}
    for op in ops() if names is None else names:
        for capability in CAPABILITIES:
            for shapes in cases.LLAMA:
                for call in record(op, shapes, capability):
                    one = specialise(call.launch, capability[0] * 10 + capability[1])
                    found.setdefault((op, one.hash), one).calls.append(call)
    return found
