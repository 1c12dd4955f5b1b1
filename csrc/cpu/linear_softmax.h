// What linear_logprob and linear_cross_entropy share: serial GEMM blocks inside at::parallel_for, the softmax
// statistics of a tile of logits, their merge, and the gradient of a tile.
//
// The work is cut into blocks that depend on the shapes alone, one thread computes a whole block with MKL running
// serially, and partial results are merged in block order: the number of threads cannot change a bit.
// z = alpha * hidden @ weight^T with alpha = 1 / temperature.
#pragma once

#include <cmath>
#include <limits>

#include <ATen/ops/addmm_cpu_dispatch.h>
#include <ATen/ops/from_blob.h>

#include "common.h"

namespace hpsafety {

constexpr int64_t kRows = 256;    // rows of a block; 64 rows cost a quarter of the GEMM rate, 512 gain nothing
constexpr int64_t kWords = 2048;  // vocabulary of a tile: 2 MB of logits per block, they do not leave the cache
constexpr int64_t kMinRows = 16;  // MKL's bits for a row differ for M below 8 and agree from 16 up

// n cut into `count` nearly equal pieces of at most `size`; count is a multiple of `multiple`.
struct Blocks {
  int64_t n, count;
  Blocks(int64_t n, int64_t size, int64_t multiple = 1)
      : n(n), count((n + size * multiple - 1) / (size * multiple) * multiple) {}
  int64_t begin(int64_t i) const { return n * i / count; }
  int64_t end(int64_t i) const { return n * (i + 1) / count; }
  int64_t largest() const { return count ? (n + count - 1) / count : 0; }
};

// Row stride of a buffer of logits: whole cache lines, and off the powers of two, which alias in the cache.
inline int64_t padded(int64_t columns) { return (columns + 15) / 16 * 16 + 16; }

struct Matrix {
  const float* data;
  int64_t rows, cols, stride;
  bool transposed = false;
  Matrix t() const { return {data, rows, cols, stride, !transposed}; }
  Tensor tensor() const {
    auto whole = const_cast<float*>(data);
    if (transposed) return at::from_blob(whole, {cols, rows}, {1, stride});
    return at::from_blob(whole, {rows, cols}, {stride, 1});
  }
};

// c = beta * c + alpha * a @ b; with beta 0 what c held is never read.
inline void gemm(const Matrix& a, const Matrix& b, const Matrix& c, double alpha, double beta) {
  auto out = c.tensor();
  at::cpu::addmm_out(out, out, a.tensor(), b.tensor(), beta, alpha);
}

// Rows [begin, end) of a (n, d) tensor in fp32: in place when they are, otherwise converted into scratch.
inline const float* rows_as_float(const Tensor& t, int64_t begin, int64_t end, float* scratch) {
  const int64_t d = t.size(1);
  if (t.scalar_type() == at::kFloat) return t.const_data_ptr<float>() + begin * d;
  const auto* source = t.const_data_ptr<BFloat16>() + begin * d;
  for_lanes((end - begin) * d, [&](int64_t i, int64_t n) { store_lanes(scratch + i, load_lanes(source + i, n), n); });
  return scratch;
}

// Indexing relies on it, so that it is checked here too: a compiled graph does not run the checks in Python.
inline Tensor checked_targets(const Tensor& targets, int64_t vocabulary) {
  auto t = targets.to(at::kLong).contiguous();
  const int64_t* p = t.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < t.numel(); ++i) {
    TORCH_CHECK_VALUE(p[i] >= 0 && p[i] < vocabulary, "targets must lie in [0, ", vocabulary, "), got ", p[i]);
  }
  return t;
}

// `count` fp32 elements into bf16 storage, from element `begin` on.
inline void store_as_bf16(const Tensor& t, int64_t begin, int64_t count, const float* source) {
  auto* target = t.mutable_data_ptr<BFloat16>() + begin;
  for_lanes(count, [&](int64_t i, int64_t n) { store_lanes(target + i, load_lanes(source + i, n), n); });
}

inline Vec keep_lanes(Vec v, int64_t lanes, float filler) {
  return lanes == kLanes ? v : Vec::set(Vec(filler), v, lanes);
}

// Of one row of one tile: m = max z, s = sum exp(z - m), u = sum exp(z - m) (z - m). The row stays in L1 between
// the passes. m keeps NaN; exp_u20 would swallow it, so nothing is summed when m is not finite.
struct Stats {
  float m, s, u;
};

template <bool kEntropy>
inline Stats tile_stats(const float* z, int64_t words) {
  constexpr float kInf = std::numeric_limits<float>::infinity();
  Vec top(-kInf);
  for_lanes(words, [&](int64_t i, int64_t n) {
    top = at::vec::maximum(top, keep_lanes(load_lanes(z + i, n), n, -kInf));
  });
  float lanes[kLanes], m = -kInf;
  top.store(lanes);
  for (float lane : lanes) m = (lane > m || std::isnan(lane)) ? lane : m;
  for (float lane : lanes) m = std::isnan(lane) ? lane : m;
  if (!std::isfinite(m)) return {m, 0, 0};
  Vec s(0.f), u(0.f);
  for_lanes(words, [&](int64_t i, int64_t n) {
    const Vec shifted = load_lanes(z + i, n) - Vec(m);
    const Vec e = keep_lanes(shifted.exp_u20(), n, 0.f);
    s = s + e;
    if constexpr (kEntropy) u = at::vec::fmadd(e, shifted, u);
  });
  return {m, sum(s), kEntropy ? sum(u) : 0.f};
}

// Statistics of the whole row from those of its tiles (stride apart), in tile order. A row whose maximum is not
// finite has no softmax: NaN, as in torch.
inline Stats merge_stats(const Stats* tiles, int64_t count, int64_t stride) {
  float m = -std::numeric_limits<float>::infinity();
  for (int64_t t = 0; t < count; ++t) {
    const float v = tiles[t * stride].m;
    m = (v > m || std::isnan(v)) ? v : m;
    if (std::isnan(m)) break;
  }
  if (!std::isfinite(m)) return {m, std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::quiet_NaN()};
  Stats all{m, 0, 0};
  for (int64_t t = 0; t < count; ++t) {
    const Stats& tile = tiles[t * stride];
    const float shift = tile.m - m, scale = std::exp(shift);
    if (scale == 0) continue;  // also a tile of -inf only
    all.s += scale * tile.s;
    all.u += scale * (tile.u + shift * tile.s);
  }
  return all;
}

inline float logprob(const Stats& row, float target_logit) {
  return std::min((target_logit - row.m) - std::log(row.s), 0.f);  // NaN stays
}
inline float entropy(const Stats& row) { return std::log(row.s) - row.u / row.s; }

// What one row contributes: dz = p * (a + b * (log p + H)), and -a more at the target, with a = -dL/dlogprob and
// b = -dL/dentropy, both divided by the temperature. log p = (z - m) - log s: as one number, m + log s would lose the
// digits of log s under large logits. All of it NaN when log s is.
struct RowGrad {
  float a, b, m, log_s, entropy;
  int64_t target;
};

template <bool kEntropy>
inline void tile_gradient(float* z, int64_t first_word, int64_t words, const RowGrad& row) {
  const float a = std::isfinite(row.log_s) ? row.a : std::numeric_limits<float>::quiet_NaN();
  for_lanes(words, [&](int64_t i, int64_t n) {
    const Vec logp = (load_lanes(z + i, n) - Vec(row.m)) - Vec(row.log_s);
    Vec factor(a);
    if constexpr (kEntropy) factor = at::vec::fmadd(Vec(row.b), logp + Vec(row.entropy), factor);
    store_lanes(z + i, logp.exp_u20() * factor, n);
  });
  const int64_t at_target = row.target - first_word;
  if (at_target >= 0 && at_target < words) z[at_target] -= a;
}

// The forward of both ops: logprobs (N,), norm (2, N) with m and log s of each row, entropy (N,) or empty; fp32.
std::tuple<Tensor, Tensor, Tensor> linear_logprob(const Tensor& hidden, const Tensor& weight, const Tensor& targets,
                                                  double temperature, bool entropy);

}  // namespace hpsafety
