"""Where the Triton kernels run in the tests: on the GPU if there is one, else in Triton's interpreter on the CPU."""

import torch

from tests.ops.oracle import check_against_oracle

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def check_triton(op_name: str, op, args: dict, factor: float = 2.0, **kwargs) -> dict:
    """check_against_oracle with impl="triton", on DEVICE."""
    return check_against_oracle(op_name, op, args, factor, impl="triton", device=DEVICE, **kwargs)


def place(args: dict) -> dict:
    """The same arguments on DEVICE; tuples of tensors too."""

    def move(value):
        if isinstance(value, torch.Tensor):
            return value.to(DEVICE)
        return tuple(move(x) for x in value) if isinstance(value, tuple) else value

    return {name: move(value) for name, value in args.items()}
