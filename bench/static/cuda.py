"""The CUDA kernels' rows of static.json, read from the very objects that setup.py links into the library.

What is launched, with how many threads and how much shared memory, comes from the launchers themselves: the emulated
library's, called with the cases of bench/static/cases and told to run nothing.
"""

import collections
import contextlib
import ctypes
import functools
import hashlib
import importlib
import inspect
import os
import re
import subprocess
from pathlib import Path
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from bench.static import cases, sass
from bench.static.record import compact_row
from hpsafety.cuda_kernels import library
from tests.cuda import emulation
from tests.mutations.build import load_setup

ROOT = Path(__file__).resolve().parents[2]
OBJECTS = ROOT / "build" / "cuda"
PREFIX = "cuda "  # of the op's name in a row
ARCHS = {"80": "sm_80", "90a": "sm_90"}  # of setup.py, and of a row
TOOLS = ("library.cu",)
TRITON = "hpsafety.triton_kernels."
ADDRESS = 1 << 20  # of every tensor of a launch that is not run


def ops() -> list[str]:
    """Ops with a wrapper in hpsafety/cuda_kernels and a case."""
    wrappers = {path.stem for path in (ROOT / "hpsafety" / "cuda_kernels").glob("*.py")}
    return sorted(p.stem for p in Path(cases.__path__[0]).glob("[a-z]*.py") if p.stem in wrappers)


def kernel_name(text: str) -> str:
    """One form for a kernel as g++ spells it in __PRETTY_FUNCTION__ and as c++filt spells a mangled name."""
    found = re.search(r"Kernel = (.*?)\]$", text)
    name = found[1] if found else text.removeprefix("void ")
    name = name.replace("(bool)1", "true").replace("(bool)0", "false")
    name = re.sub(r"\(anonymous namespace\)::|\{anonymous\}::|\(\w+\)(?=\d)|^void ", "", name)
    depth, out = 0, ""
    for letter in name:  # up to the parameters
        if letter == "(" and depth == 0:
            break
        depth += {"<": 1, ">": -1}.get(letter, 0)
        out += letter
    return out.replace(" ", "").lstrip("&")


def launches(op: str, shapes: cases.Shapes) -> list[tuple[str, int, str, int, int, int, int]]:
    """(function, its call, kernel, blocks, threads, shared bytes, bytes of the launcher's tensors), in order."""
    case = importlib.import_module(f"bench.static.cases.{op}")
    emulated = emulation.make_library()
    opened = ctypes.CDLL(str(emulated))
    opened.simt_launched.restype = ctypes.c_char_p
    out, counts = [], {}

    def made(function, name):
        @functools.wraps(function)
        def call(*args, **kwargs):
            counts[name] = counts.get(name, -1) + 1
            with library.record() as calls:
                try:
                    result = function(*args, **kwargs)
                except ValueError:  # a form that the op leaves to another backend
                    return None
            for one in calls:
                raw = [ADDRESS if isinstance(x, torch.Tensor) else x for x in one.arguments]
                tensors = {
                    x.untyped_storage()._cdata: x for x in one.arguments if isinstance(x, torch.Tensor)
                }
                moved = sum(x.numel() * x.itemsize for x in tensors.values())
                opened.simt_dry(1)
                try:
                    code = library.launcher(emulated, one.name, one.signature)(*raw, None)
                    lines = opened.simt_launched().decode().splitlines()
                finally:
                    opened.simt_dry(0)  # it may be the library that others run kernels on
                if code:
                    raise RuntimeError(f"{op}: {one.name} refuses a case, {code}")
                for line in lines:
                    kernel, blocks, threads, shared = line.rsplit("|", 3)
                    row = (kernel_name(kernel), int(blocks), int(threads), int(shared), moved // len(lines))
                    out.append((name, counts[name], *row))
            return result

        return call

    def empty(*shape, dtype=torch.bfloat16):
        return torch.empty(shape, dtype=dtype, device="cuda")

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, {"HPSAFETY_CUDA_LIBRARY": str(emulated)}))
        for module in filter(inspect.ismodule, [*vars(case).values()]):
            if module.__name__ not in (f"{TRITON}{op}", f"{TRITON}{op}_backward"):
                continue
            ours = importlib.import_module(module.__name__.replace(TRITON, "hpsafety.cuda_kernels."))
            # A GEMM of the BLAS is no kernel of ours, and fake CUDA tensors lack it.
            if hasattr(ours, "product"):
                stack.enter_context(mock.patch.object(ours, "product", lambda *args: None))
            for name, function in inspect.getmembers(ours, inspect.isfunction):
                own = function.__module__ == ours.__name__ and not name.startswith("_")
                if own and hasattr(module, name):
                    stack.enter_context(mock.patch.object(module, name, made(function, name)))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        case.run(shapes, empty)
    return out


def content(source: Path) -> str:
    """Of all that a file's machine code is made from, the compiler's version apart."""
    texts = [part for pair in load_setup().cuda_texts(source).items() for part in pair]
    whole = "\0".join([*load_setup().CUDA_FLAGS, source.name, *texts])
    return hashlib.sha256(whole.encode()).hexdigest()[:16]


def sources(op: str) -> list[Path]:
    """The .cu files of an op: <op>.cu, <op>_<part>.cu."""
    found = [p for p in sorted(load_setup().CUDA.glob("*.cu")) if p.name not in TOOLS]
    longest = {
        p: max((o for o in ops() if p.stem == o or p.stem.startswith(f"{o}_")), key=len, default="")
        for p in found
    }
    return [p for p in found if longest[p] == op]


def disassembled(path: Path, arch: str) -> dict[str, tuple[list, int, int]]:
    """kernel -> (code, registers, stack) of an object's code for a chip."""
    known = OBJECTS / f"{path.stem}.{arch}.sass"
    if not known.exists():
        command = [sass.tool("cuobjdump"), "-arch", f"sm_{arch}", "-sass", "-res-usage", str(path)]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        fresh = known.with_suffix(f".{os.getpid()}")
        fresh.write_text(text, encoding="utf-8")
        fresh.replace(known)
    text = known.read_text(encoding="utf-8")
    used, codes = sass.usage(text), sass.parse(text)
    named = subprocess.run(
        ["c++filt"], input="\n".join(codes), capture_output=True, text=True, check=True
    ).stdout
    return {
        kernel_name(name): (codes[mangled], *used[mangled])
        for mangled, name in zip(codes, named.splitlines(), strict=True)
    }


def rows(names: list[str], jobs: int = 2) -> list[dict]:
    """A row per kernel and chip of these ops. Needs nvcc: see setup.nvcc()."""
    objects = load_setup().cuda_objects(load_setup().nvcc(), OBJECTS, jobs)
    out = []
    for op in names:
        calls: dict[str, dict] = {}
        sizes: dict[str, tuple[int, int]] = {}
        for shapes in cases.LLAMA:
            found = collections.Counter()
            for function, call, kernel, blocks, threads, shared, moved in launches(op, shapes):
                found[kernel, function, call, blocks, moved] += 1
                sizes[kernel] = (threads, max(shared, sizes.get(kernel, (0, 0))[1]))
            for (kernel, *one), times in found.items():
                calls.setdefault(kernel, {}).setdefault(shapes.name, []).append([*one, times])
        for source in sources(op):
            for arch, name in ARCHS.items():
                for kernel, (code, registers, stack) in disassembled(objects[source], arch).items():
                    base = kernel.partition("<")[0]
                    # One that the cases do not launch is launched as its siblings are.
                    alike = [one for of, one in sizes.items() if of.partition("<")[0] == base]
                    threads, shared = sizes.get(kernel) or max(alike, default=(32, 0))
                    head = {
                        "op": PREFIX + op, "kernel": base.rpartition("::")[2], "arch": name, "config": kernel,
                        "types": source.name, "hash": content(source), "calls": calls.get(kernel, {}),
                    }  # fmt: skip
                    figures = sass.figures(code, registers, stack, int(name[3:]), threads // 32, shared)
                    out.append(compact_row(head, figures))
        missing = sizes.keys() - {row["config"] for row in out}
        if missing:
            raise RuntimeError(f"{op} launches {sorted(missing)}, which its objects lack")
    return out


def stale(old: list[dict], names: list[str]) -> list[str]:
    """Sources whose rows on record are of another text; without a compiler too."""
    now = {(op, p.name, content(p)) for op in names for p in sources(op)}
    known = {(r["op"].removeprefix(PREFIX), r["types"], r["hash"]) for r in old if r["op"].startswith(PREFIX)}
    known = {one for one in known if one[0] in names}
    return [f"{name} of {op}: static.json is not of this text" for op, name, _ in sorted(now ^ known)]
