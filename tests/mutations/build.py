"""Builds one mutant: a copy of triton_kernels; the emulated library of csrc/cuda; or the library of an op's C++ sources
with setup.py's own flags.

Objects are kept under a hash of everything that goes into them, so that only what a mutation touches is compiled, and
nothing is on a second run. A mutated header compiles every source of the op that includes it.
"""

import functools
import hashlib
import importlib.util
import re
import shlex
import shutil
import subprocess
import sysconfig
import threading
from pathlib import Path

import torch

from tests.cuda import emulation
from tests.mutations.mutants import CUDA, ROOT, TRITON, Mutant, texts_of

BUILD = ROOT / "build" / "mutations"
_SYSTEM_INCLUDE = re.compile(r"^#include <.*>", re.MULTILINE)


class DoesNotCompile(Exception):
    """The compiler's or the linker's errors."""


@functools.cache
def load_setup():
    """setup.py as a module."""
    spec = importlib.util.spec_from_file_location("hpsafety_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def triton_copy(mutant: Mutant) -> Path:
    """A folder with all files of triton_kernels, the mutant's changed; ValueError when it is stale."""
    changed = mutant.apply()
    path = BUILD / "triton" / mutant.id.replace("/", ".").replace(" ", ".")
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(TRITON, path, ignore=shutil.ignore_patterns("__pycache__"))
    for name, text in changed.items():
        (path / name).write_text(text, encoding="utf-8")
    return path


def cuda_copy(mutant: Mutant) -> Path:
    """A folder with all files of csrc/cuda, the mutant's changed, and its emulated library; ValueError when stale."""
    changed = mutant.apply()
    path = BUILD / "cuda" / mutant.id.replace("/", ".")
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(CUDA, path)
    for name, text in changed.items():
        (path / name).write_text(text, encoding="utf-8")
    try:
        shutil.copy(emulation.make_library(emulation.texts(path), jobs=1), path / "emulated.so")
    except RuntimeError as error:
        raise DoesNotCompile(str(error)) from error
    return path


class Builder:
    """Compiles and links; safe to use from several threads."""

    def __init__(self):
        setup = load_setup()
        capability = torch.backends.cpu.get_cpu_capability().lower()
        name = capability if capability in setup.capabilities() else "default"
        extension = next(e for e in setup.extensions() if e.name == f"hpsafety._cpu_{name}")
        self.compiler = setup.compiler()
        if self.compiler is None:
            raise SystemExit("the mutants need a C++ compiler; there is none")
        own = [*shlex.split(sysconfig.get_config_var("CFLAGS") or ""), "-fPIC", "-w"]
        includes = [f"-I{path}" for path in (*extension.include_dirs, sysconfig.get_paths()["include"])]
        self.compile_flags = [*own, *includes, *extension.extra_compile_args]
        libraries = [*(f"-L{p}" for p in extension.library_dirs), *(f"-l{p}" for p in extension.libraries)]
        shared = shlex.split(sysconfig.get_config_var("LDSHARED") or "cc -shared")[1:]
        self.link_flags = [*shared, *libraries, *extension.extra_link_args]
        self.name = name
        self._locks: dict[Path, threading.Lock] = {}
        self._guard = threading.Lock()

    def _run(self, command: list[str], folder: Path) -> None:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if "error" in line] or [done.stderr[-500:]]
            raise DoesNotCompile("\n".join(errors[:5]))

    def _make(self, name: str, texts: dict[str, str], arguments: list[str]) -> Path:
        """The file `name`, compiled from the files of these texts, unless it stands from before."""
        flags = [*self.compile_flags, *arguments]
        parts = [
            self.compiler,
            torch.__version__,
            *flags,
            *(part for pair in sorted(texts.items()) for part in pair),
        ]
        folder = BUILD / "objects" / hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]
        with self._guard:
            lock = self._locks.setdefault(folder, threading.Lock())
        with lock:
            if not (folder / name).exists():
                folder.mkdir(parents=True, exist_ok=True)
                for file, text in texts.items():
                    (folder / file).write_text(text, encoding="utf-8")
                self._run([self.compiler, *flags, "-o", "partial"], folder)
                (folder / "partial").rename(folder / name)
        return folder / name

    def _object(self, texts: dict[str, str], source: str) -> Path:
        """torch's headers, which take half of a compilation, are compiled before, once."""
        includes = "".join(f"{line}\n" for line in _SYSTEM_INCLUDE.findall(texts_of("common.h")["common.h"]))
        prelude = self._make("prelude.h.gch", {"prelude.h": includes}, ["-x", "c++-header", "prelude.h"])
        return self._make("kernel.o", texts, ["-include", str(prelude.with_suffix("")), "-c", source])

    def library(self, mutant: Mutant) -> Path:
        """The path of the mutant's library; ValueError when the mutant is stale."""
        changed = mutant.apply()
        objects = []
        for source in mutant.sources:
            texts = texts_of(source)
            texts |= {name: text for name, text in changed.items() if name in texts}
            objects.append(str(self._object(texts, source)))
        path = BUILD / "libraries" / f"{mutant.id.replace('/', '.')}.{self.name}.so"
        path.parent.mkdir(parents=True, exist_ok=True)
        self._run([self.compiler, *objects, *self.link_flags, "-o", path.name], path.parent)
        return path
