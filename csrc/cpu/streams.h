// What the losses over rows of N numbers share (ppo_loss, pair_loss, gae): rows in either storage type read as fp32,
// sums in double whose order does not depend on the threads, and the loss's denominator.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "common.h"

namespace hpsafety {

constexpr int64_t kBlock = 4096;  // elements summed to one partial; partials are added in block order
constexpr int64_t kGrain = 4;     // blocks per thread at least: below 16,384 elements a second thread costs more

// A row of n numbers, fp32 or bf16, read as fp32. The branch is the same for a whole call: one kernel serves every mix
// of the two.
class Stream {
  Tensor held_;
  const float* fp32_ = nullptr;
  const BFloat16* bf16_ = nullptr;

 public:
  Stream(const Tensor& t, int64_t n, const char* name) : held_(t.contiguous()) {
    TORCH_CHECK_VALUE(t.dim() == 1 && t.size(0) == n, name, " must be (", n, ",), got ", t.sizes());
    dispatch(t, name, [&](auto tag) {
      using T = decltype(tag);
      if constexpr (std::is_same_v<T, float>) fp32_ = held_.const_data_ptr<float>();
      else bf16_ = held_.const_data_ptr<BFloat16>();
    });
  }
  Vec at(int64_t i, int64_t lanes) const {
    return fp32_ ? load_lanes(fp32_ + i, lanes) : load_lanes(bf16_ + i, lanes);
  }
  float operator[](int64_t i) const { return fp32_ ? fp32_[i] : static_cast<float>(bf16_[i]); }
  // Elements [i, i + n) as fp32: in place when they are, otherwise converted into scratch.
  const float* range(int64_t i, int64_t n, float* scratch) const {
    if (fp32_) return fp32_ + i;
    for_lanes(n, [&](int64_t k, int64_t lanes) { store_lanes(scratch + k, at(i + k, lanes), lanes); });
    return scratch;
  }
};

// A sum of fp32 vectors in double; lanes are added up in order.
class DoubleSum {
  using Doubles = at::vec::Vectorized<double>;
  static constexpr int64_t kHalf = Doubles::size();
  static_assert(2 * kHalf == kLanes);
  Doubles low_{0.}, high_{0.};

 public:
  void add(Vec v) {
    float x[kLanes];
    double wide[kLanes];
    v.store(x);
    for (int64_t i = 0; i < kLanes; ++i) wide[i] = x[i];
    low_ = low_ + Doubles::loadu(wide);
    high_ = high_ + Doubles::loadu(wide + kHalf);
  }
  double total() const {
    double lanes[kLanes], sum = 0;
    low_.store(lanes);
    high_.store(lanes + kHalf);
    for (double lane : lanes) sum += lane;
    return sum;
  }
};

// All bits set in the first `lanes` lanes for which bytes is not 0.
inline Vec lane_mask(const bool* bytes, int64_t lanes) {
  uint8_t tail[kLanes] = {};
  int32_t flags[kLanes];
  std::memcpy(tail, bytes, lanes);
  for (int64_t i = 0; i < kLanes; ++i) flags[i] = -static_cast<int32_t>(tail[i] != 0);
  return Vec::loadu(flags);
}
inline Vec zero_past(Vec v, int64_t lanes) { return lanes == kLanes ? v : Vec::set(Vec(0.f), v, lanes); }
inline Vec where(Vec condition, Vec yes, Vec no) { return Vec::blendv(no, yes, condition); }

// f(begin, end) of each block; the results in block order.
template <typename Partial, typename F>
std::vector<Partial> map_blocks(int64_t n, F&& f) {
  std::vector<Partial> partials((n + kBlock - 1) / kBlock);
  at::parallel_for(0, static_cast<int64_t>(partials.size()), kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) partials[b] = f(b * kBlock, std::min(n, (b + 1) * kBlock));
  });
  return partials;
}

// 1 / (the tensor, or the number, or else what this call counted); 0 for 0, so that nothing to average gives 0.
inline double inverse_count(const std::optional<Tensor>& tensor, std::optional<double> number, double counted) {
  if (tensor) TORCH_CHECK_VALUE(tensor->numel() == 1, "a count must be one number, got shape ", tensor->sizes());
  const double n = tensor ? tensor->item<double>() : number.value_or(counted);
  return n == 0 ? 0 : 1 / n;
}

}  // namespace hpsafety
