"""Handwritten Triton kernels, one file per op; imported as hpsafety.triton_kernels, at the first call that needs them.

Each file holds its kernels and the functions that launch them. Those have the arguments and the results of the
registered op (hpsafety/ops/<op>.py), which has checked everything before it calls them. SHARED_BYTES is what its
largest configuration needs of shared memory.
"""
