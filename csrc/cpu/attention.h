// What attention's forward and backward share, paged_attention in part: the plan (who computes which rows against which
// keys), the GEMM tile, packing, exp2 and the running softmax.
//
// A task owns a run of query rows for one kv head, with all query heads of that kv head: query row i and head h of the
// group make packed row (i - row0) * group + h, so K and V are read once for the whole group. Its keys come in parts:
// the shared prefix (unmasked, one part for all rows of the task) and each segment's own keys (causal). Keys are cut
// into blocks counted from the start of their part, and a segment's tasks and tiles are counted from its own start;
// every sum runs in a fixed order, block after block. So neither other segments nor the number of threads change a bit.
#pragma once

#include "common.h"

#include <atomic>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

namespace hpsafety::attention {

constexpr int64_t kTileRows = kLanes == 8 ? 6 : 12;  // x 2 vectors: 12 of AVX2's 16 registers, 24 of 32 elsewhere
constexpr int64_t kKeys = 96;                        // keys a block; a multiple of kTileRows and of 2 * kLanes
constexpr int64_t kTaskRows = 384;                   // packed rows a task has, about: enough to pay for packing K, V
constexpr int64_t kPad = kLanes > 8 ? kLanes : 8;    // columns are padded to whole vectors and to square transposes
constexpr int64_t kDepth = 128;                      // longest chain of a score: longer ones round worse than MKL's

inline int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }
// Row length of a packed matrix: an odd number of 64-byte lines, so that a column walk touches all L1 sets.
inline int64_t leading(int64_t n) {
  const int64_t lines = round_up(n, 16) / 16;
  return 16 * (lines + 1 - lines % 2);
}

struct Part {
  int64_t row0, row1, key0, key1;  // absolute rows; a causal part's row i sees keys key0..i, another all of them
  bool causal;
  int64_t slot = -1;               // backward: first row of its partial dK, dV sums; -1: it alone writes to its keys
};
struct Task {
  int64_t row0, row1;
  size_t part0, part1;
  double cost;
};
struct Plan {
  std::vector<Part> parts;  // in the order of their rows: the order of every sum over parts
  std::vector<Task> tasks;
  std::vector<int32_t> writers;  // parts whose keys include row t
  int64_t covered = 0, slot_rows = 0;
};

// max_chunks bounds the partial dK, dV rows: no run of rows with the same keys is cut into more tasks than that.
Plan make_plan(const Tensor& segments, int64_t total, int64_t group, int64_t max_chunks);

// Runs f(task, head, scratch) for every task and kv head, the costliest first, each by the next free thread.
template <typename Tasks, typename F>
void run_tasks(const Tasks& tasks, int64_t kv_heads, int64_t scratch_floats, F&& f) {
  std::vector<size_t> order(tasks.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](size_t a, size_t b) { return tasks[a].cost > tasks[b].cost; });
  const int64_t items = static_cast<int64_t>(order.size()) * kv_heads;
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), items);
  scratch_floats = round_up(scratch_floats, 16);
  auto scratch = at::empty({threads, scratch_floats}, at::TensorOptions(at::kFloat));
  float* base = scratch.mutable_data_ptr<float>();
  std::atomic<int64_t> next{0};
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) {
      for (int64_t item = next++; item < items; item = next++) {
        f(tasks[order[item / kv_heads]], item % kv_heads, base + thread * scratch_floats);
      }
    }
  });
}

// How many of a product's terms the rows of a tile take: all of them `common`, row r `of[r]`, no fewer than row r - 1.
// Where all rows take the same number, that number stands in its place, and no second loop is compiled.
struct Reach {
  int64_t common, most;
  const int64_t* of;
  Reach(const int64_t* of, int64_t rows) : common(of[0]), most(of[rows - 1]), of(of) {}
};
inline int64_t common(int64_t depth) { return depth; }
inline int64_t common(const Reach& reach) { return reach.common; }

// c[R rows, N vectors] (+)= sum over k of a[row * a_row + k * a_k] * b(k)[lane], b(k) a row of fp32 or bf16. The sum
// starts from zero and is added at the end: shorter chains of roundings than summing into c. A row has one chain over
// all its terms, so its bits do not depend on the tile it stands in.
template <int R, int N, typename B, typename D>
inline void tile(const float* __restrict a, int64_t a_row, int64_t a_k, const B& b, D depth,
                 float* __restrict c, int64_t ldc, bool add) {
  Vec sum[R][N];
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) sum[r][n] = Vec(0.f);
  }
  for (int64_t k = 0; k < common(depth); ++k) {
    Vec right[N];
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) right[n] = load(b(k) + n * kLanes);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      const Vec left(a[r * a_row + k * a_k]);
#pragma GCC unroll 2
      for (int n = 0; n < N; ++n) sum[r][n] = at::vec::fmadd(left, right[n], sum[r][n]);
    }
  }
  if constexpr (std::is_same_v<D, Reach>) {
    for (int64_t k = depth.common; k < depth.most; ++k) {
      Vec right[N];
#pragma GCC unroll 2
      for (int n = 0; n < N; ++n) right[n] = load(b(k) + n * kLanes);
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r) {
        if (k >= depth.of[r]) continue;  // an unseen key is not even multiplied by zero, so its NaN stays away
        const Vec left(a[r * a_row + k * a_k]);
#pragma GCC unroll 2
        for (int n = 0; n < N; ++n) sum[r][n] = at::vec::fmadd(left, right[n], sum[r][n]);
      }
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) {
      float* to = c + r * ldc + n * kLanes;
      store(to, add ? load(to) + sum[r][n] : sum[r][n]);
    }
  }
}

// The same for up to kTileRows rows and any number of columns (rounded up to whole vectors).
template <int R = kTileRows, typename B, typename D>
inline void gemm(int64_t rows, const float* a, int64_t a_row, int64_t a_k, const B& b, D depth, float* c,
                 int64_t ldc, int64_t columns, bool add) {
  if constexpr (R > 1) {
    if (rows < R) return gemm<R - 1>(rows, a, a_row, a_k, b, depth, c, ldc, columns, add);
  }
  int64_t n = 0;
  const auto right = [&](int64_t k) { return b(k) + n; };
  for (; n + kLanes < columns; n += 2 * kLanes) tile<R, 2>(a, a_row, a_k, right, depth, c + n, ldc, add);
  if (n < columns) tile<R, 1>(a, a_row, a_k, right, depth, c + n, ldc, add);
}
// The same with a dense b.
template <int R = kTileRows, typename D>
inline void gemm(int64_t rows, const float* a, int64_t a_row, int64_t a_k, const float* b, int64_t ldb,
                 D depth, float* c, int64_t ldc, int64_t columns, bool add) {
  gemm<R>(rows, a, a_row, a_k, [=](int64_t k) { return b + k * ldb; }, depth, c, ldc, columns, add);
}

// c = a b for a tile of rows, over the head dim in chains of kDepth.
inline void scores(int64_t rows, const float* a, int64_t lda, const float* b, int64_t ldb, int64_t dim, float* c,
                   int64_t ldc, int64_t columns) {
  for (int64_t k = 0; k < dim; k += kDepth) {
    gemm(rows, a + k, lda, 1, b + k * ldb, ldb, std::min(kDepth, dim - k), c, ldc, columns, k > 0);
  }
}

// c += w b for a tile of rows of which row r may see the first visible(r) keys, never fewer than the row before it.
template <typename F>
inline void add_visible(int64_t rows, const float* w, int64_t ldw, const float* b, int64_t ldb, F&& visible, float* c,
                        int64_t ldc, int64_t columns) {
  int64_t sees[kTileRows];
  for (int64_t r = 0; r < rows; ++r) sees[r] = visible(r);
  gemm(rows, w, ldw, 1, b, ldb, Reach(sees, rows), c, ldc, columns, true);
}

// 2^t for t <= 0 (a little above is fine), 0 below 2^-126; NaN stays. Relative error 1e-7: a degree 5 minimax
// polynomial on [-1/2, 1/2]; adding 1.5 * 2^23 + 127 leaves the biased exponent in the low bits.
inline Vec exp2_below_zero(Vec t) {
  const Vec magic(12582912.f + 127.f);
  t = at::vec::clamp_min(t, Vec(-127.f));
  const Vec shifted = t + magic, f = t - (shifted - magic);
  Vec p = at::vec::fmadd(Vec(1.327647204870469e-3f), f, Vec(9.675541384707567e-3f));
  p = at::vec::fmadd(p, f, Vec(5.5507132737614366e-2f));
  p = at::vec::fmadd(p, f, Vec(0.2402211972291401f));
  p = at::vec::fmadd(p, f, Vec(0.6931469670643273f));
  p = at::vec::fmadd(p, f, Vec(1.f));
  const auto exponent = at::vec::cast<int32_t>(shifted) << at::vec::Vectorized<int32_t>(23);
  return p * at::vec::cast<float>(exponent);
}

// Halves the lanes until one is left.
template <typename F>
inline float reduce(Vec v, F&& f) {
  float lanes[kLanes];
  v.store(lanes);
#pragma GCC unroll 4
  for (int64_t width = kLanes / 2; width > 0; width /= 2) {
#pragma GCC unroll 8
    for (int64_t i = 0; i < width; ++i) lanes[i] = f(lanes[i], lanes[i + width]);
  }
  return lanes[0];
}

// Turns scores s[0..n) (base 2) into weights 2^(s - top), top the running maximum; brings the row's sum and output up
// to the new top and adds the weights to the sum.
inline void softmax_row(float* s, int64_t n, float& top, float& total, float* out, int64_t columns) {
  constexpr float kInf = std::numeric_limits<float>::infinity();
  Vec highest(-kInf);
  for_lanes(n, [&](int64_t i, int64_t lanes) {
    const Vec v = lanes == kLanes ? load(s + i) : Vec::set(Vec(-kInf), load(s + i), lanes);
    highest = at::vec::clamp_min(v, highest);
  });
  const float block = reduce(highest, [](float a, float b) { return std::max(a, b); });
  const float now = std::max(top, block);
  const float offset = now == -kInf ? 0.f : -now;  // all scores -inf so far: weights 0, not NaN
  Vec sums(0.f);
  for_lanes(n, [&](int64_t i, int64_t lanes) {
    const Vec p = exp2_below_zero(load(s + i) + Vec(offset));
    store(s + i, p);
    sums = sums + (lanes == kLanes ? p : Vec::set(Vec(0.f), p, lanes));
  });
  const float added = reduce(sums, [](float a, float b) { return a + b; });
  if (now != top && total != 0) {
    const float shrink = std::exp2(top + offset);
    total *= shrink;
    for (int64_t i = 0; i < columns; i += kLanes) store(out + i, load(out + i) * Vec(shrink));
  }
  total += added;
  top = now;
}

// A (rows, heads, K) tensor whose last dim is contiguous.
template <typename T>
struct View {
  T* data;
  int64_t row_stride, head_stride;
  T* at(int64_t row, int64_t head) const { return data + row * row_stride + head * head_stride; }
};
template <typename T>
View<const T> view(const Tensor& t) { return {t.const_data_ptr<T>(), t.stride(0), t.stride(1)}; }
template <typename T>
View<T> mutable_view(const Tensor& t) { return {t.mutable_data_ptr<T>(), t.stride(0), t.stride(1)}; }
inline Tensor dense_last(const Tensor& t) { return t.stride(-1) == 1 ? t : t.contiguous(); }

template <typename T>
inline void pack_row(const T* from, int64_t dim, float* to, float factor = 1.f) {
  // Zeros past dim: a tail is loaded with zero lanes.
  for_lanes(dim, [&](int64_t i, int64_t n) { store(to + i, load_lanes(from + i, n) * Vec(factor)); });
  for (int64_t i = round_up(dim, kLanes); i < round_up(dim, kPad); ++i) to[i] = 0;
}
// Rows row0.. of one head -> to (count, ld), with zero rows up to a multiple of kPad.
template <typename T>
inline void pack_rows(const View<const T>& from, int64_t row0, int64_t count, int64_t head, int64_t dim, float* to,
                      int64_t ld) {
  for (int64_t i = 0; i < count; ++i) pack_row(from.at(row0 + i, head), dim, to + i * ld);
  for (int64_t i = count; i < round_up(count, kPad); ++i) std::fill_n(to + i * ld, round_up(dim, kPad), 0.f);
}
// The group's query heads of rows row0.. times factor -> to (count * group, ld).
template <typename T>
inline void pack_group(const View<const T>& from, int64_t row0, int64_t count, int64_t head0, int64_t group,
                       int64_t dim, float factor, float* to, int64_t ld) {
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t h = 0; h < group; ++h) pack_row(from.at(row0 + i, head0 + h), dim, to + (i * group + h) * ld, factor);
  }
}
// from (rows, ld_from) -> to (columns, ld_to); both counts are padded to kPad.
inline void transpose(const float* from, int64_t ld_from, int64_t rows, int64_t columns, float* to, int64_t ld_to) {
  for (int64_t i = 0; i < rows; i += kPad) {
    for (int64_t j = 0; j < columns; j += kPad) {
      at::vec::transpose_mxn<float, kPad, kPad>(from + i * ld_from + j, ld_from, to + j * ld_to + i, ld_to);
    }
  }
}

}  // namespace hpsafety::attention
