// linear_logprob around its GEMMs, which a BLAS makes: the running softmax over one chunk of the vocabulary's logits,
// the results, the gradient of a chunk's logits in place, and the rows that have a gradient.
// Limit: bytes, the chunk's logits once (in the L2 cache where it holds them); the GEMMs take longer.
#include "reduce.cuh"

namespace {

constexpr int THREADS = 128;               // of a row
constexpr int WORDS = 8;                   // 16-byte words of logits that a thread holds at a time
constexpr int TILE = THREADS * WORDS * 4;  // logits: a row's sums run tile by tile, whatever the chunks are

struct Larger {
  __device__ __forceinline__ float operator()(float a, float b) const { return fmaxf(a, b); }
};
__device__ __forceinline__ float* room_of() {
  SIMT_SHARED(float, room);
  return room;
}

// What exponents are taken against: the largest logit, or 0 where there is none above -inf yet.
__device__ __forceinline__ float finite_reference(float m) { return m == -INFINITY ? 0.f : m; }

// Rounded before the maximum is subtracted, in the forward as in the backward: no FMA.
__device__ __forceinline__ float scaled(float logit, float alpha) { return __fmul_rn(logit, alpha); }

// A thread's share of a tile: word w holds the logits 4 (w THREADS + thread) and on. -inf behind the row's end.
struct Share {
  float z[WORDS][4];
  static __device__ __forceinline__ int64_t at(int word) {
    return (word * THREADS + static_cast<int>(threadIdx.x)) * 4;
  }
  __device__ __forceinline__ void load(const float* row, int64_t words, float alpha) {
#pragma unroll
    for (int w = 0; w < WORDS; w++) {
      float4 raw = at(w) < words ? reinterpret_cast<const float4*>(row)[at(w) / 4] : float4{0, 0, 0, 0};
      float part[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
      for (int i = 0; i < 4; i++) z[w][i] = at(w) + i < words ? scaled(part[i], alpha) : -INFINITY;
    }
  }
};

__device__ __forceinline__ int64_t target_of(const void* targets, int64_t row, int targets64) {
  return targets64 ? static_cast<const int64_t*>(targets)[row] : static_cast<const int32_t*>(targets)[row];
}

// Of z = alpha logits, per row and over all chunks so far: m = max z, s = sum exp(z - m), u = sum exp(z - m) (z - m)
// for the entropy, and z of the target, NaN as long as no chunk holds it. A NaN comes out in s, whatever m is then.
template <bool ENTROPY>
__global__ void __launch_bounds__(THREADS)
    update(const float* logits, int64_t stride, int64_t words, int64_t first_word, const void* targets, int targets64,
           float alpha, float* m, float* s, float* u, float* at_target) {
  float* room = room_of();
  int64_t row = blockIdx.x;
  const float* here = logits + row * stride;
  bool begin = first_word == 0;
  float top = begin ? -INFINITY : m[row], sum = begin ? 0 : s[row], weighted = begin || !ENTROPY ? 0 : u[row];
  for (int64_t start = 0; start < words; start += TILE) {
    Share share;
    share.load(here + start, words - start, alpha);
    float most = -INFINITY;
#pragma unroll
    for (int w = 0; w < WORDS; w++)
#pragma unroll
      for (int i = 0; i < 4; i++) most = fmaxf(most, share.z[w][i]);
    float before = finite_reference(top), old = top;
    top = fmaxf(top, reduce_block<THREADS>(most, Larger(), room));
    float reference = finite_reference(top), part = 0, weighted_part = 0;
#pragma unroll
    for (int w = 0; w < WORDS; w++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        float below = share.z[w][i] - reference, e = expf(below);
        part += e;
        if (ENTROPY) weighted_part += e == 0 ? 0 : e * below;
      }
    part = reduce_block<THREADS>(part, Add(), room);
    float scale = expf(old - reference);
    if (ENTROPY) {
      weighted_part = reduce_block<THREADS>(weighted_part, Add(), room);
      weighted = fmaf(scale, weighted + (before - reference) * sum, weighted_part);
    }
    sum = fmaf(scale, sum, part);
  }
  if (threadIdx.x == 0) {
    m[row] = top;
    s[row] = sum;
    if (ENTROPY) u[row] = weighted;
    int64_t target = target_of(targets, row, targets64) - first_word;
    if (target >= 0 && target < words)
      at_target[row] = scaled(here[target], alpha);
    else if (begin)
      at_target[row] = NAN;
  }
}

// logprob, norm (m, log s) and entropy. A row without a finite maximum is NaN, and so is one whose target is no word.
__global__ void __launch_bounds__(THREADS)
    finish(const float* m, const float* s, const float* u, const float* at_target, float* logprobs, float* norm,
           float* entropies, int64_t rows) {
  int64_t row = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  if (row >= rows) return;
  float log_s = m[row] == -INFINITY ? NAN : logf(s[row]);
  logprobs[row] = (at_target[row] - m[row]) - log_s;  // <= 0: the target is rounded as m is, and s is at least 1
  norm[row] = m[row];
  norm[rows + row] = log_s;
  if (u) entropies[row] = log_s - u[row] / s[row];
}

// Gradients come in by row; a row whose are zero has none and may hold anything. NaN is a gradient.
struct Incoming {
  const float *logprob, *entropy;  // entropy may be null, both where all rows count
  __device__ __forceinline__ bool kept(int64_t row) const {
    return !logprob || logprob[row] != 0 || (entropy && entropy[row] != 0);
  }
};

// A chunk's logits become dz = p (a + b (log p + H)), and -a more at the target, with a and b the row's gradients over
// -temperature; zeros in rows without gradient. BF16: at the start of the row's place, rounded.
template <bool BF16, bool ENTROPY>
__global__ void __launch_bounds__(THREADS)
    dlogits(float* logits, int64_t stride, int64_t words, int64_t first_word, const void* targets, int targets64,
            float alpha, Incoming incoming, const float* m, const float* log_s, const float* entropies) {
  int64_t row = blockIdx.x;
  float* here = logits + row * stride;
  bool kept = incoming.kept(row);
  int64_t target = target_of(targets, row, targets64) - first_word;
  float a = -incoming.logprob[row] * alpha, b = ENTROPY ? -incoming.entropy[row] * alpha : 0;
  float h = ENTROPY ? entropies[row] : 0, top = m[row], log_sum = log_s[row];
  for (int64_t start = 0; start < words; start += TILE) {
    Share share;
    if (kept) share.load(here + start, words - start, alpha);
    if (BF16) __syncthreads();  // a tile's results lie where others read: its own logits, or those of a tile before
#pragma unroll
    for (int w = 0; w < WORDS; w++) {
      int64_t at = start + Share::at(w);
      if (at >= words) break;
      float dz[4];
#pragma unroll
      for (int i = 0; i < 4; i++) {
        float log_p = (share.z[w][i] - top) - log_sum, p = expf(log_p);
        dz[i] = ENTROPY ? (p == 0 ? 0 : p * fmaf(b, log_p + h, a)) : p * a;
        if (at + i == target) dz[i] -= a;
        if (!kept) dz[i] = 0;
      }
      if constexpr (BF16) {
        uint2 packed = {pack_bf16(dz[0], dz[1]), pack_bf16(dz[2], dz[3])};
        reinterpret_cast<uint2*>(here)[at / 4] = packed;
      } else {
        reinterpret_cast<float4*>(here)[at / 4] = float4{dz[0], dz[1], dz[2], dz[3]};
      }
    }
  }
}

// What a thread of keep_rows takes at a time: as it stands, or from fp32 to bf16.
template <class From, class To>
struct Move {
  using In = uint4;
  using Out = uint4;
  static __device__ __forceinline__ uint4 words(uint4 x) { return x; }
  static __device__ __forceinline__ To element(From x) { return x; }
};
template <>
struct Move<float, __nv_bfloat16> {
  using In = float4;
  using Out = uint2;
  static __device__ __forceinline__ uint2 words(float4 x) { return uint2{pack_bf16(x.x, x.y), pack_bf16(x.z, x.w)}; }
  static __device__ __forceinline__ __nv_bfloat16 element(float x) { return __float2bfloat16_rn(x); }
};

// Copies rows that have a gradient, and zeros in the place of the others.
template <class From, class To>
__global__ void __launch_bounds__(THREADS)
    keep_rows(const From* from, int64_t stride, To* to, int64_t width, Incoming incoming, int words) {
  using M = Move<From, To>;
  int64_t row = blockIdx.x;
  const From* x = from + row * stride;
  To* y = to + row * width;
  bool kept = incoming.kept(row);
  if (words) {
    int64_t count = width / static_cast<int64_t>(16 / sizeof(From));
#pragma unroll 4
    for (int64_t i = threadIdx.x; i < count; i += THREADS)
      reinterpret_cast<typename M::Out*>(y)[i] =
          kept ? M::words(reinterpret_cast<const typename M::In*>(x)[i]) : typename M::Out{};
  } else {
    for (int64_t i = threadIdx.x; i < width; i += THREADS) y[i] = kept ? M::element(x[i]) : To{};
  }
}

bool aligned(const void* p, int64_t bytes) { return reinterpret_cast<uintptr_t>(p) % 16 == 0 && bytes % 16 == 0; }
bool grid_fits(int64_t rows) { return rows > 0 && rows <= INT32_MAX; }
const float* floats(const void* p) { return static_cast<const float*>(p); }
float* floats(void* p) { return static_cast<float*>(p); }

}  // namespace

// logits (rows, words) of the words from first_word on, `stride` apart, a multiple of 4; m, s, u (null without entropy)
// and at_target (rows,) begin with the chunk of word 0 and go on with the others in order.
extern "C" int hps_logprob_update(const void* logits, int64_t rows, int64_t words, int64_t stride, int64_t first_word,
                                  const void* targets, int targets64, float alpha, void* m, void* s, void* u,
                                  void* at_target, void* stream) {
  if (!grid_fits(rows) || words <= 0 || stride < words || !aligned(logits, stride * 4)) return BAD_ARGUMENT;
  auto launch = [&](auto one) {
    return SIMT_LAUNCH((one.kernel), dim3(static_cast<unsigned>(rows)), dim3(THREADS), THREADS / 32 * sizeof(float), stream,
                       floats(logits), stride, words, first_word, targets, targets64, alpha, floats(m), floats(s),
                       floats(u), floats(at_target));
  };
  return u ? launch(One<update<true>>{}) : launch(One<update<false>>{});
}

extern "C" int hps_logprob_finish(const void* m, const void* s, const void* u, const void* at_target, void* logprobs,
                                  void* norm, void* entropies, int64_t rows, void* stream) {
  int64_t blocks = (rows + THREADS - 1) / THREADS;
  if (!grid_fits(blocks)) return BAD_ARGUMENT;
  return SIMT_LAUNCH((finish), dim3(static_cast<unsigned>(blocks)), dim3(THREADS), 0, stream, floats(m), floats(s),
                     floats(u), floats(at_target), floats(logprobs), floats(norm), floats(entropies), rows);
}

// In place: bf16 = 1 leaves the first half of each row as bf16.
extern "C" int hps_logprob_dlogits(void* logits, int64_t rows, int64_t words, int64_t stride, int64_t first_word,
                                   const void* targets, int targets64, float alpha, const void* grad,
                                   const void* grad_entropy, const void* m, const void* log_s, const void* entropies,
                                   int bf16, void* stream) {
  if (!grid_fits(rows) || words <= 0 || stride < words || !aligned(logits, stride * 4) || !grad) return BAD_ARGUMENT;
  Incoming incoming{floats(grad), floats(grad_entropy)};
  auto launch = [&](auto one) {
    return SIMT_LAUNCH((one.kernel), dim3(static_cast<unsigned>(rows)), dim3(THREADS), 0, stream, floats(logits), stride,
                       words, first_word, targets, targets64, alpha, incoming, floats(m), floats(log_s),
                       floats(entropies));
  };
  if (grad_entropy) return bf16 ? launch(One<dlogits<true, true>>{}) : launch(One<dlogits<false, true>>{});
  return bf16 ? launch(One<dlogits<true, false>>{}) : launch(One<dlogits<false, false>>{});
}

// from (rows, width), `stride` elements apart, to dense rows; kind 0: fp32, 1: bf16, 2: fp32 to bf16.
extern "C" int hps_logprob_keep_rows(const void* from, int64_t stride, void* to, int64_t rows, int64_t width, int kind,
                                     const void* grad, const void* grad_entropy, void* stream) {
  if (!grid_fits(rows) || width <= 0 || kind < 0 || kind > 2) return BAD_ARGUMENT;
  Incoming incoming{floats(grad), floats(grad_entropy)};
  int64_t in = kind == 1 ? 2 : 4, out = kind == 0 ? 4 : 2;
  int words = aligned(from, stride * in) && aligned(to, width * out) && width * in % 16 == 0;
  auto launch = [&](auto one, auto* x, auto* y) {
    return SIMT_LAUNCH((one.kernel), dim3(static_cast<unsigned>(rows)), dim3(THREADS), 0, stream, x, stride, y, width,
                       incoming, words);
  };
  auto* half = static_cast<__nv_bfloat16*>(to);
  if (kind == 0) return launch(One<keep_rows<float, float>>{}, floats(from), floats(to));
  if (kind == 1) return launch(One<keep_rows<__nv_bfloat16, __nv_bfloat16>>{}, static_cast<const __nv_bfloat16*>(from), half);
  return launch(One<keep_rows<float, __nv_bfloat16>>{}, floats(from), half);
}
