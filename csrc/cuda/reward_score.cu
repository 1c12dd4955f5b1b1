// reward_score in two launches: both heads and the route of each response, then whitening and the best of each group.
// Limit: bytes, the last rows of the responses, read in 16-byte words; the heads come from the cache.
#include "reduce.cuh"

namespace {

constexpr int THREADS = 128;       // of a response
constexpr int WIDE = 512;          // of the block that whitens, and of a group's
constexpr int WORD = 16;           // bytes

struct Model {
  const void* hidden;  // (T, width)
  const void* head;    // (width,)
  const void* norm;    // (width,) or null
  int64_t stride;      // of hidden's rows, in elements
  int64_t width;
  int bf16;            // else fp32
  int words;           // rows and weights are 16-byte aligned
};

__device__ __forceinline__ float element(const void* p, int64_t i, bool bf16) {
  return bf16 ? __bfloat162float(static_cast<const __nv_bfloat16*>(p)[i]) : static_cast<const float*>(p)[i];
}

// COUNT numbers of a 16-byte word.
template <bool BF16>
struct Word {
  static constexpr int COUNT = BF16 ? 8 : 4;
  float x[COUNT];
  __device__ __forceinline__ void load(const void* p, int64_t word) {
    uint4 raw = static_cast<const uint4*>(p)[word];
    uint32_t part[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
      if constexpr (BF16) {
        x[2 * i] = __uint_as_float(part[i] << 16);
        x[2 * i + 1] = __uint_as_float(part[i] & 0xffff0000u);
      } else {
        x[i] = __uint_as_float(part[i]);
      }
    }
  }
};

// Of this thread's columns: dot is x . (norm * head), square is x . x; fp32.
__device__ __forceinline__ void add_column(float x, float weight, float norm, float& dot, float& square) {
  dot = fmaf(x, weight * norm, dot);
  square = fmaf(x, x, square);
}
template <bool BF16>
__device__ __forceinline__ void add_words(const Model& m, const void* row, float& dot, float& square) {
  constexpr int COUNT = Word<BF16>::COUNT;
  for (int64_t word = threadIdx.x; word < m.width / COUNT; word += THREADS) {
    Word<BF16> x, head, norm;
    x.load(row, word);
    head.load(m.head, word);
    if (m.norm) norm.load(m.norm, word);
#pragma unroll
    for (int i = 0; i < COUNT; i++) add_column(x.x[i], head.x[i], m.norm ? norm.x[i] : 1.f, dot, square);
  }
}

// The logit of one row: fp32 sums of a thread's columns, added in double.
__device__ float logit_of(const Model& m, int64_t row, double eps, double* room) {
  const void* at = static_cast<const char*>(m.hidden) + row * m.stride * (m.bf16 ? 2 : 4);
  float dot = 0, square = 0;
  if (m.words && m.bf16) {
    add_words<true>(m, at, dot, square);
  } else if (m.words) {
    add_words<false>(m, at, dot, square);
  } else {
    for (int64_t i = threadIdx.x; i < m.width; i += THREADS)
      add_column(element(at, i, m.bf16), element(m.head, i, m.bf16), m.norm ? element(m.norm, i, m.bf16) : 1.f, dot, square);
  }
  double logit = reduce_block<THREADS>(static_cast<double>(dot), Add(), room);
  double squares = reduce_block<THREADS>(static_cast<double>(square), Add(), room);
  if (m.norm) logit /= sqrt(squares / static_cast<double>(m.width) + eps);
  return static_cast<float>(logit);
}

__global__ void __launch_bounds__(THREADS)
    score_responses(Model safety, Model helpful, const void* rows, int rows64, const unsigned char* tags,
                    float* r_safety, float* r_helpful, float* combined, double eps, float threshold) {
  SIMT_SHARED(double, room);
  int64_t response = blockIdx.x;
  int64_t row = rows64 ? static_cast<const int64_t*>(rows)[response] : static_cast<const int32_t*>(rows)[response];
  float s = logit_of(safety, row, eps, room), h = logit_of(helpful, row, eps, room);
  if (threadIdx.x == 0) {
    // From double to fp32, and against fp32: the logit of 0.15 is then exactly 0.15. NaN does not pass and stays.
    float probability = static_cast<float>(1.0 / (1.0 + exp(-static_cast<double>(s))));
    bool passes = probability >= threshold && !tags[response];
    r_safety[response] = s;
    r_helpful[response] = h;
    combined[response] = passes ? h : s;
  }
}

// Sums of differences to the first score: one of the scores, so that the variance loses little to cancellation.
__device__ void whiten(const float* z, float* out, int64_t count, unsigned char* room) {
  double first = z[0], sum = 0, square = 0;
  float low = z[0], high = z[0];
  int bad = 0;
  for (int64_t i = threadIdx.x; i < count; i += WIDE) {
    double off = z[i] - first;
    sum += off;
    square += off * off;
    low = fminf(low, z[i]);
    high = fmaxf(high, z[i]);
    bad |= !(z[i] == z[i]);
  }
  auto* doubles = reinterpret_cast<double*>(room);
  auto* floats = reinterpret_cast<float*>(room);
  auto* ints = reinterpret_cast<int*>(room);
  double count_d = static_cast<double>(count);
  double mean = reduce_block<WIDE>(sum, Add(), doubles) / count_d;
  double variance = reduce_block<WIDE>(square, Add(), doubles) / count_d - mean * mean;
  low = reduce_block<WIDE>(low, [](float a, float b) { return fminf(a, b); }, floats);
  high = reduce_block<WIDE>(high, [](float a, float b) { return fmaxf(a, b); }, floats);
  bad = reduce_block<WIDE>(bad, [](int a, int b) { return a | b; }, ints);
  double scale = sqrt(variance < 0 ? 0 : variance) + 1e-8;
  bool equal = low >= high && !bad;
  for (int64_t i = threadIdx.x; i < count; i += WIDE)
    out[i] = equal ? 0.f : static_cast<float>((z[i] - first - mean) / scale);
}

// Index of the highest score, the lowest of equals; NaN only where there is nothing else.
__device__ void choose(const float* z, int64_t begin, int64_t end, int64_t* best, unsigned char* room) {
  int64_t found = end;
  for (int64_t i = begin + threadIdx.x; i < end; i += WIDE)
    if (z[i] == z[i] && (found == end || z[i] > z[found])) found = i;
  auto better = [=](int64_t a, int64_t b) {
    if (a == end || b == end) return a == end ? b : a;
    if (z[a] == z[b]) return a < b ? a : b;
    return z[a] > z[b] ? a : b;
  };
  found = reduce_block<WIDE>(found, better, reinterpret_cast<int64_t*>(room));
  if (threadIdx.x == 0) *best = found == end ? begin : found;
}

// Block 0 whitens all responses, each other one looks for the best of a group.
__global__ void __launch_bounds__(WIDE)
    whiten_and_choose(const float* combined, float* whitened, int64_t responses, const int* cu_groups, int64_t* best) {
  SIMT_SHARED(unsigned char, room);
  if (blockIdx.x == 0) {
    whiten(combined, whitened, responses, room);
  } else {
    int64_t group = static_cast<int64_t>(blockIdx.x) - 1;
    choose(combined, cu_groups[group], cu_groups[group + 1], best + group, room);
  }
}

bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % WORD == 0; }

Model model(const void* hidden, const void* head, const void* norm, int64_t stride, int64_t width, int bf16) {
  int64_t bytes = bf16 ? 2 : 4;
  bool words = aligned(hidden) && aligned(head) && aligned(norm) && stride * bytes % WORD == 0 && width * bytes % WORD == 0;
  return {hidden, head, norm, stride, width, bf16, words};
}

}  // namespace

extern "C" int hps_reward_score(
    const void* hidden_safety, const void* hidden_helpful, const void* last_rows, int rows64, const void* head_safety,
    const void* head_helpful, const void* norm_safety, const void* norm_helpful, const void* is_safety,
    const void* cu_groups, int64_t stride_safety, int64_t stride_helpful, int64_t width_safety, int64_t width_helpful,
    int bf16_safety, int bf16_helpful, int64_t responses, int64_t groups, double eps, float threshold, void* r_safety,
    void* r_helpful, void* combined, void* whitened, void* best_of_group, void* stream) {
  if (responses <= 0 || groups <= 0 || groups > responses || responses > INT32_MAX - 1) return BAD_ARGUMENT;
  Model safety = model(hidden_safety, head_safety, norm_safety, stride_safety, width_safety, bf16_safety);
  Model helpful = model(hidden_helpful, head_helpful, norm_helpful, stride_helpful, width_helpful, bf16_helpful);
  auto* z = static_cast<float*>(combined);
  auto* tags = static_cast<const unsigned char*>(is_safety);
  auto* safe = static_cast<float*>(r_safety);
  auto* help = static_cast<float*>(r_helpful);
  int raised = SIMT_LAUNCH((score_responses), dim3(static_cast<unsigned>(responses)), dim3(THREADS),
                           THREADS / 32 * sizeof(double), stream, safety, helpful, last_rows, rows64, tags, safe, help,
                           z, eps, threshold);
  if (raised) return raised;
  auto* white = static_cast<float*>(whitened);
  auto* offsets = static_cast<const int*>(cu_groups);
  auto* best = static_cast<int64_t*>(best_of_group);
  return SIMT_LAUNCH((whiten_and_choose), dim3(static_cast<unsigned>(groups + 1)), dim3(WIDE), WIDE / 32 * sizeof(double),
                     stream, z, white, responses, offsets, best);
}
