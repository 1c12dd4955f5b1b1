// Runs a CUDA kernel on the host, to check its numbers and its synchronisation. csrc/cuda/device.cuh includes it where
// the compiler is not nvcc.
//
//   g++ -x c++ -O2                                     fibers in one OS thread: fast, in a known order
//   g++ -x c++ -DSIMT_THREADS -fsanitize=thread        one OS thread per CUDA thread: a missing barrier is a data race
//   g++ -x c++ -DSIMT_THREADS -fsanitize=address,...   out-of-bounds accesses of shared memory and tensors
//
// Always on: a block's shared memory is NaN at its start; cp_async leaves NaN in its place and delivers at the wait;
// a deadlock, a barrier reached from two lines, a collective whose mask lacks its caller or the lane that it reads, and
// misaligned copies end the program with the place named. SIMT_SEED=n (fibers): threads and blocks come in an order
// drawn from n; a kernel that is synchronised gives the same bits for every n. SIMT_LAST: a launch's last block runs and
// no other, to see offsets that nobody could run all blocks up to. simt::watch names bytes that two blocks
// write. Not emulated: wgmma, TMA, mbarrier, clusters, textures. The PTX text of device.cuh is compiled, never run.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "warp.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __constant__ static
#define __align__(n) __attribute__((aligned(n)))
#define SIMT_SHARED(T, name) T* name = reinterpret_cast<T*>(simt::shared)
#define SIMT_NAME(...) __VA_ARGS__
#define SIMT_LAUNCH(kernel, grid, block, bytes, stream, ...) \
  (simt::note(simt::name_of<SIMT_NAME kernel>(), (grid), (block), (bytes)), (void)(stream),               \
   simt::dry ? (void)0 : simt::launch((grid), (block), (bytes), [=] { SIMT_NAME kernel(__VA_ARGS__); }), 0)
#define threadIdx (simt::me->index)
#define blockIdx (simt::me->block)
#define blockDim (simt::block)
#define gridDim (simt::grid)

#define SIMT_VECTOR(T, N)                 \
  struct alignas(2 * sizeof(T)) N##2 {    \
    T x, y;                               \
  };                                      \
  struct alignas(4 * sizeof(T)) N##4 {    \
    T x, y, z, w;                         \
  };                                      \
  inline N##2 make_##N##2(T x, T y) { return {x, y}; } \
  inline N##4 make_##N##4(T x, T y, T z, T w) { return {x, y, z, w}; }
SIMT_VECTOR(float, float)
SIMT_VECTOR(int, int)
SIMT_VECTOR(unsigned, uint)
typedef void* cudaStream_t;

struct __nv_bfloat16 {
  uint16_t bits;
};
struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
inline float __bfloat162float(__nv_bfloat16 v) { return simt::half_of(v.bits, false); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  if ((u & 0x7fffffff) > 0x7f800000) return {0x7fff};
  return {static_cast<uint16_t>((u + 0x7fff + ((u >> 16) & 1)) >> 16)};
}
inline __nv_bfloat16 __float2bfloat16(float x) { return __float2bfloat16_rn(x); }
inline __nv_bfloat162 __floats2bfloat162_rn(float a, float b) { return {__float2bfloat16_rn(a), __float2bfloat16_rn(b)}; }
inline uint32_t pack_bf16(float low, float high) {
  return __float2bfloat16_rn(low).bits | static_cast<uint32_t>(__float2bfloat16_rn(high).bits) << 16;
}

#define SIMT_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()
inline void __syncthreads(SIMT_HERE) { simt::sync_threads(file, line); }
inline void __syncwarp(unsigned mask = ~0u, SIMT_HERE) { simt::sync_warp(mask, file, line); }
template <class V>
inline V __shfl_sync(unsigned mask, V v, int from, int width = 32, SIMT_HERE) {
  return simt::shuffle(mask, v, simt::lane_of(from, width), file, line);
}
template <class V>
inline V __shfl_xor_sync(unsigned mask, V v, int x, int width = 32, SIMT_HERE) {
  return simt::shuffle(mask, v, simt::lane_xor(x, width), file, line);
}
template <class V>
inline V __shfl_down_sync(unsigned mask, V v, unsigned by, int width = 32, SIMT_HERE) {
  return simt::shuffle(mask, v, simt::lane_down(static_cast<int>(by), width), file, line);
}
template <class V>
inline V __shfl_up_sync(unsigned mask, V v, unsigned by, int width = 32, SIMT_HERE) {
  return simt::shuffle(mask, v, simt::lane_up(static_cast<int>(by), width), file, line);
}
inline unsigned __ballot_sync(unsigned mask, int vote, SIMT_HERE) { return simt::ballot(mask, vote != 0, file, line); }
inline int __any_sync(unsigned mask, int vote, SIMT_HERE) { return simt::ballot(mask, vote != 0, file, line) != 0; }
inline int __all_sync(unsigned mask, int vote, SIMT_HERE) { return simt::ballot(mask, vote == 0, file, line) == 0; }

inline void cp_async16(void* s, const void* g, bool there = true) { simt::copy_async(s, g, there, 16); }
inline void cp_async4(void* s, const void* g, bool there = true) { simt::copy_async(s, g, there, 4); }
inline void cp_async_commit() { simt::commit_copies(); }
template <int N>
inline void cp_async_wait() {
  simt::wait_for_copies(N);
}
inline void ldmatrix_x4(uint32_t (&r)[4], const void* p, SIMT_HERE) { simt::ldmatrix<4, false>(r, p, file, line); }
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* p, SIMT_HERE) { simt::ldmatrix<4, true>(r, p, file, line); }
inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, SIMT_HERE) {
  simt::mma(d, a, b0, b1, file, line);
}

template <class V, class U>
inline V atomicAdd(V* p, U v) {
  return simt::change(p, [=](V old) { return static_cast<V>(old + static_cast<V>(v)); });
}
template <class V, class U>
inline V atomicMax(V* p, U v) {
  return simt::change(p, [=](V old) { return old > static_cast<V>(v) ? old : static_cast<V>(v); });
}
inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
template <class V>
inline V __ldg(const V* p) {
  return *p;
}
inline float exp2_fast(float x) { return exp2f(x); }
inline float rsqrtf(float x) { return 1.f / sqrtf(x); }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline long long __float2ll_rn(float x) { return llrintf(x); }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
template <class To, class From>
inline To simt_bits(From x) {
  To y;
  static_assert(sizeof x == sizeof y);
  memcpy(&y, &x, sizeof y);
  return y;
}
inline float __int_as_float(int x) { return simt_bits<float>(x); }
inline float __uint_as_float(unsigned x) { return simt_bits<float>(x); }
inline int __float_as_int(float x) { return simt_bits<int>(x); }
inline unsigned __float_as_uint(float x) { return simt_bits<unsigned>(x); }
inline double __longlong_as_double(long long x) { return simt_bits<double>(x); }
inline long long __double_as_longlong(double x) { return simt_bits<long long>(x); }
template <class A, class B>
inline std::common_type_t<A, B> min(A a, B b) {
  return a < b ? a : b;
}
template <class A, class B>
inline std::common_type_t<A, B> max(A a, B b) {
  return a > b ? a : b;
}

// Of the whole library that holds the emulated kernels.
extern "C" {
__attribute__((weak, visibility("default"))) int simt_emulated() { return 1; }
__attribute__((weak, visibility("default"))) void simt_dry(int on) {
  simt::dry = on;
  simt::launched.clear();
}
__attribute__((weak, visibility("default"))) const char* simt_launched() { return simt::launched.c_str(); }
__attribute__((weak, visibility("default"))) uint64_t simt_matrices() { return simt::matrices; }
__attribute__((weak, visibility("default"))) uint64_t simt_turns() { return simt::turns; }
}
