// adamw_: clip, AdamW update and rounded copies in one pass over lists of tensors. grad_norm_sq: their sum of squares.
// Limit: bytes (fp32: 28 per parameter). All tensors are cut into chunks and the chunks form one task list, so that
// many small tensors are not one parallel region each.

#include "common.h"

#include <ATen/ops/scalar_tensor.h>

#include <cmath>

namespace hpsafety {
namespace {

constexpr int64_t kChunk = 16384;  // elements of a task, and of a partial sum of grad_norm_sq

struct Chunk {
  int64_t tensor, begin, end;
};

std::vector<Chunk> chunks_of(at::TensorList tensors) {
  std::vector<Chunk> chunks;
  for (int64_t i = 0; i < static_cast<int64_t>(tensors.size()); ++i) {
    const int64_t n = tensors[i].numel();
    for (int64_t begin = 0; begin < n; begin += kChunk) chunks.push_back({i, begin, std::min(n, begin + kChunk)});
  }
  return chunks;
}

struct Update {
  float clip, decay, beta1, one_minus_beta1, beta2, one_minus_beta2, step_size, inverse_root, eps;
};

template <typename G>
void update(float* p, const G* g, float* m, float* v, BFloat16* copy, int64_t count, const Update& u) {
  const Vec clip(u.clip), decay(u.decay), b1(u.beta1), c1(u.one_minus_beta1), b2(u.beta2), c2(u.one_minus_beta2),
      step_size(u.step_size), inverse_root(u.inverse_root), eps(u.eps);
  for_lanes(count, [&](int64_t i, int64_t n) {
    const Vec gi = load_lanes(g + i, n) * clip;
    const Vec mi = load_lanes(m + i, n) * b1 + gi * c1;
    const Vec vi = load_lanes(v + i, n) * b2 + gi * gi * c2;
    const Vec pi = load_lanes(p + i, n) * decay - step_size * mi / (vi.sqrt() * inverse_root + eps);
    store_lanes(m + i, mi, n);
    store_lanes(v + i, vi, n);
    store_lanes(p + i, pi, n);
    if (copy) store_lanes(copy + i, pi, n);
  });
}

void adamw_(at::TensorList params, at::TensorList grads, at::TensorList exp_avg, at::TensorList exp_avg_sq, double lr,
            double beta1, double beta2, double eps, double weight_decay, const Tensor& step, const Tensor& grad_norm,
            double max_norm, at::TensorList copies) {
  const double norm = grad_norm.scalar_type() == at::kDouble ? *grad_norm.const_data_ptr<double>()
                                                             : *grad_norm.const_data_ptr<float>();
  if (!std::isfinite(norm)) return;
  const bool clipping = max_norm > 0 && std::isfinite(max_norm);
  const double t = static_cast<double>(++*step.mutable_data_ptr<int64_t>());
  const Update u{
      .clip = static_cast<float>(clipping ? std::min(1.0, max_norm / (norm + 1e-6)) : 1.0),
      .decay = static_cast<float>(1 - lr * weight_decay),
      .beta1 = static_cast<float>(beta1),
      .one_minus_beta1 = static_cast<float>(1 - beta1),
      .beta2 = static_cast<float>(beta2),
      .one_minus_beta2 = static_cast<float>(1 - beta2),
      .step_size = static_cast<float>(lr / (1 - std::pow(beta1, t))),
      .inverse_root = static_cast<float>(1 / std::sqrt(1 - std::pow(beta2, t))),
      .eps = static_cast<float>(eps),
  };
  const auto chunks = chunks_of(params);
  at::parallel_for(0, static_cast<int64_t>(chunks.size()), 1, [&](int64_t first, int64_t last) {
    for (int64_t c = first; c < last; ++c) {
      const auto [i, begin, end] = chunks[c];
      float *p = params[i].mutable_data_ptr<float>() + begin, *m = exp_avg[i].mutable_data_ptr<float>() + begin,
            *v = exp_avg_sq[i].mutable_data_ptr<float>() + begin;
      BFloat16* copy = copies.empty() ? nullptr : copies[i].mutable_data_ptr<BFloat16>() + begin;
      dispatch(grads[i], "adamw_", [&, i = i, begin = begin, end = end](auto tag) {
        update(p, grads[i].const_data_ptr<decltype(tag)>() + begin, m, v, copy, end - begin, u);
      });
    }
  });
}

template <typename T>
double sum_of_squares(const T* x, int64_t count) {
  constexpr int64_t kSums = 16;  // independent chains, which the compiler keeps in vector registers
  double sums[kSums] = {};
  int64_t i = 0;
  for (; i + kSums <= count; i += kSums)
    for (int64_t j = 0; j < kSums; ++j) {
      const double value = static_cast<float>(x[i + j]);
      sums[j] += value * value;
    }
  for (int64_t j = 0; i + j < count; ++j) {
    const double value = static_cast<float>(x[i + j]);
    sums[j] += value * value;
  }
  double total = 0;
  for (const double s : sums) total += s;
  return total;
}

Tensor grad_norm_sq(at::TensorList grads_) {
  std::vector<Tensor> grads;
  for (const auto& grad : grads_) grads.push_back(grad.contiguous());
  const auto chunks = chunks_of(grads);
  std::vector<double> partial(chunks.size());  // added up in order, whoever made them
  at::parallel_for(0, static_cast<int64_t>(chunks.size()), 1, [&](int64_t first, int64_t last) {
    for (int64_t c = first; c < last; ++c) {
      const auto [i, begin, end] = chunks[c];
      dispatch(grads[i], "grad_norm_sq", [&, i = i, begin = begin, end = end](auto tag) {
        partial[c] = sum_of_squares(grads[i].const_data_ptr<decltype(tag)>() + begin, end - begin);
      });
    }
  });
  double total = 0;
  for (const double p : partial) total += p;
  return at::scalar_tensor(total, at::TensorOptions().dtype(at::kDouble));
}

}  // namespace

TORCH_LIBRARY_IMPL(hpsafety_cpu, CPU, m) {
  m.impl("adamw_", &adamw_);
  m.impl("grad_norm_sq", &grad_norm_sq);
}

}  // namespace hpsafety
