#include "bf16_gemm.h"

#include <ATen/native/CPUBlas.h>
#include <c10/util/Exception.h>

namespace hpsafety {

#ifdef CPU_CAPABILITY_AVX512

namespace {

namespace blas = at::native::cpublas;

constexpr int64_t kPanel = 128;  // columns of b met by all rows before the next: k x 128 pairs stay in L2

// 32 x 32 ones: 32 everywhere, unless this torch was built without the route.
bool probe() {
  if (!__builtin_cpu_supports("avx512bf16")) return false;
  std::vector<BFloat16> ones(kGrain * kGrain, BFloat16(1.f));
  std::vector<float> c(kGrain * kGrain, 0.f);
  try {
    bf16_gemm({ones.data(), kGrain}, {ones.data(), kGrain}, c.data(), kGrain, kGrain, kGrain, kGrain, false);
  } catch (const c10::Error&) {
    return false;
  } catch (const std::exception&) {
    return false;
  }
  for (const float v : c) {
    if (v != kGrain) return false;
  }
  return true;
}

uint32_t bits(float v) { return c10::detail::round_to_nearest_even(v); }

}  // namespace

bool multiplies_bf16() {
  static const bool can = probe();
  return can;
}

void bf16_gemm(Bf16Operand a, Bf16Operand b, float* c, int64_t ldc, int64_t rows, int64_t n, int64_t k, bool add) {
  for (int64_t j = 0; j < n; j += kPanel) {
    for (int64_t i = 0; i < rows; i += kGrain) {
      blas::brgemm(kGrain, std::min(kPanel, n - j), k, a.stride, b.stride, ldc, add, a.data + i * a.stride,
                   b.data + 2 * j, c + i * ldc + j);
    }
  }
  blas::brgemm_release();
}

void pack_transposed(const BFloat16* w, int64_t rows, int64_t d, BFloat16* out, int64_t ldb) {
  // A pair of bf16 travels as one 32-bit element: a plain transpose.
  auto* pairs = reinterpret_cast<float*>(out);
  at::vec::transpose_mxn<float>(reinterpret_cast<const float*>(w), d / 2, pairs, ldb, static_cast<int>(rows),
                                static_cast<int>(d / 2));
  const int64_t rest = whole_grains(rows) - rows;
  for (int64_t j = 0; j < d / 2 && rest; ++j) std::fill_n(pairs + j * ldb + rows, rest, 0.f);
}

void pack_pairs(const BFloat16* w, int64_t rows, int64_t d, BFloat16* out, int64_t ldb) {
  const auto* source = reinterpret_cast<const uint16_t*>(w);
  for (int64_t r = 0; r < whole_grains(rows); r += 2) {
    auto* target = reinterpret_cast<uint32_t*>(out) + r / 2 * ldb;
    const uint16_t *low = source + r * d, *high = low + d;
    if (r + 1 < rows) {
      for (int64_t i = 0; i < d; ++i) target[i] = low[i] | static_cast<uint32_t>(high[i]) << 16;
    } else {
      for (int64_t i = 0; i < d; ++i) target[i] = r < rows ? low[i] : 0;
    }
  }
}

void round_to_bf16(const float* z, int64_t stride, int64_t rows, int64_t n, BFloat16* plain, BFloat16* pairs,
                   int64_t ld) {
  const int64_t width = whole_grains(n);
  std::vector<float> zeros(rows % kGrain ? n : 0, 0.f);
  for (int64_t r = 0; r < whole_grains(rows); r += 2) {
    const float* low = r < rows ? z + r * stride : zeros.data();
    const float* high = r + 1 < rows ? z + (r + 1) * stride : zeros.data();
    if (plain) {
      auto* target = reinterpret_cast<uint16_t*>(plain) + r * ld;
      for (int64_t i = 0; i < n; ++i) target[i] = static_cast<uint16_t>(bits(low[i]));
      for (int64_t i = 0; i < n; ++i) target[ld + i] = static_cast<uint16_t>(bits(high[i]));
      std::fill(target + n, target + width, 0);
      std::fill(target + ld + n, target + ld + width, 0);
    }
    if (pairs) {
      auto* target = reinterpret_cast<uint32_t*>(pairs) + r / 2 * ld;
      for (int64_t i = 0; i < n; ++i) target[i] = bits(low[i]) | bits(high[i]) << 16;
      std::fill(target + n, target + width, 0);
    }
  }
}

void transpose_bf16(const BFloat16* h, int64_t rows, int64_t d, BFloat16* out, int64_t ld) {
  for (int64_t j0 = 0; j0 < d; j0 += kGrain) {  // d is whole grains
    for (int64_t r0 = 0; r0 < rows; r0 += kGrain) {
      const int64_t count = std::min(kGrain, rows - r0);
      for (int64_t j = j0; j < j0 + kGrain; ++j) {
        for (int64_t r = 0; r < kGrain; ++r) {
          out[j * ld + r0 + r] = r < count ? h[(r0 + r) * d + j] : BFloat16(0.f);
        }
      }
    }
  }
}

void transpose_to_bf16(const float* c, int64_t ldc, int64_t rows, int64_t d, BFloat16* out) {
  float block[kGrain * kGrain];
  for (int64_t r0 = 0; r0 < rows; r0 += kGrain) {
    const int64_t count = std::min(kGrain, rows - r0);
    for (int64_t j0 = 0; j0 < d; j0 += kGrain) {
      at::vec::transpose_mxn<float>(c + j0 * ldc + r0, ldc, block, kGrain, kGrain, static_cast<int>(count));
      for (int64_t r = 0; r < count; ++r) {
        for_lanes(kGrain, [&](int64_t i, int64_t n) {
          store_lanes(out + (r0 + r) * d + j0 + i, load_lanes(block + r * kGrain + i, n), n);
        });
      }
    }
  }
}

#else  // the route needs AVX-512 BF16; nothing below is ever called

bool multiplies_bf16() { return false; }
void bf16_gemm(Bf16Operand, Bf16Operand, float*, int64_t, int64_t, int64_t, int64_t, bool) {}
void pack_transposed(const BFloat16*, int64_t, int64_t, BFloat16*, int64_t) {}
void pack_pairs(const BFloat16*, int64_t, int64_t, BFloat16*, int64_t) {}
void round_to_bf16(const float*, int64_t, int64_t, int64_t, BFloat16*, BFloat16*, int64_t) {}
void transpose_bf16(const BFloat16*, int64_t, int64_t, BFloat16*, int64_t) {}
void transpose_to_bf16(const float*, int64_t, int64_t, int64_t, BFloat16*) {}

#endif

}  // namespace hpsafety
