// gae in one launch: a block for each response, from its last token back in tiles, each a scan in fp64. Limit: bytes,
// 16 a token in fp32.
//
// A token maps what comes after it, A, to delta + c A with c = gamma lam. All of a tile's maps have the same c, so that
// of 2^k tokens together have c^(2^k), and only their deltas are scanned. Where the tiles lie depends on the response's
// length alone: it has the same bits in every batch.
#include "reduce.cuh"

namespace {

constexpr int THREADS = 128;
constexpr int TOKENS = 4;                // of a thread, neighbours
constexpr int TILE = THREADS * TOKENS;   // tokens
constexpr int WARPS = THREADS / 32;

__device__ __forceinline__ float number(float x) { return x; }
__device__ __forceinline__ float number(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ int64_t offset(const void* offsets, int wide, int64_t i) {
  return wide ? static_cast<const int64_t*>(offsets)[i] : static_cast<const int32_t*>(offsets)[i];
}

// c^(TOKENS 2^k): what a run of 2^k threads hands on of what comes after it.
struct Powers {
  double of[6];
  __device__ __forceinline__ explicit Powers(double c) {
    double power = c;
    for (int i = 1; i < TOKENS; i *= 2) power *= power;
#pragma unroll
    for (int k = 0; k < 6; k++, power *= power) of[k] = power;
  }
  // To the threads that follow in a warp.
  __device__ __forceinline__ double of_threads(int count) const {
    double power = 1;
#pragma unroll
    for (int k = 0; k < 5; k++)
      if (count >> k & 1) power *= of[k];
    return power;
  }
};

template <class R, class V>
__global__ void __launch_bounds__(THREADS)
    gae_responses(const R* rewards, const V* values, const void* offsets, int wide, double gamma, double decay,
                  float* advantages, float* returns) {
  SIMT_SHARED(double, room);  // the warps' sums, of a tile and of the one before: one barrier a tile
  int64_t begin = offset(offsets, wide, blockIdx.x), end = offset(offsets, wide, static_cast<int64_t>(blockIdx.x) + 1);
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  Powers powers(decay);
  double to_the_warps_end = powers.of_threads(31 - lane);
  double next_tile = 0;  // advantage of the first token after the tile
  for (int64_t done = 0; done < end - begin; done += TILE) {
    // The last token ends a tile; what stands before the first is masked, and reads that one.
    int64_t first = end - done - TILE + threadIdx.x * TOKENS;
    bool inside[TOKENS];
    double reward[TOKENS], value[TOKENS + 1], delta[TOKENS];
#pragma unroll
    for (int i = 0; i < TOKENS; i++) {
      inside[i] = first + i >= begin;
      int64_t at = inside[i] ? first + i : begin;
      float r = number(rewards[at]), v = number(values[at]);
      reward[i] = inside[i] ? r : 0.f;
      value[i] = inside[i] ? v : 0.f;
    }
    // Of the next thread; the last lane's is the next warp's, the next tile's, or past the end.
    int64_t after = first + TOKENS;
    float v = number(values[after < begin ? begin : after < end ? after : end - 1]);
    value[TOKENS] = __shfl_down_sync(~0u, value[0], 1);
    if (lane == 31) value[TOKENS] = after >= begin && after < end ? v : 0.f;
    double sum = 0;
#pragma unroll
    for (int i = TOKENS - 1; i >= 0; i--) {
      delta[i] = inside[i] ? fma(gamma, value[i + 1], reward[i]) - value[i] : 0.0;
      sum = fma(decay, sum, delta[i]);
    }
#pragma unroll
    for (int k = 0; k < 5; k++) {
      double later = __shfl_down_sync(~0u, sum, 1u << k);
      if (lane + (1 << k) < 32) sum = fma(powers.of[k], later, sum);
    }
    double* sums = room + (done / TILE % 2) * WARPS;
    if (lane == 0) sums[warp] = sum;
    __syncthreads();
    double next_warp = 0;
#pragma unroll
    for (int w = WARPS - 1; w >= 0; w--) {
      if (w == warp) next_warp = next_tile;
      next_tile = fma(powers.of[5], next_tile, sums[w]);
    }
    double advantage = __shfl_down_sync(~0u, sum, 1);
    advantage = lane == 31 ? next_warp : fma(to_the_warps_end, next_warp, advantage);
#pragma unroll
    for (int i = TOKENS - 1; i >= 0; i--) {
      advantage = fma(decay, advantage, delta[i]);
      if (inside[i]) {
        advantages[first + i] = static_cast<float>(advantage);
        returns[first + i] = static_cast<float>(advantage + value[i]);
      }
    }
  }
}

template <class R, class V>
int launch(const void* rewards, const void* values, const void* offsets, int wide, unsigned responses, double gamma,
           double decay, void* advantages, void* returns, void* stream) {
  auto *r = static_cast<const R*>(rewards);
  auto *v = static_cast<const V*>(values);
  auto *out = static_cast<float*>(advantages), *sums = static_cast<float*>(returns);
  return SIMT_LAUNCH((gae_responses<R, V>), dim3(responses), dim3(THREADS), 2 * WARPS * sizeof(double), stream, r, v,
                     offsets, wide, gamma, decay, out, sums);
}

}  // namespace

// wide: the offsets are int64, else int32.
extern "C" int hps_gae(
    const void* rewards, const void* values, const void* offsets, int bf16_rewards, int bf16_values, int wide,
    int64_t responses, double gamma, double decay, void* advantages, void* returns, void* stream) {
  if (responses <= 0 || responses > INT32_MAX) return BAD_ARGUMENT;
  auto of = bf16_rewards ? bf16_values ? launch<__nv_bfloat16, __nv_bfloat16> : launch<__nv_bfloat16, float>
                         : bf16_values ? launch<float, __nv_bfloat16> : launch<float, float>;
  unsigned blocks = static_cast<unsigned>(responses);
  return of(rewards, values, offsets, wide, blocks, gamma, decay, advantages, returns, stream);
}
