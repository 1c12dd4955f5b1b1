// The arithmetic of sample, as hpsafety/reference/sample.py defines it: noise from Philox, log, and exp in fixed point.
//
// Every backend computes these bits. So there are only additions and multiplications that round by themselves, in this
// order and as intrinsics that the compiler never fuses (a plain a * b + c would become one), and integers.
#pragma once
#include "device.cuh"

namespace sampling {

constexpr int MASS_BITS = 40;
constexpr int SLICES = 16;
constexpr float SLICES_PER_BIT = 0.625f;  // the last slice takes what is 24 bits and more below the maximum
constexpr float LOG2_E = 1.44269502f, LN2 = 0.693147182f;

__device__ __forceinline__ float add(float a, float b) { return __fadd_rn(a, b); }
__device__ __forceinline__ float subtract(float a, float b) { return __fsub_rn(a, b); }
__device__ __forceinline__ float multiply(float a, float b) { return __fmul_rn(a, b); }
// q r + c, rounded twice.
__device__ __forceinline__ float step(float q, float r, float c) { return add(multiply(q, r), c); }

__device__ __forceinline__ float log2_1p(float r) {
  float q = step(-0.0449089098f, r, 0.104482777f);
  q = step(q, r, -0.13162224f);
  q = step(q, r, 0.144820675f);
  q = step(q, r, -0.16647768f);
  q = step(q, r, 0.199906066f);
  q = step(q, r, -0.250000536f);
  q = step(q, r, 0.333334535f);
  q = step(q, r, -0.5f);
  return multiply(add(r, multiply(multiply(r, r), q)), LOG2_E);
}

// x normal and positive: x = 2^e (1 + r) with r in [-1/4, 1/2).
__device__ __forceinline__ float log2_of(float x) {
  int bits = __float_as_int(x), e = (bits - 0x3F400000) >> 23;
  float r = subtract(__int_as_float(bits - static_cast<int>(static_cast<unsigned>(e) << 23)), 1.f);
  return add(static_cast<float>(e), log2_1p(r));
}

__device__ __forceinline__ float noise_of(uint32_t word) {
  float v = multiply(add(static_cast<float>(word), 0.5f), 0x1p-32f);
  float u = multiply(add(static_cast<float>(~word), 0.5f), 0x1p-32f);
  return -log2_of(-(word < 1u << 30 ? log2_1p(-v) : log2_of(u)));
}

// noise_of(word) <= noise_bound(word), from -log2(1 - v) >= v log2(e), and from the bits of a float as a lower bound of
// its logarithm (the chord under log2 between powers of two, at most 0.09 away). The 0.001 is above all rounding:
// over all 2^32 words the difference is never below it.
__device__ __forceinline__ float noise_bound(uint32_t word) {
  constexpr float TOP = 127 + 31 - 0.528766373f + 0.001f;  // log2(log2(e)) = 0.5288
  float half = add(static_cast<float>(static_cast<int>(word >> 1)), 0.25f);
  return subtract(TOP, multiply(static_cast<float>(__float_as_int(half)), 0x1p-23f));
}

// round(2^y 2^40), half to even.
__device__ __forceinline__ int64_t mass_of(float y) {
  y = fmaxf(y, -64.f);
  float n = subtract(add(y, 12582912.f), 12582912.f), r = subtract(y, n);
  float q = step(0.00132647238f, r, 0.00967151299f);
  q = step(q, r, 0.0555073358f);
  q = step(q, r, 0.240222424f);
  q = step(q, r, 0.693147004f);
  int power = __float_as_int(add(1.f, multiply(r, q)));
  int exponent = static_cast<int>(static_cast<unsigned>(static_cast<int>(n) + MASS_BITS) << 23);
  return __float2ll_rn(__int_as_float(power + exponent));
}

// Four words of Philox4x32-10.
struct Random {
  uint32_t word[4];
};
__device__ __forceinline__ Random philox(uint64_t seed, uint64_t position, uint32_t block) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  uint32_t x0 = static_cast<uint32_t>(position), x1 = static_cast<uint32_t>(position >> 32), x2 = block, x3 = 0;
#pragma unroll
  for (int round = 0; round < 10; round++) {
    uint32_t high0 = __umulhi(x0, 0xD2511F53u), low0 = x0 * 0xD2511F53u;
    uint32_t high1 = __umulhi(x2, 0xCD9E8D57u), low1 = x2 * 0xCD9E8D57u;
    x0 = high1 ^ x1 ^ k0, x1 = low1;
    x2 = high0 ^ x3 ^ k1, x3 = low0;
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
  return {{x0, x1, x2, x3}};
}

// Integers in the order of the floats; x is no NaN and no -0.
__device__ __forceinline__ int key_of(float x) {
  int bits = __float_as_int(x);
  return bits ^ ((bits >> 31) & 0x7FFFFFFF);
}

__device__ __forceinline__ int slice_of(float y) { return static_cast<int>(fminf(multiply(y, -SLICES_PER_BIT), 15.f)); }

// ceil(total * top_p / 2^31), below 2^63 throughout.
__device__ __forceinline__ int64_t top_p_target(int64_t total, int64_t top_p) {
  return (total >> 32) * 2 * top_p + (((total & 0xFFFFFFFF) * top_p + 2147483647) >> 31);
}

}  // namespace sampling
