// attention, backward: dK and dV. A block owns a tile of keys, in registers as left operands, and goes over all blocks
// of query rows that see them: S^T = K Q^T and dP^T = V dO^T, then dV += P^T dO and dK += dS^T Q.
// Limit: FLOPs on the tensor cores; then the port of shared memory, from which every product takes its right operand.
#pragma once
#include "attention_backward.cuh"

namespace attention {

struct KeysArguments {
  Heads grad, q, k, v;
  const float *lse, *delta;             // of the workspace; delta negated
  const int *segments, *tiles, *runs;   // attention_tiles.key_tiles
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

// A row of attention_tiles.key_tiles, and the spans of its work. In shared memory: registers are full.
struct KeysWork {
  int key0, segment0, segment1, run0, run1;
  KeysSpan spans[SPANS];
};

// From which of a block's rows on a key is seen, and pulls at the row: where a row sees but one key, its weight is 1
// whatever the score.
struct alignas(8) Bound {
  int sees, pulls;
};

// SQUARES times 16 keys a warp. The fragments of V stay in registers, or go back to the place of V in shared memory, in
// the threads' order.
template <int DIM, int WARPS, int SQUARES>
struct KeysShape {
  static constexpr int THREADS = WARPS * 32, KEYS = WARPS * SQUARES * 16, ROWS = 64, STAGES = 2;
  // Of a stage: Q, dO, and for each two rows 8 numbers: lse, lse, -, -, -delta, -delta, and these two again.
  static constexpr int TILE = ROWS * Row<DIM>::BYTES, PAIR = 32, STAGE = 2 * TILE + ROWS / 2 * PAIR;
  static constexpr int K = 0, V = KEYS * Row<DIM>::BYTES, FIRST = 2 * V, PLACES = FIRST + STAGES * STAGE;
  static constexpr int BOUNDS = PLACES + 4 * THREADS * 8;
  static constexpr int WORK = BOUNDS + KEYS * 8, SHARED = WORK + static_cast<int>(sizeof(KeysWork));
  // Where in shared memory this thread has its part of a fragment of V.
  static __device__ __forceinline__ int part(int m, int c) {
    return V + ((m * (DIM / 16) + c) * THREADS + static_cast<int>(threadIdx.x)) * 16;
  }
  static __device__ __forceinline__ int other(int stage) { return 2 * FIRST + STAGE - stage; }
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
      const int* run = a.runs + static_cast<int64_t>(work.run0 + part - owners) * 4;
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
  int span, block;
};
// The one behind it; there is none if that is the end of its span.
__device__ __forceinline__ KeysBlock next_block(const KeysSpan* spans, const KeysBlock& now) {
  if (now.block + 1 < spans[now.span].end) return {now.span, now.block + 1};
  int span = (now.span + 1) % SPANS;
  return {span, spans[span].begin};
}
template <class Shape>
__device__ __forceinline__ int rows_of(const KeysSpan& s, int block, int log_pack) {
  return ((s.row1 - s.row0) << log_pack) - block * Shape::ROWS;
}

// Of a warp's own keys, by the first of the four lanes that have a key.
template <class Shape, int SQUARES>
__device__ __forceinline__ void set_bounds(Bound* bounds, int key0, const KeysSpan& s, int block, int log_pack) {
  int tokens = Shape::ROWS >> log_pack, first = s.row0 + block * tokens;
  bool all = block >= s.masked_end && block < s.whole;
  __syncwarp();
  if (threadIdx.x % 4 == 0)
#pragma unroll
    for (int i = 0; i < 2 * SQUARES; i++) {
      int key = key0 + static_cast<int>(threadIdx.x / 32) * SQUARES * 16 + 8 * i + static_cast<int>(threadIdx.x % 32 / 4);
      int sees = all ? 0 : key >= s.seen0 && key < s.seen1 ? key - first : tokens;
      int pulls = sees + (s.alone && key == s.seen0);
      bounds[8 * i] = {max(min(sees, tokens), 0) << log_pack, max(min(pulls, tokens), 0) << log_pack};
    }
  __syncwarp();
}

// Of the lane's first key.
template <class Shape, int SQUARES>
__device__ __forceinline__ Bound* first_bound(unsigned char* shared) {
  return reinterpret_cast<Bound*>(shared + Shape::BOUNDS) +
         (threadIdx.x / 32 * SQUARES * 16 + threadIdx.x % 32 / 4);
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
  // Which block is computed.
  __device__ __forceinline__ KeysBlock& block() const {
    return reinterpret_cast<KeysBlock*>(shared + Shape::PLACES)[3 * Shape::THREADS + threadIdx.x];
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

// Of a warp: its keys, and their sums.
template <int DIM, int SQUARES>
struct KeysTile {
  uint32_t k[SQUARES][DIM / 16][4], v[SQUARES][DIM / 16][4];  // v: if it is held
  float dk[SQUARES][DIM / 16][2][4], dv[SQUARES][DIM / 16][2][4];  // transposed
};

// 16 rows of a block. bounds, where it is MASKED: of the lane's first key.
template <bool MASKED, bool V_HELD, int DIM, int SQUARES, class Shape>
__device__ __forceinline__ void add_rows(KeysTile<DIM, SQUARES>& t, const unsigned char* shared, int stage,
                                         const Fragments<DIM>& f, int slice, float scale_log2, const Bound* bounds) {
  const unsigned char *q = shared + stage, *grad = q + Shape::TILE;
  const unsigned char* values = grad + Shape::TILE + threadIdx.x % 4 * Shape::PAIR + slice * 8 * Shape::PAIR;
  float s[SQUARES][2][4], dp[SQUARES][2][4];
#pragma unroll
  for (int m = 0; m < SQUARES; m++)
#pragma unroll
    for (int n = 0; n < 2; n++) {
      float4 delta = *reinterpret_cast<const float4*>(values + n * 4 * Shape::PAIR + 16);
      dp[m][n][0] = delta.x, dp[m][n][1] = delta.y, dp[m][n][2] = delta.z, dp[m][n][3] = delta.w;
      s[m][n][0] = s[m][n][1] = s[m][n][2] = s[m][n][3] = 0;
    }
#pragma unroll
  for (int c = 0; c < DIM / 16; c++) {
    uint32_t r[4];
    ldmatrix_x4(r, q + f.of(slice, c));
#pragma unroll
    for (int m = 0; m < SQUARES; m++) {
      mma_bf16(s[m][0], t.k[m][c], r[0], r[1]);
      mma_bf16(s[m][1], t.k[m][c], r[2], r[3]);
    }
    ldmatrix_x4(r, grad + f.of(slice, c));
#pragma unroll
    for (int m = 0; m < SQUARES; m++) {
      uint32_t v[4];
      if (!V_HELD) load16(v, shared + Shape::part(m, c));
      mma_bf16(dp[m][0], V_HELD ? t.v[m][c] : v, r[0], r[1]);
      mma_bf16(dp[m][1], V_HELD ? t.v[m][c] : v, r[2], r[3]);
    }
  }
  uint32_t weights[SQUARES][2][2], ds[SQUARES][2][2];
#pragma unroll
  for (int n = 0; n < 2; n++) {
    int from[SQUARES][2], pulls[SQUARES][2];  // as Bound, from the lane's first row on
    if (MASKED) {
      int row = slice * 16 + n * 8 + static_cast<int>(threadIdx.x % 4) * 2;
#pragma unroll
      for (int m = 0; m < SQUARES; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
          Bound bound = bounds[m * 16 + half * 8];
          from[m][half] = bound.sees - row;
          pulls[m][half] = bound.pulls - row;
        }
    }
    float2 lse = *reinterpret_cast<const float2*>(values + n * 4 * Shape::PAIR);
#pragma unroll
    for (int m = 0; m < SQUARES; m++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        float weight = exp2_fast(fmaf(s[m][n][i], scale_log2, i % 2 ? -lse.y : -lse.x));
        if (MASKED) weight = from[m][i / 2] <= i % 2 ? weight : 0.f;
        float pull = weight * dp[m][n][i];
        if (MASKED) pull = pulls[m][i / 2] <= i % 2 ? pull : 0.f;
        s[m][n][i] = weight;
        dp[m][n][i] = pull;
      }
  }
#pragma unroll
  for (int m = 0; m < SQUARES; m++) {
    right_operands(weights[m], s[m][0], s[m][1]);
    right_operands(ds[m], dp[m][0], dp[m][1]);
  }
#pragma unroll
  for (int c = 0; c < DIM / 16; c++) {
    uint32_t r[4];
    ldmatrix_x4_trans(r, grad + f.of(slice, c));
#pragma unroll
    for (int m = 0; m < SQUARES; m++) {
      mma_bf16(t.dv[m][c][0], r, weights[m][0][0], weights[m][0][1]);
      mma_bf16(t.dv[m][c][1], r, weights[m][1][0], weights[m][1][1]);
    }
    ldmatrix_x4_trans(r, q + f.of(slice, c));
#pragma unroll
    for (int m = 0; m < SQUARES; m++) {
      mma_bf16(t.dk[m][c][0], r, ds[m][0][0], ds[m][0][1]);
      mma_bf16(t.dk[m][c][1], r, ds[m][1][0], ds[m][1][1]);
    }
  }
}

template <int DIM, int WARPS, int SQUARES, bool V_HELD, int BLOCKS>
__global__ void __launch_bounds__(WARPS * 32, BLOCKS) attention_backward_keys(KeysArguments a) {
  using Shape = KeysShape<DIM, WARPS, SQUARES>;
  SIMT_SHARED(unsigned char, shared);
  const RowsLoader<DIM, Shape> loader{a, shared};
  KeysWork& work = *reinterpret_cast<KeysWork*>(shared + Shape::WORK);
  KeysSpan* spans = work.spans;
  const int key_of_warp = static_cast<int>(threadIdx.x / 32) * SQUARES * 16;
  const Fragments<DIM> f = squares<DIM>();

  KeysTile<DIM, SQUARES> t = {};
  {
    if (threadIdx.x == 0) {
      const int* tile = a.tiles + static_cast<int64_t>(blockIdx.x / a.group.kv_heads) * 5;
      work.key0 = tile[0] * Shape::KEYS;
      work.segment0 = tile[1];
      work.segment1 = tile[2];
      work.run0 = tile[3];
      work.run1 = tile[4];
      find_span<Shape>(spans[0], a, work, 0);
      find_span<Shape>(spans[1], a, work, spans[0].next);
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
    const KeysSpan& first = spans[0];
    if (first.begin < first.end) {
      loader.begin(first, first.begin);
      loader.template copy<false>(shared + Shape::FIRST, rows_of<Shape>(first, first.begin, a.group.log_pack));
    } else {
      cp_async_commit();
    }
    cp_async_wait<1>();
    __syncthreads();
    const Fragments<DIM> left = Fragments<DIM>::left(key_of_warp);
#pragma unroll
    for (int m = 0; m < SQUARES; m++)
#pragma unroll
      for (int c = 0; c < DIM / 16; c++) {
        ldmatrix_x4(t.k[m][c], shared + Shape::K + left.of(m, c));
        ldmatrix_x4(t.v[m][c], shared + Shape::V + left.of(m, c));
      }
    if (!V_HELD) {
      __syncthreads();
#pragma unroll
      for (int m = 0; m < SQUARES; m++)
#pragma unroll
        for (int c = 0; c < DIM / 16; c++) store16(shared + Shape::part(m, c), t.v[m][c]);
    }
  }

  int stage = Shape::FIRST;
  bool more = spans[0].begin < spans[0].end;
  KeysBlock& place = loader.block();
  place = {0, spans[0].begin};
  while (more) {
    const int rest = spans[place.span].whole - 1 - place.block;
    if (place.block >= spans[place.span].masked_end && rest > 0) {  // blocks that see all keys, if the next one is whole
      place.block += rest;
#pragma unroll 1
      for (int i = 0; i < rest; i++) {
        cp_async_wait<0>();
        __syncthreads();
        loader.template copy<true>(shared + Shape::other(stage), 0);
#pragma unroll
        for (int slice = 0; slice < Shape::ROWS / 16; slice++)
          add_rows<false, V_HELD, DIM, SQUARES, Shape>(t, shared, stage, f, slice, a.scale_log2, {});
        stage = Shape::other(stage);
      }
    }
    cp_async_wait<0>();
    __syncthreads();
    {
      const KeysBlock now = place, next = next_block(spans, now);
      const KeysSpan& n = spans[next.span];
      if (next.block < n.end) {
        if (next.span != now.span) loader.begin(n, next.block);
        loader.template copy<false>(shared + Shape::other(stage), rows_of<Shape>(n, next.block, a.group.log_pack));
        if (next.span != now.span && threadIdx.x == 0)
          find_span<Shape>(spans[(now.span + 2) % SPANS], a, work, n.next);
      }
      set_bounds<Shape, SQUARES>(first_bound<Shape, SQUARES>(shared), work.key0, spans[now.span], now.block,
                                 a.group.log_pack);
    }
#pragma unroll 1
    for (int slice = 0; slice < Shape::ROWS / 16; slice++)
      add_rows<true, V_HELD, DIM, SQUARES, Shape>(t, shared, stage, f, slice, a.scale_log2, first_bound<Shape, SQUARES>(shared));
    stage = Shape::other(stage);
    place = next_block(spans, place);
    more = place.block < spans[place.span].end;
  }

  if (!V_HELD) __syncthreads();
  // Now a warp's rows of the tiles of K and V are read by itself alone.
#pragma unroll
  for (int m = 0; m < SQUARES; m++) {
    put_rows<DIM>(shared + Shape::K, key_of_warp + 16 * m, t.dk[m], a.scale);
    put_rows<DIM>(shared + Shape::V, key_of_warp + 16 * m, t.dv[m], 1.f);
  }
  __syncwarp();
  const int key0 = work.key0, kv_head = static_cast<int>(blockIdx.x % a.group.kv_heads);
  for (int i = static_cast<int>(threadIdx.x % 32); i < SQUARES * 16 * Row<DIM>::CHUNKS; i += 32) {
    int row = key_of_warp + i / Row<DIM>::CHUNKS, chunk = i % Row<DIM>::CHUNKS;
    if (key0 + row >= a.group.tokens) break;
    int64_t at = (static_cast<int64_t>(key0 + row) * a.group.kv_heads + kv_head) * DIM + chunk * 8;
    *reinterpret_cast<uint4*>(a.dk + at) = *reinterpret_cast<uint4*>(shared + Shape::K + Row<DIM>::at(row, chunk));
    *reinterpret_cast<uint4*>(a.dv + at) = *reinterpret_cast<uint4*>(shared + Shape::V + Row<DIM>::at(row, chunk));
  }
}

template <int DIM, int WARPS, int SQUARES, bool V_HELD, int BLOCKS>
int launch_keys(const Heads& grad, const Heads& q, const Heads& k, const Heads& v, const void* lse, const void* delta,
                const void* segments, const void* tiles, const void* runs, int64_t num_tiles, int64_t tokens,
                int kv_heads, int chunks, int log_pack, double scale, void* dk, void* dv, void* stream) {
  using Shape = KeysShape<DIM, WARPS, SQUARES>;
  KeysArguments a{
      grad, q, k, v, static_cast<const float*>(lse), static_cast<const float*>(delta),
      static_cast<const int*>(segments), static_cast<const int*>(tiles), static_cast<const int*>(runs),
      static_cast<bf16*>(dk), static_cast<bf16*>(dv), group(tokens, kv_heads, chunks, log_pack, q, grad),
      static_cast<float>(scale), static_cast<float>(scale * LOG2E)};
  if (!fits(grad) || !fits(q) || !fits(k) || !fits(v) || !fits(a.group, num_tiles * kv_heads)) return BAD_ARGUMENT;
  return SIMT_LAUNCH((attention_backward_keys<DIM, WARPS, SQUARES, V_HELD, BLOCKS>),
                     dim3(static_cast<unsigned>(num_tiles * kv_heads)), dim3(Shape::THREADS), Shape::SHARED, stream, a);
}

}  // namespace attention
