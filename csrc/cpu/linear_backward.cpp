#include "linear_backward.h"

#include <ATen/ops/index_select.h>

namespace hpsafety {
namespace {

constexpr int64_t kUnit = 256;       // words of one piece of the weight gradient
constexpr int64_t kGradGroup = 2048;  // rows whose dz against one tile stands at once: 17 MB in fp32, half for bf16

class Backward {
 public:
  Backward(const Tensor& hidden, const Tensor& weight, double alpha, bool need_hidden, bool need_weight,
           const DlogitOp& op)
      : rows_(hidden, bf16_route(hidden, weight)),
        weight_(weight),
        words_(weight.size(0), kWords),
        groups_(rows_.n, kGradGroup),
        tile_(weight, words_, rows_.bf16, need_hidden ? WordTile::kBoth : WordTile::kLogits),
        op_(op),
        alpha_(alpha),
        d_(rows_.d),
        stride_(padded(words_.largest())) {
    const auto fp32 = weight.options().dtype(at::kFloat);
    const int64_t most = std::min(rows_.padded_rows(), groups_.largest());
    if (need_hidden) dh_ = at::empty({rows_.padded_rows(), d_}, fp32);
    if (need_weight) dw_ = at::empty(weight.sizes(), weight.options());
    if (need_weight && weight.scalar_type() != at::kFloat) {
      dw_tile_ = at::empty({words_.largest(), d_}, fp32);
    }
    // dz of a group: fp32 rows, or pairs of bf16 rows, which are half of that.
    if (rows_.bf16 ? need_weight : true) dz_ = at::empty({rows_.bf16 ? most / 2 : most, stride_}, fp32);
  }

  std::tuple<Tensor, Tensor> run() {
    for (int64_t t = 0; t < words_.count; ++t) {
      tile_.load(t);
      op_.load(t);
      for (int64_t g = 0; g < groups_.count; ++g) {
        // An even number of blocks, so that two threads finish together.
        const int64_t n = groups_.end(g) - groups_.begin(g), size = rows_.n >= 8 * kRows ? kRows : kRows / 2;
        const Blocks blocks(n, size, n > 64 ? 2 : 1);
        row_blocks(g, blocks);
        if (dw_.defined()) word_units(g, blocks);
      }
    }
    auto dh = at::empty({0}, rows_.data.options()), dw = at::empty({0}, weight_.options());
    if (dh_.defined()) dh = dh_.narrow(0, 0, rows_.n);
    return {dh, dw_.defined() ? dw_ : dw};
  }

 private:
  // Logits, dz and dH by blocks of rows, each owning its rows.
  void row_blocks(int64_t g, const Blocks& blocks) {
    const int64_t r0 = groups_.begin(g);
    at::parallel_for(0, blocks.count, 1, [&](int64_t begin, int64_t end) {
      const auto fp32 = at::TensorOptions(at::kFloat);
      const int64_t most = blocks.largest();
      auto z = at::empty({rows_.bf16 ? most : 0, stride_}, fp32);
      auto spare = at::empty({op_.wants_spare ? most : 0, stride_}, fp32);
      auto plain = at::empty({rows_.bf16 && dh_.defined() ? most : 0, stride_}, fp32.dtype(at::kBFloat16));
      for (int64_t b = begin; b < end; ++b) {
        const int64_t first = blocks.begin(b), n = blocks.end(b) - first, r = r0 + first;
        BlockGrad dz{z.mutable_data_ptr<float>(), stride_, nullptr, nullptr};
        if (!rows_.bf16) dz.z = dz_.mutable_data_ptr<float>() + first * stride_;
        tile_.logits(rows_, r, r + n, alpha_, dz.z, stride_);
        op_.fill(tile_, r, r + n, dz.z, spare.mutable_data_ptr<float>(), stride_);
        if (rows_.bf16) {
          if (dh_.defined()) dz.plain = plain.mutable_data_ptr<BFloat16>();
          if (dw_.defined()) dz.pairs = pairs(first);
          round_to_bf16(dz.z, stride_, n, tile_.count, dz.plain, dz.pairs, stride_);
        }
        if (!dh_.defined()) continue;
        const int64_t padded_n = rows_.padded_end(r + n) - r;
        tile_.hidden_gradient(dz, padded_n, dh_.mutable_data_ptr<float>() + r * d_, tile_.first > 0);
      }
    });
  }

  // dW by pieces of the tile, each owning its words, over all rows of the group.
  void word_units(int64_t g, const Blocks& blocks) {
    const int64_t r0 = groups_.begin(g), n = rows_.padded_end(groups_.end(g)) - r0;
    const Blocks units(tile_.count, kUnit);
    if (rows_.bf16 && tile_.first == 0) transposed_.push_back(rows_.transposed(r0, blocks));
    at::parallel_for(0, units.count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t u = begin; u < end; ++u) {
        const int64_t c = units.begin(u), count = units.end(u) - c, first = (tile_.first + c) * d_;
        float* target = dw_tile_.defined() ? dw_tile_.mutable_data_ptr<float>() + c * d_
                                           : dw_.mutable_data_ptr<float>() + first;
        if (rows_.bf16) {
          unit_from_pairs(g, blocks, c, count, target);
        } else {
          const Matrix dz{dz_.const_data_ptr<float>() + c, n, count, stride_};
          gemm(dz.t(), {rows_.fp32_row(r0), n, d_, d_}, {target, count, d_, d_}, 1, g ? 1 : 0);
        }
        if (dw_tile_.defined() && g + 1 == groups_.count) store_unit(target, count, first);
      }
    });
  }

  // target (D, count) (+)= H^T dz, block after block.
  void unit_from_pairs(int64_t g, const Blocks& blocks, int64_t c, int64_t count, float* target) {
    const int64_t width = whole_grains(count);
    bool add = g > 0;
    for (int64_t b = 0; b < blocks.count; ++b) {
      const int64_t first = blocks.begin(b), n = whole_grains(blocks.end(b) - first);
      if (n == 0) continue;
      const auto* h = transposed_[g].const_data_ptr<BFloat16>() + b * d_ * kRows;
      bf16_gemm({h, kRows}, {pairs(first) + 2 * c, stride_}, target, width, d_, width, n, add);
      add = true;
    }
  }

  void store_unit(const float* source, int64_t count, int64_t first) {
    auto* target = dw_.mutable_data_ptr<BFloat16>() + first;
    if (rows_.bf16) {
      transpose_to_bf16(source, whole_grains(count), count, d_, target);
    } else {
      for_lanes(count * d_, [&](int64_t i, int64_t n) { store_lanes(target + i, load_lanes(source + i, n), n); });
    }
  }

  BFloat16* pairs(int64_t row) {
    return reinterpret_cast<BFloat16*>(dz_.mutable_data_ptr<float>() + row / 2 * stride_);
  }

  Rows rows_;
  Tensor weight_;
  Blocks words_, groups_;
  WordTile tile_;
  const DlogitOp& op_;
  double alpha_;
  int64_t d_, stride_;
  Tensor dh_, dw_, dw_tile_, dz_;
  std::vector<Tensor> transposed_;  // of each group, bf16 route
};

}  // namespace

std::tuple<Tensor, Tensor> linear_backward(const Tensor& hidden, const Tensor& weight, double alpha, bool need_hidden,
                                           bool need_weight, const DlogitOp& op) {
  auto [dh, dw] = Backward(hidden, weight, alpha, need_hidden, need_weight, op).run();
  return {dh.to(hidden.scalar_type()).contiguous(), dw};
}

Tensor kept_rows(int64_t n, c10::function_ref<bool(int64_t)> wanted) {
  std::vector<int64_t> kept;
  for (int64_t i = 0; i < n; ++i) {
    if (wanted(i)) kept.push_back(i);
  }
  const int64_t count = static_cast<int64_t>(kept.size());
  if (count == n) return {};
  auto index = at::empty({count}, at::kLong);
  std::copy(kept.begin(), kept.end(), index.mutable_data_ptr<int64_t>());
  return index;
}

Tensor gather_rows(const Tensor& rows, const Tensor& index) {
  return index.defined() ? at::index_select(rows, 0, index) : rows.contiguous();
}

Tensor scatter_rows(const Tensor& rows, const Tensor& index, int64_t n) {
  if (!index.defined()) return rows;
  auto sizes = rows.sizes().vec();
  sizes[0] = n;
  return at::zeros(sizes, rows.options()).index_copy_(0, index, rows);
}

}  // namespace hpsafety
