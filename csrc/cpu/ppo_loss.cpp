// ppo_loss: the clipped policy and value losses, the entropy bonus, the metrics and all gradients.
// Limit: bytes. One pass reads the 25 bytes (29 with entropy) of a token and writes 8 (12) of gradients. These are the
// gradients of n * loss: n, which this very pass may have to count, is needed only where backward scales them.

#include "streams.h"

namespace hpsafety {
namespace {

struct Tokens {
  Stream logprobs, old_logprobs, advantages, values, old_values, returns;
  std::optional<Stream> entropy;
  const bool* mask;
};

struct Settings {
  float clip_ratio, low, high, value_clip, value_coef, entropy_coef;
};

struct Partial {
  double surrogate, value, entropy, kl, outside, active;
  float ratio_max;
};

// The larger of two, NaN when either is.
float nan_max(float a, float b) { return (a > b || std::isnan(a)) ? a : b; }

float max_lane(Vec v) {
  float lanes[kLanes], top = 0;
  v.store(lanes);
  for (float lane : lanes) top = nan_max(top, lane);
  return top;
}

// exp(d) - 1 - d. Near 0 the difference has no digits left, so there the Taylor series to d^9 / 9! serves; at |d| = 0.5
// what it leaves out is 2e-9 of the whole.
Vec k3(Vec d, Vec ratio) {
  constexpr float kInverseFactorials[] = {1.f / 40320, 1.f / 5040, 1.f / 720, 1.f / 120, 1.f / 24, 1.f / 6, 1.f / 2};
  Vec series(1.f / 362880);
  for (float c : kInverseFactorials) series = at::vec::fmadd(series, d, Vec(c));
  return where(d.abs() < Vec(0.5f), series * d * d, ratio - Vec(1.f) - d);
}

// max of the squared value errors; error is overwritten with half the derivative of the chosen one by the value.
Vec value_error(Vec v, Vec v_old, Vec target, float clip, Vec& error) {
  const Vec step = v - v_old, plain = v - target;
  const Vec clipped = v_old + at::vec::clamp(step, Vec(-clip), Vec(clip)) - target;
  const Vec squared = plain * plain, squared_clipped = clipped * clipped;
  const Vec keep = squared >= squared_clipped;  // ties: the unclipped one; NaN: the clipped one, NaN too
  error = where(keep, plain, where(step.abs() <= Vec(clip), clipped, Vec(0.f)));
  return where(keep, squared, squared_clipped);
}

// Tokens [begin, end) of n; grads holds a row each for logprobs, values and, where given, entropy.
Partial run_block(const Tokens& tokens, const Settings& s, float* grads, int64_t n, int64_t begin, int64_t end) {
  DoubleSum surrogates, values, entropies, kl;
  const Vec zero(0.f), one(1.f);
  Vec active_count(0.f), outside_count(0.f), top(0.f);
  for (int64_t i = begin; i < end; i += kLanes) {
    const int64_t lanes = std::min(kLanes, end - i);
    const Vec active = lane_mask(tokens.mask + i, lanes);
    const auto read = [&](const Stream& row) { return where(active, row.at(i, lanes), zero); };  // masked: anything
    const Vec d = read(tokens.logprobs) - read(tokens.old_logprobs), a = read(tokens.advantages), ratio = d.exp();
    const Vec unclipped = ratio * a, clipped = at::vec::clamp(ratio, Vec(s.low), Vec(s.high)) * a;
    const Vec keep = unclipped <= clipped;  // ties keep the gradient; inf * 0 is NaN and does not
    surrogates.add(where(keep, unclipped, clipped));
    store_lanes(grads + i, where(keep, zero - unclipped, zero), lanes);
    Vec error;
    values.add(value_error(read(tokens.values), read(tokens.old_values), read(tokens.returns), s.value_clip, error));
    store_lanes(grads + n + i, error * Vec(s.value_coef), lanes);
    if (tokens.entropy) {
      entropies.add(read(*tokens.entropy));
      store_lanes(grads + 2 * n + i, where(active, Vec(-s.entropy_coef), zero), lanes);
    }
    kl.add(k3(d, ratio));
    active_count = active_count + where(active, one, zero);
    outside_count = outside_count + where((ratio - one).abs() > Vec(s.clip_ratio), one, zero);  // masked: ratio 1
    top = at::vec::maximum(top, where(active, ratio, zero));
  }
  return {surrogates.total(), values.total(), entropies.total(),
          kl.total(), sum(outside_count), sum(active_count), max_lane(top)};
}

Partial add_up(const std::vector<Partial>& partials) {
  Partial all{};
  for (const Partial& p : partials) {
    all.surrogate += p.surrogate;
    all.value += p.value;
    all.entropy += p.entropy;
    all.kl += p.kl;
    all.outside += p.outside;
    all.active += p.active;
    all.ratio_max = nan_max(all.ratio_max, p.ratio_max);
  }
  return all;
}

// loss; stats = policy_loss, value_loss, clip_fraction, approx_kl, ratio_max, 1/n; grads of n * loss.
std::tuple<Tensor, Tensor, Tensor> ppo_loss(
    const Tensor& logprobs, const Tensor& old_logprobs, const Tensor& advantages, const Tensor& values,
    const Tensor& old_values, const Tensor& returns, const Tensor& mask_, const std::optional<Tensor>& entropy,
    double clip_ratio, double value_clip, double value_coef, double entropy_coef, std::optional<double> num_tokens,
    const std::optional<Tensor>& num_tokens_tensor) {
  const int64_t n = logprobs.size(0);
  const auto mask = mask_.contiguous();
  TORCH_CHECK_VALUE(mask.dim() == 1 && mask.size(0) == n && mask.scalar_type() == at::kBool, "mask must be (", n,
                    ",) bool, got ", mask.sizes(), " ", mask.scalar_type());
  Tokens tokens{Stream(logprobs, n, "logprobs"), Stream(old_logprobs, n, "old_logprobs"),
                Stream(advantages, n, "advantages"), Stream(values, n, "values"),
                Stream(old_values, n, "old_values"), Stream(returns, n, "returns"),
                std::nullopt, mask.const_data_ptr<bool>()};
  if (entropy) tokens.entropy.emplace(*entropy, n, "entropy");
  const Settings s{static_cast<float>(clip_ratio), static_cast<float>(1 - clip_ratio),
                   static_cast<float>(1 + clip_ratio), static_cast<float>(value_clip),
                   static_cast<float>(value_coef), static_cast<float>(entropy_coef)};
  const auto fp32 = logprobs.options().dtype(at::kFloat);
  auto grads = at::empty({entropy ? 3 : 2, n}, fp32), loss = at::empty({}, fp32), stats = at::empty({6}, fp32);
  float* g = grads.mutable_data_ptr<float>();
  const Partial all = add_up(map_blocks<Partial>(
      n, [&](int64_t begin, int64_t end) { return run_block(tokens, s, g, n, begin, end); }));
  const double per_token = inverse_count(num_tokens_tensor, num_tokens, all.active);
  const double policy = 0 - all.surrogate * per_token, value = all.value / 2 * per_token;
  double total = policy + value_coef * value;
  if (entropy) total -= entropy_coef * all.entropy * per_token;
  loss.mutable_data_ptr<float>()[0] = static_cast<float>(total);
  const double out[] = {policy, value, all.outside * per_token, all.kl * per_token, all.ratio_max, per_token};
  for (int i = 0; i < 6; ++i) stats.mutable_data_ptr<float>()[i] = static_cast<float>(out[i]);
  return {loss, stats, grads};
}

}  // namespace

TORCH_LIBRARY_IMPL(hpsafety_cpu, CPU, m) { m.impl("ppo_loss", &ppo_loss); }

}  // namespace hpsafety
