"""Extra peak memory of the linear family: beyond inputs, outputs and gradients.

python -m bench.ops.linear_memory [OP ...] [--impl cpu] [--dtype float32] [--threads 2] [--peers]
Every figure comes from a fresh process: the peak resident set after one call, minus the resident set before it (the
inputs stand by then, and one small call has loaded the kernels), minus what the call returns.
"""

import argparse
import importlib
import json
import subprocess
import sys
from pathlib import Path

import torch

OPS = ("linear_logprob", "linear_cross_entropy", "distill_loss")


def _status_mb(field: str) -> float:
    """A field of /proc/self/status in MB: VmRSS now, VmHWM the peak of this process (not of its parent)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {field}; this measurement needs Linux")


def measure(op: str, shape: dict, dtype: torch.dtype, direction: str, contender: str) -> float:
    """MB beyond inputs, outputs and gradients; contender is a backend or a peer. Call it once per process."""
    module = importlib.import_module(f"bench.ops.{op}")

    def call(of):
        case = module.case(of, dtype, "cpu", direction)
        return case.peers[contender] if contender in case.peers else lambda: case.run(contender)

    small = dict.fromkeys(shape, 64) | {k: v for k, v in shape.items() if k == "KIND"}
    call(small)()
    work = call(shape)
    # Building the inputs may have peaked above what stands now: the peak starts again from here.
    Path("/proc/self/clear_refs").write_text("5")
    before = _status_mb("VmRSS")
    returned = work()
    return _status_mb("VmHWM") - before - sum(t.nbytes for t in returned) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("ops", nargs="*", help=f"default: {', '.join(OPS)}")
    parser.add_argument("--impl", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peers", action="store_true", help="measure the peers as well")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # JSON of one measurement: the fresh process
    o = parser.parse_args()
    torch.set_num_threads(o.threads)
    if o.one:
        arguments = json.loads(o.one)
        arguments["dtype"] = getattr(torch, arguments["dtype"])
        print(measure(**arguments))
        return
    for op in o.ops or OPS:
        module = importlib.import_module(f"bench.ops.{op}")
        headline = [s for s in module.SHAPES if all(s[k] == module.SHAPES[0][k] for k in s if k != "KIND")]
        for shape in headline:
            for direction in module.DIRECTIONS:
                for contender in (o.impl, *(("torch", "torch chunked") if o.peers else ())):
                    one = json.dumps(
                        {
                            "op": op,
                            "shape": shape,
                            "dtype": o.dtype,
                            "direction": direction,
                            "contender": contender,
                        }
                    )
                    command = [sys.executable, "-m", "bench.ops.linear_memory", "--threads", str(o.threads)]
                    done = subprocess.run(
                        [*command, "--one", one], capture_output=True, text=True, check=True
                    )
                    sizes = " ".join(f"{k}={v}" for k, v in shape.items())
                    print(
                        f"{op:21} {sizes:35} {o.dtype} {direction:8} {contender:14} {float(done.stdout):8.1f} MB",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
