// The student's gradients of distill_loss, from the logits of both models computed again tile by tile. With x = log p -
// log q and g the row's incoming gradient over the temperature, dz is
//   forward KL   g (q - p)
//   reverse KL   g q (-x - KL(q||p))
//   JSD          g q (log(q / m) - KL(q||m)) / 2
// each to the last digits where p and q all but agree.

#include "distill.h"
#include "linear_backward.h"

namespace hpsafety {
namespace {

// centre = log s_p - log s_q - divergence as the sum of two floats: where q is all but certain, x + KL(q||p) is what
// remains of two numbers that may be thousands.
struct PairGrad {
  LogRatio ratio;
  Vec g, divergence, centre, centre_rest;
  PairGrad(const RowNorm& row, float g) : ratio(row), g(g), divergence(static_cast<float>(row.divergence)) {
    const double whole = (row.log_p - row.log_q) - row.divergence;
    const float upper = static_cast<float>(whole);
    centre = Vec(upper);
    centre_rest = Vec(static_cast<float>(whole - upper));
  }
};

template <Kind kKind>
Vec dlogits(Vec z_q, Vec z_p, const PairGrad& row) {
  const Vec logq = row.ratio.logq(z_q);
  if constexpr (kKind == Kind::kReverse) {
    const Vec q = logq.exp(), minus = (row.ratio.difference(z_p, z_q) - row.centre) - row.centre_rest;
    return row.g * where_positive(q, q * minus.neg());
  }
  const Vec x = row.ratio.x(z_p, z_q);
  if constexpr (kKind == Kind::kForward) {
    // The larger of p and q times 1 - exp(-|x|), as one expm1.
    const Vec larger = at::vec::maximum(row.ratio.logp(z_p), logq).exp();
    const Vec p_larger = larger * x.abs().neg().expm1();
    return row.g * Vec::blendv(p_larger.neg(), p_larger, x > Vec(0.f));
  }
  const Vec q = logq.exp(), distance = x.abs(), upper = log_over_mean(distance);
  const Vec log_q_over_m = Vec::blendv(upper, upper - distance, x > Vec(0.f));
  return row.g * where_positive(q, Vec(0.5f) * q * (log_q_over_m - row.divergence));
}

template <Kind kKind>
void tile_pair_gradient(float* z_q, const float* z_p, int64_t words, const PairGrad& row) {
  for_lanes(words, [&](int64_t i, int64_t n) {
    store_lanes(z_q + i, dlogits<kKind>(load_lanes(z_q + i, n), load_lanes(z_p + i, n), row), n);
  });
}

std::vector<PairGrad> pair_grads(const Tensor& index, const Tensor& g, const Tensor& norm, double alpha) {
  const int64_t n = g.numel(), count = index.defined() ? index.numel() : n;
  std::vector<PairGrad> grads;
  grads.reserve(count);
  for (int64_t k = 0; k < count; ++k) {
    const int64_t i = index.defined() ? index.const_data_ptr<int64_t>()[k] : k;
    const RowNorm row = load_norm(norm.const_data_ptr<double>(), n, i);
    grads.emplace_back(row, static_cast<float>(g.const_data_ptr<float>()[i] * alpha));
  }
  return grads;
}

std::tuple<Tensor, Tensor> distill_loss_backward(const Tensor& grad, const Tensor& student_hidden,
                                                 const Tensor& student_weight_, const Tensor& teacher_hidden,
                                                 const Tensor& teacher_weight, const Tensor& norm,
                                                 std::string_view kind_name, double temperature, bool need_hidden,
                                                 bool need_weight) {
  check_sides(student_hidden, student_weight_, teacher_hidden, teacher_weight);
  const Kind kind = distill_kind(kind_name);
  const int64_t n = student_hidden.size(0);
  const auto student_weight = student_weight_.contiguous(), g = grad.to(at::kFloat).contiguous();
  const auto index = kept_rows(n, [&](int64_t i) { return g.const_data_ptr<float>()[i] != 0; });
  if (n == 0 || (index.defined() && index.numel() == 0)) {
    const auto none = at::empty({0}, student_hidden.options()), no_weight = at::empty({0}, student_weight.options());
    return {need_hidden ? at::zeros(student_hidden.sizes(), student_hidden.options()) : none,
            need_weight ? at::zeros(student_weight.sizes(), student_weight.options()) : no_weight};
  }
  const auto grads = pair_grads(index, g, norm.contiguous(), 1 / temperature);
  const Side teacher(gather_rows(teacher_hidden, index), teacher_weight);
  const Blocks words(teacher.weight.size(0), kWords);
  WordTile teacher_tile(teacher.weight, words, teacher.rows.bf16, WordTile::kLogits);
  const auto gradient = kind == Kind::kForward   ? tile_pair_gradient<Kind::kForward>
                        : kind == Kind::kReverse ? tile_pair_gradient<Kind::kReverse>
                                                 : tile_pair_gradient<Kind::kJsd>;
  const auto load_tile = [&](int64_t t) { teacher_tile.load(t); };
  const auto fill = [&](const WordTile& tile, int64_t begin, int64_t end, float* z, float* spare, int64_t stride) {
    teacher_tile.logits(teacher.rows, begin, end, 1 / temperature, spare, stride);
    for (int64_t r = begin; r < end; ++r) {
      gradient(z + (r - begin) * stride, spare + (r - begin) * stride, tile.count, grads[r]);
    }
  };
  auto [dh, dw] = linear_backward(gather_rows(student_hidden, index), student_weight, 1 / temperature, need_hidden,
                                  need_weight, {load_tile, fill, true});
  return {need_hidden ? scatter_rows(dh, index, n) : dh, dw};
}

}  // namespace

TORCH_LIBRARY_IMPL(hpsafety_cpu, CPU, m) { m.impl("distill_loss_backward", &distill_loss_backward); }

}  // namespace hpsafety
