"""Matrix products by the BLAS of the tensors' device, into memory that stands already."""

import torch


def product(a, b, out, add: bool = False) -> None:
    """out = a @ b, or out + a @ b; a and b both fp32 or both bf16, out fp32 either way, and fp32 sums.

    On a GPU one cuBLAS call; for fp32 inputs true fp32 as long as torch's matmul precision is "highest", its default.
    The CPU's BLAS, which the emulated kernels stand beside, has no bf16 product with fp32 results: there they are made
    from fp32 copies.
    """
    if a.dtype == torch.float32:
        torch.addmm(out, a, b, out=out) if add else torch.mm(a, b, out=out)
    elif a.device.type == "cpu":
        product(a.float(), b.float(), out, add)
    elif add:
        torch.ops.aten.addmm.dtype_out(out, a, b, torch.float32, out=out)
    else:
        torch.ops.aten.mm.dtype_out(a, b, torch.float32, out=out)
