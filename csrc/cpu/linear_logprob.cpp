// linear_logprob: log softmax(hidden @ weight^T / temperature) at the targets, and its entropy, without the logits.
// Limit: the GEMMs (one forward, three backward). A block of rows meets a tile of the vocabulary, the logits of that
// pair are read once more while they are in cache, and three numbers per row and tile remain. Backward computes them
// again from the two numbers per row that normalise them.

#include "linear_backward.h"
#include "linear_softmax.h"

namespace hpsafety {
namespace {

// Statistics and target logits of rows [first, first + n).
template <bool kEntropy>
void forward_group(const Rows& rows, int64_t first, int64_t n, const int64_t* targets, const Tensor& weight,
                   double alpha, const Blocks& words, Stats* stats, float* target_logits) {
  const int64_t stride = padded(words.largest());
  const Blocks blocks(n, kRows);
  at::parallel_for(0, blocks.count * words.count, 1, [&](int64_t begin, int64_t end) {
    auto z_buffer = at::empty({blocks.largest(), stride}, at::kFloat);
    float* z = z_buffer.mutable_data_ptr<float>();
    WordTile tile(weight, words, rows.bf16, WordTile::kLogits);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t t = unit / blocks.count, block = unit % blocks.count;
      if (unit == begin || block == 0) tile.load(t);
      const int64_t r0 = blocks.begin(block), r1 = blocks.end(block);
      tile.logits(rows, first + r0, first + r1, alpha, z, stride);
      for (int64_t r = r0; r < r1; ++r) {
        const float* row = z + (r - r0) * stride;
        stats[t * n + r] = tile_stats<kEntropy>(row, tile.count);
        const int64_t at_target = targets[r] - tile.first;
        if (at_target >= 0 && at_target < tile.count) target_logits[r] = row[at_target];
      }
    }
  });
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> linear_logprob(const Tensor& hidden, const Tensor& weight_, const Tensor& targets,
                                                  double temperature, bool want_entropy) {
  const int64_t n = hidden.size(0);
  const auto options = hidden.options().dtype(at::kFloat);
  auto logprobs = at::empty({n}, options), norm = at::empty({2, n}, options);
  auto entropies = at::empty({want_entropy ? n : 0}, options);
  if (n == 0) return {logprobs, norm, entropies};
  const auto weight = weight_.contiguous(), words_of = checked_targets(targets, weight.size(0));
  const Rows rows(hidden, bf16_route(hidden, weight));
  const Blocks words(weight.size(0), kWords), groups(n, kGroup);
  std::vector<Stats> stats(words.count * groups.largest());
  std::vector<float> target_logits(groups.largest());
  float *lp = logprobs.mutable_data_ptr<float>(), *nm = norm.mutable_data_ptr<float>();
  float* en = want_entropy ? entropies.mutable_data_ptr<float>() : nullptr;
  for (int64_t g = 0; g < groups.count; ++g) {
    const int64_t r0 = groups.begin(g), count = groups.end(g) - r0;
    const auto run = want_entropy ? forward_group<true> : forward_group<false>;
    run(rows, r0, count, words_of.const_data_ptr<int64_t>() + r0, weight, 1 / temperature, words, stats.data(),
        target_logits.data());
    at::parallel_for(0, count, 64, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        const Stats row = merge_stats(stats.data() + r, words.count, count);
        lp[r0 + r] = logprob(row, target_logits[r]);
        nm[r0 + r] = row.m;
        nm[n + r0 + r] = std::log(row.s);
        if (en) en[r0 + r] = entropy(row);
      }
    });
  }
  return {logprobs, norm, entropies};
}

namespace {

std::vector<RowGrad> row_grads(const Tensor& index, const Tensor& g, const Tensor& ge, const Tensor& norm,
                               const Tensor& entropy, const Tensor& targets, double alpha) {
  const int64_t n = g.numel(), count = index.defined() ? index.numel() : n;
  const float *m = norm.const_data_ptr<float>(), *log_s = m + n;
  std::vector<RowGrad> grads(count);
  for (int64_t k = 0; k < count; ++k) {
    const int64_t i = index.defined() ? index.const_data_ptr<int64_t>()[k] : k;
    const double a = -g.const_data_ptr<float>()[i] * alpha;
    const double b = ge.defined() ? -ge.const_data_ptr<float>()[i] * alpha : 0;
    grads[k] = {static_cast<float>(a), static_cast<float>(b), m[i], log_s[i],
                ge.defined() ? entropy.const_data_ptr<float>()[i] : 0.f, targets.const_data_ptr<int64_t>()[i]};
  }
  return grads;
}

std::tuple<Tensor, Tensor> linear_logprob_backward(const Tensor& grad, const std::optional<Tensor>& grad_entropy,
                                                   const Tensor& hidden, const Tensor& weight_, const Tensor& targets,
                                                   const Tensor& norm, const std::optional<Tensor>& entropy,
                                                   double temperature, bool need_hidden, bool need_weight) {
  const auto weight = weight_.contiguous(), g = grad.to(at::kFloat).contiguous();
  const auto ge = grad_entropy ? grad_entropy->to(at::kFloat).contiguous() : Tensor();
  const int64_t n = hidden.size(0);
  const auto index = kept_rows(n, [&](int64_t i) {
    return g.const_data_ptr<float>()[i] != 0 || (ge.defined() && ge.const_data_ptr<float>()[i] != 0);
  });
  if (n == 0 || (index.defined() && index.numel() == 0)) {
    return {need_hidden ? at::zeros(hidden.sizes(), hidden.options()) : at::empty({0}, hidden.options()),
            need_weight ? at::zeros(weight.sizes(), weight.options()) : at::empty({0}, weight.options())};
  }
  const auto grads = row_grads(index, g, ge, norm.contiguous(), ge.defined() ? entropy->contiguous() : Tensor(),
                               targets.to(at::kLong).contiguous(), 1 / temperature);
  const auto gradient = ge.defined() ? tile_gradient<true> : tile_gradient<false>;
  const auto fill = [&](const WordTile& tile, int64_t begin, int64_t end, float* z, float*, int64_t stride) {
    for (int64_t r = begin; r < end; ++r) gradient(z + (r - begin) * stride, tile.first, tile.count, grads[r]);
  };
  auto [dh, dw] = linear_backward(gather_rows(hidden, index), weight, 1 / temperature, need_hidden, need_weight,
                                  {[](int64_t) {}, fill, false});
  return {need_hidden ? scatter_rows(dh, index, n) : dh, dw};
}

}  // namespace

TORCH_LIBRARY_IMPL(hpsafety_cpu, CPU, m) {
  m.impl("linear_logprob", &linear_logprob);
  m.impl("linear_logprob_backward", &linear_logprob_backward);
}

}  // namespace hpsafety
