// ppo_loss in two launches: one pass over the tokens with all gradients of n * loss and a block's sums, then their sum.
// Limit: bytes, 25 (29 with entropy) read and 8 (12) written a token in fp32; rows are read in 16-byte words.
#include "reduce.cuh"

namespace {

constexpr int THREADS = 128;
constexpr int TOKENS = 8;                  // of a thread: one word of a bf16 row, two of an fp32 one
constexpr int BLOCK = THREADS * TOKENS;    // tokens
constexpr int SUM_THREADS = 256;

// A block's partial results, in fp64; (PARTIALS, blocks) in memory.
enum { SURROGATE, VALUE, ENTROPY, KL, OUTSIDE, ACTIVE, LARGEST, PARTIALS };

struct Row {
  const void* at;
  int bf16;   // else fp32
  int words;  // at a 16-byte address
};
struct Tokens {
  Row logprobs, old_logprobs, advantages, values, old_values, returns, entropy;  // entropy may be null
  const unsigned char* mask;
  int mask_words;  // at an 8-byte address
};
struct Settings {
  float clip_ratio, low, high, value_clip, value_coef, entropy_coef;
};

// The larger of two, NaN where either is.
struct Largest {
  template <class V>
  __device__ __forceinline__ V operator()(V a, V b) const {
    return a > b || a != a ? a : b;
  }
};

// Eight numbers as they stand in memory. Reading and widening are apart, so that the reads of all rows are under way
// before the first is waited for.
struct Numbers {
  uint32_t raw[TOKENS];
  bool packed;  // pairs of bf16 in the first half

  __device__ __forceinline__ void read(const Row& row, int64_t first, int count) {
    packed = false;
    if (row.words && count == TOKENS) {
      packed = row.bf16;
      const uint4* word = static_cast<const uint4*>(row.at) + first / (row.bf16 ? 8 : 4);
      uint4 low = word[0], high = make_uint4(0u, 0u, 0u, 0u);
      if (!row.bf16) high = word[1];
      raw[0] = low.x, raw[1] = low.y, raw[2] = low.z, raw[3] = low.w;
      raw[4] = high.x, raw[5] = high.y, raw[6] = high.z, raw[7] = high.w;
      return;
    }
#pragma unroll
    for (int i = 0; i < TOKENS; i++) {
      raw[i] = 0;
      if (i >= count) continue;
      if (row.bf16)
        raw[i] = static_cast<uint32_t>(static_cast<const uint16_t*>(row.at)[first + i]) << 16;
      else
        raw[i] = static_cast<const uint32_t*>(row.at)[first + i];
    }
  }
  // i is known when compiled. What is masked may hold anything.
  __device__ __forceinline__ float at(int i, bool active) const {
    uint32_t pair = raw[i / 2], bits = packed ? (i % 2 ? pair & 0xffff0000u : pair << 16) : raw[i];
    return active ? __uint_as_float(bits) : 0.f;
  }
};

__device__ __forceinline__ uint32_t read_mask(const unsigned char* mask, int words, int64_t first, int count) {
  uint32_t active = 0;
  if (words && count == TOKENS) {
    uint2 bytes = *reinterpret_cast<const uint2*>(mask + first);
#pragma unroll
    for (int i = 0; i < TOKENS; i++) active |= ((i < 4 ? bytes.x : bytes.y) >> (i % 4 * 8) & 0xff ? 1u : 0u) << i;
  } else {
#pragma unroll
    for (int i = 0; i < TOKENS; i++)
      if (i < count && mask[first + i]) active |= 1u << i;
  }
  return active;
}
__device__ __forceinline__ void write(float* to, const float (&x)[TOKENS], int words, int count) {
  if (words && count == TOKENS) {
    reinterpret_cast<float4*>(to)[0] = make_float4(x[0], x[1], x[2], x[3]);
    reinterpret_cast<float4*>(to)[1] = make_float4(x[4], x[5], x[6], x[7]);
  } else {
#pragma unroll
    for (int i = 0; i < TOKENS; i++)
      if (i < count) to[i] = x[i];
  }
}

// NaN stays NaN.
__device__ __forceinline__ float clamp(float x, float low, float high) { return x < low ? low : x > high ? high : x; }

// exp(d) - 1 - d. Near 0 the difference has no digits left, so there the Taylor series to d^9 / 9! serves; at
// |d| = 0.5 what it leaves out is 2e-9 of the whole.
__device__ __forceinline__ float k3(float d, float ratio) {
  float series = fmaf(d, 1.f / 362880, 1.f / 40320);
  series = fmaf(series, d, 1.f / 5040);
  series = fmaf(series, d, 1.f / 720);
  series = fmaf(series, d, 1.f / 120);
  series = fmaf(series, d, 1.f / 24);
  series = fmaf(series, d, 1.f / 6);
  series = fmaf(series, d, 0.5f);
  return fabsf(d) < 0.5f ? series * d * d : ratio - 1.f - d;
}

// Of a thread or a block; counts are exact in double.
struct Partial {
  double of[PARTIALS];
};

// All threads' partials to `out`, `apart` doubles from one to the next. room holds PARTIALS doubles a warp; used once.
template <int WIDTH>
__device__ __forceinline__ void add_up(Partial& mine, double* room, double* out, int64_t apart) {
  int warp = threadIdx.x / 32;
#pragma unroll
  for (int p = 0; p < PARTIALS; p++) {
    mine.of[p] = p == LARGEST ? reduce_warp(mine.of[p], Largest()) : reduce_warp(mine.of[p], Add());
    if (threadIdx.x % 32 == 0) room[warp * PARTIALS + p] = mine.of[p];
  }
  __syncthreads();
  if (threadIdx.x < PARTIALS) {
    double total = room[threadIdx.x];
    for (int w = 1; w < WIDTH / 32; w++) {
      double x = room[w * PARTIALS + threadIdx.x];
      total = threadIdx.x == LARGEST ? Largest()(total, x) : total + x;
    }
    out[threadIdx.x * apart] = total;
  }
}

__global__ void __launch_bounds__(THREADS)
    ppo_tokens(Tokens t, Settings s, float* grads, int grad_words, double* partials, int64_t n) {
  SIMT_SHARED(double, room);
  int64_t first = static_cast<int64_t>(blockIdx.x) * BLOCK + threadIdx.x * TOKENS;
  int count = n - first >= TOKENS ? TOKENS : n > first ? static_cast<int>(n - first) : 0;
  uint32_t mask = read_mask(t.mask, t.mask_words, first, count);
  Numbers logprobs, old_logprobs, advantages, values, old_values, returns, entropies;
  logprobs.read(t.logprobs, first, count);
  old_logprobs.read(t.old_logprobs, first, count);
  advantages.read(t.advantages, first, count);
  values.read(t.values, first, count);
  old_values.read(t.old_values, first, count);
  returns.read(t.returns, first, count);
  if (t.entropy.at) entropies.read(t.entropy, first, count);

  Partial mine = {};
  float slopes[TOKENS], largest = 0;
  int outside = 0;
#pragma unroll
  for (int i = 0; i < TOKENS; i++) {
    bool active = mask >> i & 1;
    float d = logprobs.at(i, active) - old_logprobs.at(i, active), advantage = advantages.at(i, active);
    float ratio = expf(d);
    // Rounded by themselves: inside of the clip they are equal, and a tie keeps the gradient.
    float plain = __fmul_rn(ratio, advantage), clipped = __fmul_rn(clamp(ratio, s.low, s.high), advantage);
    bool keep = plain <= clipped;  // inf * 0 is NaN and does not
    slopes[i] = keep ? 0.f - plain : 0.f;
    mine.of[SURROGATE] += keep ? plain : clipped;
    mine.of[KL] += k3(d, ratio);
    outside += fabsf(ratio - 1.f) > s.clip_ratio;  // masked: ratio 1
    largest = Largest()(largest, active ? ratio : 0.f);
  }
  write(grads + first, slopes, grad_words, count);
#pragma unroll
  for (int i = 0; i < TOKENS; i++) {
    bool active = mask >> i & 1;
    float v = values.at(i, active), v_old = old_values.at(i, active), target = returns.at(i, active);
    float step = v - v_old, error = v - target;
    float error_clipped = v_old + clamp(step, -s.value_clip, s.value_clip) - target;
    float square = __fmul_rn(error, error), square_clipped = __fmul_rn(error_clipped, error_clipped);
    bool keep = square >= square_clipped;  // ties: the unclipped one; NaN: the clipped one, NaN too
    slopes[i] = s.value_coef * (keep ? error : fabsf(step) <= s.value_clip ? error_clipped : 0.f);
    mine.of[VALUE] += keep ? square : square_clipped;
  }
  write(grads + n + first, slopes, grad_words, count);
  if (t.entropy.at) {
#pragma unroll
    for (int i = 0; i < TOKENS; i++) {
      bool active = mask >> i & 1;
      slopes[i] = active ? -s.entropy_coef : 0.f;
      mine.of[ENTROPY] += entropies.at(i, active);
    }
    write(grads + 2 * n + first, slopes, grad_words, count);
  }
  mine.of[OUTSIDE] = outside;
  mine.of[ACTIVE] = __popc(mask);
  mine.of[LARGEST] = largest;
  add_up<THREADS>(mine, room, partials + blockIdx.x, gridDim.x);
}

// What a loss is divided by.
enum { COUNTED, NUMBER, FLOAT64, FLOAT32, INT64 };

__device__ double count_of(int kind, const void* tensor, double number, double counted) {
  if (kind == NUMBER) return number;
  if (kind == FLOAT64) return *static_cast<const double*>(tensor);
  if (kind == FLOAT32) return *static_cast<const float*>(tensor);
  if (kind == INT64) return static_cast<double>(*static_cast<const int64_t*>(tensor));
  return counted;
}

// One block: thread i takes the blocks i, i + SUM_THREADS, ... in order.
__global__ void __launch_bounds__(SUM_THREADS)
    ppo_sums(const double* partials, int64_t blocks, int count_kind, const void* count_tensor, double number,
             double value_coef, double entropy_coef, float* loss, float* stats) {
  SIMT_SHARED(double, room);
  double* sums = room + SUM_THREADS / 32 * PARTIALS;
  Partial mine = {};
  for (int64_t block = threadIdx.x; block < blocks; block += SUM_THREADS) {
#pragma unroll
    for (int p = 0; p < PARTIALS; p++) {
      double x = partials[p * blocks + block];
      mine.of[p] = p == LARGEST ? Largest()(mine.of[p], x) : mine.of[p] + x;
    }
  }
  add_up<SUM_THREADS>(mine, room, sums, 1);
  __syncthreads();
  if (threadIdx.x) return;
  double count = count_of(count_kind, count_tensor, number, sums[ACTIVE]);
  double per_token = count == 0 ? 0 : 1 / count;  // nothing to average gives 0
  double policy = 0 - sums[SURROGATE] * per_token, value = sums[VALUE] * 0.5 * per_token;
  *loss = static_cast<float>(policy + value_coef * value - entropy_coef * sums[ENTROPY] * per_token);
  stats[0] = static_cast<float>(policy);
  stats[1] = static_cast<float>(value);
  stats[2] = static_cast<float>(sums[OUTSIDE] * per_token);
  stats[3] = static_cast<float>(sums[KL] * per_token);
  stats[4] = static_cast<float>(sums[LARGEST]);
  stats[5] = static_cast<float>(per_token);
}

bool aligned(const void* p, int bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

}  // namespace

// bf16: bit i for the i-th of the rows from logprobs to entropy.
extern "C" int hps_ppo_loss(
    const void* logprobs, const void* old_logprobs, const void* advantages, const void* values, const void* old_values,
    const void* returns, const void* entropy, int bf16, const void* mask, int64_t n, float clip_ratio, float low,
    float high, float value_clip, double value_coef, double entropy_coef, int count_kind, const void* count_tensor,
    double number, void* partials, void* loss, void* stats, void* grads, void* stream) {
  int64_t blocks = (n + BLOCK - 1) / BLOCK;
  if (n < 0 || blocks > INT32_MAX) return BAD_ARGUMENT;
  auto row = [&](const void* at, int i) { return Row{at, bf16 >> i & 1, aligned(at, 16)}; };
  auto* active = static_cast<const unsigned char*>(mask);
  Tokens tokens = {row(logprobs, 0),   row(old_logprobs, 1), row(advantages, 2), row(values, 3),
                   row(old_values, 4), row(returns, 5),      row(entropy, 6),    active,
                   aligned(mask, 8)};
  Settings settings = {clip_ratio,
                       low,
                       high,
                       value_clip,
                       static_cast<float>(value_coef),
                       static_cast<float>(entropy_coef)};
  auto* slopes = static_cast<float*>(grads);
  auto* sums = static_cast<double*>(partials);
  auto* out = static_cast<float*>(loss);
  auto* figures = static_cast<float*>(stats);
  if (blocks) {
    int grad_words = aligned(grads, 16) && n % 4 == 0;
    int raised = SIMT_LAUNCH((ppo_tokens), dim3(static_cast<unsigned>(blocks)), dim3(THREADS),
                             THREADS / 32 * PARTIALS * sizeof(double), stream, tokens, settings, slopes, grad_words,
                             sums, n);
    if (raised) return raised;
  }
  return SIMT_LAUNCH((ppo_sums), dim3(1), dim3(SUM_THREADS), (SUM_THREADS / 32 + 1) * PARTIALS * sizeof(double), stream,
                     sums, blocks, count_kind, count_tensor, number, value_coef, entropy_coef, out, figures);
}
