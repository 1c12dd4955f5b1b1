#include "linear_gemm.h"

#include <ATen/ops/addmm_cpu_dispatch.h>
#include <ATen/ops/from_blob.h>

namespace hpsafety {

Tensor Matrix::tensor() const {
  auto whole = const_cast<float*>(data);
  if (transposed) return at::from_blob(whole, {cols, rows}, {1, stride});
  return at::from_blob(whole, {rows, cols}, {stride, 1});
}

void gemm(const Matrix& a, const Matrix& b, const Matrix& c, double alpha, double beta) {
  auto out = c.tensor();
  at::cpu::addmm_out(out, out, a.tensor(), b.tensor(), beta, alpha);
}

bool bf16_route(const Tensor& hidden, const Tensor& weight) {
  return hidden.scalar_type() == at::kBFloat16 && weight.scalar_type() == at::kBFloat16 && hidden.size(1) > 0 &&
         hidden.size(1) % kGrain == 0 && multiplies_bf16();
}

Rows::Rows(const Tensor& hidden, bool bf16) : n(hidden.size(0)), d(hidden.size(1)), bf16(bf16) {
  data = hidden.to(bf16 ? at::kBFloat16 : at::kFloat).contiguous();
  const int64_t wanted = bf16 ? whole_grains(n) : std::max(n, kGrain);
  if (n == 0 || n == wanted) return;
  auto more = at::zeros({wanted, d}, data.options());
  more.narrow(0, 0, n).copy_(data);
  data = more;
}

Tensor Rows::transposed(int64_t first, const Blocks& blocks) const {
  auto out = at::empty({blocks.count, d, kRows}, data.options());
  at::parallel_for(0, blocks.count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const int64_t r0 = blocks.begin(b);
      transpose_bf16(bf16_row(first + r0), blocks.end(b) - r0, d, out.mutable_data_ptr<BFloat16>() + b * d * kRows, kRows);
    }
  });
  return out;
}

WordTile::WordTile(const Tensor& weight, const Blocks& words, bool bf16, Use use)
    : weight_(weight), words_(words), d_(weight.size(1)), stride_(padded(words.largest())), bf16_(bf16), use_(use) {
  if (bf16 && use & kLogits) forward_ = at::empty({d_, stride_}, weight.options());
  if (bf16 && use & kHiddenGrad) backward_ = at::empty({words.largest(), d_}, weight.options());
  if (!bf16 && weight.scalar_type() != at::kFloat) forward_ = at::empty({words.largest(), d_}, at::kFloat);
}

void WordTile::place(int64_t tile) { first = words_.begin(tile), count = words_.end(tile) - first; }

void WordTile::load(int64_t tile) {
  place(tile);
  if (weight_.scalar_type() == at::kFloat) {
    w_ = weight_.const_data_ptr<float>() + first * d_;
    return;
  }
  const auto* source = weight_.const_data_ptr<BFloat16>() + first * d_;
  at::parallel_for(0, whole_grains(count) / kGrain, 8, [&](int64_t begin, int64_t end) {  // serial inside a block
    const int64_t r = begin * kGrain, rows = std::min(count, end * kGrain) - r;
    if (!bf16_) {
      float* target = forward_.mutable_data_ptr<float>() + r * d_;
      for_lanes(rows * d_, [&](int64_t i, int64_t n) {
        store_lanes(target + i, load_lanes(source + r * d_ + i, n), n);
      });
      return;
    }
    if (use_ & kLogits) {
      pack_transposed(source + r * d_, rows, d_, forward_.mutable_data_ptr<BFloat16>() + 2 * r, stride_);
    }
    if (use_ & kHiddenGrad) {
      pack_pairs(source + r * d_, rows, d_, backward_.mutable_data_ptr<BFloat16>() + r * d_, d_);
    }
  });
  if (!bf16_) w_ = forward_.const_data_ptr<float>();
}

void WordTile::logits(const Rows& rows, int64_t begin, int64_t end, double alpha, float* z, int64_t stride) const {
  const int64_t last = rows.padded_end(end), n = last - begin;
  if (!bf16_) {
    gemm({rows.fp32_row(begin), n, d_, d_}, Matrix{w_, count, d_, d_}.t(), {z, n, count, stride}, alpha, 0);
    return;
  }
  bf16_gemm({rows.bf16_row(begin), d_}, {forward_.const_data_ptr<BFloat16>(), stride_}, z, stride, n,
            whole_grains(count), d_, false);
  if (alpha == 1) return;
  const Vec scale(static_cast<float>(alpha));
  for (int64_t r = 0; r < n; ++r) {
    float* row = z + r * stride;
    for_lanes(count, [&](int64_t i, int64_t k) { store_lanes(row + i, load_lanes(row + i, k) * scale, k); });
  }
}

void WordTile::hidden_gradient(const BlockGrad& dz, int64_t rows, float* dh, bool add) const {
  if (!bf16_) {
    gemm({dz.z, rows, count, dz.stride}, {w_, count, d_, d_}, {dh, rows, d_, d_}, 1, add ? 1 : 0);
    return;
  }
  bf16_gemm({dz.plain, dz.stride}, {backward_.const_data_ptr<BFloat16>(), d_}, dh, d_, whole_grains(rows), d_,
            whole_grains(count), add);
}

}  // namespace hpsafety
