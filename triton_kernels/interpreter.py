"""Repairs of Triton's interpreter (TRITON_INTERPRET=1), which is silently wrong for bf16 in version 3.9.0:

- tl.dot multiplies the bit patterns of bf16 operands as if they were integers, since numpy has no bf16;
- fp32 -> bf16 drops the low bits, where a GPU rounds to nearest even;
- so do sums, products and comparisons of bf16: they raise here, and a kernel widens to fp32 before it computes.

tests/triton/test_interpreter.py proves both, and that the stock interpreter still needs them.
"""

import numpy as np
import triton.language as tl
import triton.runtime.interpreter as stock

QUIET_NAN = np.uint16(0x7FFF)


def to_bf16_bits(x: np.ndarray) -> np.ndarray:
    """fp32 -> the uint16 patterns of bf16, rounded to nearest even; NaN stays NaN."""
    x = np.ascontiguousarray(x, dtype=np.float32)
    bits = x.view(np.uint32)
    with np.errstate(over="ignore"):  # only a NaN's pattern can pass 2^32, and it is replaced
        rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), QUIET_NAN, rounded.astype(np.uint16))


def _values(operand) -> np.ndarray:
    """The numbers of an operand: bf16 patterns widened to fp32, everything else as it is."""
    data = np.asarray(operand.data)
    if operand.dtype.scalar == tl.bfloat16 and data.dtype == np.uint16:
        return (data.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return data


def repair() -> None:
    """Patches the interpreter of this process; a second call changes nothing."""
    if getattr(stock, "hpsafety_repaired", False):
        return
    stock_dot, stock_convert = stock.InterpreterBuilder.create_dot, stock._convert_float

    def create_dot(self, a, b, accumulator, *rest):
        if tl.bfloat16 not in (a.dtype.scalar, b.dtype.scalar):
            return stock_dot(self, a, b, accumulator, *rest)
        product = np.matmul(_values(a), _values(b)).astype(accumulator.data.dtype)
        return stock.TensorHandle(product + accumulator.data, accumulator.dtype.scalar)

    def convert_float(x, source, target, mode, *rest):
        nearest = mode is None or "RTNE" in str(mode)
        if source == tl.float32 and target == tl.bfloat16 and nearest:
            x = np.asarray(x)
            return to_bf16_bits(x if x.dtype == np.float32 else x.view(np.float32))
        return stock_convert(x, source, target, mode, *rest)

    stock_binary = stock.InterpreterBuilder.binary_op

    def binary_op(self, lhs, rhs, op):
        if lhs.dtype.scalar == tl.bfloat16 and np.asarray(lhs.data).dtype == np.uint16:
            raise TypeError(f"{op.__name__} of bf16 is not interpreted: widen to fp32 first, .to(tl.float32)")
        return stock_binary(self, lhs, rhs, op)

    stock.InterpreterBuilder.create_dot = create_dot
    stock.InterpreterBuilder.binary_op = binary_op
    stock._convert_float = convert_float
    stock.hpsafety_repaired = True
