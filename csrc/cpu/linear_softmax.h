// What the linear family shares beside its GEMMs: the softmax statistics of a tile of logits, their merge, and the
// gradient of a tile.
#pragma once

#include <cmath>
#include <limits>

#include "linear_gemm.h"

namespace hpsafety {

// Indexing relies on it, so that it is checked here too: a compiled graph does not run the checks in Python.
inline Tensor checked_targets(const Tensor& targets, int64_t vocabulary) {
  auto t = targets.to(at::kLong).contiguous();
  const int64_t* p = t.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < t.numel(); ++i) {
    TORCH_CHECK_VALUE(p[i] >= 0 && p[i] < vocabulary, "targets must lie in [0, ", vocabulary, "), got ", p[i]);
  }
  return t;
}

inline Vec keep_lanes(Vec v, int64_t lanes, float filler) {
  return lanes == kLanes ? v : Vec::set(Vec(filler), v, lanes);
}

// Of one row of one tile: m = max z, s = sum exp(z - m), u = sum exp(z - m) (z - m). The row stays in L1 between
// the passes. m keeps NaN; exp_u20 would swallow it, so nothing is summed when m is not finite.
struct Stats {
  float m, s, u;
};

constexpr Stats kNoWords{-std::numeric_limits<float>::infinity(), 0, 0};

inline float row_max(const float* z, int64_t words) {
  constexpr float kInf = std::numeric_limits<float>::infinity();
  Vec top(-kInf);
  for_lanes(words, [&](int64_t i, int64_t n) {
    top = at::vec::maximum(top, keep_lanes(load_lanes(z + i, n), n, -kInf));
  });
  float lanes[kLanes], m = -kInf;
  top.store(lanes);
  for (float lane : lanes) m = (lane > m || std::isnan(lane)) ? lane : m;
  for (float lane : lanes) m = std::isnan(lane) ? lane : m;
  return m;
}

// kExact: exp to the last digit instead of 20 bits, where small differences of two distributions are the result.
template <bool kEntropy, bool kExact = false>
inline Stats tile_stats(const float* z, int64_t words) {
  const float m = row_max(z, words);
  if (!std::isfinite(m)) return {m, 0, 0};
  Vec s(0.f), u(0.f);
  for_lanes(words, [&](int64_t i, int64_t n) {
    const Vec shifted = load_lanes(z + i, n) - Vec(m);
    const Vec e = keep_lanes(kExact ? shifted.exp() : shifted.exp_u20(), n, 0.f);
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
