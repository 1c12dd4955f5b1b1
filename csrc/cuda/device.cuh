// What every kernel of this folder is written with: nvcc makes PTX of it, g++ runs it on csrc/simt.
//
//   SIMT_LAUNCH((kernel<...>), grid, block, shared_bytes, stream, arguments...)   a launch; returns 0 or a CUDA error
//   SIMT_SHARED(float, s)   the block's dynamic shared memory, 128-byte aligned. The only shared memory there is: arrays
//                           declared __shared__ would escape the emulation's checks in templates
//   cp_async16, cp_async4, cp_async_commit, cp_async_wait<N>, ldmatrix_x4, ldmatrix_x4_trans, mma_bf16, pack_bf16, exp2_fast
//
// Launchers are extern "C", take raw pointers and the stream, return 0 or the CUDA error, allocate nothing and never
// synchronise. No torch header.
#pragma once
#include <cstddef>
#include <cstdint>

#ifdef __CUDACC__
#include <cuda_bf16.h>

#define SIMT_SHARED(T, name)                                       \
  extern __shared__ __align__(128) unsigned char simt_shared_[]; \
  T* name = reinterpret_cast<T*>(simt_shared_)
#define SIMT_NAME(...) __VA_ARGS__
#define SIMT_LAUNCH(kernel, grid, block, shared, stream, ...)                                                        \
  [&]() -> int {                                                                                                    \
    if ((shared) > 48 * 1024) {                                                                                     \
      cudaError_t raised = cudaFuncSetAttribute(                                                                    \
          reinterpret_cast<const void*>(SIMT_NAME kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, (shared));  \
      if (raised != cudaSuccess) return static_cast<int>(raised);                                                   \
    }                                                                                                               \
    SIMT_NAME kernel<<<grid, block, shared, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__);                      \
    return static_cast<int>(cudaGetLastError());                                                                    \
  }()

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
// 16 bytes to shared memory, zeros where !there (g is not read then, but must be a valid address of any kind).
__device__ __forceinline__ void cp_async16(void* s, const void* g, bool there = true) {
  int bytes = there ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(s)), "l"(g), "r"(bytes) : "memory");
}
// The same of 4 bytes, which come by way of L1.
__device__ __forceinline__ void cp_async4(void* s, const void* g, bool there = true) {
  int bytes = there ? 4 : 0;
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(s)), "l"(g), "r"(bytes) : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* p) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(p))
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* p) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(p))
               : "memory");
}
// d += a b: a (16, 16) row-major fragments, b (16, 8) column-major, fp32 sums.
__device__ __forceinline__ void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
  __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<uint32_t*>(&both);
}
// 2^x within 2 ulp; 0 for -inf, NaN for NaN.
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
#else
#include "../simt/simt.h"
#endif

// A kernel as a value that a lambda takes: SIMT_LAUNCH((one.kernel), ...).
template <auto Kernel>
struct One {
  static constexpr auto kernel = Kernel;
};

constexpr int BAD_ARGUMENT = 1;  // cudaErrorInvalidValue: what a launcher says to sizes it has no kernel for
