// paged_attention's passes over keys and values that stand in pages: from the query heads of one sequence to a split of
// its own tokens, and from a tile of (member, head) rows of one group to a split of the group's shared tokens.
// Limit: the bytes of K and V.
//
// A part (a sequence's own tokens, a group's prefix) is cut into splits of SPLIT keys counted from its start, and a
// block leaves (maximum, sum, output) of each row in fp32, base 2; csrc/cuda/paged_attention.cu merges them. A team of
// warps takes KEYS keys at a time through two stages of shared memory: own tokens by teams of one warp, each with every
// fourth 16 keys of the split and all rows (few rows, many keys: the warps need no barrier until they are merged, in
// order); a prefix by one team of four warps, with 16 rows each (many rows share the keys). Keys of a row are summed in
// an order that follows from their places in the part alone.
#pragma once
#include "paged_attention_pages.cuh"

namespace paged {

constexpr int THREADS = 128, WARPS = THREADS / 32;
constexpr int ROWS = 16;    // of a warp: the M of its MMAs

// What all blocks of a launch have in common. B sequences, G kv heads, H / G = heads, K = DIM.
struct Pass {
  Pages pages;
  const __nv_bfloat16* q;  // (B, G, heads, K)
  const int* table;        // (rows, columns)
  const int* lens;         // (rows,)
  int64_t columns;
  int64_t kv_heads;
  int64_t slots;           // partial results of a row
  float* out;              // (B, G, heads, slots, K)
  float* top;              // (B, G, heads, slots)
  float* total;
  float scale;             // times log2(e)
  int heads;
};

// ROWS rows of queries as fragments, zeros where there is none. `low` and `high` are this lane's two rows, or -1.
template <int DIM>
struct Queries {
  uint32_t a[DIM / 16][4];
  __device__ __forceinline__ void load(const __nv_bfloat16* q, int64_t low, int64_t high) {
    auto* words = reinterpret_cast<const uint32_t*>(q);
    int pair = threadIdx.x % 4;
#pragma unroll
    for (int k = 0; k < DIM / 16; k++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        int64_t row = i % 2 ? high : low;
        a[k][i] = row < 0 ? 0 : words[row * (DIM / 2) + k * 8 + i / 2 * 4 + pair];
      }
  }
};

// Two rows of a lane: row threadIdx.x % 32 / 4 of the warp's 16 and the one 8 below. Elements 0, 1 are of the first.
template <int DIM>
struct State {
  float top[2], total[2];  // total: of this lane's columns until it is finished
  float out[DIM / 8][4];
  __device__ __forceinline__ void clear() {
    top[0] = top[1] = -INFINITY;
    total[0] = total[1] = 0;
#pragma unroll
    for (int j = 0; j < DIM / 8; j++) out[j][0] = out[j][1] = out[j][2] = out[j][3] = 0;
  }
  __device__ __forceinline__ void finish() {
#pragma unroll
    for (int r = 0; r < 2; r++) {
      total[r] += __shfl_xor_sync(~0u, total[r], 1);
      total[r] += __shfl_xor_sync(~0u, total[r], 2);
    }
  }
};

// One step of the running softmax over KEYS keys of a stage, the first `seen` of which count. A row without any score
// above -inf keeps a sum of 0, so that later keys, or the merge, decide whether it is NaN.
template <int DIM, int KEYS>
__device__ __forceinline__ void take(const Queries<DIM>& q, State<DIM>& state, const uint4* keys, const uint4* values,
                                     unsigned seen, float scale) {
  int lane = threadIdx.x % 32;
  float s[KEYS / 8][4];
#pragma unroll
  for (int n = 0; n < KEYS / 16; n++) {
#pragma unroll
    for (int i = 0; i < 4; i++) s[2 * n][i] = s[2 * n + 1][i] = 0;
#pragma unroll
    for (int k = 0; k < DIM / 16; k++) {
      uint32_t b[4];
      ldmatrix_x4(b, word_of<DIM>(keys, n * 16 + lane / 16 * 8 + lane % 8, k * 2 + lane / 8 % 2));
      mma_bf16(s[2 * n], q.a[k], b[0], b[1]);
      mma_bf16(s[2 * n + 1], q.a[k], b[2], b[3]);
    }
  }
  if (seen < KEYS) {
#pragma unroll
    for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
      for (int i = 0; i < 4; i++)
        if (n * 8 + lane % 4 * 2 + i % 2 >= seen) s[n][i] = -INFINITY;
  }
  float base[2], rescale[2];
#pragma unroll
  for (int r = 0; r < 2; r++) {
    float most = -INFINITY;
#pragma unroll
    for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
      for (int i = 0; i < 2; i++) most = fmaxf(most, s[n][2 * r + i]);
    most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
    most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
    float top = fmaxf(state.top[r], most * scale);
    base[r] = top == -INFINITY ? 0.f : top;
    rescale[r] = exp2_fast(state.top[r] - base[r]);
    state.top[r] = top;
    float sum = 0;
#pragma unroll
    for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
      for (int i = 0; i < 2; i++) {
        s[n][2 * r + i] = exp2_fast(fmaf(s[n][2 * r + i], scale, -base[r]));
        sum += s[n][2 * r + i];
      }
    state.total[r] = fmaf(state.total[r], rescale[r], sum);
  }
#pragma unroll
  for (int j = 0; j < DIM / 8; j++)
#pragma unroll
    for (int i = 0; i < 4; i++) state.out[j][i] *= rescale[i / 2];
#pragma unroll
  for (int n = 0; n < KEYS / 16; n++) {
    uint32_t p[4] = {pack_bf16(s[2 * n][0], s[2 * n][1]), pack_bf16(s[2 * n][2], s[2 * n][3]),
                     pack_bf16(s[2 * n + 1][0], s[2 * n + 1][1]), pack_bf16(s[2 * n + 1][2], s[2 * n + 1][3])};
#pragma unroll
    for (int j = 0; j < DIM / 16; j++) {
      uint32_t b[4];
      ldmatrix_x4_trans(b, word_of<DIM>(values, n * 16 + lane / 8 % 2 * 8 + lane % 8, j * 2 + lane / 16));
      mma_bf16(state.out[2 * j], p, b[0], b[1]);
      mma_bf16(state.out[2 * j + 1], p, b[2], b[3]);
    }
  }
}

template <int TEAM>
__device__ __forceinline__ void sync_team() {
  if constexpr (TEAM == 32)
    __syncwarp();
  else
    __syncthreads();
}

// Takes a team's rows through the keys first + its share of every `step` up to `end`, of one row of the table. `room`
// holds two stages of KEYS keys and as many values.
template <int DIM, int TEAM, bool ALIGNED>
__device__ __forceinline__ void attend(const Pass& pass, const int* table, int64_t head, unsigned first, unsigned end,
                                       unsigned step, const Queries<DIM>& q, State<DIM>& state, uint4* room) {
  constexpr int KEYS = TEAM / 2, WORDS = KEYS * DIM / 8;
  Copier<DIM, KEYS, TEAM, ALIGNED> copier(pass.pages, table, head, end);
  copier.locate(first);
  if (first < end) copier.copy(room, room + WORDS);
  cp_async_commit();
  copier.locate(first + step);
  int stage = 0;
  for (unsigned key = first; key < end; key += step) {
    uint4 *now = room + stage * 2 * WORDS, *next = room + (1 - stage) * 2 * WORDS;
    if (key + step < end) copier.copy(next, next + WORDS);
    cp_async_commit();
    copier.locate(key + 2 * step);
    cp_async_wait<1>();
    sync_team<TEAM>();
    take<DIM, KEYS>(q, state, now, now + WORDS, end - key, pass.scale);
    sync_team<TEAM>();
    stage = 1 - stage;
  }
}

// Of one kv head and sequence: where a row's partial result of a split stands.
__device__ __forceinline__ int64_t slot_of(const Pass& pass, int64_t query, int64_t slot) {
  return query * pass.slots + slot;
}

// Tile of 16 heads (fastest), kv head, sequence, split. Slots of own tokens start at slot0.
template <int DIM, bool ALIGNED>
__global__ void __launch_bounds__(THREADS) attend_own(Pass pass, int64_t batch, int64_t slot0) {
  SIMT_SHARED(uint4, shared);
  constexpr int ROOM = 2 * 2 * ROWS * DIM / 8;  // of a warp: two stages, later its sums
  int64_t tiles = (pass.heads + ROWS - 1) / ROWS, block = blockIdx.x;
  int64_t tile = block % tiles, head = block / tiles % pass.kv_heads;
  int64_t b = block / tiles / pass.kv_heads % batch, split = block / tiles / pass.kv_heads / batch;
  int64_t length = pass.lens[b], key0 = split * SPLIT;
  if (key0 >= length) return;
  unsigned end = static_cast<unsigned>(min(length, key0 + SPLIT));
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int64_t query0 = (b * pass.kv_heads + head) * pass.heads + tile * ROWS;
  int rows = static_cast<int>(min(static_cast<int64_t>(ROWS), pass.heads - tile * ROWS));
  Queries<DIM> q;
  int low = lane / 4, high = low + 8;
  q.load(pass.q, low < rows ? query0 + low : -1, high < rows ? query0 + high : -1);
  State<DIM> state;
  state.clear();
  uint4* room = shared + warp * ROOM;
  attend<DIM, 32, ALIGNED>(pass, pass.table + b * pass.columns, head, static_cast<unsigned>(key0) + warp * ROWS, end,
                           WARPS * ROWS, q, state, room);
  state.finish();
  constexpr int AT = 2 * ROWS;  // floats of maxima and sums before those of the outputs
  auto* mine = reinterpret_cast<float*>(room);
  for (int r = 0; r < 2; r++) {
    if (lane % 4 == 0) {
      mine[low + 8 * r] = state.top[r];
      mine[ROWS + low + 8 * r] = state.total[r];
    }
    for (int j = 0; j < DIM / 8; j++) {
      auto* to = reinterpret_cast<float2*>(mine + AT + (low + 8 * r) * DIM + j * 8 + lane % 4 * 2);
      *to = make_float2(state.out[j][2 * r], state.out[j][2 * r + 1]);
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < rows * DIM; i += THREADS) {
    int row = i / DIM, column = i % DIM;
    const float* part[WARPS];
    float top = -INFINITY, total = 0, out = 0;
    for (int w = 0; w < WARPS; w++) {
      part[w] = reinterpret_cast<const float*>(shared + w * ROOM);
      top = fmaxf(top, part[w][row]);
    }
    float base = top == -INFINITY ? 0.f : top;
    for (int w = 0; w < WARPS; w++) {
      float factor = exp2_fast(part[w][row] - base);
      total = fmaf(factor, part[w][ROWS + row], total);
      out = fmaf(factor, part[w][AT + row * DIM + column], out);
    }
    int64_t slot = slot_of(pass, query0 + row, slot0 + split);
    pass.out[slot * DIM + column] = out;
    if (column == 0) {
      pass.top[slot] = top;
      pass.total[slot] = total;
    }
  }
}

// Tile of 64 rows (fastest: the tiles of a group share its pages in the L2 cache), kv head, split.
template <int DIM, bool ALIGNED>
__global__ void __launch_bounds__(THREADS)
    attend_prefixes(Pass pass, const int* order, const int* bounds, const int* group_of_tile, int64_t tiles) {
  SIMT_SHARED(uint4, shared);
  int64_t block = blockIdx.x, tile = block % tiles, head = block / tiles % pass.kv_heads;
  int64_t split = block / tiles / pass.kv_heads, group = group_of_tile[tile];
  if (group < 0) return;
  int64_t length = pass.lens[group], key0 = split * SPLIT;
  if (key0 >= length) return;
  unsigned end = static_cast<unsigned>(min(length, key0 + SPLIT));
  int64_t member0 = bounds[2 * group], rows = (bounds[2 * group + 1] - member0) * pass.heads;
  int64_t row0 = (tile - first_tile(member0, group, pass.heads)) * TILE_ROWS + threadIdx.x / 32 * ROWS;
  int lane = threadIdx.x % 32;
  int64_t query[2];
  for (int r = 0; r < 2; r++) {
    int64_t row = row0 + lane / 4 + 8 * r;
    int64_t member = row < rows ? order[member0 + row / pass.heads] : -1;
    query[r] = member < 0 ? -1 : (member * pass.kv_heads + head) * pass.heads + row % pass.heads;
  }
  Queries<DIM> q;
  q.load(pass.q, query[0], query[1]);
  State<DIM> state;
  state.clear();
  attend<DIM, THREADS, ALIGNED>(pass, pass.table + group * pass.columns, head, static_cast<unsigned>(key0), end,
                                THREADS / 2, q, state, shared);
  state.finish();
  for (int r = 0; r < 2; r++) {
    if (query[r] < 0) continue;
    int64_t slot = slot_of(pass, query[r], split);
    for (int j = 0; j < DIM / 8; j++) {
      auto* to = reinterpret_cast<float2*>(pass.out + slot * DIM + j * 8 + lane % 4 * 2);
      *to = make_float2(state.out[j][2 * r], state.out[j][2 * r + 1]);
    }
    if (lane % 4 == 0) {
      pass.top[slot] = state.top[r];
      pass.total[slot] = state.total[r];
    }
  }
}

// The arguments of a launcher as they come from Python: pointers, sizes, and strides in elements.
struct Arguments {
  const void *q, *k, *v, *table, *lens;
  void *out, *top, *total;
  int64_t heads, kv_heads, columns, page_size, slots, splits;
  int64_t k_page, k_slot, k_head, v_page, v_slot, v_head;
  float scale;
};

inline bool whole_words(const void* p, int64_t page, int64_t slot, int64_t head) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0 && page % 8 == 0 && slot % 8 == 0 && head % 8 == 0;
}
inline bool aligned(const Arguments& a) {
  return whole_words(a.k, a.k_page, a.k_slot, a.k_head) && whole_words(a.v, a.v_page, a.v_slot, a.v_head);
}
inline bool fits(const Arguments& a, int64_t blocks) {
  return a.heads > 0 && a.heads <= INT32_MAX && a.kv_heads > 0 && a.page_size > 0 && a.page_size <= INT32_MAX &&
         a.splits > 0 && blocks > 0 && blocks <= INT32_MAX && reinterpret_cast<uintptr_t>(a.q) % 4 == 0;
}
inline Pass make_pass(const Arguments& a) {
  auto* k = static_cast<const __nv_bfloat16*>(a.k);
  auto* v = static_cast<const __nv_bfloat16*>(a.v);
  Pages pages{k, v, a.k_page, a.k_slot, a.k_head, a.v_page, a.v_slot, a.v_head,
              divisor(static_cast<unsigned>(a.page_size))};
  return {pages, static_cast<const __nv_bfloat16*>(a.q), static_cast<const int*>(a.table),
          static_cast<const int*>(a.lens), a.columns, a.kv_heads, a.slots, static_cast<float*>(a.out),
          static_cast<float*>(a.top), static_cast<float*>(a.total), a.scale, static_cast<int>(a.heads)};
}

template <int DIM>
constexpr int SHARED = 2 * 2 * TILE_ROWS * DIM * 2;  // bytes: two stages of 64 keys and values

template <int DIM>
int launch_own(const Arguments& a, int64_t batch, int64_t slot0, void* stream) {
  int64_t blocks = (a.heads + ROWS - 1) / ROWS * a.kv_heads * batch * a.splits;
  if (!fits(a, blocks)) return BAD_ARGUMENT;
  auto launch = [&](auto one) {
    return SIMT_LAUNCH((one.kernel), dim3(static_cast<unsigned>(blocks)), dim3(THREADS), SHARED<DIM>, stream, make_pass(a),
                       batch, slot0);
  };
  return aligned(a) ? launch(One<attend_own<DIM, true>>{}) : launch(One<attend_own<DIM, false>>{});
}

template <int DIM>
int launch_prefixes(const Arguments& a, const int* order, const int* bounds, const int* group_of_tile, int64_t tiles,
                    void* stream) {
  int64_t blocks = tiles * a.kv_heads * a.splits;
  if (!fits(a, blocks)) return BAD_ARGUMENT;
  auto launch = [&](auto one) {
    return SIMT_LAUNCH((one.kernel), dim3(static_cast<unsigned>(blocks)), dim3(THREADS), SHARED<DIM>, stream, make_pass(a),
                       order, bounds, group_of_tile, tiles);
  };
  return aligned(a) ? launch(One<attend_prefixes<DIM, true>>{}) : launch(One<attend_prefixes<DIM, false>>{});
}

}  // namespace paged
