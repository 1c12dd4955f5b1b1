// linear_logprob: log softmax(hidden @ weight^T / temperature) at the targets, and its entropy, without the logits.
// Limit: the GEMMs (one forward, three backward). A block of rows meets a tile of the vocabulary, the logits of that
// pair are read once more while they are in cache, and three numbers per row and tile remain. Backward computes them
// again from the two numbers per row that normalise them.

#include <ATen/ops/index_select.h>
#include <ATen/ops/nonzero.h>

#include "linear_softmax.h"

namespace hpsafety {
namespace {

constexpr int64_t kGroup = 4096;  // rows in one go: bounds the partial statistics, and the 32 MB of logits in backward
constexpr int64_t kUnit = 256;    // words of one piece of the weight gradient

// fp32 rows, zeros up to kMinRows: forward and backward then see the same logits, whatever the number of rows.
Tensor padded_rows(const Tensor& hidden) {
  auto h = hidden.to(at::kFloat).contiguous();
  if (h.size(0) >= kMinRows) return h;
  auto more = at::zeros({kMinRows, h.size(1)}, h.options());
  more.narrow(0, 0, h.size(0)).copy_(h);
  return more;
}

// Statistics and target logits of n rows; h has at least kMinRows.
template <bool kEntropy>
void forward_group(const float* h, const int64_t* targets, int64_t n, const Tensor& weight, double alpha,
                   const Blocks& words, Stats* stats, float* target_logits) {
  const int64_t d = weight.size(1), stride = padded(words.largest());
  const Blocks blocks(std::max(n, kMinRows), kRows);
  const bool convert = weight.scalar_type() != at::kFloat;
  at::parallel_for(0, blocks.count * words.count, 1, [&](int64_t begin, int64_t end) {
    auto z_buffer = at::empty({blocks.largest(), stride}, at::kFloat);
    auto w_buffer = at::empty({convert ? words.largest() : 0, d}, at::kFloat);
    float* z = z_buffer.mutable_data_ptr<float>();
    const float* w = nullptr;
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t tile = unit / blocks.count, block = unit % blocks.count;
      const int64_t w0 = words.begin(tile), count = words.end(tile) - w0, r0 = blocks.begin(block);
      const int64_t r1 = blocks.end(block);
      if (!w || block == 0) w = rows_as_float(weight, w0, w0 + count, w_buffer.mutable_data_ptr<float>());
      gemm({h + r0 * d, r1 - r0, d, d}, Matrix{w, count, d, d}.t(), {z, r1 - r0, count, stride}, alpha, 0);
      for (int64_t r = r0; r < std::min(r1, n); ++r) {
        const float* row = z + (r - r0) * stride;
        stats[tile * n + r] = tile_stats<kEntropy>(row, count);
        const int64_t at_target = targets[r] - w0;
        if (at_target >= 0 && at_target < count) target_logits[r] = row[at_target];
      }
    }
  });
}

// Rows of the backward: those with a gradient, in order.
struct Trained {
  Tensor index;   // undefined: all rows
  Tensor hidden;  // fp32, at least kMinRows unless there is none
  std::vector<RowGrad> grads;
  int64_t n;  // without padding
};

Trained gather(const Tensor& grad, const std::optional<Tensor>& grad_entropy, const Tensor& hidden,
               const Tensor& targets, const Tensor& norm, const std::optional<Tensor>& entropy, double alpha) {
  const auto g = grad.to(at::kFloat).contiguous(), norms = norm.contiguous(), t = targets.to(at::kLong).contiguous();
  const auto ge = grad_entropy ? grad_entropy->to(at::kFloat).contiguous() : Tensor();
  const auto h = entropy && entropy->numel() ? entropy->contiguous() : Tensor();
  const int64_t n = hidden.size(0);
  std::vector<int64_t> kept;
  std::vector<RowGrad> grads;
  const float *m = norms.const_data_ptr<float>(), *log_s = m + n;
  for (int64_t i = 0; i < n; ++i) {
    const float gi = g.const_data_ptr<float>()[i], ei = ge.defined() ? ge.const_data_ptr<float>()[i] : 0.f;
    if (gi == 0 && ei == 0) continue;
    kept.push_back(i);
    grads.push_back({static_cast<float>(-gi * alpha), static_cast<float>(-ei * alpha), m[i], log_s[i],
                     h.defined() ? h.const_data_ptr<float>()[i] : 0.f, t.const_data_ptr<int64_t>()[i]});
  }
  const int64_t count = static_cast<int64_t>(kept.size());
  grads.resize(std::max(count, kMinRows), {0, 0, 0, 0, 0, -1});
  if (count == n) return {Tensor(), padded_rows(hidden), grads, n};
  auto index = at::empty({count}, at::kLong);
  std::copy(kept.begin(), kept.end(), index.mutable_data_ptr<int64_t>());
  return {index, padded_rows(at::index_select(hidden, 0, index)), grads, count};
}

struct Tile {  // one tile of the vocabulary: weight rows, their gradient (or null), and the buffer of logits
  const float* w;
  float* dw;
  float* z;
  int64_t first, count, d, stride;
};

// Logits, their gradient, and dH (+)= dz @ W of rows [begin, end); z has one row for each.
template <bool kEntropy>
void backward_rows(const Tile& tile, const float* h, float* dh, const RowGrad* grads, double alpha, int64_t begin,
                   int64_t end) {
  const int64_t rows = end - begin, d = tile.d;
  const Matrix z{tile.z + begin * tile.stride, rows, tile.count, tile.stride}, w{tile.w, tile.count, d, d};
  gemm({h + begin * d, rows, d, d}, w.t(), z, alpha, 0);
  for (int64_t r = begin; r < end; ++r) {
    tile_gradient<kEntropy>(tile.z + r * tile.stride, tile.first, tile.count, grads[r]);
  }
  if (dh) gemm(z, w, {dh + begin * d, rows, d, d}, 1, tile.first ? 1 : 0);
}

// All rows against one tile: first by blocks of rows, each owning its dH, then by pieces of the tile, each owning
// its dW.
template <bool kEntropy>
void backward_tile(const Trained& trained, const Tile& tile, float* dh, double alpha) {
  const int64_t rows = trained.hidden.size(0);
  const Blocks groups(rows, kGroup);
  const float* h = trained.hidden.const_data_ptr<float>();
  const int64_t d = tile.d, rows_per_block = rows >= 8 * kRows ? kRows : kRows / 2;
  for (int64_t g = 0; g < groups.count; ++g) {
    const int64_t r0 = groups.begin(g), n = groups.end(g) - r0;
    const Blocks blocks(n, rows_per_block, n > 64 ? 2 : 1);  // even, so that two threads finish together
    at::parallel_for(0, blocks.count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        backward_rows<kEntropy>(tile, h + r0 * d, dh ? dh + r0 * d : nullptr, trained.grads.data() + r0, alpha,
                                blocks.begin(b), blocks.end(b));
      }
    });
    if (!tile.dw) continue;
    const Blocks units(tile.count, kUnit);
    at::parallel_for(0, units.count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t u = begin; u < end; ++u) {
        const int64_t c = units.begin(u), count = units.end(u) - c;
        gemm(Matrix{tile.z + c, n, count, tile.stride}.t(), {h + r0 * d, n, d, d}, {tile.dw + c * d, count, d, d}, 1,
             g ? 1 : 0);
      }
    });
  }
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> linear_logprob(const Tensor& hidden, const Tensor& weight_, const Tensor& targets,
                                                  double temperature, bool want_entropy) {
  const int64_t n = hidden.size(0);
  const auto options = hidden.options().dtype(at::kFloat);
  auto logprobs = at::empty({n}, options), norm = at::empty({2, n}, options);
  auto entropies = at::empty({want_entropy ? n : 0}, options);
  if (n == 0) return {logprobs, norm, entropies};
  const auto weight = weight_.contiguous();
  const auto rows = padded_rows(hidden), words_of = checked_targets(targets, weight.size(0));
  const Blocks words(weight.size(0), kWords), groups(n, kGroup);
  std::vector<Stats> stats(words.count * groups.largest());
  std::vector<float> target_logits(groups.largest());
  float *lp = logprobs.mutable_data_ptr<float>(), *nm = norm.mutable_data_ptr<float>();
  float* en = want_entropy ? entropies.mutable_data_ptr<float>() : nullptr;
  for (int64_t g = 0; g < groups.count; ++g) {
    const int64_t r0 = groups.begin(g), count = groups.end(g) - r0;
    const auto run = want_entropy ? forward_group<true> : forward_group<false>;
    run(rows.const_data_ptr<float>() + r0 * weight.size(1), words_of.const_data_ptr<int64_t>() + r0, count, weight,
        1 / temperature, words, stats.data(), target_logits.data());
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

std::tuple<Tensor, Tensor> linear_logprob_backward(const Tensor& grad, const std::optional<Tensor>& grad_entropy,
                                                   const Tensor& hidden, const Tensor& weight_, const Tensor& targets,
                                                   const Tensor& norm, const std::optional<Tensor>& entropy,
                                                   double temperature, bool need_hidden, bool need_weight) {
  const auto weight = weight_.contiguous();
  const int64_t d = weight.size(1);
  const bool convert = weight.scalar_type() != at::kFloat;
  const auto trained = gather(grad, grad_entropy, hidden, targets, norm, entropy, 1 / temperature);
  const int64_t n = trained.hidden.size(0);
  if (trained.n == 0) {
    return {need_hidden ? at::zeros(hidden.sizes(), hidden.options()) : at::empty({0}, hidden.options()),
            need_weight ? at::zeros(weight.sizes(), weight.options()) : at::empty({0}, weight.options())};
  }
  const auto fp32 = hidden.options().dtype(at::kFloat);
  const Blocks words(weight.size(0), kWords);
  const int64_t stride = padded(words.largest());
  auto dh = at::empty({need_hidden ? n : 0, d}, fp32);
  auto dw = need_weight ? at::empty(weight.sizes(), weight.options()) : at::empty({0}, weight.options());
  auto z = at::empty({Blocks(n, kGroup).largest(), stride}, fp32);
  auto w_tile = at::empty({convert ? words.largest() : 0, d}, fp32);
  auto dw_tile = at::empty({convert && need_weight ? words.largest() : 0, d}, fp32);
  for (int64_t t = 0; t < words.count; ++t) {
    const int64_t w0 = words.begin(t), count = words.end(t) - w0;
    const float* w = rows_as_float(weight, w0, w0 + count, w_tile.mutable_data_ptr<float>());
    float* target = !need_weight ? nullptr
                    : convert    ? dw_tile.mutable_data_ptr<float>()
                                 : dw.mutable_data_ptr<float>() + w0 * d;
    const Tile tile{w, target, z.mutable_data_ptr<float>(), w0, count, d, stride};
    const auto run = grad_entropy ? backward_tile<true> : backward_tile<false>;
    run(trained, tile, need_hidden ? dh.mutable_data_ptr<float>() : nullptr, 1 / temperature);
    if (convert && need_weight) store_as_bf16(dw, w0 * d, count * d, target);
  }
  if (!need_hidden) return {at::empty({0}, hidden.options()), dw};
  dh = dh.narrow(0, 0, trained.n).to(hidden.scalar_type()).contiguous();
  if (!trained.index.defined()) return {dh, dw};
  return {at::zeros(hidden.sizes(), hidden.options()).index_copy_(0, trained.index, dh), dw};
}

}  // namespace

TORCH_LIBRARY_IMPL(hpsafety_cpu, CPU, m) {
  m.impl("linear_logprob", &linear_logprob);
  m.impl("linear_logprob_backward", &linear_logprob_backward);
}

}  // namespace hpsafety
