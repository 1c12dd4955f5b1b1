"""What a number was measured on, so that a result file stands alone."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

from hpsafety.doctor import cpu_facts, first_line, memory_gb

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "numpy", "transformers", "trl", "accelerate", "datasets", "triton")


def commit() -> str:
    """The checkout's commit, with "+changes" where tracked files differ from it; "unknown" outside of git."""
    told = []
    for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"]):
        try:
            done = subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.SubprocessError):
            return "unknown"
        if done.returncode:
            return "unknown"
        told.append(done.stdout.strip())
    return told[0] + ("+changes" if told[1] else "")


def machine(threads: int) -> dict:
    """CPU, threads, versions, commit and the load at the time of the call."""
    import torch

    model, features = cpu_facts()
    installed = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
    return {
        "cpu": model, "features": features, "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(), "threads": threads, "memory": memory_gb(), "system": platform.platform(),
        "python": platform.python_version(), "load_average": os.getloadavg(), "commit": commit(),
        "versions": {name: installed[name] for name in PACKAGES if name in installed},
    }  # fmt: skip


def gpu(device: str) -> dict:
    """A GPU's name, driver and clocks as they are now; {} for a CPU, without a CUDA call."""
    if not device.startswith("cuda"):
        return {}
    import torch

    properties = torch.cuda.get_device_properties(device)
    index = torch.device(device).index or 0
    clocks = first_line(
        "nvidia-smi", "-i", str(index), "--format=csv,noheader",
        "--query-gpu=clocks.sm,clocks.mem,clocks_event_reasons.active,driver_version",
    )  # fmt: skip
    return {
        "gpu": properties.name, "compute_capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda, "clocks_sm_mem_reasons_driver": clocks or "unknown",
    }  # fmt: skip
