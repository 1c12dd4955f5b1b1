"""Small programs over csrc/simt, built and run: for the tests of the emulation itself."""

import os
import subprocess
import tempfile
from pathlib import Path

from tests.cuda import emulation


def link(objects: list[Path], mode: str, program: Path) -> None:
    flags = [f for f in emulation.MODES[mode] if f.startswith("-fsanitize") or f == "-pthread"]
    subprocess.run([emulation.compiler(), *flags, *map(str, objects), "-o", str(program)], check=True)


def execute(program: Path, mode: str, *arguments: str, seed: int | None = None, seconds: float = 240):
    """The finished process. SIMT_SEED is `seed`, or unset."""
    env = os.environ | {"TSAN_OPTIONS": "halt_on_error=1 exitcode=66", "ASAN_OPTIONS": "detect_leaks=0"}
    env.pop("SIMT_SEED", None)
    if seed is not None:
        env["SIMT_SEED"] = str(seed)
    # gcc's ThreadSanitizer does not start where addresses are drawn from too wide a range.
    command = ["setarch", os.uname().machine, "-R"] if mode == "tsan" else []
    return subprocess.run(
        [*command, str(program), *arguments], env=env, capture_output=True, text=True, timeout=seconds
    )


def run(
    text: str, mode: str = "fibers", seed: int | None = None, arguments: list[str] | None = None
) -> list[tuple[int, str]]:
    """(exit code, what it said) of a program that includes "device.cuh" and has a main, for each of the arguments."""
    files = emulation.texts() | {"cuda/probe.cu": text}
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "probe"
        link([emulation.make_object("cuda/probe.cu", files, mode)], mode, program)
        done = [execute(program, mode, one, seed=seed) for one in arguments or [""]]
    return [(one.returncode, one.stdout + one.stderr) for one in done]
