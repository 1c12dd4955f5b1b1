"""What the compiler makes of the GPU kernels, without a GPU: python -m bench.static."""
