// Sums and maxima over a warp or a block, in one fixed order: the same bits at every run.
#pragma once
#include "device.cuh"

struct Add {
  template <class V>
  __device__ __forceinline__ V operator()(V a, V b) const {
    return a + b;
  }
};

// All lanes get the result.
template <class V, class Op>
__device__ __forceinline__ V reduce_warp(V value, Op op) {
#pragma unroll
  for (int step = 16; step; step /= 2) value = op(value, __shfl_xor_sync(~0u, value, step));
  return value;
}

// All threads get the result. `room` holds one V per warp; whole warps only. Two barriers: room may be used again after.
template <int THREADS, class V, class Op>
__device__ __forceinline__ V reduce_block(V value, Op op, V* room) {
  constexpr int WARPS = THREADS / 32;
  static_assert(THREADS % 32 == 0, "whole warps");
  value = reduce_warp(value, op);
  if constexpr (WARPS > 1) {
    if (threadIdx.x % 32 == 0) room[threadIdx.x / 32] = value;
    __syncthreads();
    value = room[0];
#pragma unroll
    for (int w = 1; w < WARPS; w++) value = op(value, room[w]);
    __syncthreads();
  }
  return value;
}
