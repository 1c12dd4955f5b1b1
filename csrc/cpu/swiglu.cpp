// swiglu: y = silu(gate) * up over rows [gate | up]. The backward recomputes the sigmoid from gate_up and returns
// y too, for a caller that did not keep it. Limit: bytes (the exponential is the cheap vector one: see sigmoid).

#include "common.h"

namespace hpsafety {
namespace {

constexpr int64_t kElementsPerTask = 8192;

// exp_u20 is the cheap exponential. Its error (20 ulp at most) grows with |x|, where the sigmoid is near 0 or 1: silu
// was within 3.6 ulp for |x| <= 80 (torch's own: 1.4). Past its range it gives 0 or at most inf, so never a NaN here.
inline Vec sigmoid(Vec x) { return Vec(1.f) / (Vec(1.f) + x.neg().exp_u20()); }

// Calls f(row, first column, columns) for the pieces of rows in a flat range, on all threads: many short rows and few
// wide ones are split alike.
template <typename F>
void for_pieces(int64_t rows, int64_t width, F&& f) {
  at::parallel_for(0, rows * width, kElementsPerTask, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t row = begin / width, column = begin % width, n = std::min(width - column, end - begin);
      f(row, column, n);
      begin += n;
    }
  });
}

Tensor swiglu(const Tensor& gate_up_) {
  const auto gate_up = gate_up_.contiguous();
  const int64_t rows = gate_up.size(0), width = gate_up.size(1) / 2;
  auto y = at::empty({rows, width}, gate_up.options());
  dispatch(gate_up, "swiglu", [&](auto tag) {
    using T = decltype(tag);
    const T* in = gate_up.const_data_ptr<T>();
    T* out = y.mutable_data_ptr<T>();
    for_pieces(rows, width, [&](int64_t row, int64_t column, int64_t count) {
      const T *gate = in + row * 2 * width + column, *up = gate + width;
      T* target = out + row * width + column;
      for_lanes(count, [&](int64_t i, int64_t n) {
        const Vec g = load_lanes(gate + i, n);
        store_lanes(target + i, g * sigmoid(g) * load_lanes(up + i, n), n);
      });
    });
  });
  return y;
}

// With s = sigmoid(gate):  d gate = dy * up * s * (1 + gate * (1 - s)),  d up = dy * gate * s.
template <typename T>
void backward_piece(const T* grad, const T* gate, const T* up, T* grad_gate, T* grad_up, T* y, int64_t count) {
  for_lanes(count, [&](int64_t i, int64_t n) {
    const Vec dy = load_lanes(grad + i, n), g = load_lanes(gate + i, n), u = load_lanes(up + i, n);
    const Vec s = sigmoid(g), silu = g * s;
    store_lanes(grad_gate + i, dy * u * (s + silu * (Vec(1.f) - s)), n);
    store_lanes(grad_up + i, dy * silu, n);
    store_lanes(y + i, silu * u, n);
  });
}

std::tuple<Tensor, Tensor> swiglu_backward(const Tensor& grad_, const Tensor& gate_up_) {
  const auto grad = grad_.contiguous(), gate_up = gate_up_.contiguous();
  const int64_t rows = gate_up.size(0), width = gate_up.size(1) / 2;
  auto out = at::empty_like(gate_up), y = at::empty_like(grad);
  dispatch(gate_up, "swiglu_backward", [&](auto tag) {
    using T = decltype(tag);
    const T *dy = grad.const_data_ptr<T>(), *in = gate_up.const_data_ptr<T>();
    T *d = out.mutable_data_ptr<T>(), *again = y.mutable_data_ptr<T>();
    for_pieces(rows, width, [&](int64_t row, int64_t column, int64_t count) {
      const int64_t wide = row * 2 * width + column, narrow = row * width + column;
      backward_piece<T>(dy + narrow, in + wide, in + wide + width, d + wide, d + wide + width,
                        again + narrow, count);
    });
  });
  return {out, y};
}

}  // namespace

TORCH_LIBRARY_IMPL(hpsafety_cpu, CPU, m) {
  m.impl("swiglu", &swiglu);
  m.impl("swiglu_backward", &swiglu_backward);
}

}  // namespace hpsafety
