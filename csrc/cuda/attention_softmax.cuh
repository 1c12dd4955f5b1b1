// What a warp of attention's forward does with a block of keys: scores, weights, sums, in registers.
//
// A row's maximum is raised only when a score passes it by a factor of 2^SLACK, by its own scores alone, and keys that
// it does not see add exact zeros: its bits are the same alone, and whatever shares its tile.
#pragma once
#include "attention_plan.cuh"

namespace attention {

template <int DIM>
struct Forward {
  static constexpr int WARPS = 4, THREADS = 32 * WARPS, ROWS = 128, KEYS = DIM == 64 ? 128 : 64;
  // Of shared memory, in bytes; the weights are there in the second launch.
  static constexpr int Q = 0, K = ROWS * DIM * 2, V = K + KEYS * DIM * 2, PLAN = V + KEYS * DIM * 2;
  static constexpr int WEIGHTS = PLAN + (sizeof(attention::Plan<ROWS, KEYS>) + 15) / 16 * 16;
  static constexpr int shared(bool redo) { return WEIGHTS + (redo ? ROWS * KEYS * 2 : 0); }
  using Plan = attention::Plan<ROWS, KEYS>;
  using Copy = TileCopy<DIM, KEYS, THREADS>;
  using Scores = float[2][KEYS / 8][4];
  using Weights = uint32_t[2][4];  // of 16 keys, as left operands
};

constexpr float SLACK = 8;  // weights reach 2^SLACK: no less exact in bf16 and fp32 than up to 1

// Of a warp's rows 16 m + 8 h + lane / 4, r = 2 m + h.
template <int DIM>
struct Sums {
  float acc[2][DIM / 8][4];
  float minus_top[4], total[4];  // total of this lane's columns
  __device__ __forceinline__ Sums() {
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
      for (int d = 0; d < DIM / 8; d++)
#pragma unroll
        for (int e = 0; e < 4; e++) acc[m][d][e] = 0;
#pragma unroll
    for (int r = 0; r < 4; r++) minus_top[r] = -LOWEST, total[r] = 0;
  }
};

__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}
__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

template <int DIM>
__device__ __forceinline__ void make_scores(typename Forward<DIM>::Scores& s, const unsigned char* q,
                                            const Fragments<DIM>& at_q, const unsigned char* k,
                                            const Fragments<DIM>& at) {
#pragma unroll
  for (int m = 0; m < 2; m++)
#pragma unroll
    for (int n = 0; n < Forward<DIM>::KEYS / 8; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) s[m][n][e] = 0;
#pragma unroll
  for (int d = 0; d < DIM / 16; d++) {
    uint32_t a[2][4], b[4];
#pragma unroll
    for (int m = 0; m < 2; m++) ldmatrix_x4(a[m], q + at_q.of(m, d));
#pragma unroll
    for (int n = 0; n < Forward<DIM>::KEYS / 16; n++) {
      ldmatrix_x4(b, k + at.of(n, d));
#pragma unroll
      for (int m = 0; m < 2; m++) {
        mma_bf16(s[m][2 * n], a[m], b[0], b[1]);
        mma_bf16(s[m][2 * n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

// Raises the maxima of those rows whose block has a score of over 2^SLACK weights, and brings their sums to it.
template <int DIM>
__device__ __forceinline__ void raise(Sums<DIM>& sums, const float (&most)[4], float scale) {
#pragma unroll
  for (int r = 0; r < 4; r++) {
    float m = quad_max(most[r]), old = sums.minus_top[r];
    sums.minus_top[r] = fmaf(m, scale, old) > SLACK ? -__fmul_rn(m, scale) : old;
    float shrink = exp2_fast(__fsub_rn(sums.minus_top[r], old));
    sums.total[r] = __fmul_rn(sums.total[r], shrink);
#pragma unroll
    for (int d = 0; d < DIM / 8; d++)
#pragma unroll
      for (int e = 0; e < 2; e++) {
        float& sum = sums.acc[r / 2][d][r % 2 * 2 + e];
        sum = __fmul_rn(sum, shrink);
      }
  }
}

// Brings the sums to maxima that serve for a block's scores.
template <int DIM>
__device__ __forceinline__ void raise_where_needed(Sums<DIM>& sums, const typename Forward<DIM>::Scores& s,
                                                   float scale) {
  float most[4];
  bool rises = false;
#pragma unroll
  for (int r = 0; r < 4; r++) {
    most[r] = fmaxf(s[r / 2][0][r % 2 * 2], s[r / 2][0][r % 2 * 2 + 1]);
#pragma unroll
    for (int n = 1; n < Forward<DIM>::KEYS / 8; n++)
#pragma unroll
      for (int e = 0; e < 2; e++) most[r] = fmaxf(most[r], s[r / 2][n][r % 2 * 2 + e]);
    rises |= fmaf(most[r], scale, sums.minus_top[r]) > SLACK;
  }
  if (__any_sync(~0u, rises)) raise<DIM>(sums, most, scale);
}

// Weights 2^(score - top) of keys 16 k.. of a block, and their sums.
template <int DIM>
__device__ __forceinline__ void make_weights(typename Forward<DIM>::Weights& w, Sums<DIM>& sums,
                                             const typename Forward<DIM>::Scores& s, int k, float scale) {
#pragma unroll
  for (int m = 0; m < 2; m++)
#pragma unroll
    for (int i = 0; i < 4; i++) {  // 8 keys from i / 2, rows of half i % 2
      int r = 2 * m + i % 2;
      float low = exp2_fast(fmaf(s[m][2 * k + i / 2][i % 2 * 2], scale, sums.minus_top[r]));
      float high = exp2_fast(fmaf(s[m][2 * k + i / 2][i % 2 * 2 + 1], scale, sums.minus_top[r]));
      sums.total[r] = __fadd_rn(__fadd_rn(sums.total[r], low), high);
      w[m][i] = pack_bf16(low, high);
    }
}

// weights(w, k): those of keys 16 k..
template <int DIM, class Make>
__device__ __forceinline__ void add_values(Sums<DIM>& sums, const unsigned char* v, const Fragments<DIM>& at,
                                           Make weights) {
#pragma unroll
  for (int k = 0; k < Forward<DIM>::KEYS / 16; k++) {
    typename Forward<DIM>::Weights w;
    weights(w, k);
#pragma unroll
    for (int d = 0; d < DIM / 16; d++) {
      uint32_t b[4];
      ldmatrix_x4_trans(b, v + at.of(k, d));
#pragma unroll
      for (int m = 0; m < 2; m++) {
        mma_bf16(sums.acc[m][2 * d], w[m], b[0], b[1]);
        mma_bf16(sums.acc[m][2 * d + 1], w[m], b[2], b[3]);
      }
    }
  }
}

// Rows of this lane: see Sums.
__device__ __forceinline__ int row_of(int r) { return threadIdx.x / 32 * 32 + r * 8 + threadIdx.x % 32 / 4; }

template <int DIM>
__device__ __forceinline__ void mask_scores(typename Forward<DIM>::Scores& s, const Keys& keys, const TileRow* rows) {
#pragma unroll
  for (int r = 0; r < 4; r++) {
    int seen = keys.seen_by(rows[row_of(r)].token) - keys.key - threadIdx.x % 4 * 2;
#pragma unroll
    for (int n = 0; n < Forward<DIM>::KEYS / 8; n++)
#pragma unroll
      for (int e = 0; e < 2; e++)
        if (n * 8 + e >= seen) s[r / 2][n][r % 2 * 2 + e] = -INF;
  }
}

__device__ __forceinline__ float low_half(uint32_t word) { return __uint_as_float(word << 16); }
__device__ __forceinline__ float high_half(uint32_t word) { return __uint_as_float(word & 0xffff0000u); }
__device__ __forceinline__ bool finite(float x) { return fabsf(x) < INF; }

// Where a weight of this lane stands in shared memory, in the second launch, whose sums leave no registers for them.
template <int DIM>
__device__ __forceinline__ uint32_t& kept_weight(unsigned char* shared, int m, int i, int k) {
  int row = row_of(2 * m + i % 2), key = k * 16 + i / 2 * 8 + threadIdx.x % 4 * 2;
  return *reinterpret_cast<uint32_t*>(shared + Forward<DIM>::WEIGHTS + (row * Forward<DIM>::KEYS + key) * 2);
}
template <int DIM>
__device__ __forceinline__ void keep_weights(Sums<DIM>& sums, const typename Forward<DIM>::Scores& s, float scale,
                                             unsigned char* shared) {
#pragma unroll
  for (int k = 0; k < Forward<DIM>::KEYS / 16; k++) {
    typename Forward<DIM>::Weights w;
    make_weights<DIM>(w, sums, s, k, scale);
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
      for (int i = 0; i < 4; i++) kept_weight<DIM>(shared, m, i, k) = w[m][i];
  }
}

// acc += weights @ v over those values of a block that are NaN or infinite, for the rows that see them; then v has
// zeros in their place. The whole block calls it, with weights kept.
template <int DIM>
__device__ void add_not_finite(Sums<DIM>& sums, const Keys& keys, const TileRow* rows, unsigned char* shared) {
  using F = Forward<DIM>;
  int pair = threadIdx.x % 4;
  const bf16* weights = reinterpret_cast<const bf16*>(shared + F::WEIGHTS) + row_of(0) * F::KEYS;
  __syncwarp();
  int seen[4];
#pragma unroll
  for (int r = 0; r < 4; r++) seen[r] = keys.seen_by(rows[row_of(r)].token) - keys.key;
#pragma unroll 1
  for (int j = 0; j < min(F::KEYS, keys.key1 - keys.key); j++) {
    const unsigned char* row = shared + F::V;
#pragma unroll
    for (int d = 0; d < DIM / 8; d++) {
      uint32_t both = *reinterpret_cast<const uint32_t*>(row + Row<DIM>::at(j, d) + pair * 4);
      float v[2] = {low_half(both), high_half(both)};
      if (finite(v[0]) && finite(v[1])) continue;
#pragma unroll
      for (int r = 0; r < 4; r++)
#pragma unroll
        for (int e = 0; e < 2; e++)
          if (j < seen[r] && !finite(v[e]))
            sums.acc[r / 2][d][r % 2 * 2 + e] += __bfloat162float(weights[r * 8 * F::KEYS + j]) * v[e];
    }
  }
  __syncthreads();
  auto* words = reinterpret_cast<uint32_t*>(shared + F::V);
  for (int i = threadIdx.x; i < F::KEYS * DIM / 2; i += F::THREADS) {
    uint32_t word = words[i];
    words[i] = (finite(low_half(word)) ? word & 0xffffu : 0) | (finite(high_half(word)) ? word & 0xffff0000u : 0);
  }
  __syncthreads();
}

}  // namespace attention
