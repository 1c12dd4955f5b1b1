// reward_score: both reward heads on each response's last row, the route between them, whitening, best of each group.
// Limit: bytes, the R last rows (nobody reads the others). A row is one thread's and its lanes are added in one order:
// a response's score has the same bits alone and in any batch.

#include <algorithm>
#include <cmath>

#include "common.h"

namespace hpsafety {
namespace {

constexpr int64_t kUnroll = 4;                  // independent sums: hides the multiply-add's latency
constexpr int64_t kElementsPerThread = 1 << 17;  // half a megabyte of fp32 rows

struct Sums {
  Vec dot[kUnroll], squares[kUnroll];
  Sums() { std::fill_n(dot, kUnroll, Vec(0.f)), std::fill_n(squares, kUnroll, Vec(0.f)); }
};

// x . (norm * head), and the sum of x^2 where there is a norm; the lanes are added in double.
template <bool kNorm, typename T>
float row_score(const T* x, const T* head, const T* norm, int64_t d, double eps) {
  Sums sums;
  const auto step = [&](int64_t u, int64_t i, int64_t lanes) {
    const Vec v = load_lanes(x + i, lanes);
    Vec weight = load_lanes(head + i, lanes);
    if constexpr (kNorm) {
      weight = weight * load_lanes(norm + i, lanes);
      sums.squares[u] = at::vec::fmadd(v, v, sums.squares[u]);
    }
    sums.dot[u] = at::vec::fmadd(v, weight, sums.dot[u]);
  };
  int64_t i = 0;
  for (; i + kUnroll * kLanes <= d; i += kUnroll * kLanes) {
    for (int64_t u = 0; u < kUnroll; ++u) step(u, i + u * kLanes, kLanes);
  }
  for (; i < d; i += kLanes) step(0, i, std::min(kLanes, d - i));
  const auto total = [](const Vec* parts) {
    double all = 0;
    for (int64_t u = 0; u < kUnroll; ++u) {
      float lanes[kLanes];
      parts[u].store(lanes);
      for (float lane : lanes) all += lane;
    }
    return all;
  };
  const double dot = total(sums.dot);
  return static_cast<float>(kNorm ? dot / std::sqrt(total(sums.squares) / static_cast<double>(d) + eps) : dot);
}

// Scores of all rows by one model.
Tensor scores(const Tensor& hidden_, const Tensor& rows, const Tensor& head_, const std::optional<Tensor>& norm_,
              double eps, const char* name) {
  const int64_t r = rows.numel(), d = head_.numel();
  TORCH_CHECK_VALUE(hidden_.dim() == 2 && hidden_.size(1) == d && head_.scalar_type() == hidden_.scalar_type() &&
                        (!norm_ || (norm_->numel() == d && norm_->scalar_type() == hidden_.scalar_type())),
                    name, ": hidden, head and norm must agree in width and dtype");
  const auto hidden = hidden_.stride(1) == 1 ? hidden_ : hidden_.contiguous();  // rows may lie apart: few are read
  const auto head = head_.contiguous(), norm = norm_ ? norm_->contiguous() : Tensor();
  const int64_t *row = rows.const_data_ptr<int64_t>(), stride = hidden.stride(0);
  for (int64_t i = 0; i < r; ++i) {
    TORCH_CHECK_VALUE(row[i] >= 0 && row[i] < hidden.size(0), "last_rows must lie in [0, ", hidden.size(0), "), got ",
                      row[i]);
  }
  auto out = at::empty({r}, hidden.options().dtype(at::kFloat));
  float* score = out.mutable_data_ptr<float>();
  dispatch(hidden, "reward_score", [&](auto tag) {
    using T = decltype(tag);
    const T *x = hidden.const_data_ptr<T>(), *w = head.const_data_ptr<T>();
    const T* g = norm.defined() ? norm.const_data_ptr<T>() : nullptr;
    const int64_t grain = std::max<int64_t>(1, kElementsPerThread / std::max<int64_t>(d, 1));
    at::parallel_for(0, r, grain, [&](int64_t b, int64_t e) {
      for (int64_t i = b; i < e; ++i) {
        const T* at_row = x + row[i] * stride;
        score[i] = g ? row_score<true>(at_row, w, g, d, eps) : row_score<false, T>(at_row, w, nullptr, d, eps);
      }
    });
  });
  return out;
}

// (z - mean) / (std + 1e-8) in double, in row order; zeros where all are equal, NaN where one is NaN.
void whiten(const float* z, float* out, int64_t n) {
  if (n == 0) return;
  float low = z[0], high = z[0];
  double total = 0, squares = 0;
  for (int64_t i = 0; i < n; ++i) {
    low = std::min(low, z[i]);
    high = std::max(high, z[i]);
    total += z[i];
  }
  if (low == high && !std::isnan(total)) {
    std::fill_n(out, n, 0.f);
    return;
  }
  const double mean = total / static_cast<double>(n);
  for (int64_t i = 0; i < n; ++i) squares += (z[i] - mean) * (z[i] - mean);
  const double scale = std::sqrt(squares / static_cast<double>(n)) + 1e-8;
  for (int64_t i = 0; i < n; ++i) out[i] = static_cast<float>((z[i] - mean) / scale);
}

// Index of the highest of z[begin, end), the lowest of equals; NaN only where there is nothing else.
int64_t best(const float* z, int64_t begin, int64_t end) {
  int64_t found = begin;
  for (int64_t i = begin + 1; i < end; ++i) {
    if (z[i] > z[found] || (std::isnan(z[found]) && !std::isnan(z[i]))) found = i;
  }
  return found;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> reward_score(
    const Tensor& hidden_safety, const Tensor& hidden_helpful, const Tensor& last_rows, const Tensor& head_safety,
    const Tensor& head_helpful, const Tensor& is_safety, const Tensor& cu_groups,
    const std::optional<Tensor>& norm_safety, const std::optional<Tensor>& norm_helpful, double eps,
    double threshold) {
  const int64_t r = last_rows.numel(), groups = cu_groups.numel() - 1;
  const auto rows = last_rows.to(at::kLong).contiguous(), offsets = cu_groups.to(at::kLong).contiguous();
  const auto tags = is_safety.contiguous();
  TORCH_CHECK_VALUE(tags.numel() == r && tags.scalar_type() == at::kBool, "is_safety must be (", r, ",) bool");
  const int64_t* cu = offsets.const_data_ptr<int64_t>();
  TORCH_CHECK_VALUE(groups >= 0 && cu[0] == 0 && cu[groups] == r &&
                        std::adjacent_find(cu, cu + groups + 1, std::greater_equal<>()) == cu + groups + 1,
                    "cu_groups must rise from 0 to ", r);
  auto safety = scores(hidden_safety, rows, head_safety, norm_safety, eps, "safety");
  auto helpful = scores(hidden_helpful, rows, head_helpful, norm_helpful, eps, "helpful");
  auto combined = at::empty_like(safety), whitened = at::empty_like(safety);
  auto best_of_group = at::empty({groups}, rows.options());
  const float *s = safety.const_data_ptr<float>(), *h = helpful.const_data_ptr<float>();
  const bool* tagged = tags.const_data_ptr<bool>();
  float* z = combined.mutable_data_ptr<float>();
  for (int64_t i = 0; i < r; ++i) {
    // From double to fp32, and against fp32: the logit of 0.15 is then exactly 0.15. NaN does not pass and stays.
    const auto probability = static_cast<float>(1 / (1 + std::exp(-static_cast<double>(s[i]))));
    z[i] = tagged[i] || !(probability >= static_cast<float>(threshold)) ? s[i] : h[i];
  }
  whiten(z, whitened.mutable_data_ptr<float>(), r);
  for (int64_t g = 0; g < groups; ++g) best_of_group.mutable_data_ptr<int64_t>()[g] = best(z, cu[g], cu[g + 1]);
  return {safety, helpful, combined, whitened, best_of_group};
}

}  // namespace

TORCH_LIBRARY_IMPL(hpsafety_cpu, CPU, m) { m.impl("reward_score", &reward_score); }

}  // namespace hpsafety
