// What all kernels of sample know of a row of logits: its chunks, its largest logit, the order of its words.
#pragma once
#include "reduce.cuh"
#include "sample_arithmetic.cuh"

namespace sampling {

constexpr int THREADS = 128;                // of a chunk
constexpr int WORDS = 16;                   // of a thread
constexpr int CHUNK = THREADS * WORDS;      // words
constexpr int64_t NOTHING = INT64_MIN;      // below every place and every score

// (B, V) logits in bf16 or fp32.
template <bool BF16>
struct Logits {
  const void* at;
  int64_t stride;  // of rows, in elements
  int words;       // V
  int chunks;      // of a row
  float scale;     // log2(e) / temperature
  int aligned;     // rows begin at 16-byte addresses

  // As fp32; -0 becomes 0. Past the end of the row its last word.
  __device__ __forceinline__ float word(int64_t row, int word) const {
    int64_t i = row * stride + (word < words ? word : words - 1);
    float x;
    if constexpr (BF16)
      x = __bfloat162float(static_cast<const __nv_bfloat16*>(at)[i]);
    else
      x = static_cast<const float*>(at)[i];
    return add(x, 0.f);
  }
  // use(word, x) for those of this thread's words of a chunk that are there. In 16-byte words where they are aligned,
  // all of which are under way before the first is used.
  template <class Use>
  __device__ __forceinline__ void for_words(int64_t row, int chunk, Use use) const {
    constexpr int VECTOR = BF16 ? 8 : 4, VECTORS = WORDS / VECTOR;
    uint4 raw[VECTORS];
    bool whole[VECTORS];
    int first = chunk * CHUNK + static_cast<int>(threadIdx.x) * VECTOR;
#pragma unroll
    for (int k = 0; k < VECTORS; k++) {
      whole[k] = aligned && first + (k * THREADS + 1) * VECTOR <= words;
      if (whole[k]) raw[k] = static_cast<const uint4*>(at)[(row * stride + first) / VECTOR + k * THREADS];
    }
#pragma unroll
    for (int k = 0; k < VECTORS; k++, first += THREADS * VECTOR) {
      if (!whole[k]) {
        for (int i = first; i < first + VECTOR && i < words; i++) use(i, word(row, i));
        continue;
      }
      uint32_t part[4] = {raw[k].x, raw[k].y, raw[k].z, raw[k].w};
#pragma unroll
      for (int i = 0; i < 4; i++) {
        if constexpr (BF16) {
          use(first + 2 * i, add(__uint_as_float(part[i] << 16), 0.f));
          use(first + 2 * i + 1, add(__uint_as_float(part[i] & 0xffff0000u), 0.f));
        } else {
          use(first + i, add(__uint_as_float(part[i]), 0.f));
        }
      }
    }
  }
};

// Distance to the row's maximum in bits.
__device__ __forceinline__ float bits_below(float x, float top, float scale) {
  return multiply(subtract(x, top), scale);
}

struct Larger {
  template <class V>
  __device__ __forceinline__ V operator()(V a, V b) const {
    return a > b ? a : b;
  }
};
// NaN where either is.
struct LargerOrNaN {
  __device__ __forceinline__ float operator()(float a, float b) const { return a > b || a != a ? a : b; }
};

// Largest logit of the row, from its chunks' (each warp for itself). NaN: a word is NaN or +inf. Not finite: the row
// has no softmax, and only `finish` has something to say about it.
__device__ __forceinline__ float row_top(const float* maxima, int64_t row, int chunks) {
  float top = -INFINITY;
  for (int i = threadIdx.x % 32; i < chunks; i += 32) top = LargerOrNaN()(top, maxima[row * chunks + i]);
  return reduce_warp(top, LargerOrNaN());
}

// Words in order of their logits upwards, of equals the first last: a word that is allowed allows all places above it.
__device__ __forceinline__ int64_t place_of(float x, int word) {
  return static_cast<int64_t>(key_of(x)) * (1 << 23) + ((1 << 23) - 1 - word);
}

// Scores upwards, of equals the lowest word last.
__device__ __forceinline__ int64_t rank_of(float score, int word) {
  return static_cast<int64_t>(key_of(add(score, 0.f))) * (int64_t{1} << 32) + (INT32_MAX - word);
}
__device__ __forceinline__ int word_at(int64_t rank) { return INT32_MAX - static_cast<int>(rank & 0xFFFFFFFF); }

}  // namespace sampling
