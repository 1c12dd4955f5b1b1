// rope_: rotates the pairs (i, i + K/2) of q and k heads by the angle of the token's position; copies v if given.
// Limit: bytes. Sources and destinations are strided, so that the split of a fused qkv projection, its backward and
// the plain and in-place forms are one kernel. The backward is the same with -sin (`inverse`).

#include "common.h"

#include <cstring>

namespace hpsafety {
namespace {

constexpr int64_t kElementsPerTask = 16384;

// Heads (T, A, B, K) with last stride 1; (T, H, K) counts as (T, H, 1, K).
template <typename T>
struct Heads {
  T* data;
  int64_t groups, per_group, token_stride, group_stride, head_stride;

  explicit Heads(const Tensor& t)
      : data(static_cast<T*>(t.data_ptr())),
        groups(t.size(1)),
        per_group(t.dim() == 4 ? t.size(2) : 1),
        token_stride(t.stride(0)),
        group_stride(t.stride(1)),
        head_stride(t.dim() == 4 ? t.stride(2) : 0) {}

  T* at(int64_t token, int64_t group, int64_t head) const {
    return data + token * token_stride + group * group_stride + head * head_stride;
  }
};

// Calls f(source row, destination row) for every head of a token.
template <typename T, typename F>
void for_heads(const Heads<T>& in, const Heads<T>& out, int64_t token, F&& f) {
  for (int64_t g = 0; g < in.groups; ++g)
    for (int64_t h = 0; h < in.per_group; ++h) f(in.at(token, g, h), out.at(token, g, h));
}

template <typename T>
void rotate(const T* x, T* y, const float* cos, const float* sin, bool inverse, int64_t half) {
  for_lanes(half, [&](int64_t i, int64_t n) {
    const Vec low = load_lanes(x + i, n), high = load_lanes(x + half + i, n), c = load_lanes(cos + i, n);
    Vec s = load_lanes(sin + i, n);
    if (inverse) s = s.neg();
    store_lanes(y + i, low * c - high * s, n);  // both halves are read before either is written: x may be y
    store_lanes(y + half + i, high * c + low * s, n);
  });
}

void check_positions(const Tensor& positions, int64_t max_pos) {
  const int32_t* p = positions.const_data_ptr<int32_t>();
  int32_t low = 0, high = -1;
  for (int64_t t = 0; t < positions.numel(); ++t) {
    low = std::min(low, p[t]);
    high = std::max(high, p[t]);
  }
  TORCH_CHECK_VALUE(low >= 0 && high < max_pos, "rope: positions must lie in [0, ", max_pos, "), got ",
                    low < 0 ? low : high);
}

Tensor readable(const Tensor& t) { return t.stride(-1) == 1 ? t : t.contiguous(); }

void check_out(const Tensor& in, const Tensor& out) {
  TORCH_CHECK_VALUE(out.stride(-1) == 1 && out.numel() == in.numel() && out.scalar_type() == in.scalar_type() &&
                        out.size(0) == in.size(0) && out.size(1) == in.size(1),
                    "rope_: the destination must be like the source, with last stride 1");
}

void rope_(const Tensor& q_, const Tensor& k_, const std::optional<Tensor>& v_, const Tensor& positions_,
           const Tensor& cos_, const Tensor& sin_, bool inverse, const Tensor& q_out, const Tensor& k_out,
           const std::optional<Tensor>& v_out) {
  const auto q = readable(q_), k = readable(k_), v = v_ ? readable(*v_) : Tensor();
  const auto positions = positions_.contiguous(), cos = cos_.contiguous(), sin = sin_.contiguous();
  const int64_t tokens = q.size(0), size = q.size(-1), half = size / 2;
  check_positions(positions, cos.size(0));
  check_out(q, q_out);
  check_out(k, k_out);
  if (v.defined()) check_out(v, *v_out);
  const int64_t elements = tokens ? (q.numel() + k.numel() + (v.defined() ? v.numel() : 0)) / tokens : 0;
  if (elements == 0) return;
  const int32_t* p = positions.const_data_ptr<int32_t>();
  const float *c = cos.const_data_ptr<float>(), *s = sin.const_data_ptr<float>();
  dispatch(q, "rope_", [&](auto tag) {
    using T = decltype(tag);
    const Heads<T> qi(q), qo(q_out), ki(k), ko(k_out), vi(v.defined() ? v : k), vo(v.defined() ? *v_out : k_out);
    at::parallel_for(0, tokens, std::max<int64_t>(1, kElementsPerTask / elements), [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        const int64_t row = static_cast<int64_t>(p[t]) * half;
        const auto turn = [&](const T* x, T* y) { rotate(x, y, c + row, s + row, inverse, half); };
        for_heads(qi, qo, t, turn);
        for_heads(ki, ko, t, turn);
        if (v.defined()) for_heads(vi, vo, t, [&](const T* x, T* y) { std::memcpy(y, x, size * sizeof(T)); });
      }
    });
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(hpsafety_cpu, CPU, m) { m.impl("rope_", &rope_); }

}  // namespace hpsafety
