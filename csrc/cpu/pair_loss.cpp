// pair_loss: -log sigmoid(chosen - rejected - margin), with the safety bins' cross-entropy, and both gradients.
// Limit: the call itself, since there are hundreds of pairs. Gradients are those of num_pairs * loss, as in ppo_loss.

#include "streams.h"

namespace hpsafety {
namespace {

// -log sigmoid(x) = log(1 + exp(-x)), and its derivative -sigmoid(-x), both without overflow or lost digits.
struct Softplus {
  Vec value, derivative;
  explicit Softplus(Vec x) {
    const Vec zero(0.f), one(1.f), e = (zero - x.abs()).exp();
    value = at::vec::maximum(zero - x, zero) + e.log1p();
    derivative = zero - where(x > zero, e, one) / (one + e);
  }
};

struct Pairs {
  Stream chosen, rejected;
  std::optional<Stream> margin;
  float margin_value, aux_weight;
  const int8_t *safe_chosen, *safe_rejected;  // null: no bins
};

// Adds aux_weight / 2 * -log sigmoid(+-score), + where safe and - where not; lanes without a bin keep their bits.
void add_auxiliary(Vec score, const int8_t* safe, int64_t lanes, float aux_weight, Vec& loss, Vec& grad) {
  float signs[kLanes] = {};
  for (int64_t i = 0; i < lanes; ++i) signs[i] = safe[i] == 1 ? 1.f : safe[i] == 0 ? -1.f : 0.f;
  const Vec sign = Vec::loadu(signs), known = sign != Vec(0.f), weight(aux_weight / 2);
  const Softplus term(where(known, sign * score, Vec(0.f)));
  loss = where(known, loss + weight * term.value, loss);
  grad = where(known, grad + weight * sign * term.derivative, grad);
}

double run_block(const Pairs& pairs, float* grad_chosen, float* grad_rejected, int64_t begin, int64_t end) {
  DoubleSum total;
  for (int64_t i = begin; i < end; i += kLanes) {
    const int64_t lanes = std::min(kLanes, end - i);
    const Vec c = pairs.chosen.at(i, lanes), r = pairs.rejected.at(i, lanes);
    const Vec margin = pairs.margin ? pairs.margin->at(i, lanes) : Vec(pairs.margin_value);
    const Softplus rank(c - r - margin);
    Vec loss = rank.value, dc = rank.derivative, dr = Vec(0.f) - rank.derivative;
    if (pairs.safe_chosen) add_auxiliary(c, pairs.safe_chosen + i, lanes, pairs.aux_weight, loss, dc);
    if (pairs.safe_rejected) add_auxiliary(r, pairs.safe_rejected + i, lanes, pairs.aux_weight, loss, dr);
    total.add(zero_past(loss, lanes));
    store_lanes(grad_chosen + i, dc, lanes);
    store_lanes(grad_rejected + i, dr, lanes);
  }
  return total.total();
}

// Row of bins, or an undefined tensor where there is none or it has no weight.
Tensor bins(const std::optional<Tensor>& safe, int64_t n, double aux_weight, const char* name) {
  if (!safe || aux_weight == 0) return Tensor();
  TORCH_CHECK_VALUE(safe->dim() == 1 && safe->size(0) == n && safe->scalar_type() == at::kChar, name, " must be (", n,
                    ",) int8, got ", safe->sizes(), " ", safe->scalar_type());
  return safe->contiguous();
}

// loss; per_pair = 1 / num_pairs; grads (2, P) of num_pairs * loss.
std::tuple<Tensor, Tensor, Tensor> pair_loss(const Tensor& chosen, const Tensor& rejected,
                                             const std::optional<Tensor>& margin, double margin_value,
                                             const std::optional<Tensor>& safe_chosen,
                                             const std::optional<Tensor>& safe_rejected, double aux_weight,
                                             std::optional<double> num_pairs,
                                             const std::optional<Tensor>& num_pairs_tensor) {
  const int64_t n = chosen.size(0);
  const auto bins_chosen = bins(safe_chosen, n, aux_weight, "safe_chosen");
  const auto bins_rejected = bins(safe_rejected, n, aux_weight, "safe_rejected");
  Pairs pairs{Stream(chosen, n, "chosen"), Stream(rejected, n, "rejected"), std::nullopt,
              static_cast<float>(margin_value), static_cast<float>(aux_weight),
              bins_chosen.defined() ? bins_chosen.const_data_ptr<int8_t>() : nullptr,
              bins_rejected.defined() ? bins_rejected.const_data_ptr<int8_t>() : nullptr};
  if (margin) pairs.margin.emplace(*margin, n, "margin");
  const auto fp32 = chosen.options().dtype(at::kFloat);
  auto grads = at::empty({2, n}, fp32), loss = at::empty({}, fp32), per_pair = at::empty({}, fp32);
  float* g = grads.mutable_data_ptr<float>();
  double total = 0;
  for (double partial : map_blocks<double>(
           n, [&](int64_t begin, int64_t end) { return run_block(pairs, g, g + n, begin, end); })) {
    total += partial;
  }
  const double scale = inverse_count(num_pairs_tensor, num_pairs, static_cast<double>(n));
  loss.mutable_data_ptr<float>()[0] = static_cast<float>(total * scale);
  per_pair.mutable_data_ptr<float>()[0] = static_cast<float>(scale);
  return {loss, per_pair, grads};
}

}  // namespace

TORCH_LIBRARY_IMPL(hpsafety_cpu, CPU, m) { m.impl("pair_loss", &pair_loss); }

}  // namespace hpsafety
