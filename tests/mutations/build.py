"""Builds the library of one mutant: the op's sources with setup.py's own flags for the running CPU.

Objects are kept under a hash of everything that goes into them, so that only what a mutation touches is compiled, and
nothing is on a second run. A mutated header compiles every source of the op that includes it.
"""

import hashlib
import importlib.util
import shlex
import subprocess
import sysconfig
import threading
from pathlib import Path

import torch

from tests.mutations.mutants import ROOT, Mutant, texts_of

BUILD = ROOT / "build" / "mutations"


class DoesNotCompile(Exception):
    """The compiler's or the linker's errors."""


def _setup():
    spec = importlib.util.spec_from_file_location("hpsafety_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Builder:
    """Compiles and links; safe to use from several threads."""

    def __init__(self):
        setup = _setup()
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

    def _run(self, command: list[str]) -> None:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if "error" in line] or [done.stderr[-500:]]
            raise DoesNotCompile("\n".join(errors[:5]))

    def _object(self, texts: dict[str, str], changed: dict[str, str], source: str) -> Path:
        texts |= {name: text for name, text in changed.items() if name in texts}
        parts = [self.compiler, torch.__version__, *self.compile_flags, source, *sorted(texts), *texts.values()]
        key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]
        folder = BUILD / "objects" / key
        made = folder / "kernel.o"
        with self._guard:
            lock = self._locks.setdefault(made, threading.Lock())
        with lock:
            if not made.exists():
                folder.mkdir(parents=True, exist_ok=True)
                for name, text in texts.items():
                    (folder / name).write_text(text, encoding="utf-8")
                partial = folder / "partial.o"
                self._run([self.compiler, *self.compile_flags, "-c", str(folder / source), "-o", str(partial)])
                partial.rename(made)
        return made

    def library(self, mutant: Mutant) -> Path:
        """The path of the mutant's library; ValueError when the mutant is stale."""
        changed = mutant.apply()
        objects = [str(self._object(texts_of(source), changed, source)) for source in mutant.sources]
        path = BUILD / "libraries" / f"{mutant.id.replace('/', '.')}.{self.name}.so"
        path.parent.mkdir(parents=True, exist_ok=True)
        self._run([self.compiler, *objects, *self.link_flags, "-o", str(path)])
        return path
