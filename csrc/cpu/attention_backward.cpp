// attention, backward: with P = 2^(S - lse), D = rowsum(dO * O) and dS = P * (dP - D):
// dV = P^T dO, dP = dO V^T, dQ = scale dS K, dK = scale dS^T Q. Limit: FLOPs, five GEMMs.
//
// A task owns its rows' dQ, so nothing is recomputed (a second pass for dQ would need seven GEMMs). Where several tasks
// see the same keys (a prefix, or a segment cut into chunks), each writes its own fp32 sums of dK, dV and a second pass
// adds them in the plan's order: no atomics, the same bits for any number of threads. Cutting a run of rows with the
// same keys into at most kMaxChunks tasks keeps those sums linear in the keys.

#include "attention.h"

namespace hpsafety::attention {
namespace {

constexpr int64_t kMaxChunks = 8;
constexpr int64_t kBlockRows = 96;  // packed rows whose P and dS stand at once, so that they stay in L2
constexpr int64_t kMergeRows = 64;  // rows of one item of the second pass
constexpr float kLn2 = 0.6931471805599453f;  // dK is summed with q * scale * log2(e): what is left of scale

struct Sizes {
  int64_t group, dim, padded, ld, ld_keys = leading(kKeys);
  float scale, scale_log2e;
};

template <typename T>
struct Tensors {
  View<const T> q, k, v, out, grad;
  const float* lse;
  int64_t heads, kv_heads;
  View<T> dq, dk, dv;
  float* slots;  // (slot row, kv head, dK then dV, dim)
};

struct Buffers {  // of one task: packed rows; one block of keys; one block of rows against it
  float *q, *grad, *dq, *lse, *delta, *keys, *keys_t, *values_t, *dk, *dv, *p, *ds;
  static int64_t floats(int64_t rows, const Sizes& z) {
    return 3 * rows * z.ld + 2 * round_up(rows, 8) + 3 * kKeys * z.ld + 2 * z.padded * z.ld_keys +
           2 * kBlockRows * z.ld_keys;
  }
  Buffers(float* at, int64_t rows, const Sizes& z) {
    const auto take = [&](int64_t n) { return std::exchange(at, at + n); };
    q = take(rows * z.ld), grad = take(rows * z.ld), dq = take(rows * z.ld);
    keys = take(kKeys * z.ld), dk = take(kKeys * z.ld), dv = take(kKeys * z.ld);
    keys_t = take(z.padded * z.ld_keys), values_t = take(z.padded * z.ld_keys);
    p = take(kBlockRows * z.ld_keys), ds = take(kBlockRows * z.ld_keys);
    lse = take(round_up(rows, 8)), delta = take(round_up(rows, 8));
  }
};

// One block of keys, as the rows of a task see it.
struct Block {
  const Part& part;
  int64_t row0, key, n, group;
  int64_t visible(int64_t p) const { return part.causal ? std::min(n, row0 + p / group - key + 1) : n; }
  // The first packed row that sees key `key + j`.
  int64_t first(int64_t j) const { return ((part.causal ? std::max(part.row0, key + j) : part.row0) - row0) * group; }
  int64_t end() const { return (part.row1 - row0) * group; }
};

// Rows p.. (at most kTileRows): P and dS into their rows of the block, dQ += dS K.
void backward_tile(const Block& block, int64_t p, int64_t rows, float* weights, float* ds, const Sizes& z,
                   const Buffers& b) {
  const int64_t widest = block.visible(p + rows - 1), ldk = z.ld_keys;
  scores(rows, b.q + p * z.ld, z.ld, b.keys_t, ldk, z.dim, weights, ldk, widest);
  scores(rows, b.grad + p * z.ld, z.ld, b.values_t, ldk, z.dim, ds, ldk, widest);
  for (int64_t r = 0; r < rows; ++r) {
    float *w = weights + r * ldk, *d = ds + r * ldk;
    const int64_t n = block.visible(p + r);
    const Vec lse(b.lse[p + r]), delta(b.delta[p + r]);
    for (int64_t i = 0; i < n; i += kLanes) {
      const Vec weight = exp2_below_zero(load(w + i) - lse);
      store(w + i, weight);
      store(d + i, weight * (load(d + i) - delta));
    }
    // A tile of dK, dV starts at the first row that sees its first key: its other keys need zeros there.
    for (int64_t i = n; i < std::min(block.n, n + kTileRows); ++i) w[i] = d[i] = 0;
  }
  add_visible(rows, ds, ldk, b.keys, z.ld, [&](int64_t r) { return block.visible(p + r); }, b.dq + p * z.ld, z.ld,
              z.padded);
}

// All rows of the task that see the block: adds to dQ, leaves the block's dK / ln 2 and dV in the buffers.
void backward_block(const Block& block, const Sizes& z, const Buffers& b) {
  std::fill_n(b.dk, block.n * z.ld, 0.f);
  std::fill_n(b.dv, block.n * z.ld, 0.f);
  for (int64_t begin = block.first(0); begin < block.end(); begin += kBlockRows) {
    const int64_t end = std::min(block.end(), begin + kBlockRows);
    for (int64_t p = begin; p < end; p += kTileRows) {
      const int64_t at = (p - begin) * z.ld_keys;
      backward_tile(block, p, std::min(kTileRows, end - p), b.p + at, b.ds + at, z, b);
    }
    for (int64_t j = 0; j < block.n; j += kTileRows) {
      const int64_t from = std::max(begin, block.first(j)), keys = std::min(kTileRows, block.n - j);
      if (from >= end) break;
      const int64_t at = (from - begin) * z.ld_keys + j;
      gemm(keys, b.p + at, 1, z.ld_keys, b.grad + from * z.ld, z.ld, end - from, b.dv + j * z.ld, z.ld, z.padded, true);
      gemm(keys, b.ds + at, 1, z.ld_keys, b.q + from * z.ld, z.ld, end - from, b.dk + j * z.ld, z.ld, z.padded, true);
    }
  }
}

// delta = rowsum(dO * O), in the order in which dP = dO V^T is summed: a row that sees one key gets dS of exactly zero.
void row_dots(const float* x, const float* y, int64_t rows, const Sizes& z, float* dots) {
  for (int64_t p = 0; p < rows; p += 8) {  // 8 chains of fma at once hide their latency
    const int64_t n = std::min<int64_t>(8, rows - p);
    std::fill_n(dots + p, n, 0.f);
    for (int64_t k = 0; k < z.dim;) {
      float sums[8] = {};
      for (const int64_t end = std::min(z.dim, k + kDepth); k < end; ++k) {
        for (int64_t r = 0; r < n; ++r) sums[r] = std::fma(x[(p + r) * z.ld + k], y[(p + r) * z.ld + k], sums[r]);
      }
      for (int64_t r = 0; r < n; ++r) dots[p + r] += sums[r];
    }
  }
}

template <typename T>
void pack_task(const Tensors<T>& t, const Task& task, int64_t head, const Sizes& z, const Buffers& b) {
  const int64_t count = task.row1 - task.row0, head0 = head * z.group;
  pack_group(t.q, task.row0, count, head0, z.group, z.dim, z.scale_log2e, b.q, z.ld);
  pack_group(t.grad, task.row0, count, head0, z.group, z.dim, 1.f, b.grad, z.ld);
  pack_group(t.out, task.row0, count, head0, z.group, z.dim, 1.f, b.dq, z.ld);
  row_dots(b.grad, b.dq, count * z.group, z, b.delta);
  std::fill_n(b.dq, count * z.group * z.ld, 0.f);
  for (int64_t i = 0; i < count; ++i) {
    std::copy_n(t.lse + (task.row0 + i) * t.heads + head0, z.group, b.lse + i * z.group);
  }
}

template <typename T>
void store_keys(const Tensors<T>& t, const Block& block, int64_t head, const Sizes& z, const Buffers& b) {
  for (int64_t j = 0; j < block.n; ++j) {
    const float *dk = b.dk + j * z.ld, *dv = b.dv + j * z.ld;
    if (block.part.slot < 0) {
      T *dk_to = t.dk.at(block.key + j, head), *dv_to = t.dv.at(block.key + j, head);
      for_lanes(z.dim, [&](int64_t i, int64_t n) {
        store_lanes(dk_to + i, load(dk + i) * Vec(kLn2), n);
        store_lanes(dv_to + i, load(dv + i), n);
      });
    } else {
      float* to = t.slots + ((block.part.slot + block.key - block.part.key0 + j) * t.kv_heads + head) * 2 * z.dim;
      for_lanes(z.dim, [&](int64_t i, int64_t n) {
        store_lanes(to + i, load(dk + i), n);
        store_lanes(to + z.dim + i, load(dv + i), n);
      });
    }
  }
}

template <typename T>
void backward_task(const Plan& plan, const Task& task, int64_t head, const Sizes& z, const Tensors<T>& t,
                   float* scratch) {
  const int64_t rows = (task.row1 - task.row0) * z.group;
  const Buffers b(scratch, rows, z);
  pack_task(t, task, head, z, b);
  for (size_t i = task.part0; i < task.part1; ++i) {
    const Part& part = plan.parts[i];
    for (int64_t key = part.key0; key < part.key1; key += kKeys) {
      const Block block{part, task.row0, key, std::min(kKeys, part.key1 - key), z.group};
      pack_rows(t.v, key, block.n, head, z.dim, b.keys, z.ld);
      transpose(b.keys, z.ld, round_up(block.n, kPad), z.padded, b.values_t, z.ld_keys);
      pack_rows(t.k, key, block.n, head, z.dim, b.keys, z.ld);
      transpose(b.keys, z.ld, round_up(block.n, kPad), z.padded, b.keys_t, z.ld_keys);
      backward_block(block, z, b);
      store_keys(t, block, head, z, b);
    }
  }
  for (int64_t p = 0; p < rows; ++p) {
    T* to = t.dq.at(task.row0 + p / z.group, head * z.group + p % z.group);
    for_lanes(z.dim, [&](int64_t i, int64_t n) { store_lanes(to + i, load(b.dq + p * z.ld + i) * Vec(z.scale), n); });
  }
}

// Adds up the sums of the parts that share row t, in the plan's order; one kv head.
template <typename T>
void merge_row(const Plan& plan, const std::vector<size_t>& parts, int64_t row, int64_t head, const Sizes& z,
               const Tensors<T>& t) {
  T *dk_to = t.dk.at(row, head), *dv_to = t.dv.at(row, head);
  for_lanes(z.dim, [&](int64_t i, int64_t n) {
    Vec dk(0.f), dv(0.f);
    for (size_t index : parts) {
      const Part& part = plan.parts[index];
      if (row < part.key0 || row >= part.key1) continue;
      const float* from = t.slots + ((part.slot + row - part.key0) * t.kv_heads + head) * 2 * z.dim + i;
      dk = dk + load_lanes(from, n), dv = dv + load_lanes(from + z.dim, n);
    }
    store_lanes(dk_to + i, dk * Vec(kLn2), n);
    store_lanes(dv_to + i, dv, n);
  });
}

template <typename T>
void merge(const Plan& plan, int64_t total, const Sizes& z, const Tensors<T>& t) {
  std::vector<std::vector<size_t>> parts((total + kMergeRows - 1) / kMergeRows);  // of each run of kMergeRows rows
  for (size_t i = 0; i < plan.parts.size(); ++i) {
    const Part& p = plan.parts[i];
    if (p.slot < 0) continue;
    for (int64_t m = p.key0 / kMergeRows; m * kMergeRows < p.key1; ++m) parts[m].push_back(i);
  }
  at::parallel_for(0, static_cast<int64_t>(parts.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      if (parts[m].empty()) continue;
      for (int64_t row = m * kMergeRows; row < std::min(total, (m + 1) * kMergeRows); ++row) {
        const bool shared = std::any_of(parts[m].begin(), parts[m].end(), [&](size_t i) {
          return plan.parts[i].key0 <= row && row < plan.parts[i].key1;
        });
        for (int64_t head = 0; shared && head < t.kv_heads; ++head) merge_row(plan, parts[m], row, head, z, t);
      }
    }
  });
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_, const Tensor& q_, const Tensor& k_, const Tensor& v_,
                                            const Tensor& out_, const Tensor& lse_, const Tensor& segments,
                                            double softmax_scale) {
  const auto q = dense_last(q_), k = dense_last(k_), v = dense_last(v_), out = dense_last(out_);
  const auto grad = dense_last(grad_), lse = lse_.contiguous();
  const int64_t total = q.size(0), heads = q.size(1), dim = q.size(2), kv_heads = k.size(1);
  Sizes z{heads / kv_heads, dim, round_up(dim, kPad), leading(round_up(dim, kPad))};
  z.scale = static_cast<float>(softmax_scale);
  z.scale_log2e = static_cast<float>(softmax_scale * M_LOG2E);
  const auto plan = make_plan(segments, total, z.group, kMaxChunks);
  const bool full = plan.covered == total;  // rows of no segment, if in no prefix either, get zeros
  const auto fresh = [&](const Tensor& t) {
    return full ? at::empty(t.sizes(), t.options()) : at::zeros(t.sizes(), t.options());
  };
  auto dq = fresh(q), dk = fresh(k), dv = fresh(v);
  auto slots = at::empty({plan.slot_rows, kv_heads, 2, dim}, q.options().dtype(at::kFloat));
  int64_t rows = 0;
  for (const Task& t : plan.tasks) rows = std::max(rows, (t.row1 - t.row0) * z.group);
  dispatch(q, "attention_backward", [&](auto tag) {
    using T = decltype(tag);
    const Tensors<T> t{view<T>(q), view<T>(k), view<T>(v), view<T>(out), view<T>(grad), lse.const_data_ptr<float>(),
                       heads, kv_heads, mutable_view<T>(dq), mutable_view<T>(dk), mutable_view<T>(dv),
                       slots.mutable_data_ptr<float>()};
    run_tasks(plan.tasks, kv_heads, Buffers::floats(rows, z), [&](const Task& task, int64_t head, float* scratch) {
      backward_task<T>(plan, task, head, z, t, scratch);
    });
    if (plan.slot_rows) merge<T>(plan, total, z, t);
  });
  return {dq, dk, dv};
}

}  // namespace

TORCH_LIBRARY_IMPL(hpsafety_cpu, CPU, m) { m.impl("attention_backward", &backward); }

}  // namespace hpsafety::attention
