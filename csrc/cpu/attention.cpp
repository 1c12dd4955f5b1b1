// attention, forward: flash form over packed segments, with shared prefixes and grouped query heads.
// Limit: FLOPs. Scores live in one (kTileRows, kKeys) tile; the row maximum and sum run along, output and sum are
// rescaled when the maximum grows. Blocks and columns above the diagonal are skipped, not masked. Saved: lse, base 2.

#include "attention.h"

namespace hpsafety::attention {
namespace {

void check_segment(int64_t i, const int32_t* s, int64_t previous_end, int64_t total) {
  TORCH_CHECK_VALUE(s[0] < s[1], "attention: segments[", i, "] is empty: start ", s[0], ", end ", s[1]);
  TORCH_CHECK_VALUE(s[0] >= previous_end, "attention: segments must be sorted and must not overlap; segments[", i,
                    "] starts at ", s[0], ", the one before ends at ", previous_end);
  TORCH_CHECK_VALUE(s[1] <= total, "attention: segments[", i, "] ends at ", s[1], ", but there are ", total, " rows");
  if (s[2] == s[3]) return;
  TORCH_CHECK_VALUE(0 <= s[2] && s[2] < s[3] && s[3] <= s[0], "attention: the prefix of segments[", i,
                    "] must lie in [0, ", s[0], "), before its own rows; got ", s[2], " to ", s[3]);
}

struct Row4 {
  int64_t start, end, prefix_start, prefix_end;
  int64_t length() const { return end - start; }
  bool continues(const Row4& before) const {
    return start == before.end && prefix_start == before.prefix_start && prefix_end == before.prefix_end;
  }
};

std::vector<Row4> checked_segments(const Tensor& tensor, int64_t total) {
  const auto segments = tensor.contiguous();
  const int32_t* s = segments.const_data_ptr<int32_t>();
  std::vector<Row4> rows(segments.size(0));
  int64_t previous_end = 0;
  for (size_t i = 0; i < rows.size(); ++i, s += 4) {
    check_segment(static_cast<int64_t>(i), s, previous_end, total);
    const bool prefix = s[2] != s[3];
    rows[i] = {s[0], s[1], prefix ? s[2] : 0, prefix ? s[3] : 0};
    previous_end = s[1];
  }
  return rows;
}

// One task for rows row0..row1 of the segments first..last (inclusive).
void add_task(Plan& plan, const std::vector<Row4>& segments, size_t first, size_t last, int64_t row0, int64_t row1) {
  const size_t part0 = plan.parts.size();
  const Row4& s = segments[first];
  double cost = 0;
  if (s.prefix_start < s.prefix_end) {
    plan.parts.push_back({row0, row1, s.prefix_start, s.prefix_end, false});
    cost += static_cast<double>(row1 - row0) * (s.prefix_end - s.prefix_start);
  }
  for (size_t i = first; i <= last; ++i) {
    const int64_t begin = std::max(row0, segments[i].start), end = std::min(row1, segments[i].end);
    plan.parts.push_back({begin, end, segments[i].start, end, true});
    cost += 0.5 * (end - begin) * (begin + end - 2 * segments[i].start);
  }
  plan.tasks.push_back({row0, row1, part0, plan.parts.size(), cost});
  plan.covered += row1 - row0;
}

// A part that shares a key with another part sums into rows of its own; the sums are added in order afterwards.
void assign_slots(Plan& plan, int64_t total) {
  plan.writers.assign(total + 1, 0);
  for (const Part& p : plan.parts) ++plan.writers[p.key0], --plan.writers[p.key1];
  std::partial_sum(plan.writers.begin(), plan.writers.end(), plan.writers.begin());
  std::vector<int64_t> shared(total + 1, 0);  // rows before t with more than one writer
  for (int64_t t = 0; t < total; ++t) shared[t + 1] = shared[t] + (plan.writers[t] > 1);
  for (Part& p : plan.parts) {
    if (shared[p.key1] == shared[p.key0]) continue;
    p.slot = plan.slot_rows;
    plan.slot_rows += p.key1 - p.key0;
  }
}

}  // namespace

Plan make_plan(const Tensor& tensor, int64_t total, int64_t group, int64_t max_chunks) {
  const auto segments = checked_segments(tensor, total);
  const int64_t base = std::max<int64_t>(1, kTaskRows / group);
  const auto limit = [&](int64_t rows) { return std::max(base, (rows + max_chunks - 1) / max_chunks); };
  Plan plan;
  for (size_t i = 0, next; i < segments.size(); i = next) {
    for (next = i + 1; next < segments.size() && segments[next].continues(segments[next - 1]);) ++next;
    const bool prefix = segments[i].prefix_start < segments[i].prefix_end;
    const int64_t run = segments[next - 1].end - segments[i].start;
    for (size_t first = i, last; first < next; first = last + 1) {
      const Row4& s = segments[first];
      const int64_t rows = limit(prefix ? run : s.length());
      last = first;
      if (s.length() > rows) {  // cut by its own length alone: its neighbours must not move the cuts
        const int64_t chunks = (s.length() + rows - 1) / rows, step = (s.length() + chunks - 1) / chunks;
        for (int64_t r = s.start; r < s.end; r += step) {
          add_task(plan, segments, first, first, r, std::min(s.end, r + step));
        }
        continue;
      }
      while (last + 1 < next && segments[last + 1].end - s.start <= (prefix ? rows : base)) ++last;
      add_task(plan, segments, first, last, s.start, segments[last].end);
    }
  }
  assign_slots(plan, total);
  return plan;
}

namespace {

struct Sizes {
  int64_t group, dim, padded, ld, ld_keys = leading(kKeys);
  float scale_log2e;
};

struct Buffers {  // of one task: packed rows x ld, and one block of keys
  float *q, *out, *top, *total, *keys, *keys_t, *values;
  static int64_t floats(int64_t rows, const Sizes& z) {
    return 2 * rows * (z.ld + 8) + 2 * kKeys * z.ld + z.padded * z.ld_keys;
  }
  Buffers(float* at, int64_t rows, const Sizes& z) {
    q = at, out = q + rows * z.ld, keys = out + rows * z.ld, values = keys + kKeys * z.ld;
    keys_t = values + kKeys * z.ld, top = keys_t + z.padded * z.ld_keys, total = top + round_up(rows, 8);
  }
};

// All rows of `part` against its keys key..key+n, which stand packed in the buffers.
void forward_block(const Part& part, int64_t row0, int64_t key, int64_t n, const Sizes& z, const Buffers& b) {
  alignas(64) float s[kTileRows * (kKeys + 16)];
  const int64_t first = part.causal ? std::max(part.row0, key) : part.row0;
  const int64_t end = (part.row1 - row0) * z.group;
  for (int64_t p = (first - row0) * z.group; p < end; p += kTileRows) {
    const int64_t rows = std::min(kTileRows, end - p);
    const auto visible = [&](int64_t r) {
      return part.causal ? std::min(n, row0 + (p + r) / z.group - key + 1) : n;
    };
    scores(rows, b.q + p * z.ld, z.ld, b.keys_t, z.ld_keys, z.dim, s, z.ld_keys, visible(rows - 1));
    for (int64_t r = 0; r < rows; ++r) {
      softmax_row(s + r * z.ld_keys, visible(r), b.top[p + r], b.total[p + r], b.out + (p + r) * z.ld,
                  z.padded);
    }
    add_visible(rows, s, z.ld_keys, b.values, z.ld, visible, b.out + p * z.ld, z.ld, z.padded);
  }
}

template <typename T>
void forward_task(const Plan& plan, const Task& task, int64_t head, const Sizes& z, const View<const T>& q,
                  const View<const T>& k, const View<const T>& v, const View<T>& out, float* lse, int64_t heads,
                  float* scratch) {
  const int64_t rows = (task.row1 - task.row0) * z.group;
  const Buffers b(scratch, rows, z);
  pack_group(q, task.row0, task.row1 - task.row0, head * z.group, z.group, z.dim, z.scale_log2e, b.q, z.ld);
  std::fill_n(b.out, rows * z.ld, 0.f);
  std::fill_n(b.total, rows, 0.f);
  std::fill_n(b.top, rows, -std::numeric_limits<float>::infinity());
  for (size_t i = task.part0; i < task.part1; ++i) {
    const Part& part = plan.parts[i];
    for (int64_t key = part.key0; key < part.key1; key += kKeys) {
      const int64_t n = std::min(kKeys, part.key1 - key);
      pack_rows(k, key, n, head, z.dim, b.keys, z.ld);
      transpose(b.keys, z.ld, round_up(n, kPad), z.padded, b.keys_t, z.ld_keys);
      pack_rows(v, key, n, head, z.dim, b.values, z.ld);
      forward_block(part, task.row0, key, n, z, b);
    }
  }
  for (int64_t p = 0; p < rows; ++p) {
    const int64_t row = task.row0 + p / z.group, h = head * z.group + p % z.group;
    T* to = out.at(row, h);
    const Vec share(1.f / b.total[p]);
    for_lanes(z.dim, [&](int64_t i, int64_t n) { store_lanes(to + i, load(b.out + p * z.ld + i) * share, n); });
    lse[row * heads + h] = b.top[p] + std::log2(b.total[p]);
  }
}

std::tuple<Tensor, Tensor> forward(const Tensor& q_, const Tensor& k_, const Tensor& v_, const Tensor& segments,
                                   double softmax_scale) {
  const auto q = dense_last(q_), k = dense_last(k_), v = dense_last(v_);
  const int64_t total = q.size(0), heads = q.size(1), dim = q.size(2), kv_heads = k.size(1);
  Sizes z{heads / kv_heads, dim, round_up(dim, kPad), leading(round_up(dim, kPad))};
  z.scale_log2e = static_cast<float>(softmax_scale * M_LOG2E);
  const auto plan = make_plan(segments, total, z.group, std::numeric_limits<int32_t>::max());
  const auto floats = q.options().dtype(at::kFloat);
  const bool full = plan.covered == total;  // rows of no segment are zero
  auto out = full ? at::empty(q.sizes(), q.options()) : at::zeros(q.sizes(), q.options());
  auto lse = full ? at::empty({total, heads}, floats) : at::zeros({total, heads}, floats);
  int64_t rows = 0;
  for (const Task& t : plan.tasks) rows = std::max(rows, (t.row1 - t.row0) * z.group);
  dispatch(q, "attention", [&](auto tag) {
    using T = decltype(tag);
    const auto qv = view<T>(q), kv = view<T>(k), vv = view<T>(v);
    const auto ov = mutable_view<T>(out);
    float* l = lse.mutable_data_ptr<float>();
    run_tasks(plan.tasks, kv_heads, Buffers::floats(rows, z), [&](const Task& task, int64_t head, float* scratch) {
      forward_task<T>(plan, task, head, z, qv, kv, vv, ov, l, heads, scratch);
    });
  });
  return {out, lse};
}

}  // namespace

TORCH_LIBRARY_IMPL(hpsafety_cpu, CPU, m) { m.impl("attention", &forward); }

}  // namespace hpsafety::attention
