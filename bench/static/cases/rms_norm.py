from hpsafety.triton_kernels import rms_norm as kernels


def run(shapes, empty) -> None:
    x, weight = empty(shapes.tokens, shapes.width), empty(shapes.width)
    kernels.rms_norm(x, weight, 1e-5, None)
    y, summed, rstd = kernels.rms_norm(x, weight, 1e-5, x)
    kernels.rms_norm_backward(y, None, x, weight, rstd)
    kernels.rms_norm_backward(y, x, summed, weight, rstd)
