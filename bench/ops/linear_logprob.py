"""Time and memory of linear_logprob and linear_cross_entropy against the GEMMs they need.

python -m bench.ops.linear_logprob [--rows 4096] [--width 576] [--vocabulary 49152] [--threads 2] [--dtype float32]
The limit is the best torch.mm(out=) rate for 256-row chunks times the number of forward-size GEMMs (4 with recompute,
3 with gradients made in the forward). Times are the minimum of --repeats alternating runs; memory is the peak resident
set of the process minus what stood before (inputs) and minus the gradients and outputs: for that, run one op
per process with --only.
"""

import argparse
import resource
import time

import torch

from hpsafety import ops, reference


def seconds(function) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def gemm_seconds(hidden, weight, rows: int = 256) -> float:
    """Forward-size GEMM, all rows, by chunks into one buffer: the fp32 limit (bf16 is computed in fp32 too)."""
    chunk, w = hidden[:rows].float(), weight.float()
    out = torch.empty(chunk.shape[0], w.shape[0])
    return seconds(lambda: torch.mm(chunk, w.t(), out=out)) * hidden.shape[0] / chunk.shape[0]


def work(name: str, args: dict):
    """A closure that runs one forward and backward of the op and returns (outputs, gradients)."""
    hidden, weight, targets = args["hidden"], args["weight"], args["targets"]
    row_weights = torch.full((len(targets),), 1 / len(targets))

    def logprob(entropy=False):
        out = ops.linear_logprob(hidden, weight, targets, 1.0, entropy)
        loss = -(row_weights * out[0]).sum() - 0.01 * (row_weights * out[1]).sum() if entropy else -out.mean()
        return torch.autograd.grad(loss, (hidden, weight))

    def cross_entropy():
        loss, _ = ops.linear_cross_entropy(hidden, weight, targets, row_weights)
        return torch.autograd.grad(loss, (hidden, weight))

    def forward():
        with torch.no_grad():
            ops.linear_logprob(hidden, weight, targets)

    return {
        "forward": (forward, 1),
        "logprob": (logprob, 4),
        "logprob+entropy": (lambda: logprob(True), 4),
        "cross_entropy": (cross_entropy, 3),
    }[name]


def check_correct(dtype) -> None:
    g = torch.Generator().manual_seed(1)
    hidden, weight = torch.randn(300, 64, generator=g).to(dtype), torch.randn(5003, 64, generator=g).to(dtype)
    targets = torch.randint(0, 5003, (300,), generator=g)
    exact = reference.linear_logprob(hidden.double(), weight.double(), targets)
    torch.testing.assert_close(
        ops.linear_logprob(hidden, weight, targets).double(), exact, rtol=1e-4, atol=1e-4
    )


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--only", default="forward,logprob,logprob+entropy,cross_entropy")
    o = parser.parse_args()
    torch.set_num_threads(o.threads)
    dtype = getattr(torch, o.dtype)
    check_correct(dtype)
    args = {
        "hidden": torch.randn(o.rows, o.width).to(dtype).requires_grad_(),
        "weight": torch.randn(o.vocabulary, o.width).mul_(o.width**-0.5).to(dtype).requires_grad_(),
        "targets": torch.randint(0, o.vocabulary, (o.rows,)),
    }
    results = dict.fromkeys(o.only.split(","), float("inf"))
    grads_mb = sum(args[k].numel() * args[k].element_size() for k in ("hidden", "weight")) / 2**20
    for name in results:
        before = peak_mb()
        work(name, args)[0]()
        extra = peak_mb() - before - (grads_mb if name != "forward" else 0)
        print(f"{name:16} first run: {extra:6.1f} MB beyond inputs, outputs and gradients")
    limit = float("inf")
    for _ in range(o.repeats):
        with torch.no_grad():
            limit = min(limit, gemm_seconds(args["hidden"], args["weight"]))
        for name in results:
            results[name] = min(results[name], seconds(work(name, args)[0]))
    gflops = 2 * o.rows * o.width * o.vocabulary / limit / 1e9
    print(
        f"{o.dtype}, {o.rows} x {o.width} x {o.vocabulary}, {o.threads} threads; limit {gflops:.0f} GFLOP/s"
    )
    for name, taken in results.items():
        gemms = work(name, args)[1]
        print(f"{name:16} {taken:7.3f} s, {taken / (gemms * limit):.3f} x its {gemms} GEMMs")


if __name__ == "__main__":
    main()
