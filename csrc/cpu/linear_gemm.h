// The GEMMs of the linear family: blocks of rows of hidden against tiles of the vocabulary, and back.
//
// The work is cut into blocks that depend on the shapes alone, one thread computes a whole block with the BLAS running
// serially, and partial results are merged in block order: the number of threads cannot change a bit.
// z = alpha * hidden @ weight^T with alpha = 1 / temperature. Two routes, chosen by dtype and CPU once per call:
// fp32 operands (bf16 converted tile by tile), or bf16 operands where the CPU multiplies them (bf16_gemm.h). Logits
// are fp32 on both; dz is rounded to bf16 on the second, as in any bf16 training.
#pragma once

#include "bf16_gemm.h"

namespace hpsafety {

constexpr int64_t kRows = 256;    // rows of a block; 64 rows cost a quarter of the GEMM rate, 512 gain nothing
constexpr int64_t kWords = 2048;  // vocabulary of a tile: 2 MB of logits per block, they do not leave the cache

// n cut into `count` nearly equal pieces of at most `size`, all but the last whole grains; count is a multiple of
// `multiple`, so that some pieces of a small n are empty.
struct Blocks {
  int64_t n, grains, count;
  Blocks(int64_t n, int64_t size, int64_t multiple = 1)
      : n(n), grains(whole_grains(n) / kGrain), count((n + size * multiple - 1) / (size * multiple) * multiple) {}
  int64_t begin(int64_t i) const { return std::min(n, grains * i / count * kGrain); }
  int64_t end(int64_t i) const { return begin(i + 1); }
  int64_t largest() const { return count ? (grains + count - 1) / count * kGrain : 0; }  // whole grains
};

// Row stride of a buffer of logits: whole cache lines, and off the powers of two, which alias in the cache.
inline int64_t padded(int64_t columns) { return whole_grains(columns) + 16; }

struct Matrix {
  const float* data;
  int64_t rows, cols, stride;
  bool transposed = false;
  Matrix t() const { return {data, rows, cols, stride, !transposed}; }
  Tensor tensor() const;
};
// c = beta * c + alpha * a @ b; with beta 0 what c held is never read.
void gemm(const Matrix& a, const Matrix& b, const Matrix& c, double alpha, double beta);

// bf16 operands: both bf16, a width of whole grains, and a CPU that multiplies them.
bool bf16_route(const Tensor& hidden, const Tensor& weight);

// Rows of hidden as the GEMMs read them: in place where that is possible, with zero rows at the end where it is not:
// at least kGrain (MKL's bits for a row differ for M below 8 and agree from 16 up), whole grains for bf16.
struct Rows {
  Tensor data;
  int64_t n, d;  // n without the zero rows
  bool bf16;
  Rows(const Tensor& hidden, bool bf16);
  int64_t padded_rows() const { return data.size(0); }
  int64_t padded_end(int64_t end) const { return end == n ? padded_rows() : end; }
  const float* fp32_row(int64_t r) const { return data.const_data_ptr<float>() + r * d; }
  const BFloat16* bf16_row(int64_t r) const { return data.const_data_ptr<BFloat16>() + r * d; }
  // (blocks, D, kRows): blocks of rows from `first` on, transposed: the left operand of the bf16 weight gradient.
  Tensor transposed(int64_t first, const Blocks& blocks) const;
};

// dz of one block of rows against one tile: fp32 as computed, and rounded for the bf16 GEMMs.
struct BlockGrad {
  float* z;
  int64_t stride;            // of z and of plain; pairs have as many pairs in a row
  BFloat16 *plain, *pairs;  // bf16 route only
};

// A tile of the vocabulary in the forms that the GEMMs read.
class WordTile {
 public:
  enum Use { kLogits = 1, kHiddenGrad = 2, kBoth = 3 };
  WordTile(const Tensor& weight, const Blocks& words, bool bf16, Use use);
  void load(int64_t tile);
  void place(int64_t tile);  // first and count alone, for a tile whose words are not read

  int64_t first = 0, count = 0;
  // z (end - begin, count) of these rows; z has room for whole grains both ways.
  void logits(const Rows& rows, int64_t begin, int64_t end, double alpha, float* z, int64_t stride) const;
  // dh (rows, D) = dz @ w, or += with add; plain of dz has been filled on the bf16 route.
  void hidden_gradient(const BlockGrad& dz, int64_t rows, float* dh, bool add) const;

 private:
  Tensor weight_, forward_, backward_;  // forward_: fp32 words or pairs along D; backward_: pairs along the words
  Blocks words_;
  int64_t d_, stride_;
  bool bf16_;
  Use use_;
  const float* w_ = nullptr;  // fp32 route
};

}  // namespace hpsafety
