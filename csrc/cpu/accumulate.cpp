// accumulate_: total += grad, fp32 += fp32 or bf16 in one pass. torch's own add_ of two dtypes makes an fp32 copy of
// the gradient first. Limit: bytes (10 per element for bf16).

#include "common.h"

namespace hpsafety {
namespace {

constexpr int64_t kGrain = 32768;  // elements a thread takes at least

void accumulate_(const Tensor& total, const Tensor& grad) {
  TORCH_CHECK_VALUE(total.scalar_type() == at::kFloat && total.is_contiguous() && grad.is_contiguous() &&
                        total.sizes() == grad.sizes(),
                    "accumulate_: total must be contiguous float32 of grad's shape ", grad.sizes(), ", got ",
                    total.sizes(), " ", total.scalar_type());
  float* out = total.mutable_data_ptr<float>();
  dispatch(grad, "accumulate_", [&](auto tag) {
    const auto* in = grad.const_data_ptr<decltype(tag)>();
    at::parallel_for(0, total.numel(), kGrain, [&](int64_t begin, int64_t end) {
      for_lanes(end - begin, [&](int64_t i, int64_t n) {
        i += begin;
        store_lanes(out + i, load_lanes(out + i, n) + load_lanes(in + i, n), n);
      });
    });
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(hpsafety_cpu, CPU, m) { m.impl("accumulate_", &accumulate_); }

}  // namespace hpsafety
