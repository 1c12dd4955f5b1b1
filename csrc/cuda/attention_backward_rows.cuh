// attention, backward: dQ. A block owns a tile of query rows, in registers as left operands, and goes over the blocks
// of keys that they see, as forward does: S = Q K^T and dP = dO V^T, then dQ += dS K.
// Limit: FLOPs on the tensor cores; then the port of shared memory, from which every product takes its other operand.
#pragma once
#include "attention_backward.cuh"

namespace attention {

struct RowsArguments {
  Heads grad, q, k, v;
  const float *lse, *delta;      // of the workspace; delta negated
  const int *segments, *tiles;   // attention_tiles.query_tiles
  bf16* dq;
  Group group;
  float scale, scale_log2;
};

// Keys that the tile's rows meet in blocks, one stretch after the other.
struct RowsSpan {
  int begin, end;   // keys; as many as blocks take, if all rows see all of them and they are a block or more
  int row0, row1;   // the tokens that see those up to their own; row1 = 0: all rows see all keys
  int next;         // the index of the next span to look at
};

// In shared memory: registers are full.
struct RowsWork {
  QueryTile tile;
  RowsSpan spans[SPANS];
};

// SQUARES times 16 rows a warp.
template <int DIM, int WARPS, int SQUARES>
struct RowsShape {
  static constexpr int THREADS = WARPS * 32, ROWS = WARPS * SQUARES * 16, KEYS = 64, STAGES = 2;
  static constexpr int TILE = KEYS * Row<DIM>::BYTES, STAGE = 2 * TILE;  // K, V
  static constexpr int Q = 0, GRAD = ROWS * Row<DIM>::BYTES, FIRST = 2 * GRAD, PLACES = FIRST + STAGES * STAGE;
  static constexpr int WORK = PLACES + THREADS * 8;
  static constexpr int SHARED = WORK + static_cast<int>(sizeof(RowsWork));
};

// The first span that has keys, of index `index` on: whole blocks of the prefix, then of the only segment before the
// tile; the rest of each segment, then of the prefix. begin == end if there is none.
template <class Shape>
__device__ void find_span(RowsSpan& found, const RowsArguments& a, const QueryTile& tile, int index) {
  const int* segment = a.segments + static_cast<int64_t>(tile.segment0) * 4;
  int count = tile.segment1 - tile.segment0, prefix0 = segment[2], prefix1 = max(segment[3], prefix0);
  int prefix_whole = prefix0 + (prefix1 - prefix0) / Shape::KEYS * Shape::KEYS;
  int own_whole = count == 1 ? (tile.first - segment[0]) / Shape::KEYS * Shape::KEYS : 0;
  RowsSpan s = {};
  for (; count && index < count + 3; index++) {
    const int* own = segment + static_cast<int64_t>(index - 2) * 4;
    if (index == 0)
      s = {prefix0, prefix_whole, 0, 0, 0};
    else if (index == 1)
      s = {segment[0], segment[0] + own_whole, 0, 0, 0};
    else if (index == count + 2)
      s = {prefix_whole, prefix1, 0, 0, 0};
    else  // without a prefix the first row sees one key: its weight is 1 whatever q is
      s = {own[0] + own_whole, min(own[1], tile.last), own[0] + (prefix0 == prefix1), own[1], 0};
    if (s.begin < s.end) break;
    s.begin = s.end = 0;
  }
  s.next = index + 1;
  found = s;
}

// A block of keys, in shared memory for each thread: registers are full.
struct alignas(8) KeysPlace {
  int span, key;
};
// The one behind it; there is none if that is the end of its span.
__device__ __forceinline__ KeysPlace next_place(const RowsSpan* spans, const KeysPlace& now, int block) {
  if (now.key + block < spans[now.span].end) return {now.span, now.key + block};
  int span = (now.span + 1) % SPANS;
  return {span, spans[span].begin};
}

// Copies blocks of keys to stages, and goes on.
template <int DIM, class Shape>
struct KeysLoader {
  using Copy = RowsCopy<DIM, Shape::KEYS, Shape::THREADS>;
  const unsigned char *k, *v;
  __device__ __forceinline__ KeysLoader(const RowsArguments& a, int kv_head, int key)
      : k(Copy::from(a.k, key, kv_head, 0)), v(Copy::from(a.v, key, kv_head, 0)) {}
  template <bool WHOLE>
  __device__ __forceinline__ void copy(unsigned char* stage, const RowsArguments& a, int count) {
    Copy::template copy<WHOLE>(stage, k, COPY_ROWS * a.k.token, count);
    Copy::template copy<WHOLE>(stage + Shape::TILE, v, COPY_ROWS * a.v.token, count);
    cp_async_commit();
  }
};

// Of a warp: its rows, and their sums.
template <int DIM, int SQUARES>
struct RowsTile {
  uint32_t q[SQUARES][DIM / 16][4], grad[SQUARES][DIM / 16][4];
  float dq[SQUARES][DIM / 16][2][4];  // transposed
  float lse[SQUARES][2], delta[SQUARES][2];
};

// 16 keys of a block. sees, where it is MASKED: how many keys of the block a row sees.
template <bool MASKED, int DIM, int SQUARES, class Shape>
__device__ __forceinline__ void add_keys(RowsTile<DIM, SQUARES>& t, const unsigned char* stage, const Fragments<DIM>& f,
                                         int slice, float scale_log2, const int (&sees)[SQUARES][2]) {
  const unsigned char *k = stage, *v = stage + Shape::TILE;
  float s[SQUARES][2][4], dp[SQUARES][2][4];
#pragma unroll
  for (int m = 0; m < SQUARES; m++)
#pragma unroll
    for (int n = 0; n < 2; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        s[m][n][i] = 0;
        dp[m][n][i] = t.delta[m][i / 2];
      }
#pragma unroll
  for (int c = 0; c < DIM / 16; c++) {
    uint32_t r[4];
    ldmatrix_x4(r, k + f.of(slice, c));
#pragma unroll
    for (int m = 0; m < SQUARES; m++) {
      mma_bf16(s[m][0], t.q[m][c], r[0], r[1]);
      mma_bf16(s[m][1], t.q[m][c], r[2], r[3]);
    }
    ldmatrix_x4(r, v + f.of(slice, c));
#pragma unroll
    for (int m = 0; m < SQUARES; m++) {
      mma_bf16(dp[m][0], t.grad[m][c], r[0], r[1]);
      mma_bf16(dp[m][1], t.grad[m][c], r[2], r[3]);
    }
  }
  int first = slice * 16 + static_cast<int>(threadIdx.x % 4) * 2;
  uint32_t ds[SQUARES][2][2];
#pragma unroll
  for (int m = 0; m < SQUARES; m++) {
#pragma unroll
    for (int n = 0; n < 2; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        float weight = exp2_fast(fmaf(s[m][n][i], scale_log2, -t.lse[m][i / 2]));
        float pull = weight * dp[m][n][i];
        if (MASKED) pull = n * 8 + i % 2 < sees[m][i / 2] - first ? pull : 0.f;
        dp[m][n][i] = pull;
      }
    right_operands(ds[m], dp[m][0], dp[m][1]);
  }
#pragma unroll
  for (int c = 0; c < DIM / 16; c++) {
    uint32_t r[4];
    ldmatrix_x4_trans(r, k + f.of(slice, c));
#pragma unroll
    for (int m = 0; m < SQUARES; m++) {
      mma_bf16(t.dq[m][c][0], r, ds[m][0][0], ds[m][0][1]);
      mma_bf16(t.dq[m][c][1], r, ds[m][1][0], ds[m][1][1]);
    }
  }
}

template <int DIM, int WARPS, int SQUARES, int BLOCKS>
__global__ void __launch_bounds__(WARPS * 32, BLOCKS) attention_backward_rows(RowsArguments a) {
  using Shape = RowsShape<DIM, WARPS, SQUARES>;
  using Loader = KeysLoader<DIM, Shape>;
  SIMT_SHARED(unsigned char, shared);
  RowsWork& work = *reinterpret_cast<RowsWork*>(shared + Shape::WORK);
  RowsSpan* spans = work.spans;
  const int log_pack = a.group.log_pack;
  const int row_of_warp = static_cast<int>(threadIdx.x / 32) * SQUARES * 16;
  const Fragments<DIM> f = squares<DIM>();

  RowsTile<DIM, SQUARES> t = {};
  {
    const QueryTile tile = query_tile(a.tiles, static_cast<int>(blockIdx.x), a.group.kv_heads, {0, 0, a.group.chunks});
    if (tile.first >= tile.last) return;
    const int64_t chunk = static_cast<int64_t>(tile.kv_head) * a.group.chunks + tile.chunk;
    const int count = (tile.last - tile.first) << log_pack;
    if (threadIdx.x == 0) {
      work.tile = tile;
      find_span<Shape>(spans[0], a, tile, 0);
      find_span<Shape>(spans[1], a, tile, spans[0].next);
    }
    using Copy = RowsCopy<DIM, Shape::ROWS, Shape::THREADS>;
    const unsigned char* q = Copy::from(a.q, tile.first, chunk << log_pack, log_pack);
    const unsigned char* grad = Copy::from(a.grad, tile.first, chunk << log_pack, log_pack);
    Copy::template copy<false>(shared + Shape::Q, q, a.group.q_step, count);
    Copy::template copy<false>(shared + Shape::GRAD, grad, a.group.grad_step, count);
    cp_async_commit();
    __syncthreads();
    if (spans[0].begin < spans[0].end)
      Loader(a, tile.kv_head, spans[0].begin)
          .template copy<false>(shared + Shape::FIRST, a, spans[0].end - spans[0].begin);
    else
      cp_async_commit();
    const int64_t values = a.group.row(chunk, tile.first);
#pragma unroll
    for (int m = 0; m < SQUARES; m++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        int row = row_of_warp + m * 16 + half * 8 + static_cast<int>(threadIdx.x % 32) / 4;
        if (row < count) {
          t.lse[m][half] = a.lse[values + row];
          t.delta[m][half] = a.delta[values + row];
        }
      }
    cp_async_wait<1>();
    __syncthreads();
    const Fragments<DIM> left = Fragments<DIM>::left(row_of_warp);
#pragma unroll
    for (int m = 0; m < SQUARES; m++)
#pragma unroll
      for (int c = 0; c < DIM / 16; c++) {
        ldmatrix_x4(t.q[m][c], shared + Shape::Q + left.of(m, c));
        ldmatrix_x4(t.grad[m][c], shared + Shape::GRAD + left.of(m, c));
      }
  }

  int stage = Shape::FIRST, other = Shape::FIRST + Shape::STAGE;
  KeysPlace& place = reinterpret_cast<KeysPlace*>(shared + Shape::PLACES)[threadIdx.x];
  place = {0, spans[0].begin};
  bool more = spans[0].begin < spans[0].end;
  while (more) {
    const int rest = (spans[place.span].end - place.key) / Shape::KEYS - 1;
    if (spans[place.span].row1 == 0 && rest > 0) {  // blocks that all rows see, if the next one is such a block too
      Loader loader(a, work.tile.kv_head, place.key + Shape::KEYS);
      place.key += rest * Shape::KEYS;
      int left = rest;
#pragma unroll 1
      do {
        cp_async_wait<0>();
        __syncthreads();
        loader.template copy<true>(shared + other, a, 0);
#pragma unroll
        for (int slice = 0; slice < Shape::KEYS / 16; slice++)
          add_keys<false, DIM, SQUARES, Shape>(t, shared + stage, f, slice, a.scale_log2, {});
        int swap = stage;
        stage = other;
        other = swap;
      } while (--left);
    }
    cp_async_wait<0>();
    __syncthreads();
    const RowsSpan& s = spans[place.span];
    {
      const KeysPlace now = place, next = next_place(spans, now, Shape::KEYS);
      const RowsSpan& n = spans[next.span];
      if (next.key < n.end) {
        Loader(a, work.tile.kv_head, next.key).template copy<false>(shared + other, a, n.end - next.key);
        if (next.span != now.span && threadIdx.x == 0)
          find_span<Shape>(spans[(now.span + 2) % SPANS], a, work.tile, n.next);
      }
    }
    int sees[SQUARES][2];
#pragma unroll
    for (int m = 0; m < SQUARES; m++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        int row = row_of_warp + m * 16 + half * 8 + static_cast<int>(threadIdx.x % 32) / 4;
        int token = work.tile.first + (row >> log_pack), key = place.key;
        sees[m][half] = s.row1 == 0 ? s.end - key : token >= s.row0 && token < s.row1 ? token + 1 - key : 0;
      }
#pragma unroll 1
    for (int slice = 0; slice < Shape::KEYS / 16; slice++)
      add_keys<true, DIM, SQUARES, Shape>(t, shared + stage, f, slice, a.scale_log2, sees);
    int swap = stage;
    stage = other;
    other = swap;
    place = next_place(spans, place, Shape::KEYS);
    more = place.key < spans[place.span].end;
  }

  // A warp's rows of the tile of Q have been read by itself alone.
#pragma unroll
  for (int m = 0; m < SQUARES; m++) put_rows<DIM>(shared + Shape::Q, row_of_warp + 16 * m, t.dq[m], a.scale);
  __syncwarp();
  const QueryTile& tile = work.tile;
  const int64_t chunk = static_cast<int64_t>(tile.kv_head) * a.group.chunks + tile.chunk;
  const int count = (tile.last - tile.first) << log_pack;
  const int64_t heads = static_cast<int64_t>(a.group.kv_heads * a.group.chunks) << log_pack;
  for (int i = static_cast<int>(threadIdx.x % 32); i < SQUARES * 16 * Row<DIM>::CHUNKS; i += 32) {
    int row = row_of_warp + i / Row<DIM>::CHUNKS, part = i % Row<DIM>::CHUNKS;
    if (row >= count) break;
    int64_t head = (chunk << log_pack) + (row & ((1 << log_pack) - 1));
    int64_t at = ((tile.first + (row >> log_pack)) * heads + head) * DIM + part * 8;
    *reinterpret_cast<uint4*>(a.dq + at) = *reinterpret_cast<uint4*>(shared + Shape::Q + Row<DIM>::at(row, part));
  }
}

template <int DIM, int WARPS, int SQUARES, int BLOCKS>
int launch_rows(const Heads& grad, const Heads& q, const Heads& k, const Heads& v, const void* lse, const void* delta,
                const void* segments, const void* tiles, int64_t num_tiles, int64_t tokens, int kv_heads, int chunks,
                int log_pack, double scale, void* dq, void* stream) {
  using Shape = RowsShape<DIM, WARPS, SQUARES>;
  RowsArguments a{
      grad, q, k, v, static_cast<const float*>(lse), static_cast<const float*>(delta),
      static_cast<const int*>(segments), static_cast<const int*>(tiles), static_cast<bf16*>(dq),
      group(tokens, kv_heads, chunks, log_pack, q, grad), static_cast<float>(scale), static_cast<float>(scale * LOG2E)};
  int64_t programs = num_tiles * kv_heads * chunks;
  if (!fits(grad) || !fits(q) || !fits(k) || !fits(v) || !fits(a.group, programs)) return BAD_ARGUMENT;
  return SIMT_LAUNCH((attention_backward_rows<DIM, WARPS, SQUARES, BLOCKS>), dim3(static_cast<unsigned>(programs)),
                     dim3(Shape::THREADS), Shape::SHARED, stream, a);
}

}  // namespace attention
