// rms_norm: y = x / sqrt(mean(x^2) + eps) * weight, with an optional residual added first (x + residual is returned).
// Limit: bytes. One row stays in cache between its two passes; backward needs x (or the sum) and rstd only.

#include "common.h"

namespace hpsafety {
namespace {

constexpr int64_t kRowsPerPartial = 64;  // grad_weight is summed per 64 rows, then over blocks in order:
                                         // the same bits for any number of threads

template <typename T>
void forward_rows(const T* x, const T* residual, const T* weight, double eps, T* y, T* sum_out, float* rstd,
                  int64_t begin, int64_t end, int64_t d) {
  for (int64_t row = begin; row < end; ++row) {
    const T* source = x + row * d;
    Vec squares(0.f);
    if (residual) {
      T* target = sum_out + row * d;
      for_lanes(d, [&](int64_t i, int64_t n) {
        store_lanes(target + i, load_lanes(source + i, n) + load_lanes(residual + row * d + i, n), n);
        Vec v = load_lanes(target + i, n);  // re-read: bf16 rounds, and backward will see the rounded sum
        squares = at::vec::fmadd(v, v, squares);
      });
      source = target;
    } else {
      for_lanes(d, [&](int64_t i, int64_t n) {
        Vec v = load_lanes(source + i, n);
        squares = at::vec::fmadd(v, v, squares);
      });
    }
    const float r = static_cast<float>(1.0 / std::sqrt(static_cast<double>(sum(squares)) / d + eps));
    rstd[row] = r;
    for_lanes(d, [&](int64_t i, int64_t n) {
      store_lanes(y + row * d + i, load_lanes(source + i, n) * Vec(r) * load_lanes(weight + i, n), n);
    });
  }
}

std::tuple<Tensor, Tensor, Tensor> rms_norm(const Tensor& x_, const Tensor& weight_, double eps,
                                            const std::optional<Tensor>& residual_) {
  const auto x = x_.contiguous(), weight = weight_.contiguous();
  const int64_t rows = x.size(0), d = x.size(1);
  const auto residual = residual_ ? residual_->contiguous() : Tensor();
  auto y = at::empty_like(x), rstd = at::empty({rows}, x.options().dtype(at::kFloat));
  auto sum_out = residual.defined() ? at::empty_like(x) : at::empty({0}, x.options());
  dispatch(x, "rms_norm", [&](auto tag) {
    using T = decltype(tag);
    const T* r = residual.defined() ? residual.const_data_ptr<T>() : nullptr;
    T* s = r ? sum_out.mutable_data_ptr<T>() : nullptr;
    at::parallel_for(0, rows, 16, [&](int64_t begin, int64_t end) {
      forward_rows<T>(x.const_data_ptr<T>(), r, weight.const_data_ptr<T>(), eps, y.mutable_data_ptr<T>(), s,
                      rstd.mutable_data_ptr<float>(), begin, end, d);
    });
  });
  return {y, sum_out, rstd};
}

// With xhat = x * rstd and c = mean(dy * w * xhat):  dx = rstd * (dy * w - c * xhat) + d(sum),  dw = sum dy * xhat.
template <typename T>
void backward_rows(const T* dy, const T* dsum, const T* x, const T* weight, const float* rstd, T* dx, float* dw,
                   int64_t begin, int64_t end, int64_t d) {
  std::fill(dw, dw + d, 0.f);
  for (int64_t row = begin; row < end; ++row) {
    const T *g = dy + row * d, *v = x + row * d;
    const Vec r(rstd[row]);
    Vec dot(0.f);
    for_lanes(d, [&](int64_t i, int64_t n) {
      Vec xhat = load_lanes(v + i, n) * r, gi = load_lanes(g + i, n);
      dot = at::vec::fmadd(gi * load_lanes(weight + i, n), xhat, dot);
      store_lanes(dw + i, at::vec::fmadd(gi, xhat, load_lanes(dw + i, n)), n);
    });
    const Vec c(sum(dot) / static_cast<float>(d));
    for_lanes(d, [&](int64_t i, int64_t n) {
      Vec xhat = load_lanes(v + i, n) * r;
      Vec out = (load_lanes(g + i, n) * load_lanes(weight + i, n) - c * xhat) * r;
      if (dsum) out = out + load_lanes(dsum + row * d + i, n);
      store_lanes(dx + row * d + i, out, n);
    });
  }
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& grad_y, const std::optional<Tensor>& grad_sum,
                                             const Tensor& x_, const Tensor& weight_, const Tensor& rstd) {
  const auto dy = grad_y.contiguous(), x = x_.contiguous(), weight = weight_.contiguous();
  const auto dsum = grad_sum ? grad_sum->contiguous() : Tensor();
  const int64_t rows = x.size(0), d = x.size(1), blocks = (rows + kRowsPerPartial - 1) / kRowsPerPartial;
  auto dx = at::empty_like(x), dw = at::empty_like(weight);
  auto partial = at::empty({blocks, d}, x.options().dtype(at::kFloat));
  float* p = partial.mutable_data_ptr<float>();
  dispatch(x, "rms_norm_backward", [&](auto tag) {
    using T = decltype(tag);
    at::parallel_for(0, blocks, 1, [&](int64_t first, int64_t last) {
      for (int64_t b = first; b < last; ++b) {
        backward_rows<T>(dy.const_data_ptr<T>(), dsum.defined() ? dsum.const_data_ptr<T>() : nullptr,
                         x.const_data_ptr<T>(), weight.const_data_ptr<T>(), rstd.const_data_ptr<float>(),
                         dx.mutable_data_ptr<T>(), p + b * d, b * kRowsPerPartial,
                         std::min(rows, (b + 1) * kRowsPerPartial), d);
      }
    });
    T* out = dw.mutable_data_ptr<T>();
    for_lanes(d, [&](int64_t i, int64_t n) {
      Vec total(0.f);
      for (int64_t b = 0; b < blocks; ++b) total = total + load_lanes(p + b * d + i, n);
      store_lanes(out + i, total, n);
    });
  });
  return {dx, dw};
}

}  // namespace

TORCH_LIBRARY_IMPL(hpsafety_cpu, CPU, m) {
  m.impl("rms_norm", &rms_norm);
  m.impl("rms_norm_backward", &rms_norm_backward);
}

}  // namespace hpsafety
