"""The CUDA kernels of csrc/cuda, op by op: outputs are allocated here, and a launcher of the library fills them."""
