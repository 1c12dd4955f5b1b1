// attention, backward: dK and dV. A block owns a tile of keys and goes over all blocks of query rows that see them.
// Limit: FLOPs on the tensor cores.
//
// Two warps share 16 SQUARES keys. One holds K and sums dV: it makes the weights P^T = 2^(K Q^T - lse) of a block, and
// adds P^T dO. The other holds V and sums dK: a block later it makes dS^T = P^T (V dO^T - delta), and adds dS^T Q.
// P goes through shared memory, in fp32. So a warp has twice the keys that it could hold both gradients of, and reads
// half as much from shared memory for a product: at head dim 128 the port of shared memory would be the limit else.
#pragma once
#include "attention_backward.cuh"

namespace attention {

struct KeysArguments {
  Heads grad, q, k, v;
  const float *lse, *delta;             // of the workspace; delta negated
  const int *segments, *tiles, *parts;   // attention_tiles.key_tiles
  bf16 *dk, *dv;
  Group group;
  float scale, scale_log2;
};

// Adjacent blocks of rows of one segment or run, and of one chunk of heads.
struct KeysSpan {
  int row0, row1;     // tokens
  int seen0, seen1;   // the keys that they see, if they do not come before them
  int begin, masked_end, whole, end;  // blocks; those of masked_end to whole see all keys of the tile
  int chunk;
  int alone;          // row0 sees no other key than itself
  int next;           // the index of the next span to look at
};

constexpr int KEYS_SPANS = 4;  // of the block before, of the one that is computed, of the next one, the one then

// A row of attention_tiles.key_tiles, and the spans of its work. In shared memory: registers are full.
struct KeysWork {
  int key0, segment0, segment1, run0, run1;
  KeysSpan spans[KEYS_SPANS];
};

// SQUARES times 16 keys a pair of warps. HELD of the fragments of K or V stay in registers, the rest in shared memory,
// in the threads' order.
template <int DIM, int WARPS, int SQUARES, int HELD, int BLOCK_ROWS>
struct KeysShape {
  static constexpr int THREADS = WARPS * 32, HALF = THREADS / 2, KEYS = WARPS / 2 * SQUARES * 16, ROWS = BLOCK_ROWS;
  // Of a stage: Q, dO, and for each two rows 8 numbers: lse, lse, -, -, -delta, -delta, and these two again.
  static constexpr int TILE = ROWS * Row<DIM>::BYTES, PAIR = 32, STAGE = 2 * TILE + ROWS / 2 * PAIR, STAGES = 3;
  // Of a block of weights: 16 bytes of each thread for each 16 x 8 of them.
  static constexpr int WEIGHTS = STAGES * STAGE, BLOCK = ROWS / 8 * SQUARES * HALF * 16;
  static constexpr int PLACES = WEIGHTS + 2 * BLOCK, PARTS = PLACES + 5 * THREADS * 8;
  static constexpr int BOUNDS = PARTS + (SQUARES * DIM / 16 - HELD) * THREADS * 16, WORK = BOUNDS + 2 * KEYS * 4;
  static constexpr int SHARED = WORK + static_cast<int>(sizeof(KeysWork));
  // K and V, before the second block is copied, and at the end dV and dK.
  static constexpr int K = STAGE, V = K + KEYS * Row<DIM>::BYTES;
  static_assert(V + KEYS * Row<DIM>::BYTES <= PLACES, "K and V lie where stages and weights will");
  static __device__ __forceinline__ bool held(int m, int c) { return m * (DIM / 16) + c < HELD; }
  static __device__ __forceinline__ int part(int m, int c) {
    return PARTS + ((m * (DIM / 16) + c - HELD) * THREADS + static_cast<int>(threadIdx.x)) * 16;
  }
  static __device__ __forceinline__ int after(int stage) { return stage == 2 * STAGE ? 0 : stage + STAGE; }
  // Where the next block goes, of a warp that is at the one before (PULLS) or at this one.
  template <bool PULLS>
  static __device__ __forceinline__ int free_stage(int stage) {
    return PULLS ? after(after(stage)) : after(stage);
  }
  static __device__ __forceinline__ int other(int weights) { return 2 * WEIGHTS + BLOCK - weights; }
};

// The first span that has blocks, of index `index` on; begin == end if there is none.
template <class Shape>
__device__ void find_span(KeysSpan& found, const KeysArguments& a, const KeysWork& work, int index) {
  int key0 = work.key0, key1 = key0 + Shape::KEYS, owners = work.segment1 - work.segment0;
  int parts = owners + work.run1 - work.run0, tokens = Shape::ROWS >> a.group.log_pack;
  KeysSpan s = {};
  for (; index < parts * a.group.chunks; index++) {
    int part = index / a.group.chunks;
    s.chunk = index - part * a.group.chunks;
    int diagonal = 0;
    if (part < owners) {  // the keys' own segment
      const int* segment = a.segments + static_cast<int64_t>(work.segment0 + part) * 4;
      s.row0 = s.seen0 = segment[0];
      s.row1 = s.seen1 = segment[1];
      s.alone = segment[2] >= segment[3];
      s.begin = max(key0 - s.row0, 0) / tokens;
      diagonal = (max(key1 - 1 - s.row0, 0) + tokens - 1) / tokens;
    } else {
      const int* run = a.parts + static_cast<int64_t>(work.run0 + part - owners) * 5;
      s.seen0 = run[0];
      s.seen1 = run[1];
      s.row0 = run[2];
      s.row1 = s.seen0 < key1 && s.seen1 > key0 ? run[3] : s.row0;
      s.alone = s.begin = 0;
    }
    s.end = (s.row1 - s.row0 + tokens - 1) / tokens;
    s.whole = (s.row1 - s.row0) / tokens;
    bool inside = s.seen0 <= key0 && min(static_cast<int64_t>(key1), a.group.tokens) <= s.seen1;
    s.masked_end = inside ? min(diagonal, s.end) : s.end;
    if (s.begin < s.end) break;
    s.begin = s.end = 0;
  }
  s.next = index + 1;
  found = s;
}

struct alignas(8) KeysBlock {
  int span, block;  // -1: there is none
};
__device__ __forceinline__ KeysBlock next_block(const KeysSpan* spans, const KeysBlock& now) {
  if (now.block < 0 || now.block + 1 < spans[now.span].end) return {now.span, now.block < 0 ? -1 : now.block + 1};
  int span = (now.span + 1) % KEYS_SPANS;
  return {span, spans[span].begin < spans[span].end ? spans[span].begin : -1};
}
template <class Shape>
__device__ __forceinline__ int rows_of(const KeysSpan& s, int block, int log_pack) {
  return ((s.row1 - s.row0) << log_pack) - block * Shape::ROWS;
}

// From which of a block's rows on a warp's keys count: for the weights those that see the key; for dS not the one that
// sees no other key, as its weight is 1 whatever the score. `bounds`: of the lane's first key.
template <bool PULLS, class Shape, int SQUARES>
__device__ __forceinline__ void set_bounds(int* bounds, int key, const KeysSpan& s, int block, int log_pack) {
  int tokens = Shape::ROWS >> log_pack, first = s.row0 + block * tokens;
  bool all = block >= s.masked_end && block < s.whole;
  __syncwarp();
  if (threadIdx.x % 4 == 0)
#pragma unroll
    for (int i = 0; i < 2 * SQUARES; i++, key += 8) {
      int from = all ? 0 : key >= s.seen0 && key < s.seen1 ? key - first : tokens;
      if (PULLS && !all) from += s.alone && key == s.seen0;
      bounds[8 * i] = max(min(from, tokens), 0) << log_pack;
    }
  __syncwarp();
}

// Copies blocks of rows to stages. Where a thread goes on stays in shared memory: registers are full.
template <int DIM, class Shape>
struct RowsLoader {
  using Copy = RowsCopy<DIM, Shape::ROWS, Shape::THREADS>;
  const KeysArguments& a;
  unsigned char* shared;

  __device__ __forceinline__ const unsigned char*& place(int which) const {
    return reinterpret_cast<const unsigned char**>(shared + Shape::PLACES)[which * Shape::THREADS + threadIdx.x];
  }
  // The block whose weights are made, and the one before it.
  __device__ __forceinline__ KeysBlock& block(int before) const {
    return reinterpret_cast<KeysBlock*>(shared + Shape::PLACES)[(3 + before) * Shape::THREADS + threadIdx.x];
  }
  __device__ __forceinline__ void begin(const KeysSpan& s, int block) const {
    int chunk = static_cast<int>(blockIdx.x % a.group.kv_heads) * a.group.chunks + s.chunk;
    int64_t token = s.row0 + static_cast<int64_t>(block) * (Shape::ROWS >> a.group.log_pack);
    int64_t head = static_cast<int64_t>(chunk) << a.group.log_pack;
    place(0) = Copy::from(a.q, token, head, a.group.log_pack);
    place(1) = Copy::from(a.grad, token, head, a.group.log_pack);
    // Of the lse of a row, for the first ROWS threads.
    place(2) = reinterpret_cast<const unsigned char*>(a.lse + a.group.row(chunk, token) + threadIdx.x);
  }
  // A whole block, or the first `count` rows and zeros behind them; moves on to the next one.
  template <bool WHOLE>
  __device__ __forceinline__ void copy(unsigned char* stage, int count) const {
    const unsigned char *q = place(0), *grad = place(1);
    const float* values = reinterpret_cast<const float*>(place(2));
    Copy::template copy<WHOLE>(stage, q, a.group.q_step, count);
    Copy::template copy<WHOLE>(stage + Shape::TILE, grad, a.group.grad_step, count);
    if (threadIdx.x < Shape::ROWS) {
      unsigned char* to = stage + 2 * Shape::TILE + threadIdx.x / 2 * Shape::PAIR + threadIdx.x % 2 * 4;
      bool there = WHOLE || static_cast<int>(threadIdx.x) < count;
      cp_async4(to, values, there);
      cp_async4(to + 16, values + (a.delta - a.lse), there);
      cp_async4(to + 24, values + (a.delta - a.lse), there);
    }
    place(0) = q;
    place(1) = grad;
    place(2) = reinterpret_cast<const unsigned char*>(values + Shape::ROWS);
    cp_async_commit();
  }
};

// Of a warp: K or V of its keys, as far as registers go, and the transposed sums of dV or dK.
template <int DIM, int SQUARES>
struct KeysTile {
  uint32_t held[SQUARES][DIM / 16][4];
  float sums[SQUARES][DIM / 16][2][4];
};

// 16 rows of a block. PULLS: of the warp that makes dS and sums dK, else of the one that makes the weights and sums dV.
template <bool PULLS, bool MASKED, int DIM, int SQUARES, class Shape>
__device__ __forceinline__ void add_rows(KeysTile<DIM, SQUARES>& t, unsigned char* shared, int at_stage, int at_weights,
                                         const Fragments<DIM>& f, int slice, float scale_log2, const int* bounds) {
  const unsigned char* stage = shared + at_stage;
  unsigned char* weights = shared + at_weights;
  const unsigned char *q = stage, *grad = stage + Shape::TILE;
  const unsigned char* values = grad + Shape::TILE + threadIdx.x % 4 * Shape::PAIR + slice * 8 * Shape::PAIR;
  float s[SQUARES][2][4];
#pragma unroll
  for (int m = 0; m < SQUARES; m++)
#pragma unroll
    for (int n = 0; n < 2; n++) {
      float4 start = make_float4(0, 0, 0, 0);
      if (PULLS) start = *reinterpret_cast<const float4*>(values + n * 4 * Shape::PAIR + 16);
      s[m][n][0] = start.x, s[m][n][1] = start.y, s[m][n][2] = start.z, s[m][n][3] = start.w;
    }
#pragma unroll
  for (int c = 0; c < DIM / 16; c++) {
    uint32_t r[4];
    ldmatrix_x4(r, (PULLS ? grad : q) + f.of(slice, c));
#pragma unroll
    for (int m = 0; m < SQUARES; m++) {
      uint32_t read[4];
      if (!Shape::held(m, c)) load16(read, shared + Shape::part(m, c));
      mma_bf16(s[m][0], Shape::held(m, c) ? t.held[m][c] : read, r[0], r[1]);
      mma_bf16(s[m][1], Shape::held(m, c) ? t.held[m][c] : read, r[2], r[3]);
    }
  }
#pragma unroll
  for (int n = 0; n < 2; n++) {
    int row = slice * 16 + n * 8 + static_cast<int>(threadIdx.x % 4) * 2;  // the lane's first
    float2 lse = make_float2(0, 0);
    if (!PULLS) lse = *reinterpret_cast<const float2*>(values + n * 4 * Shape::PAIR);
#pragma unroll
    for (int m = 0; m < SQUARES; m++) {
      auto* at = reinterpret_cast<float4*>(weights) + ((slice * SQUARES + m) * 2 + n) * Shape::HALF +
                 threadIdx.x % Shape::HALF;
      float weight[4];
      if (PULLS) {
        float4 w = *at;
        weight[0] = w.x, weight[1] = w.y, weight[2] = w.z, weight[3] = w.w;
      }
#pragma unroll
      for (int i = 0; i < 4; i++) {
        float x = PULLS ? weight[i] * s[m][n][i] : exp2_fast(fmaf(s[m][n][i], scale_log2, i % 2 ? -lse.y : -lse.x));
        if (MASKED) x = bounds[m * 16 + i / 2 * 8] - row <= i % 2 ? x : 0.f;
        s[m][n][i] = x;
      }
      if (!PULLS) *at = make_float4(s[m][n][0], s[m][n][1], s[m][n][2], s[m][n][3]);
    }
  }
  uint32_t x[SQUARES][2][2];
#pragma unroll
  for (int m = 0; m < SQUARES; m++) right_operands(x[m], s[m][0], s[m][1]);
#pragma unroll
  for (int c = 0; c < DIM / 16; c++) {
    uint32_t r[4];
    ldmatrix_x4_trans(r, (PULLS ? q : grad) + f.of(slice, c));
#pragma unroll
    for (int m = 0; m < SQUARES; m++) {
      mma_bf16(t.sums[m][c][0], r, x[m][0][0], x[m][0][1]);
      mma_bf16(t.sums[m][c][1], r, x[m][1][0], x[m][1][1]);
    }
  }
}

// All blocks of rows. The first is on its way to the first stage.
template <bool PULLS, int DIM, int SQUARES, class Shape>
__device__ __forceinline__ void add_blocks(KeysTile<DIM, SQUARES>& t, const KeysArguments& a, unsigned char* shared) {
  const RowsLoader<DIM, Shape> loader{a, shared};
  const Fragments<DIM> f = squares<DIM>();
  KeysWork& work = *reinterpret_cast<KeysWork*>(shared + Shape::WORK);
  KeysSpan* spans = work.spans;
  KeysBlock &now = loader.block(0), &before = loader.block(1);
  now = {0, spans[0].begin < spans[0].end ? spans[0].begin : -1};
  before = {0, -1};
  int stage = PULLS ? Shape::after(Shape::after(0)) : 0;  // of the warp's block: the one before, if it PULLS
  int weights = PULLS ? Shape::other(Shape::WEIGHTS) : Shape::WEIGHTS;
  while (now.block >= 0 || before.block >= 0) {
    const int rest = now.block < 0 ? 0 : spans[now.span].whole - 1 - now.block;
    // Blocks that see all keys, as the one before does; the next one is whole.
    if (rest > 0 && now.block > max(spans[now.span].masked_end, spans[now.span].begin)) {
      now.block += rest;
      before.block += rest;
      int left = rest;
#pragma unroll 1
      do {
        cp_async_wait<0>();
        __syncthreads();
        loader.template copy<true>(shared + Shape::template free_stage<PULLS>(stage), 0);
#pragma unroll
        for (int slice = 0; slice < Shape::ROWS / 16; slice++)
          add_rows<PULLS, false, DIM, SQUARES, Shape>(t, shared, stage, weights, f, slice, a.scale_log2, nullptr);
        stage = Shape::after(stage);
        weights = Shape::other(weights);
      } while (--left);
    }
    cp_async_wait<0>();
    __syncthreads();
    {
      const KeysBlock one = now, next = next_block(spans, one);
      if (next.block >= 0) {
        const KeysSpan& n = spans[next.span];
        if (next.span != one.span) loader.begin(n, next.block);
        loader.template copy<false>(shared + Shape::template free_stage<PULLS>(stage),
                                    rows_of<Shape>(n, next.block, a.group.log_pack));
        if (next.span != one.span && threadIdx.x == 0)
          find_span<Shape>(spans[(one.span + 2) % KEYS_SPANS], a, work, n.next);
      }
    }
    const KeysBlock mine = PULLS ? before : now;
    if (mine.block >= 0) {
      const int key = threadIdx.x % Shape::HALF / 32 * SQUARES * 16 + threadIdx.x % 32 / 4;
      int* bounds = reinterpret_cast<int*>(shared + Shape::BOUNDS) + (PULLS ? Shape::KEYS : 0) + key;
      set_bounds<PULLS, Shape, SQUARES>(bounds, work.key0 + key, spans[mine.span], mine.block, a.group.log_pack);
#pragma unroll 1
      for (int slice = 0; slice < Shape::ROWS / 16; slice++)
        add_rows<PULLS, true, DIM, SQUARES, Shape>(t, shared, stage, weights, f, slice, a.scale_log2, bounds);
    }
    stage = Shape::after(stage);
    weights = Shape::other(weights);
    before = now;
    now = next_block(spans, before);
  }
}

template <int DIM, int WARPS, int SQUARES, int HELD, int ROWS, int BLOCKS>
__global__ void __launch_bounds__(WARPS * 32, BLOCKS) attention_backward_keys(KeysArguments a) {
  using Shape = KeysShape<DIM, WARPS, SQUARES, HELD, ROWS>;
  SIMT_SHARED(unsigned char, shared);
  KeysWork& work = *reinterpret_cast<KeysWork*>(shared + Shape::WORK);

  KeysTile<DIM, SQUARES> t = {};
  {
    if (threadIdx.x == 0) {
      const int* tile = a.tiles + static_cast<int64_t>(blockIdx.x / a.group.kv_heads) * 5;
      work.key0 = tile[0] * Shape::KEYS;
      work.segment0 = tile[1];
      work.segment1 = tile[2];
      work.run0 = tile[3];
      work.run1 = tile[4];
      find_span<Shape>(work.spans[0], a, work, 0);
      find_span<Shape>(work.spans[1], a, work, work.spans[0].next);
    }
    __syncthreads();
    const int kv_head = static_cast<int>(blockIdx.x % a.group.kv_heads);
    const int64_t key0 = work.key0;
    using Copy = RowsCopy<DIM, Shape::KEYS, Shape::THREADS>;
    int count = static_cast<int>(min(a.group.tokens - key0, static_cast<int64_t>(Shape::KEYS)));
    const unsigned char *k = Copy::from(a.k, key0, kv_head, 0), *v = Copy::from(a.v, key0, kv_head, 0);
    Copy::template copy<false>(shared + Shape::K, k, COPY_ROWS * a.k.token, count);
    Copy::template copy<false>(shared + Shape::V, v, COPY_ROWS * a.v.token, count);
    cp_async_commit();
    const RowsLoader<DIM, Shape> loader{a, shared};
    const KeysSpan& first = work.spans[0];
    if (first.begin < first.end) {
      loader.begin(first, first.begin);
      loader.template copy<false>(shared, rows_of<Shape>(first, first.begin, a.group.log_pack));
    } else {
      cp_async_commit();
    }
    cp_async_wait<1>();
    __syncthreads();
    const Fragments<DIM> left = Fragments<DIM>::left(threadIdx.x % Shape::HALF / 32 * SQUARES * 16);
#pragma unroll
    for (int m = 0; m < SQUARES; m++)
#pragma unroll
      for (int c = 0; c < DIM / 16; c++) {
        ldmatrix_x4(t.held[m][c], shared + (threadIdx.x < Shape::HALF ? Shape::K : Shape::V) + left.of(m, c));
        if (!Shape::held(m, c)) store16(shared + Shape::part(m, c), t.held[m][c]);
      }
  }
  // Both meet at as many barriers: bar.sync counts warps, and asks of each only that its lanes come together.
  if (threadIdx.x >= Shape::HALF)
    add_blocks<true, DIM, SQUARES, Shape>(t, a, shared);
  else
    add_blocks<false, DIM, SQUARES, Shape>(t, a, shared);

  __syncthreads();
  const unsigned thread = thread_again();
  const bool pulls = thread >= Shape::HALF;
  const int key_of_warp = thread % Shape::HALF / 32 * SQUARES * 16;
  unsigned char* tile = shared + (pulls ? Shape::V : Shape::K);
#pragma unroll
  for (int m = 0; m < SQUARES; m++) put_rows<DIM>(tile, key_of_warp + 16 * m, t.sums[m], pulls ? a.scale : 1.f);
  __syncwarp();
  const int key0 = work.key0, kv_head = static_cast<int>(blockIdx.x % a.group.kv_heads);
  bf16* out = pulls ? a.dk : a.dv;
  for (unsigned i = thread % 32; i < SQUARES * 16 * Row<DIM>::CHUNKS; i += 32) {
    int row = key_of_warp + i / Row<DIM>::CHUNKS, chunk = i % Row<DIM>::CHUNKS;
    if (key0 + row >= a.group.tokens) break;
    int64_t at = (static_cast<int64_t>(key0 + row) * a.group.kv_heads + kv_head) * DIM + chunk * 8;
    *reinterpret_cast<uint4*>(out + at) = *reinterpret_cast<uint4*>(tile + Row<DIM>::at(row, chunk));
  }
}

template <int DIM, int WARPS, int SQUARES, int HELD, int ROWS, int BLOCKS>
int launch_keys(const Heads& grad, const Heads& q, const Heads& k, const Heads& v, const void* lse, const void* delta,
                const void* segments, const void* tiles, const void* parts, int64_t num_tiles, int64_t tokens,
                int kv_heads, int chunks, int log_pack, double scale, void* dk, void* dv, void* stream) {
  using Shape = KeysShape<DIM, WARPS, SQUARES, HELD, ROWS>;
  KeysArguments a{
      grad, q, k, v, static_cast<const float*>(lse), static_cast<const float*>(delta),
      static_cast<const int*>(segments), static_cast<const int*>(tiles), static_cast<const int*>(parts),
      static_cast<bf16*>(dk), static_cast<bf16*>(dv), group(tokens, kv_heads, chunks, log_pack, q, grad),
      static_cast<float>(scale), static_cast<float>(scale * LOG2E)};
  if (!fits(grad) || !fits(q) || !fits(k) || !fits(v) || !fits(a.group, num_tiles * kv_heads)) return BAD_ARGUMENT;
  return SIMT_LAUNCH((attention_backward_keys<DIM, WARPS, SQUARES, HELD, ROWS, BLOCKS>),
                     dim3(static_cast<unsigned>(num_tiles * kv_heads)), dim3(Shape::THREADS), Shape::SHARED, stream, a);
}

}  // namespace attention
