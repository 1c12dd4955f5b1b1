// paged_attention before and after its passes (csrc/cuda/paged_attention.cuh): which sequences a group's tiles hold,
// and the merge of the splits. Limit of the merge: bytes, the splits' outputs; of the plan: its launch.
#include "reduce.cuh"
#include "paged_attention_pages.cuh"

namespace {

using paged::SPLIT;
constexpr int PLAN = 256, MERGE = 128;  // threads

// The sequences of group blockIdx.x in their order: their places in `order`, (first, end) of them in `bounds`, and the
// group in those of its tiles that it needs, -1 in the others.
__global__ void __launch_bounds__(PLAN)
    plan(const int* group_of, int* order, int* bounds, int* group_of_tile, int64_t batch, int64_t heads) {
  SIMT_SHARED(int, room);
  int group = static_cast<int>(blockIdx.x), lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int before = 0, members = 0;
  for (int64_t b = threadIdx.x; b < batch; b += PLAN) {
    before += group_of[b] < group;
    members += group_of[b] == group;
  }
  before = reduce_block<PLAN>(before, Add(), room);
  members = reduce_block<PLAN>(members, Add(), room);
  if (threadIdx.x == 0) {
    bounds[2 * group] = before;
    bounds[2 * group + 1] = before + members;
  }
  int place = before;
  for (int64_t start = 0; start < batch; start += PLAN) {
    int64_t b = start + threadIdx.x;
    bool mine = b < batch && group_of[b] == group;
    unsigned votes = __ballot_sync(~0u, mine);
    if (lane == 0) room[warp] = __popc(votes);
    __syncthreads();
    int ahead = 0, all = 0;
    for (int w = 0; w < PLAN / 32; w++) {
      if (w < warp) ahead += room[w];
      all += room[w];
    }
    if (mine) order[place + ahead + __popc(votes & ((1u << lane) - 1))] = static_cast<int>(b);
    place += all;
    __syncthreads();
  }
  int64_t first = paged::first_tile(before, group, heads);
  int64_t end = paged::first_tile(before + static_cast<int64_t>(members), group + 1, heads);
  int64_t used = first + (members * heads + paged::TILE_ROWS - 1) / paged::TILE_ROWS;
  for (int64_t tile = first + threadIdx.x; tile < end; tile += PLAN) group_of_tile[tile] = tile < used ? group : -1;
}

template <int COUNT>
struct alignas(4 * COUNT) Columns {  // of a lane: one load
  float x[COUNT];
};

// A query head's splits, its prefix's first, under their common maximum, in order: a warp each, K / 32 columns a lane.
template <int DIM>
__global__ void __launch_bounds__(MERGE)
    merge(const float* out, const float* top, const float* total, const int* lens, const int* prefix_lens,
          const int* group_of, __nv_bfloat16* y, int64_t queries, int64_t heads, int64_t slots, int64_t slot0) {
  constexpr int EACH = DIM / 32;
  int64_t query = static_cast<int64_t>(blockIdx.x) * (MERGE / 32) + threadIdx.x / 32;
  if (query >= queries) return;
  int64_t b = query / heads, column = threadIdx.x % 32 * EACH;
  int64_t of_prefix = group_of ? (static_cast<int64_t>(prefix_lens[group_of[b]]) + SPLIT - 1) / SPLIT : 0;
  int64_t splits = of_prefix + (static_cast<int64_t>(lens[b]) + SPLIT - 1) / SPLIT;
  auto slot = [=](int64_t i) { return query * slots + (i < of_prefix ? i : slot0 + i - of_prefix); };
  float most = -INFINITY, sum = 0, value[EACH] = {};
  for (int64_t i = 0; i < splits; i++) most = fmaxf(most, top[slot(i)]);
  for (int64_t i = 0; i < splits; i++) {
    float factor = exp2_fast(top[slot(i)] - most);  // all of them -inf: NaN, as softmax is
    sum = fmaf(factor, total[slot(i)], sum);
    auto part = *reinterpret_cast<const Columns<EACH>*>(out + slot(i) * DIM + column);
#pragma unroll
    for (int j = 0; j < EACH; j++) value[j] = fmaf(factor, part.x[j], value[j]);
  }
  float share = splits ? __fdiv_rn(1.f, sum) : 0.f;
  auto* to = reinterpret_cast<uint32_t*>(y + query * DIM + column);
#pragma unroll
  for (int j = 0; j < EACH / 2; j++) to[j] = pack_bf16(value[2 * j] * share, value[2 * j + 1] * share);
}

}  // namespace

extern "C" int hps_paged_plan(const void* group_of, void* order, void* bounds, void* group_of_tile, int64_t batch,
                              int64_t groups, int64_t heads, void* stream) {
  if (batch <= 0 || batch > INT32_MAX || groups <= 0 || groups > INT32_MAX || heads <= 0) return BAD_ARGUMENT;
  return SIMT_LAUNCH((plan), dim3(static_cast<unsigned>(groups)), dim3(PLAN), PLAN / 32 * sizeof(int), stream,
                     static_cast<const int*>(group_of), static_cast<int*>(order), static_cast<int*>(bounds),
                     static_cast<int*>(group_of_tile), batch, heads);
}

extern "C" int hps_paged_merge(const void* out, const void* top, const void* total, const void* lens,
                               const void* prefix_lens, const void* group_of, void* y, int64_t batch, int64_t heads,
                               int64_t dim, int64_t slots, int64_t slot0, void* stream) {
  int64_t queries = batch * heads, blocks = (queries + MERGE / 32 - 1) / (MERGE / 32);
  if (queries <= 0 || blocks > INT32_MAX || (dim != 64 && dim != 128)) return BAD_ARGUMENT;
  auto floats = [](const void* p) { return static_cast<const float*>(p); };
  auto ints = [](const void* p) { return static_cast<const int*>(p); };
  auto launch = [&](auto one) {
    return SIMT_LAUNCH((one.kernel), dim3(static_cast<unsigned>(blocks)), dim3(MERGE), 0, stream, floats(out), floats(top),
                       floats(total), ints(lens), ints(prefix_lens), ints(group_of), static_cast<__nv_bfloat16*>(y),
                       queries, heads, slots, slot0);
  };
  return dim == 64 ? launch(One<merge<64>>{}) : launch(One<merge<128>>{});
}
