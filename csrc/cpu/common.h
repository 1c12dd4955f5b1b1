// What every CPU kernel shares: fp32 vectors loaded from and stored to fp32 or bf16 rows, and tails.
// All arithmetic is fp32 whatever the storage type.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

namespace hpsafety {

using Vec = at::vec::Vectorized<float>;
using at::BFloat16;
using at::Tensor;
constexpr int64_t kLanes = Vec::size();

inline Vec load(const float* p) { return Vec::loadu(p); }
inline Vec load(const float* p, int64_t n) { return Vec::loadu(p, n); }  // lanes past n are zero
inline Vec load(const BFloat16* p) {
  Vec out;
  at::vec::load_fp32_from_bf16(p, out);
  return out;
}
inline Vec load(const BFloat16* p, int64_t n) {
  BFloat16 tail[kLanes] = {};
  for (int64_t i = 0; i < n; ++i) tail[i] = p[i];
  return load(tail);
}

inline void store(float* p, Vec v) { v.store(p); }
inline void store(float* p, Vec v, int64_t n) { v.store(p, static_cast<int>(n)); }
inline void store(BFloat16* p, Vec v, int64_t n = kLanes) {  // rounds to nearest even
  at::vec::convert<BFloat16>(v).store(p, static_cast<int>(n));
}

// Lane sums in a fixed order: the same input gives the same bits wherever it stands.
inline float sum(Vec v) {
  float lanes[kLanes];
  v.store(lanes);
  float total = 0;
  for (int64_t i = 0; i < kLanes; ++i) total += lanes[i];
  return total;
}

// Calls f(offset, lanes) over n elements: full vectors first, then one tail with lanes < kLanes.
template <typename F>
inline void for_lanes(int64_t n, F&& f) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) f(i, kLanes);
  if (i < n) f(i, n - i);
}
template <typename T>
inline Vec load_lanes(const T* p, int64_t lanes) { return lanes == kLanes ? load(p) : load(p, lanes); }
template <typename T>
inline void store_lanes(T* p, Vec v, int64_t lanes) { lanes == kLanes ? store(p, v) : store(p, v, lanes); }

// Runs f with a value of the element type of t: fp32 or bf16.
template <typename F>
inline void dispatch(const Tensor& t, const char* op, F&& f) {
  if (t.scalar_type() == at::kFloat) {
    f(float{});
  } else {
    TORCH_CHECK(t.scalar_type() == at::kBFloat16, op, ": expected float32 or bfloat16, got ", t.scalar_type(),
                "; call .float() first");
    f(BFloat16{});
  }
}

}  // namespace hpsafety
