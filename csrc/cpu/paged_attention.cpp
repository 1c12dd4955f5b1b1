// paged_attention: one query per sequence over keys and values that stand in pages; a prefix that a group of sequences
// shares is read once for the whole group.
// Limit: the bytes of K and V.
//
// A part is a group's prefix or a sequence's own tokens. It is cut into splits of kSplit keys counted from its start;
// an item is one split of one part for one kv head, with the packed query rows of all members of the part and all query
// heads of that kv head. Every item leaves (maximum, sum, output) of each of its rows, and a second pass merges them in
// the order prefix, own tokens, split by split. A row's numbers come from the same chains whatever stands in the rows
// beside it, and splits and blocks are counted in tokens: so its bits depend on its own query, keys and values alone,
// not on the other sequences, the members of its group, the page size, the order of pages or the number of threads.
//
// Sequential: no splits. A row goes through its prefix's blocks and then its own, with one running softmax: the steps
// of attention's row of a segment with a prefix, so the bits are that row's. Prefixes come first, for all members at
// once; the sequences' own items go on from the state they left.

#include "attention.h"

#include <ATen/ops/full.h>

namespace hpsafety::paged {

using namespace attention;

namespace {

constexpr int64_t kSplit = 3 * kKeys;  // 8192 tokens make 29 splits; 3 rows leave 1/190 of the bytes of K, V

struct Part {
  const int32_t* table;       // its pages, in the order of its tokens
  int64_t length;             // tokens
  int64_t member0, members;   // its sequences: a run of Plan::order
  int64_t slot = 0;           // first row of its partial results
};
struct Item {
  size_t part;
  int64_t split;
  double cost;
};
struct Plan {
  std::vector<Part> parts;      // first the groups, then the sequences' own tokens
  std::vector<int64_t> order;   // the sequences, group after group
  std::vector<int64_t> place;   // where a sequence stands in `order`
  std::vector<int64_t> group;   // of each sequence; empty when there is no prefix
  bool sequential = false;
  std::vector<Item> first, then;  // sequential: prefixes, then own tokens; else all are in `first`
  std::vector<Tensor> tables;   // what the parts point into
  int64_t slots = 0;            // rows of partial results
  int64_t split() const { return sequential ? std::numeric_limits<int64_t>::max() / 2 : kSplit; }
  int64_t splits(const Part& part) const { return (part.length + split() - 1) / split(); }
  int64_t sequences() const { return static_cast<int64_t>(order.size()); }
  const Part& own(int64_t b) const { return parts[parts.size() - order.size() + b]; }
};

// The rows of a table (rows, pages) as parts without members.
void add_parts(Plan& plan, const char* lens_name, const Tensor& table_, const Tensor& lens_, int64_t page_size) {
  const auto table = table_.contiguous(), lens = lens_.contiguous();
  plan.tables.push_back(table);
  const int64_t columns = table.size(1), covered = columns * page_size;
  for (int64_t i = 0; i < table.size(0); ++i) {
    const int64_t length = lens.const_data_ptr<int32_t>()[i];
    TORCH_CHECK_VALUE(0 <= length && length <= covered, "paged_attention: ", lens_name, "[", i, "] must lie in [0, ",
                      covered, "], which ", columns, " pages of ", page_size, " tokens cover, got ", length);
    plan.parts.push_back({table.const_data_ptr<int32_t>() + i * columns, length, 0, 0});
  }
}

void check_pages(const char* name, int64_t row, const Part& part, int64_t page_size, int64_t pages) {
  for (int64_t i = 0; i * page_size < part.length; ++i) {
    TORCH_CHECK_VALUE(0 <= part.table[i] && part.table[i] < pages, "paged_attention: ", name, "[", row, "][", i,
                      "] must lie in [0, ", pages, "), got ", part.table[i]);
  }
}

// Sorts the sequences by group; the order inside of a group is the batch's.
void gather_members(Plan& plan, const Tensor& group_of_, int64_t groups) {
  const auto group_of = group_of_.contiguous();
  const int32_t* of = group_of.const_data_ptr<int32_t>();
  plan.group.assign(of, of + plan.sequences());
  for (int64_t b = 0; b < plan.sequences(); ++b) {
    TORCH_CHECK_VALUE(0 <= of[b] && of[b] < groups, "paged_attention: group_of[", b, "] must lie in [0, ", groups,
                      "), got ", of[b]);
    ++plan.parts[of[b]].members;
  }
  std::vector<int64_t> next(groups, 0);
  for (int64_t g = 1; g < groups; ++g) {
    next[g] = plan.parts[g].member0 = plan.parts[g - 1].member0 + plan.parts[g - 1].members;
  }
  for (int64_t b = 0; b < plan.sequences(); ++b) plan.place[b] = next[of[b]]++;
}

using Optional = std::optional<Tensor>;

Plan make_plan(const Tensor& block_table, const Tensor& context_lens, const Optional& prefix_table,
               const Optional& prefix_lens, const Optional& group_of, int64_t pages, int64_t page_size, int64_t heads,
               bool sequential) {
  Plan plan;
  plan.sequential = sequential;
  plan.order.resize(block_table.size(0));
  plan.place.resize(block_table.size(0));
  std::iota(plan.place.begin(), plan.place.end(), 0);
  const int64_t groups = prefix_table ? prefix_table->size(0) : 0;
  if (prefix_table) {
    add_parts(plan, "prefix lens", *prefix_table, *prefix_lens, page_size);
    gather_members(plan, *group_of, groups);
  }
  add_parts(plan, "context_lens", block_table, context_lens, page_size);
  for (int64_t b = 0; b < plan.sequences(); ++b) {
    plan.order[plan.place[b]] = b;
    plan.parts[groups + b].member0 = plan.place[b];
    plan.parts[groups + b].members = 1;
  }
  for (size_t i = 0; i < plan.parts.size(); ++i) {
    Part& part = plan.parts[i];
    if (!part.members) continue;  // its table may be stale
    const int64_t row = static_cast<int64_t>(i);
    const bool prefix = row < groups;
    check_pages(prefix ? "prefix table" : "block_table", prefix ? row : row - groups, part, page_size, pages);
    part.slot = plan.slots;
    plan.slots += plan.splits(part) * part.members * heads;
    for (int64_t s = 0; s < plan.splits(part); ++s) {
      const int64_t keys = std::min(plan.split(), part.length - s * plan.split());
      const Item item{i, s, static_cast<double>(keys) * static_cast<double>(part.members + 4)};
      (sequential && !prefix ? plan.then : plan.first).push_back(item);
    }
  }
  if (sequential) plan.slots = plan.sequences() * heads;
  return plan;
}

struct Sizes {
  int64_t heads, kv_heads, group, dim, padded, ld, ld_keys = leading(kKeys);
};

// Row (member, head of the group) of a split and kv head of a part, among the partial results; sequential: where the
// sequence's query stands, so that both of its parts have the same.
int64_t slot(const Plan& plan, const Part& part, const Sizes& z, int64_t split, int64_t head) {
  if (plan.sequential) return (head * plan.sequences() + part.member0) * z.group;
  return part.slot + (split * z.kv_heads + head) * part.members * z.group;
}

struct Partials {
  float *out, *top, *total;  // (slots, padded), (slots,), (slots,)
};

template <typename T>
constexpr int64_t kLine = 64 / sizeof(T);  // elements of a cache line

template <typename T>
struct Pages {
  const T* data;
  int64_t page_size, page_stride, slot_stride, head_stride;
  explicit Pages(const Tensor& t)
      : data(t.const_data_ptr<T>()), page_size(t.size(1)), page_stride(t.stride(0)), slot_stride(t.stride(1)),
        head_stride(t.stride(2)) {}
};

// Where the n keys or values from `key` on stand. Their lines are asked for at once, values and the next block's keys
// before the present keys are worked on: rows of one head are too short and too far apart for the hardware to foresee
// (one thread, fp32, one sequence of 8192 tokens, 9 heads on 3, K=64: 0.6 ms instead of 2.2).
template <typename T>
void locate(const Pages<T>& pages, const Part& part, int64_t key, int64_t n, int64_t head, int64_t dim,
            const T** rows) {
  int64_t page = key / pages.page_size, slot = key % pages.page_size;
  for (int64_t i = 0; i < n; ++page, slot = 0) {
    const T* from = pages.data + part.table[page] * pages.page_stride + head * pages.head_stride;
    for (; slot < pages.page_size && i < n; ++slot, ++i) {
      rows[i] = from + slot * pages.slot_stride;
      for (int64_t j = 0; j < dim; j += kLine<T>) __builtin_prefetch(rows[i] + j, 0, 2);
    }
  }
}

// -> to (n, ld), with zero rows up to a multiple of kPad.
template <typename T>
void pack(const T* const* rows, int64_t n, const Sizes& z, float* to) {
  for (int64_t i = 0; i < n; ++i) pack_row(rows[i], z.dim, to + i * z.ld);
  for (int64_t i = n; i < round_up(n, kPad); ++i) std::fill_n(to + i * z.ld, z.padded, 0.f);
}

// Keys -> to (padded, ld_keys). Straight from the pages where kPad keys stand in one page; a last page is read to the
// end, the columns past n mean nothing.
template <typename T>
void pack_transposed(const Pages<T>& pages, const T* const* rows, int64_t n, const Sizes& z, float* scratch,
                     float* to) {
  if constexpr (std::is_same_v<T, float>) {
    if (pages.page_size % kPad == 0 && z.dim % kPad == 0) {
      for (int64_t i = 0; i < n; i += kPad) {
        transpose(rows[i], pages.slot_stride, kPad, z.padded, to + i, z.ld_keys);
      }
      return;
    }
  }
  pack(rows, n, z, scratch);
  transpose(scratch, z.ld, round_up(n, kPad), z.padded, to, z.ld_keys);
}

struct Buffers {  // of one item: a block of keys (transposed) or values
  float *keys_t, *rows;
  static int64_t floats(const Sizes& z) { return z.padded * z.ld_keys + kKeys * z.ld; }
  Buffers(float* at, const Sizes& z) : keys_t(at), rows(at + z.padded * z.ld_keys) {}
};

template <typename T>
void run_item(const Plan& plan, const Item& item, int64_t head, const Sizes& z, const Pages<T>& k, const Pages<T>& v,
              const float* q, const Partials& to, const Buffers& b) {
  alignas(64) float s[kTileRows * (kKeys + 16)];
  const T *keys[2][kKeys], *values[kKeys];
  const Part& part = plan.parts[item.part];
  const int64_t rows = part.members * z.group, first = slot(plan, part, z, item.split, head);
  float *out = to.out + first * z.padded, *top = to.top + first, *total = to.total + first;
  // A value that is used once is read where it stands. The sums are the same either way.
  const bool in_place = rows <= kTileRows && z.dim % kLanes == 0;
  const int64_t end = std::min(part.length, (item.split + 1) * plan.split());
  int64_t key = item.split * plan.split(), turn = 0;
  locate(k, part, key, std::min(kKeys, end - key), head, z.dim, keys[turn]);
  for (; key < end; key += kKeys) {
    const int64_t n = std::min(kKeys, end - key);
    locate(v, part, key, n, head, z.dim, values);
    locate(k, part, key + n, std::min(kKeys, end - key - n), head, z.dim, keys[1 - turn]);
    pack_transposed(k, keys[turn], n, z, b.rows, b.keys_t);
    turn = 1 - turn;
    if (!in_place) pack(values, n, z, b.rows);
    for (int64_t p = 0; p < rows; p += kTileRows) {
      const int64_t count = std::min(kTileRows, rows - p);
      float* o = out + p * z.padded;
      scores(count, q + p * z.padded, z.padded, b.keys_t, z.ld_keys, z.dim, s, z.ld_keys, n);
      for (int64_t r = 0; r < count; ++r) {
        softmax_row(s + r * z.ld_keys, n, top[p + r], total[p + r], o + r * z.padded, z.padded);
      }
      if (in_place) {
        gemm(count, s, z.ld_keys, 1, [&](int64_t j) { return values[j]; }, n, o, z.padded, z.padded, true);
      } else {
        gemm(count, s, z.ld_keys, 1, b.rows, z.ld, n, o, z.padded, z.padded, true);
      }
    }
  }
}

// The partial results of one sequence's query head, in order: prefix, own tokens.
template <typename F>
void for_partials(const Plan& plan, int64_t b, int64_t h, const Sizes& z, F&& f) {
  const auto visit = [&](const Part& part) {
    const int64_t row = (plan.place[b] - part.member0) * z.group + h % z.group;
    for (int64_t s = 0; s < plan.splits(part); ++s) f(slot(plan, part, z, s, h / z.group) + row);
  };
  if (!plan.group.empty()) visit(plan.parts[plan.group[b]]);
  visit(plan.own(b));
}

// The one state of a sequential row.
template <typename T>
void finish_row(const Plan& plan, int64_t b, int64_t h, const Sizes& z, const Partials& from, T* out) {
  const int64_t i = (h / z.group * plan.sequences() + plan.place[b]) * z.group + h % z.group;
  const bool any = plan.own(b).length > 0 || (!plan.group.empty() && plan.parts[plan.group[b]].length > 0);
  const Vec share(any ? 1.f / from.total[i] : 0.f);
  for_lanes(z.dim, [&](int64_t j, int64_t n) { store_lanes(out + j, load(from.out + i * z.padded + j) * share, n); });
}

template <typename T>
void merge_row(const Plan& plan, int64_t b, int64_t h, const Sizes& z, const Partials& from, float* sum, T* out) {
  float top = -std::numeric_limits<float>::infinity(), total = 0;
  bool any = false;
  for_partials(plan, b, h, z, [&](int64_t i) { top = std::max(top, from.top[i]), any = true; });
  std::fill_n(sum, z.padded, 0.f);
  for_partials(plan, b, h, z, [&](int64_t i) {
    const float factor = std::exp2(from.top[i] - top);  // NaN when all scores are -inf, as the softmax is
    total = std::fma(factor, from.total[i], total);
    for (int64_t j = 0; j < z.padded; j += kLanes) {
      store(sum + j, at::vec::fmadd(Vec(factor), load(from.out + i * z.padded + j), load(sum + j)));
    }
  });
  const Vec share(any ? 1.f / total : 0.f);
  for_lanes(z.dim, [&](int64_t j, int64_t n) { store_lanes(out + j, load(sum + j) * share, n); });
}

// q times scale / ln 2 -> (kv head, place, head of the group, padded): the rows of a part stand together.
template <typename T>
void pack_queries(const Plan& plan, const Tensor& q, double softmax_scale, const Sizes& z, float* to) {
  const auto from = view<T>(q);
  const float factor = static_cast<float>(softmax_scale * M_LOG2E);
  at::parallel_for(0, plan.sequences(), 16, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      for (int64_t h = 0; h < z.heads; ++h) {
        const int64_t row = (h / z.group * plan.sequences() + plan.place[b]) * z.group + h % z.group;
        pack_row(from.at(b, h), z.dim, to + row * z.padded, factor);
      }
    }
  });
}

template <typename T>
void attend(const Plan& plan, const Tensor& q, const Tensor& k_pages, const Tensor& v_pages, double softmax_scale,
            const Sizes& z, const Tensor& out) {
  const Pages<T> k(k_pages), v(v_pages);
  const auto floats = q.options().dtype(at::kFloat);
  const auto packed = at::empty({plan.sequences() * z.heads, z.padded}, floats);
  const auto partial = at::zeros({plan.slots, z.padded}, floats), total = at::zeros({plan.slots}, floats);
  const auto top = at::full({plan.slots}, -std::numeric_limits<float>::infinity(), floats);
  float* rows = packed.mutable_data_ptr<float>();
  const Partials to{partial.mutable_data_ptr<float>(), top.mutable_data_ptr<float>(), total.mutable_data_ptr<float>()};
  pack_queries<T>(plan, q, softmax_scale, z, rows);
  const auto run = [&](const Item& item, int64_t head, float* scratch) {
    const int64_t member0 = plan.parts[item.part].member0;
    const float* members = rows + (head * plan.sequences() + member0) * z.group * z.padded;
    run_item<T>(plan, item, head, z, k, v, members, to, Buffers(scratch, z));
  };
  run_tasks(plan.first, z.kv_heads, Buffers::floats(z), run);
  if (!plan.then.empty()) run_tasks(plan.then, z.kv_heads, Buffers::floats(z), run);
  T* o = out.mutable_data_ptr<T>();
  at::parallel_for(0, plan.sequences() * z.heads, 64, [&](int64_t begin, int64_t end) {
    std::vector<float> sum(z.padded);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / z.heads, h = i % z.heads;
      plan.sequential ? finish_row(plan, b, h, z, to, o + i * z.dim)
                      : merge_row(plan, b, h, z, to, sum.data(), o + i * z.dim);
    }
  });
}

Tensor forward(const Tensor& q_, const Tensor& k_pages, const Tensor& v_pages, const Tensor& block_table,
               const Tensor& context_lens, const Optional& prefix_table, const Optional& prefix_lens,
               const Optional& group_of, double softmax_scale, bool sequential) {
  const auto q = dense_last(q_);
  const int64_t heads = q.size(1), dim = q.size(2), kv_heads = k_pages.size(2), padded = round_up(dim, kPad);
  // A copy of the cache would cost more than all of this op's work.
  TORCH_CHECK_VALUE((k_pages.stride(3) == 1 && v_pages.stride(3) == 1) || dim == 1,
                    "paged_attention: k_pages and v_pages must have last stride 1, got ", k_pages.stride(3), " and ",
                    v_pages.stride(3));
  const Sizes z{heads, kv_heads, heads / kv_heads, dim, padded, leading(padded)};
  const auto plan = make_plan(block_table, context_lens, prefix_table, prefix_lens, group_of, k_pages.size(0),
                              k_pages.size(1), heads, sequential);
  auto out = at::empty(q.sizes(), q.options());
  dispatch(q, "paged_attention", [&](auto tag) {
    attend<decltype(tag)>(plan, q, k_pages, v_pages, softmax_scale, z, out);
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(hpsafety_cpu, CPU, m) { m.impl("paged_attention", &forward); }

}  // namespace hpsafety::paged
