"""Compiles kernels for a chip that is not there, and keeps code and figures in build/static by content.

The code comes from triton.compile with the target "cuda:80" or "cuda:90"; the latter makes code for sm_90a.
"""

import contextlib
import hashlib
import json
import multiprocessing
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench.static import sass
from bench.static.launches import Compilation

CACHE = Path(__file__).resolve().parents[2] / "build" / "static"
PROCESSES = 2


def build(one: Compilation) -> tuple[bytes, int]:
    """(cubin, bytes of shared memory a launch asks for). Nothing stays in triton's own cache."""
    source = ASTSource(one.kernel, one.signature, one.constants, one.attributes)
    with tempfile.TemporaryDirectory() as folder, triton.knobs.cache.scope():
        triton.knobs.cache.dir = folder
        made = triton.compile(source, target=GPUTarget("cuda", one.arch, 32), options=one.options)
        return made.asm["cubin"], made.metadata.shared


def figures(one: Compilation) -> dict:
    """What sass.profile says of a compilation; {"error": why} where the compiler refuses it."""
    CACHE.mkdir(parents=True, exist_ok=True)
    reader = hashlib.sha256(Path(sass.__file__).read_bytes()).hexdigest()[:8]
    binary, known = CACHE / f"{one.hash}.cubin", CACHE / f"{one.hash}.{reader}.json"
    asked = CACHE / f"{one.hash}.shared"
    if known.exists():
        return json.loads(known.read_text())
    if not (binary.exists() and asked.exists()):
        try:
            cubin, shared = build(one)
        except Exception as error:
            return {"error": " ".join(f"{type(error).__name__}: {error}".split())[:300]}
        _put(binary, cubin)
        _put(asked, str(shared).encode())
    found = sass.profile(binary.read_bytes(), one.arch, one.options["num_warps"], int(asked.read_text()))
    _put(known, json.dumps(found).encode())
    return found


def _put(path: Path, content: bytes) -> None:
    """Whole or not at all: another process may read or write the same."""
    fresh = path.with_suffix(f".{os.getpid()}")
    fresh.write_bytes(content)
    fresh.replace(path)


_work: list[Compilation] = []  # kernels cannot be pickled: forked processes find them here


def _figures_at(index: int) -> dict:
    return figures(_work[index])


def _in_processes(indices: list[int], processes: int) -> dict[int, dict]:
    """Figures by index; without those that were under way or waiting when the compiler took its process down."""
    out = {}
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("fork")) as pool:
        waiting = {index: pool.submit(_figures_at, index) for index in indices}
        for index, future in waiting.items():
            with contextlib.suppress(BrokenProcessPool):
                out[index] = future.result()
    return out


def all_figures(many: list[Compilation], say=print) -> list[dict]:
    """`figures` of each, by PROCESSES processes."""
    if not many:
        return []
    started = time.monotonic()
    _work[:] = many
    say(f"{len(many)} kernels to compile, or to read from build/{CACHE.name}")
    out = _in_processes([*range(len(many))], min(PROCESSES, len(many)))
    for index in range(len(many)):
        if index not in out:  # alone, so that one that crashes is known by itself
            out |= _in_processes([index], 1)
    say(f"done in {time.monotonic() - started:.0f} s")
    return [out.get(index, {"error": "the compiler crashed"}) for index in range(len(many))]
