"""The CUDA kernels compiled for the host, against csrc/simt: libraries for Python, programs for the sanitizers.

    python -m tests.cuda.emulation       builds the library and prints its path

Objects are kept in build/simt by content. The emulated library is what HPSAFETY_CUDA_LIBRARY names in the tests.
"""

import fcntl
import hashlib
import os
import posixpath
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
CUDA, SIMT = ROOT / "csrc" / "cuda", ROOT / "csrc" / "simt"
BUILD = ROOT / "build" / "simt"
INCLUDE = re.compile(r'^\s*#include "([^"]+)"', re.MULTILINE)
FLAGS = [
    "-x", "c++", "-std=c++17", "-fPIC", "-w", "-fno-gnu-unique", "-ffp-contract=off", "-fno-strict-aliasing",
]  # fmt: skip
MODES = {
    "fibers": ["-O2"],
    "tsan": ["-O1", "-g", "-DSIMT_THREADS", "-fsanitize=thread", "-pthread", "-Wno-tsan"],
    "asan": [
        "-O1",
        "-g",
        "-DSIMT_THREADS",
        "-fsanitize=address,undefined",
        "-fno-sanitize=vptr",
        "-fno-sanitize-recover=undefined",
        "-pthread",
    ],
}


def compiler() -> str | None:
    named = os.environ.get("CXX")
    return shutil.which(named) if named else shutil.which("g++")


def texts(folder: Path | None = None) -> dict[str, str]:
    """Everything the kernels are made of: path below csrc -> text.

    HPSAFETY_CUDA_SOURCES names another csrc/cuda, a mutant's.
    """
    folder = folder or Path(os.environ.get("HPSAFETY_CUDA_SOURCES") or CUDA)
    files = [*folder.glob("*.cu"), *folder.glob("*.cuh")]
    found = {f"cuda/{path.name}": path.read_text(encoding="utf-8") for path in files}
    return found | {f"simt/{path.name}": path.read_text(encoding="utf-8") for path in SIMT.glob("*.h")}


def _run(command: list[str], cwd: Path) -> None:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[:2])} ... fails:\n{done.stderr[-3000:]}")


def _make(path: Path, build) -> Path:
    """build(fresh path) unless the path stands; whole or not at all, and by one process at a time."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                fresh = path.with_suffix(f".{os.getpid()}")
                build(fresh)
                fresh.replace(path)
    return path


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _tree(files: dict[str, str], digest: str) -> Path:
    """A folder with these files, for sources that are not those of the checkout."""
    folder = BUILD / "trees" / digest
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
    return folder


def included(source: str, files: dict[str, str]) -> dict[str, str]:
    """A file and all those that it includes: path below csrc -> text."""
    found, waiting = {}, [source]
    while waiting:
        name = waiting.pop()
        if name not in found and name in files:
            found[name] = files[name]
            folder = posixpath.dirname(name)
            waiting += [posixpath.normpath(f"{folder}/{x}") for x in INCLUDE.findall(files[name])]
    return found


def make_object(source: str, files: dict[str, str], mode: str = "fibers") -> Path:
    """One .cu, by its name below csrc. It is made again only where it or a header that it includes is another."""
    needed = included(source, files)
    flags = [*FLAGS, *MODES[mode]]
    digest = _digest(source, *flags, *(part for pair in sorted(needed.items()) for part in pair))

    def build(fresh: Path) -> None:
        tree = _tree(needed, digest)
        _run([compiler(), *flags, "-c", str(tree / source), "-o", str(fresh)], tree)

    return _make(BUILD / f"{Path(source).stem}.{digest}.{mode}.o", build)


def make_library(files: dict[str, str] | None = None, jobs: int = 2) -> Path:
    """All kernels in one library whose launchers run on the CPU."""
    files = texts() if files is None else files
    sources = sorted(name for name in files if name.endswith(".cu"))
    with ThreadPoolExecutor(jobs) as pool:
        objects = [str(path) for path in pool.map(lambda source: make_object(source, files), sources)]

    def build(fresh: Path) -> None:
        _run([compiler(), "-shared", "-fno-gnu-unique", *objects, "-o", str(fresh)], BUILD)

    return _make(BUILD / f"libhpsafety_cuda.{_digest(*objects)}.so", build)


if __name__ == "__main__":
    if compiler() is None:
        sys.exit("no C++ compiler found: apt install g++")
    print(make_library())
