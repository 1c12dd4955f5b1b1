// The border of top-k or top-p: the place of the last allowed word of a row.
//
//   slice_weights   weight (1, or the mass) of a chunk's words in each of SLICES slices of y
//   find_border     a block for each row: the slice in which the weights, added up from the top, reach the target, and
//                   in it, by bisection over places, the last word that is needed
#pragma once
#include "sample_row.cuh"

namespace sampling {

constexpr int BORDER_THREADS = 512;
constexpr int LIST = 2048;  // words that find_border holds; of a slice with more, the row is read again until it fits
static_assert(BORDER_THREADS == SLICES * 32, "a warp for each slice");

struct Border {
  int64_t* places;   // (B,)
  int64_t* weights;  // (B, C, SLICES)
  int64_t target;    // top_k, or top_p 2^31
  int masses;        // top-p
  int bounded;       // top-k went before: only what its places allow counts
};

template <bool BF16>
__global__ void __launch_bounds__(THREADS) slice_weights(Logits<BF16> logits, const float* maxima, Border border) {
  SIMT_SHARED(int64_t, sums);  // [SLICES][THREADS]
  int64_t row = blockIdx.x / static_cast<unsigned>(logits.chunks);
  int chunk = static_cast<int>(blockIdx.x % static_cast<unsigned>(logits.chunks));
  float top = row_top(maxima, row, logits.chunks);
  if (!(fabsf(top) < INFINITY)) return;
  int64_t least = border.bounded ? border.places[row] : NOTHING;
#pragma unroll
  for (int i = 0; i < SLICES; i++) sums[i * THREADS + threadIdx.x] = 0;
  logits.for_words(row, chunk, [&](int word, float x) {
    float y = bits_below(x, top, logits.scale);
    if (border.bounded && place_of(x, word) < least) return;
    sums[slice_of(y) * THREADS + threadIdx.x] += border.masses ? mass_of(y) : 1;
  });
  __syncthreads();
#pragma unroll
  for (int k = 0; k < SLICES / (THREADS / 32); k++) {
    int slice = threadIdx.x / 32 * (SLICES / (THREADS / 32)) + k;
    int64_t sum = 0;
    for (int i = threadIdx.x % 32; i < THREADS; i += 32) sum += sums[slice * THREADS + i];
    sum = reduce_warp(sum, Add());
    if (threadIdx.x % 32 == 0) border.weights[static_cast<int64_t>(blockIdx.x) * SLICES + slice] = sum;
  }
}

struct Room {
  int64_t places[LIST], weights[LIST], sums[SLICES], words[BORDER_THREADS / 32];
  int count;
};

template <bool BF16>
__global__ void __launch_bounds__(BORDER_THREADS)
    find_border(Logits<BF16> logits, const float* maxima, Border border) {
  SIMT_SHARED(Room, room);
  int64_t row = blockIdx.x;
  float top = row_top(maxima, row, logits.chunks);
  if (!(fabsf(top) < INFINITY)) return;
  int64_t least = border.bounded ? border.places[row] : NOTHING;
  const int64_t* weights = border.weights + row * logits.chunks * SLICES;
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32;

  int64_t sum = 0;
  for (int64_t chunk = lane; chunk < logits.chunks; chunk += 32) sum += weights[chunk * SLICES + warp];
  sum = reduce_warp(sum, Add());
  if (lane == 0) room->sums[warp] = sum;
  __syncthreads();
  int64_t left = border.target;
  if (border.masses) {
    int64_t total = 0;
    for (int i = 0; i < SLICES; i++) total += room->sums[i];
    left = top_p_target(total, border.target);
  }
  int found = 0;
  while (found < SLICES - 1 && room->sums[found] < left) left -= room->sums[found++];

  // use(place, y) for this thread's words of the slice, between low and high.
  int64_t low = NOTHING, high = INT64_MAX;
  auto for_candidates = [&](auto use) {
    for (int chunk = 0; chunk < logits.chunks; chunk++) {
      if (weights[static_cast<int64_t>(chunk) * SLICES + found] == 0) continue;
      int first = chunk * CHUNK + threadIdx.x;
      float x[CHUNK / BORDER_THREADS];
#pragma unroll
      for (int i = 0; i < CHUNK / BORDER_THREADS; i++) x[i] = logits.word(row, first + i * BORDER_THREADS);
#pragma unroll
      for (int i = 0; i < CHUNK / BORDER_THREADS; i++) {
        int word = first + i * BORDER_THREADS;
        float y = bits_below(x[i], top, logits.scale);
        int64_t place = place_of(x[i], word);
        bool inside = word < logits.words && place >= least && place >= low && place <= high;
        if (inside && slice_of(y) == found) use(place, y);
      }
    }
  };
  auto weight_of = [&](float y) { return border.masses ? mass_of(y) : 1; };

  // The largest place for which the words from it on reach what is left: that of the last allowed word.
  int count = 0;
  while (true) {
    if (threadIdx.x == 0) room->count = 0;
    __syncthreads();
    int64_t lowest = INT64_MAX, highest = NOTHING;
    for_candidates([&](int64_t place, float y) {
      int at = atomicAdd(&room->count, 1);
      if (at < LIST) room->places[at] = place, room->weights[at] = weight_of(y);
      lowest = place < lowest ? place : lowest;
      highest = place > highest ? place : highest;
    });
    low = -reduce_block<BORDER_THREADS>(-lowest, Larger(), room->words);
    high = reduce_block<BORDER_THREADS>(highest, Larger(), room->words);
    count = room->count;
    if (count <= LIST) break;
    int64_t middle = high - ((high - low) >> 1), weight = 0;
    for_candidates([&](int64_t place, float y) { weight += place >= middle ? weight_of(y) : 0; });
    weight = reduce_block<BORDER_THREADS>(weight, Add(), room->words);
    if (weight >= left) {
      low = middle;
    } else {
      high = middle - 1;
      left -= weight;
    }
  }
  while (low < high) {
    int64_t middle = high - ((high - low) >> 1), weight = 0;
    for (int i = threadIdx.x; i < count; i += BORDER_THREADS)
      weight += room->places[i] >= middle ? room->weights[i] : 0;
    weight = reduce_block<BORDER_THREADS>(weight, Add(), room->words);
    if (weight >= left)
      low = middle;
    else
      high = middle - 1;
  }
  if (threadIdx.x == 0) border.places[row] = low;
}

}  // namespace sampling
