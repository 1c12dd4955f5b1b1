// linear_cross_entropy: -sum row_weights * logprob with the gradients made in the forward: three GEMMs where
// linear_logprob with its recomputation needs four. For losses whose gradient per row is known beforehand.
// Price: the logits of 256 rows over the whole vocabulary (50 MB at 49,152 words).

#include <ATen/ops/index_select.h>

#include "linear_softmax.h"

namespace hpsafety {
namespace {

constexpr int64_t kParts = 16;  // dH is summed over 16 parts of the vocabulary, then over parts in order

struct Chunk {  // 256 rows, their logits, and what is known about each
  const float* h;
  const int64_t* targets;
  float* z;
  int64_t rows, d, stride;
};

void chunk_logits(const Chunk& chunk, const Tensor& weight, const Blocks& words, Stats* stats) {
  const bool convert = weight.scalar_type() != at::kFloat;
  const int64_t d = chunk.d;
  at::parallel_for(0, words.count, 1, [&](int64_t begin, int64_t end) {
    auto buffer = at::empty({convert ? words.largest() : 0, d}, at::kFloat);
    for (int64_t t = begin; t < end; ++t) {
      const int64_t w0 = words.begin(t), count = words.end(t) - w0;
      const float* w = rows_as_float(weight, w0, w0 + count, buffer.mutable_data_ptr<float>());
      const Matrix z{chunk.z + w0, chunk.rows, count, chunk.stride};
      gemm({chunk.h, chunk.rows, d, d}, Matrix{w, count, d, d}.t(), z, 1, 0);
      for (int64_t r = 0; r < chunk.rows; ++r) {
        stats[t * chunk.rows + r] = tile_stats<false>(chunk.z + r * chunk.stride + w0, count);
      }
    }
  });
}

// dlogits in place of the logits, then both gradients; dh_parts (kParts, rows, D), either gradient may be null.
void chunk_gradients(const Chunk& chunk, const Tensor& weight, const Blocks& words, const RowGrad* grads,
                     float* dh_parts, float* dw, bool first_chunk) {
  const bool convert = weight.scalar_type() != at::kFloat && dh_parts;
  const int64_t d = chunk.d, tiles = words.count / kParts;
  at::parallel_for(0, kParts, 1, [&](int64_t begin, int64_t end) {
    auto buffer = at::empty({convert ? words.largest() : 0, d}, at::kFloat);
    for (int64_t part = begin; part < end; ++part) {
      for (int64_t t = part * tiles; t < (part + 1) * tiles; ++t) {
        const int64_t w0 = words.begin(t), count = words.end(t) - w0;
        if (count == 0) continue;
        for (int64_t r = 0; r < chunk.rows; ++r) {
          tile_gradient<false>(chunk.z + r * chunk.stride + w0, w0, count, grads[r]);
        }
        const Matrix z{chunk.z + w0, chunk.rows, count, chunk.stride}, h{chunk.h, chunk.rows, d, d};
        if (dw) gemm(z.t(), h, {dw + w0 * d, count, d, d}, 1, first_chunk ? 0 : 1);
        if (!dh_parts) continue;
        const float* w = rows_as_float(weight, w0, w0 + count, buffer.mutable_data_ptr<float>());
        gemm(z, {w, count, d, d}, {dh_parts + part * chunk.rows * d, chunk.rows, d, d}, 1, 1);
      }
    }
  });
}

void sum_parts(const float* parts, int64_t size, float* out) {
  at::parallel_for(0, (size + 4095) / 4096, 4, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * 4096;
    for_lanes(std::min(size, end * 4096) - first, [&](int64_t i, int64_t n) {
      Vec total(0.f);
      for (int64_t p = 0; p < kParts; ++p) total = total + load_lanes(parts + p * size + first + i, n);
      store_lanes(out + first + i, total, n);
    });
  });
}

struct Trained {
  Tensor hidden, weight, targets, row_weights;  // fp32, storage dtype, int64, fp32; contiguous
};

// Writes logprobs (n,), and dh (n, D) and dw (V, D) in fp32 where they are defined.
void train_rows(const Trained& in, const Tensor& logprobs, const Tensor& dh, const Tensor& dw) {
  const int64_t n = in.hidden.size(0), d = in.hidden.size(1), vocabulary = in.weight.size(0);
  const Blocks chunks(n, kRows), words(vocabulary, kWords, kParts);
  const int64_t stride = padded(vocabulary), most = chunks.largest();
  auto z = at::empty({most, stride}, at::kFloat);
  auto parts = at::empty({dh.defined() ? kParts : 0, most, d}, at::kFloat);
  std::vector<Stats> stats(words.count * most);
  std::vector<RowGrad> grads(most);
  const int64_t* targets = in.targets.const_data_ptr<int64_t>();
  const float* row_weights = in.row_weights.const_data_ptr<float>();
  for (int64_t c = 0; c < chunks.count; ++c) {
    const int64_t r0 = chunks.begin(c), rows = chunks.end(c) - r0;
    const float* h = in.hidden.const_data_ptr<float>() + r0 * d;
    const Chunk chunk{h, targets + r0, z.mutable_data_ptr<float>(), rows, d, stride};
    chunk_logits(chunk, in.weight, words, stats.data());
    for (int64_t r = 0; r < rows; ++r) {
      const Stats row = merge_stats(stats.data() + r, words.count, rows);
      logprobs.mutable_data_ptr<float>()[r0 + r] = logprob(row, chunk.z[r * stride + chunk.targets[r]]);
      grads[r] = {row_weights[r0 + r], 0, row.m, std::log(row.s), 0, chunk.targets[r]};
    }
    if (dh.defined()) parts.zero_();
    chunk_gradients(chunk, in.weight, words, grads.data(), dh.defined() ? parts.mutable_data_ptr<float>() : nullptr,
                    dw.defined() ? dw.mutable_data_ptr<float>() : nullptr, c == 0);
    if (dh.defined()) sum_parts(parts.const_data_ptr<float>(), rows * d, dh.mutable_data_ptr<float>() + r0 * d);
  }
}

Tensor weighted_loss(const Tensor& logprobs, const Tensor& row_weights) {
  const float *lp = logprobs.const_data_ptr<float>(), *w = row_weights.const_data_ptr<float>();
  double total = 0;
  for (int64_t i = 0; i < logprobs.numel(); ++i) total -= w[i] == 0 ? 0.0 : static_cast<double>(w[i]) * lp[i];
  auto loss = at::empty({}, logprobs.options());
  *loss.mutable_data_ptr<float>() = static_cast<float>(total);
  return loss;
}

// Rows of weight zero get their logprob and no gradient work.
std::tuple<Tensor, Tensor> split_rows(const Tensor& row_weights) {
  std::vector<int64_t> kept, rest;
  const float* w = row_weights.const_data_ptr<float>();
  for (int64_t i = 0; i < row_weights.numel(); ++i) (w[i] == 0 ? rest : kept).push_back(i);
  auto as_tensor = [](const std::vector<int64_t>& v) {
    auto t = at::empty({static_cast<int64_t>(v.size())}, at::kLong);
    std::copy(v.begin(), v.end(), t.mutable_data_ptr<int64_t>());
    return t;
  };
  return {as_tensor(kept), as_tensor(rest)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_cross_entropy(const Tensor& hidden_, const Tensor& weight_,
                                                                const Tensor& targets_, const Tensor& row_weights_,
                                                                bool need_hidden, bool need_weight) {
  const auto hidden = hidden_.contiguous(), weight = weight_.contiguous();
  const auto targets = checked_targets(targets_, weight.size(0)), row_weights = row_weights_.contiguous();
  const auto none = at::empty({0}, hidden.options());
  if (!need_hidden && !need_weight) {
    const auto logprobs = std::get<0>(linear_logprob(hidden, weight, targets, 1.0, false));
    return {weighted_loss(logprobs, row_weights), logprobs, none, at::empty({0}, hidden.options())};
  }
  const auto [kept, rest] = split_rows(row_weights);
  const int64_t n = hidden.size(0), trained = kept.numel();
  const auto fp32 = hidden.options().dtype(at::kFloat);
  auto dw = !need_weight ? Tensor() : trained ? at::empty(weight.sizes(), fp32) : at::zeros(weight.sizes(), fp32);
  auto dh = need_hidden ? at::empty({trained, hidden.size(1)}, fp32) : Tensor();
  auto logprobs = at::empty({trained}, fp32);
  const bool all = trained == n;
  const auto pick = [&](const Tensor& t, const Tensor& index) { return all ? t : at::index_select(t, 0, index); };
  const auto row_hidden = pick(hidden, kept).to(at::kFloat);
  train_rows({row_hidden, weight, pick(targets, kept), pick(row_weights, kept)}, logprobs, dh, dw);
  if (need_hidden) dh = dh.to(hidden.scalar_type());
  if (!all) {
    const auto others = at::index_select(hidden, 0, rest), other_targets = at::index_select(targets, 0, rest);
    const auto untrained = std::get<0>(linear_logprob(others, weight, other_targets, 1.0, false));
    logprobs = at::empty({n}, fp32).index_copy_(0, kept, logprobs).index_copy_(0, rest, untrained);
    if (need_hidden) dh = at::zeros(hidden.sizes(), hidden.options()).index_copy_(0, kept, dh);
  }
  return {weighted_loss(logprobs, row_weights), logprobs, need_hidden ? dh : none,
          need_weight ? dw.to(weight.scalar_type()) : at::empty({0}, weight.options())};
}

}  // namespace

TORCH_LIBRARY_IMPL(hpsafety_cpu, CPU, m) { m.impl("linear_cross_entropy", &linear_cross_entropy); }

}  // namespace hpsafety
