// linear_cross_entropy: -sum row_weights * logprob with the gradients made in the forward: three GEMMs where
// linear_logprob with its recomputation needs four. For losses whose gradient per row is known beforehand.
// Price: the logits of 256 rows over the whole vocabulary (50 MB at 49,152 words).

#include "linear_backward.h"
#include "linear_softmax.h"

namespace hpsafety {
namespace {

constexpr int64_t kParts = 16;  // dH is summed over 16 parts of the vocabulary, then over parts in order

struct Chunk {  // up to 256 rows, their logits, and where they stand in `rows`
  const Rows& rows;
  int64_t begin, end;
  float* z;
  int64_t stride;
  int64_t count() const { return end - begin; }
  float* row(int64_t r) const { return z + r * stride; }
};

void chunk_logits(const Chunk& chunk, const Tensor& weight, const Blocks& words, Stats* stats) {
  at::parallel_for(0, words.count, 1, [&](int64_t begin, int64_t end) {
    WordTile tile(weight, words, chunk.rows.bf16, WordTile::kLogits);
    for (int64_t t = begin; t < end; ++t) {
      tile.load(t);
      if (tile.count == 0) {
        for (int64_t r = 0; r < chunk.count(); ++r) stats[t * chunk.count() + r] = kNoWords;
        continue;
      }
      tile.logits(chunk.rows, chunk.begin, chunk.end, 1, chunk.z + tile.first, chunk.stride);
      for (int64_t r = 0; r < chunk.count(); ++r) {
        stats[t * chunk.count() + r] = tile_stats<false>(chunk.row(r) + tile.first, tile.count);
      }
    }
  });
}

// dW in fp32: (V, D), or on the bf16 route tile after tile (D, words), which the GEMM writes. Null: not wanted.
struct Sums {
  float *dh_parts, *dw;
  int64_t part;  // elements of one part of dH
};

// dlogits in place of the logits of one tile, then both gradients; transposed: H^T on the bf16 route.
void tile_gradients(const Chunk& chunk, const WordTile& tile, const RowGrad* grads, const Sums& sums, float* dh,
                    BlockGrad dz, const BFloat16* transposed, bool first_chunk) {
  const int64_t d = chunk.rows.d, n = chunk.rows.padded_end(chunk.end) - chunk.begin;
  for (int64_t r = 0; r < chunk.count(); ++r) {
    tile_gradient<false>(chunk.row(r) + tile.first, tile.first, tile.count, grads[r]);
  }
  float* dw = sums.dw ? sums.dw + tile.first * d : nullptr;
  if (chunk.rows.bf16) {
    round_to_bf16(chunk.z + tile.first, chunk.stride, chunk.count(), tile.count, dz.plain, dz.pairs, dz.stride);
    const int64_t width = whole_grains(tile.count);
    if (dw) bf16_gemm({transposed, kRows}, {dz.pairs, dz.stride}, dw, width, d, width, n, !first_chunk);
  } else {
    dz = {chunk.z + tile.first, chunk.stride, nullptr, nullptr};
    const Matrix z{dz.z, n, tile.count, chunk.stride}, h{chunk.rows.fp32_row(chunk.begin), n, d, d};
    if (dw) gemm(z.t(), h, {dw, tile.count, d, d}, 1, first_chunk ? 0 : 1);
  }
  if (dh) tile.hidden_gradient(dz, n, dh, true);
}

void chunk_gradients(const Chunk& chunk, const Tensor& weight, const Blocks& words, const RowGrad* grads,
                     const Sums& sums, bool first_chunk) {
  const int64_t tiles = words.count / kParts, stride = padded(words.largest());
  const bool bf16 = chunk.rows.bf16;
  Tensor transposed;
  if (bf16 && sums.dw) transposed = chunk.rows.transposed(chunk.begin, Blocks(chunk.count(), kRows));
  at::parallel_for(0, kParts, 1, [&](int64_t begin, int64_t end) {
    const auto options = weight.options().dtype(at::kBFloat16);
    auto plain = at::empty({bf16 && sums.dh_parts ? kRows : 0, stride}, options);
    auto pairs = at::empty({bf16 && sums.dw ? kRows : 0, stride}, options);
    const BlockGrad dz{nullptr, stride, plain.numel() ? plain.mutable_data_ptr<BFloat16>() : nullptr,
                       pairs.numel() ? pairs.mutable_data_ptr<BFloat16>() : nullptr};
    WordTile tile(weight, words, bf16, WordTile::kHiddenGrad);
    for (int64_t t = begin * tiles; t < end * tiles; ++t) {
      if (sums.dh_parts) tile.load(t); else tile.place(t);
      if (tile.count == 0) continue;
      tile_gradients(chunk, tile, grads, sums, sums.dh_parts ? sums.dh_parts + t / tiles * sums.part : nullptr, dz,
                     transposed.defined() ? transposed.const_data_ptr<BFloat16>() : nullptr, first_chunk);
    }
  });
}

void sum_parts(const float* parts, int64_t part, int64_t size, float* out) {
  at::parallel_for(0, (size + 4095) / 4096, 4, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * 4096;
    for_lanes(std::min(size, end * 4096) - first, [&](int64_t i, int64_t n) {
      Vec total(0.f);
      for (int64_t p = 0; p < kParts; ++p) total = total + load_lanes(parts + p * part + first + i, n);
      store_lanes(out + first + i, total, n);
    });
  });
}

struct Trained {
  Rows rows;
  Tensor weight, targets, row_weights;  // storage dtype, int64, fp32; contiguous
};

// Writes logprobs (n,), and dh (n, D) and dw in fp32 where they are defined; dw has the form that Sums says.
void train_rows(const Trained& in, const Blocks& words, const Tensor& logprobs, const Tensor& dh, const Tensor& dw) {
  const int64_t d = in.rows.d;
  const Blocks chunks(in.rows.n, kRows);
  const int64_t stride = padded(in.weight.size(0)), most = chunks.largest();
  auto z = at::empty({most, stride}, at::kFloat);
  auto parts = at::empty({dh.defined() ? kParts : 0, most, d}, at::kFloat);
  const Sums sums{dh.defined() ? parts.mutable_data_ptr<float>() : nullptr,
                  dw.defined() ? dw.mutable_data_ptr<float>() : nullptr, most * d};
  std::vector<Stats> stats(words.count * most);
  std::vector<RowGrad> grads(most);
  const int64_t* targets = in.targets.const_data_ptr<int64_t>();
  const float* row_weights = in.row_weights.const_data_ptr<float>();
  for (int64_t c = 0; c < chunks.count; ++c) {
    const int64_t r0 = chunks.begin(c), n = chunks.end(c) - r0;
    const Chunk chunk{in.rows, r0, r0 + n, z.mutable_data_ptr<float>(), stride};
    chunk_logits(chunk, in.weight, words, stats.data());
    for (int64_t r = 0; r < n; ++r) {
      const Stats row = merge_stats(stats.data() + r, words.count, n);
      const int64_t target = targets[r0 + r];
      logprobs.mutable_data_ptr<float>()[r0 + r] = logprob(row, chunk.row(r)[target]);
      grads[r] = {row_weights[r0 + r], 0, row.m, std::log(row.s), 0, target};
    }
    if (dh.defined()) parts.zero_();
    chunk_gradients(chunk, in.weight, words, grads.data(), sums, c == 0);
    if (dh.defined()) sum_parts(sums.dh_parts, sums.part, n * d, dh.mutable_data_ptr<float>() + r0 * d);
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

// dW in the weight's dtype, from the fp32 sums.
Tensor finished(const Tensor& dw, const Tensor& weight, const Blocks& words, bool bf16) {
  if (!bf16) return dw.to(weight.scalar_type());
  const int64_t d = weight.size(1);
  auto out = at::empty(weight.sizes(), weight.options());
  at::parallel_for(0, words.count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t first = words.begin(t), count = words.end(t) - first;
      transpose_to_bf16(dw.const_data_ptr<float>() + first * d, whole_grains(count), count, d,
                        out.mutable_data_ptr<BFloat16>() + first * d);
    }
  });
  return out;
}

// Rows of weight zero get their logprob and no gradient work.
std::tuple<Tensor, Tensor, Tensor, Tensor> linear_cross_entropy(const Tensor& hidden_, const Tensor& weight_,
                                                                const Tensor& targets_, const Tensor& row_weights_,
                                                                bool need_hidden, bool need_weight) {
  const auto hidden = hidden_.contiguous(), weight = weight_.contiguous();
  const auto targets = checked_targets(targets_, weight.size(0)), row_weights = row_weights_.contiguous();
  const auto none = at::empty({0}, hidden.options()), no_weight = at::empty({0}, weight.options());
  if (!need_hidden && !need_weight) {
    const auto logprobs = std::get<0>(linear_logprob(hidden, weight, targets, 1.0, false));
    return {weighted_loss(logprobs, row_weights), logprobs, none, no_weight};
  }
  const float* w = row_weights.const_data_ptr<float>();
  const int64_t n = hidden.size(0), d = hidden.size(1);
  const auto kept = kept_rows(n, [&](int64_t i) { return w[i] != 0; });
  const Trained in{Rows(gather_rows(hidden, kept), bf16_route(hidden, weight)), weight, gather_rows(targets, kept),
                   gather_rows(row_weights, kept)};
  const auto fp32 = hidden.options().dtype(at::kFloat);
  const Blocks words(weight.size(0), kWords, kParts);
  auto dw = !need_weight ? Tensor()
            : in.rows.n  ? at::empty({in.rows.bf16 ? whole_grains(words.n) : words.n, d}, fp32)
                         : at::zeros(weight.sizes(), fp32);
  auto dh = need_hidden ? at::empty({in.rows.n, d}, fp32) : Tensor();
  auto logprobs = at::empty({in.rows.n}, fp32);
  if (in.rows.n) train_rows(in, words, logprobs, dh, dw);
  if (need_weight) dw = finished(dw, weight, words, in.rows.bf16 && in.rows.n);
  if (kept.defined()) {
    const auto rest = kept_rows(n, [&](int64_t i) { return w[i] == 0; });
    const auto others = gather_rows(hidden, rest), other_targets = gather_rows(targets, rest);
    const auto untrained = std::get<0>(linear_logprob(others, weight, other_targets, 1.0, false));
    logprobs = scatter_rows(logprobs, kept, n);
    if (rest.defined()) logprobs.index_copy_(0, rest, untrained); else logprobs = untrained;
  }
  return {weighted_loss(logprobs, row_weights), logprobs,
          need_hidden ? scatter_rows(dh.to(hidden.scalar_type()), kept, n) : none, need_weight ? dw : no_weight};
}

}  // namespace

TORCH_LIBRARY_IMPL(hpsafety_cpu, CPU, m) { m.impl("linear_cross_entropy", &linear_cross_entropy); }

}  // namespace hpsafety
