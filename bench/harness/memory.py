"""Peak memory of one contender beyond its inputs: python -m bench.harness.memory '{"op": ..., ...}' prints megabytes.

In a process of its own, since one process cannot tell its contenders' memory apart. The contender first works at the
CHECK shape, so that libraries and their buffers are there; then the inputs are made, free memory is handed back, and
the kernel's record of the peak starts anew. The outputs count: they are beyond the inputs.
"""

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from bench.end_to_end.common import peak_rss_mb
from bench.harness import contenders

ROOT = Path(__file__).resolve().parents[2]


def _resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def _start_anew() -> float:
    """Resident megabytes now, with free memory returned and the peak forgotten. OSError where the system cannot."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _resident_mb()


def peak_mb(job: dict) -> float:
    """job: op, shape, dtype, device, direction, seed, impl, threads."""
    torch.set_num_threads(job["threads"])
    module = contenders.load(job["op"])

    def call_of(shape):
        case = contenders.build(module, shape, job["dtype"], job["device"], job["direction"], job["seed"])
        return contenders.contenders(case, (job["impl"],))[0][job["impl"]]

    call_of(module.CHECK)()
    call = call_of(job["shape"])
    if job["device"].startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(job["device"])
        before = torch.cuda.memory_allocated(job["device"])
        kept = call()
        peak = torch.cuda.max_memory_allocated(job["device"]) - before
        del kept
        return peak / 2**20
    before = _start_anew()
    kept = call()
    peak = peak_rss_mb()
    del kept
    return max(0.0, peak - before)


def in_child(job: dict) -> float | None:
    """peak_mb(job) in a fresh process; None where it cannot be had (no /proc, or the child failed)."""
    # Large blocks come from and return to the system, so that the resident size is what is in use.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, "-W", "ignore", "-m", "bench.harness.memory", json.dumps(job)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    try:
        return float(done.stdout.split()[-1])
    except (IndexError, ValueError):
        return None


if __name__ == "__main__":
    print(peak_mb(json.loads(sys.argv[1])))
