"""Where the Triton kernels run in the tests: on the GPU if there is one, else in Triton's interpreter on the CPU."""

from tests.device import DEVICE, place
from tests.ops.oracle import check_against_oracle

__all__ = ["DEVICE", "check_triton", "place"]


def check_triton(op_name: str, op, args: dict, factor: float = 2.0, **kwargs) -> dict:
    """check_against_oracle with impl="triton", on DEVICE."""
    return check_against_oracle(op_name, op, args, factor, impl="triton", device=DEVICE, **kwargs)
