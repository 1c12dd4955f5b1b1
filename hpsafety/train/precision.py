"""Which dtype a run computes in, and why."""

import torch

from hpsafety.errors import InputError


def cpu_has_fast_bf16() -> bool:
    """True where the CPU multiplies bf16 in hardware (AVX-512 bf16 or AMX); elsewhere a bf16 GEMM crawls."""
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, lambda: False)() for name in probes)


def choose(precision: str, device: torch.device) -> tuple[torch.dtype, str]:
    """(dtype of the computation, a line that says why). `precision` is auto, fp32 or bf16."""
    if precision == "fp32":
        return torch.float32, "fp32, as asked"
    if precision == "bf16":
        return torch.bfloat16, "bf16, as asked (fp32 masters, reductions and optimiser)"
    if precision != "auto":
        raise InputError(f'--precision must be auto, fp32 or bf16, got "{precision}"')
    if device.type == "cuda":
        return torch.bfloat16, "bf16 (auto: a GPU; fp32 masters, reductions and optimiser)"
    if cpu_has_fast_bf16():
        return torch.bfloat16, "bf16 (auto: this CPU multiplies bf16 in hardware; fp32 masters and optimiser)"
    return torch.float32, "fp32 (auto: this CPU has no bf16 multiply)"


def name(dtype: torch.dtype) -> str:
    """The --precision that means `dtype`."""
    return "bf16" if dtype == torch.bfloat16 else "fp32"
