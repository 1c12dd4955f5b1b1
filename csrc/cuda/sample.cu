// sample: one word per row by Gumbel-max from counter-based noise, under top-k and top-p, and its logprob.
//
// The arithmetic is in sample_arithmetic.cuh, to the bit that of every other backend; sums are of integers, ties go by
// index. A row is cut into chunks, a block each:
//
//   chunk_maxima    largest logit of each chunk, NaN where a word is NaN or +inf
//   (sample_border.cuh, two launches for each of top-k and top-p)
//   draw            masses of the chunk, and its allowed word with the largest y + noise
//   finish          a warp for each row: its word and logprob, from its chunks
//
// Limit: Philox and the masses, about 100 instructions a word, then bytes. Two logarithms a word would double that: they
// are taken only of words that an upper bound of their noise lets past the best score of a warp.
#include "sample_border.cuh"

namespace {

using namespace sampling;

template <bool BF16>
__global__ void __launch_bounds__(THREADS) chunk_maxima(Logits<BF16> logits, float* maxima) {
  SIMT_SHARED(float, room);
  int64_t row = blockIdx.x / static_cast<unsigned>(logits.chunks);
  int chunk = static_cast<int>(blockIdx.x % static_cast<unsigned>(logits.chunks));
  float top = -INFINITY;
  logits.for_words(row, chunk, [&](int, float x) { top = LargerOrNaN()(top, x == INFINITY ? NAN : x); });
  top = reduce_block<THREADS>(top, LargerOrNaN(), room);
  if (threadIdx.x == 0) maxima[blockIdx.x] = top;
}

struct Keys {
  const int64_t *seeds, *positions;  // (B,)
};
struct Drawn {
  int64_t *totals, *ranks;  // (B, C)
};

// The score of one word, by which the row's is chosen.
template <bool BF16>
struct Scores {
  const Logits<BF16>& logits;
  int64_t row, seed, position;
  float top;
  int greedy;

  // Output j of a block belongs to the words 32 j .. 32 j + 31 of 128: a warp takes 128 words in four contiguous loads.
  __device__ __forceinline__ Random random(int word) const {
    return philox(seed, position, static_cast<uint32_t>(word / 128 * 32 + word % 32));
  }
  __device__ __forceinline__ float of(int word) const {
    float x = logits.word(row, word);
    if (greedy) return x;
    Random four = random(word);
    int j = word / 32 % 4;
    uint32_t mine = j == 0 ? four.word[0] : j == 1 ? four.word[1] : j == 2 ? four.word[2] : four.word[3];
    return add(bits_below(x, top, logits.scale), noise_of(mine));
  }
};

template <bool BF16>
__global__ void __launch_bounds__(THREADS)
    draw(Logits<BF16> logits, const float* maxima, const int64_t* border, Keys keys, int greedy, Drawn out) {
  SIMT_SHARED(int64_t, room);
  int64_t row = blockIdx.x / static_cast<unsigned>(logits.chunks);
  int chunk = static_cast<int>(blockIdx.x % static_cast<unsigned>(logits.chunks));
  float top = row_top(maxima, row, logits.chunks);
  if (!(fabsf(top) < INFINITY)) return;
  int64_t least = border ? border[row] : NOTHING;
  Scores<BF16> scores = {logits, row, keys.seeds[row], keys.positions[row], top, greedy};
  int first = chunk * CHUNK + threadIdx.x / 32 * 32 * WORDS + threadIdx.x % 32;  // this thread has every 32nd
  float x[WORDS];  // then what no score of the word is above; -inf: it cannot be drawn
#pragma unroll
  for (int i = 0; i < WORDS; i++) x[i] = logits.word(row, first + 32 * i);
  int64_t total = 0;
  float highest = -INFINITY;
  int likely = 0;  // the word of the highest bound: its score is a good one to begin with
#pragma unroll
  for (int i = 0; i < WORDS; i += 4) {
    Random four = {};
    if (!greedy) four = scores.random(first + 32 * i);
#pragma unroll
    for (int j = 0; j < 4; j++) {
      int word = first + 32 * (i + j);
      float logit = x[i + j], y = bits_below(logit, top, logits.scale);
      bool inside = word < logits.words;
      total += inside ? mass_of(y) : 0;
      bool allowed = inside && (!border || place_of(logit, word) >= least);
      float bound = greedy ? logit : add(y, noise_bound(four.word[j]));
      x[i + j] = allowed ? bound : -INFINITY;
      if (x[i + j] > highest) highest = x[i + j], likely = word;
    }
  }
  float floor = reduce_warp(highest > -INFINITY ? scores.of(likely) : -INFINITY, Larger());
  uint32_t left = 0;
#pragma unroll
  for (int i = 0; i < WORDS; i++) left |= (x[i] > -INFINITY && x[i] >= floor ? 1u : 0u) << i;
  int64_t best = NOTHING;
  for (; left; left &= left - 1) {
    int word = first + 32 * (__ffs(left) - 1);
    best = Larger()(best, rank_of(scores.of(word), word));
  }
  total = reduce_block<THREADS>(total, Add(), room);
  best = reduce_block<THREADS>(best, Larger(), room);
  if (threadIdx.x == 0) {
    out.totals[blockIdx.x] = total;
    out.ranks[blockIdx.x] = best;
  }
}

// The first word that is NaN or +inf; 0 where there is none. The chunk is the first whose maximum is NaN.
template <bool BF16>
__device__ int first_bad(const Logits<BF16>& logits, const float* maxima, int64_t row) {
  int lane = threadIdx.x, chunk = INT32_MAX, found = INT32_MAX;
  auto smaller = [](int a, int b) { return a < b ? a : b; };
  for (int i = lane; i < logits.chunks; i += 32)
    if (maxima[row * logits.chunks + i] != maxima[row * logits.chunks + i]) chunk = smaller(chunk, i);
  chunk = reduce_warp(chunk, smaller);
  if (chunk == INT32_MAX) return 0;
  for (int word = chunk * CHUNK + lane; word < (chunk + 1) * CHUNK && word < logits.words; word += 32)
    if (!(logits.word(row, word) < INFINITY)) found = smaller(found, word);
  return reduce_warp(found, smaller);
}

template <bool BF16>
__global__ void __launch_bounds__(32)
    finish(Logits<BF16> logits, const float* maxima, Drawn in, int64_t* tokens, float* logprobs) {
  int64_t row = blockIdx.x;
  float top = row_top(maxima, row, logits.chunks), logprob = NAN;
  int word;
  if (fabsf(top) < INFINITY) {
    int64_t total = 0, best = NOTHING;
    for (int64_t i = row * logits.chunks + threadIdx.x; i < (row + 1) * logits.chunks; i += 32) {
      total += in.totals[i];
      best = Larger()(best, in.ranks[i]);
    }
    total = reduce_warp(total, Add());
    word = word_at(reduce_warp(best, Larger()));
    float bits = bits_below(logits.word(row, word), top, logits.scale);
    logprob = multiply(subtract(bits, log2_of(multiply(static_cast<float>(total), 0x1p-40f))), LN2);
  } else {
    word = first_bad(logits, maxima, row);
  }
  if (threadIdx.x == 0) {
    tokens[row] = word;
    logprobs[row] = logprob;
  }
}

struct Work {
  float* maxima;
  int64_t *weights, *places;
  Drawn drawn;
  int64_t* tokens;
  float* logprobs;
};

template <bool BF16>
int launch(Logits<BF16> logits, Keys keys, int64_t rows, int greedy, int64_t top_k, int64_t top_p, Work w,
           void* stream) {
  dim3 chunks(static_cast<unsigned>(rows * logits.chunks)), each(static_cast<unsigned>(rows));
  constexpr int WARPS = THREADS / 32;
  float* maxima = w.maxima;
  int raised = SIMT_LAUNCH((chunk_maxima<BF16>), chunks, dim3(THREADS), WARPS * sizeof(float), stream, logits, maxima);
  int bounded = 0;
  for (int masses = 0; masses < 2 && !greedy; masses++) {
    if (raised || (masses ? top_p >= int64_t{1} << 31 : top_k <= 0 || top_k >= logits.words)) continue;
    Border border = {w.places, w.weights, masses ? top_p : top_k, masses, bounded};
    raised = SIMT_LAUNCH((slice_weights<BF16>), chunks, dim3(THREADS), SLICES * THREADS * sizeof(int64_t), stream,
                         logits, maxima, border);
    if (raised) return raised;
    raised = SIMT_LAUNCH((find_border<BF16>), each, dim3(BORDER_THREADS), sizeof(Room), stream, logits, maxima, border);
    bounded = 1;
  }
  if (raised) return raised;
  const int64_t* places = bounded ? w.places : nullptr;
  Drawn drawn = w.drawn;
  raised = SIMT_LAUNCH((draw<BF16>), chunks, dim3(THREADS), WARPS * sizeof(int64_t), stream, logits, maxima, places,
                       keys, greedy, drawn);
  if (raised) return raised;
  int64_t* tokens = w.tokens;
  float* logprobs = w.logprobs;
  return SIMT_LAUNCH((finish<BF16>), each, dim3(32), 0, stream, logits, maxima, drawn, tokens, logprobs);
}

}  // namespace

// top_k: 0 is off. top_p: times 2^31, rounded up; from 2^31 on off. weights and places may be null where both are off.
extern "C" int hps_sample(
    const void* logits, const void* seeds, const void* positions, int bf16, int64_t stride, int64_t rows, int64_t words,
    float scale, int greedy, int64_t top_k, int64_t top_p, void* maxima, void* weights, void* places, void* totals,
    void* ranks, void* tokens, void* logprobs, void* stream) {
  int64_t chunks = (words + CHUNK - 1) / CHUNK;
  if (rows <= 0 || words <= 0 || words > 1 << 23 || rows > INT32_MAX / chunks) return BAD_ARGUMENT;
  Keys keys = {static_cast<const int64_t*>(seeds), static_cast<const int64_t*>(positions)};
  Work work = {static_cast<float*>(maxima),
               static_cast<int64_t*>(weights),
               static_cast<int64_t*>(places),
               {static_cast<int64_t*>(totals), static_cast<int64_t*>(ranks)},
               static_cast<int64_t*>(tokens),
               static_cast<float*>(logprobs)};
  int aligned = reinterpret_cast<uintptr_t>(logits) % 16 == 0 && stride * (bf16 ? 2 : 4) % 16 == 0;
  int v = static_cast<int>(words), c = static_cast<int>(chunks);
  if (bf16) return launch<true>({logits, stride, v, c, scale, aligned}, keys, rows, greedy, top_k, top_p, work, stream);
  return launch<false>({logits, stride, v, c, scale, aligned}, keys, rows, greedy, top_k, top_p, work, stream);
}
