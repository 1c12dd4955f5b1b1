// The backward by recomputation that linear_logprob and distill_loss share: per tile of the vocabulary the logits again,
// their gradient dz in place, and both GEMMs with dz. Holds dz of 2048 rows against one tile, no more.
#pragma once

#include <c10/util/FunctionRef.h>

#include "linear_gemm.h"

namespace hpsafety {

constexpr int64_t kGroup = 4096;  // rows of a forward in one go: bounds the partial statistics

// What an op adds to the skeleton. `load` is called once per tile of the vocabulary, by one thread; `fill` turns the
// logits of rows [begin, end), which are rows of the gathered hidden, into dz (scaled by alpha) in place; `spare` is a
// second buffer of the same form, one per thread, given where wants_spare.
struct DlogitOp {
  c10::function_ref<void(int64_t tile)> load;
  c10::function_ref<void(const WordTile& tile, int64_t begin, int64_t end, float* z, float* spare, int64_t stride)> fill;
  bool wants_spare;
};

// dH (n, D) and dW (V, D) in the dtypes of hidden and weight; empty where not wanted. n > 0.
std::tuple<Tensor, Tensor> linear_backward(const Tensor& hidden, const Tensor& weight, double alpha, bool need_hidden,
                                           bool need_weight, const DlogitOp& op);

// Indices of the rows that `wanted` keeps; undefined when that is all of them.
Tensor kept_rows(int64_t n, c10::function_ref<bool(int64_t)> wanted);
Tensor gather_rows(const Tensor& rows, const Tensor& index);  // contiguous; all rows when index is undefined
// The gathered rows back at their places in zeros of shape (n, ...).
Tensor scatter_rows(const Tensor& rows, const Tensor& index, int64_t n);

}  // namespace hpsafety
