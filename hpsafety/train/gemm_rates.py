"""Every way this machine can multiply two matrices: the best of them at a shape is "the limit" of all benchmarks.

Nobody is told to beat one library's GEMM where another's is twice as fast, so each route is tried at each shape.
"""

import os
import time
from collections.abc import Callable

import torch
import torch.nn.functional as nnf

THROUGH_FLOAT32 = "float32 mm"  # where bf16 is not multiplied in hardware, widening first is the faster way


def wall_seconds(call: Callable) -> float:
    """Seconds of one call, from an idle device to an idle device."""
    wait = torch.cuda.synchronize if torch.cuda.is_initialized() else lambda: None
    wait()
    start = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - start


def _numpy_has_our_threads() -> bool:
    """numpy's BLAS takes its thread count from the environment when it is loaded; another count is another limit."""
    given = os.environ.get("OPENBLAS_NUM_THREADS") or os.environ.get("OMP_NUM_THREADS") or str(os.cpu_count())
    return given == str(torch.get_num_threads())


def routes(
    rows: int, inputs: int, outputs: int, dtype: torch.dtype, device: str = "cpu"
) -> dict[str, Callable]:
    """Name -> call that computes x (rows, inputs) times a weight (outputs, inputs) transposed.

    A route that this torch or machine lacks is left out.
    """
    x = torch.randn(rows, inputs, device=device).to(dtype)
    weight = torch.randn(outputs, inputs, device=device).to(dtype)
    out = torch.empty(rows, outputs, dtype=dtype, device=device)
    found = {"mm": lambda: torch.mm(x, weight.t(), out=out), "linear": lambda: nnf.linear(x, weight)}
    if device != "cpu":
        return found
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
        point = torch.ops.mkldnn._linear_pointwise
        point(x, packed, None, "none", [], "")
        found["mkldnn packed"] = lambda: point(x, packed, None, "none", [], "")
    except (AttributeError, RuntimeError, TypeError):
        pass
    if dtype == torch.float32 and _numpy_has_our_threads():
        import numpy as np

        left, right, result = x.numpy(), weight.t().numpy(), out.numpy()
        found["numpy"] = lambda: np.matmul(left, right, out=result)
    if dtype == torch.bfloat16:
        wide_x, wide_weight, wide_out = x.float(), weight.float(), out.float()
        found[THROUGH_FLOAT32] = lambda: torch.mm(wide_x, wide_weight.t(), out=wide_out)
    return found


def rates(
    rows: int, inputs: int, outputs: int, dtype: torch.dtype, device: str = "cpu", *, repeats: int = 3,
    seconds: Callable[[Callable], float] = wall_seconds,
) -> dict[str, float]:  # fmt: skip
    """Route -> GFLOP/s of its best call. A route whose first call is hopeless (no hardware for it) gets no more."""
    work, found = 2e-9 * rows * inputs * outputs, {}
    for name, call in routes(rows, inputs, outputs, dtype, device).items():
        best = seconds(call)
        if not found or work / best > 0.1 * max(found.values()):
            best = min(best, *(seconds(call) for _ in range(repeats)))
        found[name] = work / best
    return found
