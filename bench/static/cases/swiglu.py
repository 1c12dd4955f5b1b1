from hpsafety.triton_kernels import swiglu as kernels


def run(shapes, empty) -> None:
    gate_up = empty(shapes.tokens, 2 * shapes.mlp)
    y = kernels.swiglu(gate_up)
    kernels.swiglu_backward(y, gate_up)
