// The arithmetic of sample, as hpsafety/reference/sample.py defines it: noise from Philox, log, and exp in fixed point.
//
// Every backend computes these bits, on any machine: fp32 additions and multiplications, each rounded by itself and in
// this order (-ffp-contract=off), and integers. Nothing here may become std::fma, std::log or exp_u20. Plain loops over
// these functions are what the compiler turns into vectors.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <limits>

#include <ATen/cpu/vec/vec.h>

namespace hpsafety::sampling {

constexpr int64_t kGroup = 128, kWidth = 32;  // words of a group; lanes of each of the four Philox outputs
constexpr int kMassBits = 40;
constexpr float kLog2e = 1.44269502f, kLn2 = 0.693147182f;
constexpr float kMaxNoise = 32.48f;  // above the noise of word 0
constexpr float kNoMass = -42.f;     // all masses are 0 from -41 down

inline float log2_1p(float r) {
  float q = -0.0449089098f;
  for (float c : {0.104482777f, -0.13162224f, 0.144820675f, -0.16647768f, 0.199906066f, -0.250000536f, 0.333334535f,
                  -0.5f}) {
    q = q * r + c;
  }
  return (r + r * r * q) * kLog2e;
}

inline float log2_of(float x) {
  const int32_t bits = std::bit_cast<int32_t>(x), e = (bits - 0x3F400000) >> 23;
  return static_cast<float>(e) + log2_1p(std::bit_cast<float>(bits - (e << 23)) - 1.f);
}

inline float noise(uint32_t word) {
  const float v = (static_cast<float>(word) + 0.5f) * 0x1p-32f, u = (static_cast<float>(~word) + 0.5f) * 0x1p-32f;
  return -log2_of(-(word < (1u << 30) ? log2_1p(-v) : log2_of(u)));
}

// noise(word) <= noise_bound(word), from -log2(1 - v) >= v log2(e), and from the bits of a float as a lower bound of
// its logarithm (the chord under log2 between powers of two, at most 0.09 away). The 0.001 is above all rounding:
// over all 2^32 words the difference is never below it.
inline float noise_bound(uint32_t word) {
  constexpr float kTop = 127 + 31 - 0.528766373f + 0.001f;                    // log2(log2(e)) = 0.5288
  const float half = static_cast<float>(static_cast<int32_t>(word >> 1)) + 0.25f;  // signed: AVX2 converts no other
  return kTop - static_cast<float>(std::bit_cast<int32_t>(half)) * 0x1p-23f;
}

// min(a, b) for floats of one sign whose bits grow with distance from 0: for negative ones the one nearer to 0. A
// comparison of floats would be a branch to the compiler, and keep a loop from becoming vectors.
inline float nearer_to_zero(float a, float b) {
  return std::bit_cast<float>(std::min(std::bit_cast<uint32_t>(a), std::bit_cast<uint32_t>(b)));
}

inline int64_t mass(float y) {
  constexpr float kToInteger = 0x1.8p23f;
  constexpr double kToFixed = 0x1.8p52;  // rounds half to even and leaves the integer in the low bits
  y = nearer_to_zero(y, -64.f);
  const float shifted = y + kToInteger, r = y - (shifted - kToInteger);
  const float q = (((0.00132647238f * r + 0.00967151299f) * r + 0.0555073358f) * r + 0.240222424f) * r + 0.693147004f;
  const uint32_t exponent = (std::bit_cast<uint32_t>(shifted) + kMassBits) << 23;  // the low bits of `shifted` are n
  const float power = std::bit_cast<float>(std::bit_cast<uint32_t>(1.f + r * q) + exponent);
  return std::bit_cast<int64_t>(static_cast<double>(power) + kToFixed) - std::bit_cast<int64_t>(kToFixed);
}

// What Philox is keyed with, and its ten round keys.
struct Key {
  uint64_t position, rounds[10][2];
  Key(uint64_t seed, uint64_t position) : position(position) {
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (auto& round : rounds) {
      round[0] = k0, round[1] = k1;
      k0 += 0x9E3779B9, k1 += 0xBB67AE85;
    }
  }
};

// 64-bit lanes, of which Philox uses the low halves: the product of two of them then holds both its results where they
// are needed (the low one in place, the high one a shift away), and nothing is shuffled between rounds.
#if defined(CPU_CAPABILITY_AVX512)
using Lanes = uint64_t __attribute__((vector_size(64)));
inline Lanes low_product(Lanes a, Lanes b) { return (Lanes)_mm512_mul_epu32((__m512i)a, (__m512i)b); }
#elif defined(CPU_CAPABILITY_AVX2)
using Lanes = uint64_t __attribute__((vector_size(32)));
inline Lanes low_product(Lanes a, Lanes b) { return (Lanes)_mm256_mul_epu32((__m256i)a, (__m256i)b); }
#else
using Lanes = uint64_t __attribute__((vector_size(16)));
inline Lanes low_product(Lanes a, Lanes b) { return (a & 0xFFFFFFFF) * (b & 0xFFFFFFFF); }
#endif

// words[32 j + lane]: output j of Philox4x32-10 at block first + lane.
inline void philox(const Key& key, uint32_t first, uint32_t* words) {
  constexpr int64_t kStep = sizeof(Lanes) / sizeof(uint64_t);
  using Words = uint32_t __attribute__((vector_size(sizeof(Lanes) / 2)));
  Lanes iota{};
  for (int64_t i = 0; i < kStep; ++i) iota[i] = i;
  for (int64_t lane = 0; lane < kWidth; lane += kStep) {
    Lanes x[4] = {Lanes{} + key.position, Lanes{} + (key.position >> 32), iota + static_cast<uint64_t>(first + lane)};
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
      const Lanes a = low_product(x[0], Lanes{} + 0xD2511F53), b = low_product(x[2], Lanes{} + 0xCD9E8D57);
      x[0] = (b >> 32) ^ x[1] ^ key.rounds[round][0];
      x[1] = b;
      x[2] = (a >> 32) ^ x[3] ^ key.rounds[round][1];
      x[3] = a;
    }
    for (int j = 0; j < 4; ++j) {
      const Words w = __builtin_convertvector(x[j], Words);
      std::memcpy(words + j * kWidth + lane, &w, sizeof w);
    }
  }
}

}  // namespace hpsafety::sampling
